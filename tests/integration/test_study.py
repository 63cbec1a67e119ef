"""``liquid study`` by its real command line: two arms, two seeds; killed, continued, shared between processes."""

import json
import os
import shutil
import signal
import threading
import time

import pytest
import torch
import yaml
from tests.support.forked import Forked
from tests.support.tiny import QUICK, build, files

from liquid_llm.cli.main import main
from liquid_llm.study.folder import StudyFolder
from liquid_llm.study.plan import Unit

pytestmark = pytest.mark.slow

ARMS = {"plain": {"kd_alpha_start": 0, "kd_alpha_end": 0}, "distilled": {"kd_alpha_start": 0.9, "kd_alpha_end": 0.8}}
UNITS = [Unit(arm, seed) for seed in (0, 1) for arm in ARMS]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Other processes have one too: sums come out the same."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """A configuration file: a store is captured first, then the arms train for eight steps."""
    tiny = build(tmp_path_factory.mktemp("tiny"), teacher_steps=100)
    stores = {
        "math_logits_dir": str(tiny.root / "signal" / "math"),
        "code_logits_dir": str(tiny.root / "signal" / "code"),
    }
    values = {
        "student": str(tiny.student),
        "lm_teacher_id": str(tiny.teacher),
        "mc_teacher_id": str(tiny.teacher),
        "dataset_manifest": str(tiny.manifest),
        "data_cache": str(tiny.root / "tokens"),
        **stores,
        "block_size": 64,
        "batch_size": 2,
        "max_steps": 8,
        "warmup_steps": 2,
        "lr": 1e-2,
        "eval_every": 4,
        "eval_tokens": 512,
        "save_every": 2,
        "metrics_interval": 2,
        "val_fraction": 0.2,
        "trackers": "none",
        "seeds": [0, 1],
        "arms": [{"name": name, **options} for name, options in ARMS.items()],
        "captures": [{**stores, "seq_len": 64, **QUICK}],
    }
    path = tmp_path_factory.mktemp("asked") / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def words(asked, folder, *more):
    return ["study", f"--config={asked}", f"--study_dir={folder}", "--at=tokens", *more]


@pytest.fixture(scope="module")
def finished(asked, tmp_path_factory):
    folder = tmp_path_factory.mktemp("study") / "one"
    assert main(words(asked, folder)) == 0
    return folder


def weights(folder, unit):
    return torch.load(StudyFolder(folder).run_dir(unit) / "final.pt", weights_only=True)["student"]


def assert_same(folder, finished):
    for unit in UNITS:
        ours, theirs = weights(folder, unit), weights(finished, unit)
        assert all(torch.equal(value, theirs[name]) for name, value in ours.items()), unit.title
    ours, theirs = (json.loads((one / "study.json").read_text()) for one in (folder, finished))
    assert ours["verdicts"] == theirs["verdicts"]


def begin(asked, folder):
    """The same command as a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return Forked(["-m", "liquid_llm", *words(asked, folder)], env=environment, stdout=False)


def wait_for(folder, pattern):
    until = time.monotonic() + 120
    while not files(folder, pattern):
        assert time.monotonic() < until, f"{pattern} does not come"
        time.sleep(0.02)


def test_each_arm_is_judged_against_the_first(finished):
    result = json.loads((finished / "study.json").read_text())
    assert [arm["name"] for arm in result["arms"]] == ["plain", "distilled"]
    assert {(run["arm"], run["seed"], run["steps"]) for run in result["runs"]} == {(u.arm, u.seed, 8) for u in UNITS}
    assert {(one["measure"], one["type"]) for one in result["verdicts"]} >= {
        (measure, type) for measure in ("ce", "kl", "agreement") for type in ("all", "lm", "math_tool", "code")
    }
    assert all(one["num_seeds"] == 2 and one["low"] <= one["difference"] <= one["high"] for one in result["verdicts"])
    kl = next(one for one in result["verdicts"] if (one["measure"], one["type"]) == ("kl", "all"))
    assert kl["difference"] < 0, "what is distilled comes nearer to the teacher"
    assert (finished / "study.html").stat().st_size > 10_000


def test_the_capture_is_part_of_it_and_its_cost_is_borne_by_who_reads_it(finished):
    [capture] = json.loads((finished / "captures.json").read_text())
    assert capture["complete"]
    assert capture["written"] == 80
    shares = {arm["name"]: arm["capture_seconds"] for arm in json.loads((finished / "study.json").read_text())["arms"]}
    assert shares == {"plain": 0.0, "distilled": capture["seconds"]}
    rows = [json.loads(line) for line in (finished / "runs/plain/seed-0/metrics.jsonl").read_text().splitlines()]
    assert all(row["kd"] is None and not row["kd_coverage"] for row in rows if row["kind"] == "train")


def test_seeds_change_a_run_and_arms_begin_alike(finished):
    first = {
        unit: json.loads((StudyFolder(finished).run_dir(unit) / "metrics.jsonl").read_text().splitlines()[0])
        for unit in UNITS
    }
    losses = {(unit.arm, unit.seed): row["val_loss_student"] for unit, row in first.items()}
    assert losses["plain", 0] == losses["distilled", 0]
    assert losses["plain", 0] != losses["plain", 1]


def test_running_it_again_trains_nothing_and_report_shows_it(asked, finished, capsys, caplog):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*.pt")}
    assert len(before) == len(UNITS), "snapshots of finished runs are gone"
    with caplog.at_level("INFO"):
        assert main(words(asked, finished)) == 0
    assert "study: " not in caplog.text
    shown = capsys.readouterr().out
    (finished / "study.html").unlink()
    assert main(["report", str(finished)]) == 0
    assert capsys.readouterr().out == shown
    assert main(["study", str(finished)]) == 0
    assert (finished / "study.html").exists()
    assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("*.pt")}


def test_stopped_by_a_signal_it_ends_with_75_and_goes_on(asked, finished, tmp_path, capsys, caplog):
    folder = tmp_path / "study"
    stop = threading.Thread(
        target=lambda: (wait_for(folder, "runs/distilled/seed-0/step-*.pt"), os.kill(os.getpid(), signal.SIGTERM))
    )
    stop.start()
    assert main(words(asked, folder)) == 75
    stop.join()
    assert "the study was stopped in distilled, seed 0: stopped at step" in capsys.readouterr().err
    caplog.clear()
    with caplog.at_level("INFO"):
        assert main(words(asked, folder)) == 0
    assert "study: plain, seed 0" not in caplog.text, "a finished run is not run again"
    assert "this run goes on from step" in caplog.text
    assert_same(folder, finished)


def test_a_signal_that_comes_while_a_run_gets_ready_is_heard_at_its_first_step(asked, tmp_path, capsys, monkeypatch):
    from liquid_llm.jobs import train

    def build(*given):
        os.kill(os.getpid(), signal.SIGTERM)
        return build_basis(*given)

    build_basis = train.build_basis
    monkeypatch.setattr(train, "build_basis", build)
    assert main(words(asked, tmp_path / "study")) == 75
    assert "the study was stopped in plain, seed 0: stopped at step 1 of 8" in capsys.readouterr().err


def test_killed_at_once_it_goes_on(asked, finished, tmp_path):
    folder = tmp_path / "study"
    process = begin(asked, folder)
    wait_for(folder, "runs/plain/seed-0/step-*.pt")
    process.kill()
    process.communicate()
    assert main(words(asked, folder, "--processes=2")) == 0
    assert_same(folder, finished)


def test_two_processes_share_the_runs(asked, finished, tmp_path, caplog):
    folder = tmp_path / "study"
    process = begin(asked, folder)
    wait_for(folder, "runs/plain/seed-0/step-*.pt")
    with caplog.at_level("INFO"):
        assert main(words(asked, folder)) == 0
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    for unit in UNITS:
        assert (f"study: {unit.title}" in said) + (f"study: {unit.title}" in caplog.text) == 1, unit.title
    assert "study: distilled, seed 0" in caplog.text, "the first run was taken: the next one is run meanwhile"
    assert_same(folder, finished)


def test_seeds_and_arms_are_added_and_what_contradicts_is_refused(asked, finished, tmp_path, capsys, caplog):
    folder = tmp_path / "study"
    shutil.copytree(finished, folder)  # the other tests' has its own arms, whichever comes first
    values = yaml.safe_load(asked.read_text())
    more = tmp_path / "more.yaml"
    more.write_text(yaml.safe_dump({**values, "arms": [*values["arms"], {"name": "cold", "kd_temperature": 1.5}]}))
    with caplog.at_level("INFO"):
        assert main(words(more, folder)) == 0
    assert [line for line in caplog.messages if line.startswith("study: ")] == [
        *("study: cold, seed 0", "study: cold, seed 1", "study: evaluate 2 students"),
    ]
    assert {arm["name"] for arm in json.loads((folder / "study.json").read_text())["arms"]} == {*ARMS, "cold"}
    changed = tmp_path / "changed.yaml"
    changed.write_text(yaml.safe_dump({**values, "lr": 1}))
    assert main(words(changed, folder)) == 2
    assert "arm 'plain': lr was 0.01, and now it is 1.0" in capsys.readouterr().err


def test_what_an_arm_cannot_be_is_said_before_anything_runs(asked, tmp_path, capsys, caplog):
    folder = tmp_path / "study"
    values = yaml.safe_load(asked.read_text())
    for arms, message in (
        ([{"name": "a"}, {"name": "b", "kd_alpha_start": 2}], "arm 'b': 1 problem in the options"),
        ([{"name": "a"}, {"name": "b", "kd_temperature": 1}], "arms 'a' and 'b' are the same training"),
    ):
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump({**values, "arms": arms}))
        assert main(words(path, folder)) == 2
        assert message in capsys.readouterr().err
    path.write_text(yaml.safe_dump({**values, "val_fraction": 0}))
    assert main(words(path, folder)) == 2
    assert "nothing is held out, so students could not be judged" in capsys.readouterr().err
    assert not (folder / "plan.json").exists()
    assert not (folder / "runs").exists()


def times(folder):
    return {path: path.is_file() and path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_a_dry_run_says_what_would_be_run_and_keeps_nothing(asked, tmp_path, capsys):
    """The arm without a store is tried; the other's is captured first, and nothing is made up about it."""
    folder = tmp_path / "study"
    assert main(words(asked, folder, "--dry_run", "--at=tokens,seconds")) == 0
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    assert list(tmp_path.iterdir()) == []
    plain, distilled = found["arms"]
    assert (plain["steps"], plain["seeds"], plain["done"], plain["from"]) == (8, [0, 1], 0, "two steps tried now")
    assert plain["run_seconds"] > 8 * plain["step_seconds"] > 0, "evaluations and saves are in it"
    assert found["seconds"] == pytest.approx(2 * plain["run_seconds"])
    assert distilled["step_seconds"] is distilled["run_seconds"] is None
    assert found["at_seconds_unknown"] == ["distilled"]
    assert [one["state"] for one in found["captures"]] == ["never run"]
    assert found["without"][:2] == ["2 runs whose store is captured first", "1 captures"]
    stores = yaml.safe_load(asked.read_text())
    assert found["shared"]["stores"] == {stores[name]: ["distilled"] for name in ("math_logits_dir", "code_logits_dir")}
    for word in ("arm            distilled: 8 steps", "unknown: its store is captured first", "not counted: 2 runs"):
        assert word in shown.err


def test_a_dry_run_of_a_begun_study_counts_what_is_done_and_takes_its_pace(asked, finished, capsys):
    before = times(finished)
    assert main(words(asked, finished, "--dry_run")) == 0
    shown = capsys.readouterr()
    assert "no run is left" in shown.err
    assert all(one["done"] for one in json.loads(shown.out)["units"])
    assert main(words(asked, finished, "--dry_run", "--seeds=0,1,2")) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(one["arm"], one["seed"]) for one in found["units"] if not one["done"]] == [("plain", 2), ("distilled", 2)]
    pace = {arm["name"]: arm["seconds_per_step"] for arm in json.loads((finished / "study.json").read_text())["arms"]}
    assert {arm["name"]: (arm["step_seconds"], arm["from"]) for arm in found["arms"]} == {
        name: (pace[name], "finished runs")
        for name in ARMS  # another test may have added one to the folder
    }
    assert found["seconds"] == pytest.approx(sum(arm["run_seconds"] for arm in found["arms"]))
    assert found["captures"][0]["state"] == "complete"
    assert times(finished) == before


@pytest.mark.parametrize(
    ("changed", "code", "message"),
    [
        ({"lr": 1}, 2, "arm 'plain': lr was 0.01, and now it is 1.0"),
        ({"captures": {"mc_teacher_id": "/nowhere"}}, 2, "no such model; got '/nowhere'"),
        ({"evaluation": {"answers": 3}}, 2, "no held-out text has an answer that can be marked"),
        ({"arms": [{"name": "plain", **ARMS["plain"]}, {"name": "large", "eval_ctx_lens": "512"}]}, 2, "at most 256"),
    ],
)
def test_a_dry_run_refuses_what_a_run_would(asked, finished, tmp_path, capsys, changed, code, message):
    path, before = tmp_path / "run.yaml", times(finished)
    values = yaml.safe_load(asked.read_text())
    if "captures" in changed:
        changed = {"captures": [{**values["captures"][0], **changed["captures"]}]}
    path.write_text(yaml.safe_dump({**values, **changed}))
    assert main(words(path, finished, "--dry_run", "--seeds=5")) == code
    shown = capsys.readouterr()
    assert message in shown.err
    assert shown.out == ""
    assert times(finished) == before


@pytest.mark.parametrize(
    ("changed", "code", "message"),
    [
        ({"evaluation": {"answers": 3}}, 2, "no held-out text has an answer that can be marked"),
        ({"val_fraction": 1e-9}, 3, "no text is held out, so there is nothing to evaluate on"),
        ({"evaluation": {"records": "nowhere.jsonl"}}, 3, "nowhere.jsonl"),
    ],
)
def test_an_evaluation_that_cannot_be_made_is_refused_before_anything_runs(
    asked, tmp_path, capsys, changed, code, message
):
    path, folder = tmp_path / "run.yaml", tmp_path / "study"
    path.write_text(yaml.safe_dump({**yaml.safe_load(asked.read_text()), **changed}))
    assert main(words(path, folder)) == code
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said
    assert not (folder / "runs").exists()
    assert not (folder / "captures.json").exists()


def test_answers_in_records_of_the_evaluation_s_own_can_be_marked_and_more_of_them_later(asked, tmp_path, caplog):
    """What is asked of the held-out text is asked of the text that the evaluation names; what is measured stays."""
    records, path = tmp_path / "held.jsonl", tmp_path / "run.yaml"
    rows = [{"prompt": f"{n} and {n} are", "completion": f"so many: #### {2 * n}"} for n in range(6)]
    records.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {**yaml.safe_load(asked.read_text()), "max_steps": 1, "seeds": [0], "eval_every": 0}
    folder, unit = tmp_path / "study", Unit("plain", 0)

    def ask(answers):
        evaluation = {"records": f"lm={records}", "answers": answers, "answer_tokens": 4}
        path.write_text(yaml.safe_dump({**values, "evaluation": evaluation}))
        caplog.clear()
        with caplog.at_level("INFO"):
            assert main(words(path, folder)) == 0
        said = [one for one in caplog.messages if one.startswith("study: ") and "students" in one]
        return StudyFolder(folder).evaluation(unit), said

    found, _ = ask(3)
    assert len(found["answers"]) == found["measures"]["answers"]["all"]["total"] == 3
    more, said = ask(5)
    assert said == ["study: hear the answers of 2 students"]
    assert len(more["answers"]) == more["measures"]["answers"]["all"]["total"] == 5
    assert (more["texts"], more["measures"]["all"]) == (found["texts"], found["measures"]["all"])
    none, said = ask(0)
    assert (none["answers"], "answers" in none["measures"], len(said)) == ([], False, 1)
    assert ask(0) == (none, []), "nothing is left to do"


def test_an_arm_without_kd_at_first_alone_is_pointed_at(asked, tmp_path, caplog):
    values = yaml.safe_load(asked.read_text())
    values |= {"arms": [{"name": "nearly plain", "kd_alpha_start": 0}, {"name": "b", "kd_alpha_start": 0.9}]}
    path, folder = tmp_path / "run.yaml", tmp_path / "study"
    path.write_text(yaml.safe_dump({**values, "max_steps": 1, "seeds": [0], "eval_every": 0}))
    assert main(words(path, folder, "--at=tokens,seconds")) == 0
    remark = "nearly plain: --kd_alpha_start=0 alone: the KD weight rises to 0.4"
    assert remark in caplog.text
    result = json.loads((folder / "study.json").read_text())
    assert any(one.startswith(remark) for one in result["remarks"])
    assert not any(one.startswith("b: --kd_alpha") for one in result["remarks"])
    assert {one["at"] for one in result["verdicts"]} == {"tokens", "seconds"}
    assert all("one seed: the interval holds texts only" in one["sentence"] for one in result["verdicts"])
