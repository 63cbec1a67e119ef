"""The main job by its real command lines on small real models: capture, hybrid training, what a run leaves behind."""

import json
import weakref

import pytest
from tests.support import forked
from tests.support.servers import LIBRARIES
from tests.support.tiny import Tiny, build, run

from liquid_llm.cli.main import main
from liquid_llm.metrics import read_metrics
from liquid_llm.training import Trainer
from liquid_llm.wiring import parts

pytestmark = pytest.mark.slow


LONGER = {"max_steps": 60, "eval_every": 30, "kd_alpha_start": 0.9, "kd_alpha_end": 0.8}


@pytest.fixture(scope="module")
def captured(tmp_path_factory) -> Tiny:
    tiny = build(tmp_path_factory.mktemp("tiny"), teacher_steps=150)
    assert main(["capture", *tiny.capture_words()]) == 0
    return tiny


@pytest.fixture(scope="module")
def finished(captured, tmp_path_factory):
    output = tmp_path_factory.mktemp("output")
    assert main(["train", *captured.train_words(output, **LONGER)]) == 0
    return output / "run"


def evaluations(run_dir):
    return [row for row in read_metrics(run_dir) if row["kind"] == "eval"]


def test_kl_to_the_teacher_falls_for_every_type(finished):
    before, after = evaluations(finished)[0], evaluations(finished)[-1]
    assert set(before["by_type"]) == {"lm", "math_tool", "code"}
    for kind, row in before["by_type"].items():
        assert after["by_type"][kind]["val_kd"] < 0.7 * row["val_kd"], kind


def test_without_the_kd_term_the_student_does_not_come_near_the_teacher(captured, tmp_path):
    # The control of the test above: what passes it cannot be cross-entropy alone.
    muted = {**LONGER, "kd_alpha_start": 0.0, "kd_alpha_end": 0.0, "eval_teacher": True}
    assert main(["train", *captured.train_words(tmp_path, **muted)]) == 0
    before, after = evaluations(tmp_path / "run")[0], evaluations(tmp_path / "run")[-1]
    for kind, row in before["by_type"].items():
        assert after["by_type"][kind]["val_kd"] > 0.7 * row["val_kd"], kind


def test_every_type_trains_with_its_signal(finished):
    rows = [row for row in read_metrics(finished) if row["kind"] == "train"]
    for kind in ("lm", "math_tool", "code"):
        seen = [row["by_type"][kind] for row in rows if kind in row["by_type"]]
        assert seen, kind
        assert all(row["kd"] is not None and row["tokens"] > 0 for row in seen), kind
    assert all(row["kd_coverage"] == 1.0 for row in rows)


def test_the_schedules_are_in_the_rows(finished):
    rows = {row["step"]: row for row in read_metrics(finished) if row["kind"] == "train"}
    assert rows[1]["kd_alpha"] == pytest.approx(0.9)
    assert rows[10]["kd_alpha"] == pytest.approx(0.9 - 0.1 * 9 / 18)
    assert rows[60]["kd_alpha"] == pytest.approx(0.8)
    assert {row["kd_temperature"] for row in rows.values()} == {1.0}
    assert rows[4]["lr"] == pytest.approx(1e-2)
    assert rows[60]["lr"] < 2e-3


def test_the_run_directory_is_complete(finished):
    names = {path.name for path in finished.iterdir()}
    for name in ("best", "last", "final", "step-00000060"):
        assert {f"{name}.pt", f"{name}.meta.json"} <= names
    assert {"metrics.jsonl", "student", "tb", "provenance", "report.html"} <= names
    provenance = {path.name for path in (finished / "provenance").iterdir()}
    assert provenance == {
        "config.json",
        "manifest_snapshot.jsonl",
        "data_readiness.json",
        "datasets_snapshot.yaml",
        "environment.json",
        "history.json",
        "options.yaml",
        "tokenizer",
    }
    environment = json.loads((finished / "provenance" / "environment.json").read_text())
    assert environment["choices"]["student_dtype"]["reason"]


def test_the_student_opens_in_a_fresh_process_and_generates(finished):
    code = (
        "import sys; from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "t = AutoTokenizer.from_pretrained(sys.argv[1]); m = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "i = t('Question: Ada', return_tensors='pt', add_special_tokens=False)\n"
        "print(m.generate(**i, max_new_tokens=8, do_sample=False, pad_token_id=0).shape[1] > i['input_ids'].shape[1])\n"
    )
    done = forked.run(["-c", code, str(finished / "student")], server=LIBRARIES)
    assert done.stdout.strip() == "True", done.stderr


def test_running_a_finished_run_again_says_so_and_changes_nothing(captured, finished, caplog):
    before = {path.name: path.stat().st_mtime_ns for path in finished.glob("*.pt")}
    with caplog.at_level("INFO"):
        assert main(["train", *captured.train_words(finished.parent, **LONGER)]) == 0
    assert "nothing to do" in caplog.text
    assert before == {path.name: path.stat().st_mtime_ns for path in finished.glob("*.pt")}


def test_a_finished_run_says_what_it_came_to_and_a_call_more_says_it_again(captured, finished, capsys):
    kept = json.loads((finished / "summary.json").read_text())
    assert [row["type"] for row in kept["rows"]] == ["all", "lm", "math_tool", "code"]
    assert main(["train", *captured.train_words(finished.parent, **LONGER)]) == 0
    said = capsys.readouterr().out
    for row in kept["rows"]:
        assert f"{row['before']:.3f}" in said
        assert f"{row['after']:.3f}" in said
    assert kept["sentences"][0] in said
    assert f"liquid evaluate {finished}" in said


def test_inspect_and_report_read_what_a_run_left(finished, capsys):
    assert main(["inspect", "--json", str(finished)]) == 0
    described = json.loads(capsys.readouterr().out)
    assert described["kind"] == "run"
    assert described["checkpoints"]["final"]["step"] == 60
    (finished / "report.html").unlink()
    assert main(["report", str(finished)]) == 0
    assert (finished / "report.html").exists()


def test_inspect_reads_stores_checkpoints_and_manifests(captured, finished, capsys):
    kinds = {}
    for path in (captured.root / "signal" / "math", finished / "best.pt", captured.manifest):
        assert main(["inspect", "--json", str(path)]) == 0
        kinds[path.name] = json.loads(capsys.readouterr().out)["kind"]
    assert kinds == {"math": "store", "best.pt": "checkpoint", "manifest.jsonl": "manifest"}


def test_capture_skips_what_is_complete_and_says_so_in_one_line(captured):
    done = run("stage1_hybrid.precompute_hybrid_logits", captured.capture_words())
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["written"] == 0
    assert summary["skipped"] == 80
    assert summary["failed"] == 0


def test_without_hybrid_one_online_teacher_scores_every_type(captured, tmp_path):
    words = captured.train_words(
        tmp_path, hybrid="false", math_logits_dir=None, code_logits_dir=None, mc_teacher_id=None, max_steps=6
    )
    assert main(["train", *words]) == 0
    rows = [row for row in read_metrics(tmp_path / "run") if row["kind"] == "train"]
    assert all(row["kd_coverage"] == 1.0 for row in rows)
    provenance = json.loads((tmp_path / "run" / "provenance" / "environment.json").read_text())
    assert provenance["teachers"]["online"]["types"] == ["lm", "math_tool", "code"]


def test_precomputed_mode_scores_maths_and_code_from_the_store_and_text_by_cross_entropy(captured, tmp_path):
    words = captured.train_words(tmp_path, hybrid="false", teacher_mode="precomputed", lm_teacher_id=None, max_steps=8)
    assert main(["train", *words]) == 0
    rows = [row for row in read_metrics(tmp_path / "run") if row["kind"] == "train"]
    kinds = {kind: row["by_type"][kind]["kd_coverage"] for row in rows for kind in row["by_type"]}
    assert kinds == {"lm": 0.0, "math_tool": 1.0, "code": 1.0}


def test_staying_near_the_old_logits_is_zero_at_first_and_ends_at_its_step(captured, finished, tmp_path):
    words = captured.train_words(
        tmp_path,
        resume_gcs_uri=finished / "student",
        keep_old_logit_l2=0.5,
        keep_old_logit_l2_fade_step=4,
        max_steps=6,
        eval_every=0,
    )
    assert main(["train", *words]) == 0
    rows = {row["step"]: row for row in read_metrics(tmp_path / "run") if row["kind"] == "train"}
    assert rows[1]["l2"] == 0.0
    assert all(rows[step]["l2"] > 0 for step in (2, 3, 4))
    assert rows[5]["l2"] == rows[6]["l2"] == 0.0
    assert [rows[step]["l2_gamma"] for step in (1, 2, 3, 4, 5)] == pytest.approx([0.5, 0.375, 0.25, 0.125, 0.0])


def test_the_reference_student_is_freed_when_its_weight_has_faded(captured, finished, tmp_path, monkeypatch):
    references, alive = [], {}
    make, step = parts._reference, Trainer.step

    def spied_make(*arguments):
        reference = make(*arguments)
        references.append(weakref.ref(reference))
        return reference

    def spied_step(trainer):
        result = step(trainer)
        alive[result.step] = references[0]() is not None
        return result

    monkeypatch.setattr(parts, "_reference", spied_make)
    monkeypatch.setattr(Trainer, "step", spied_step)
    fading = {"keep_old_logit_l2": 0.5, "keep_old_logit_l2_fade_step": 3, "max_steps": 5, "eval_every": 0}
    words = captured.train_words(tmp_path, resume_gcs_uri=finished / "student", **fading)
    assert main(["train", *words]) == 0
    assert alive == {1: True, 2: True, 3: True, 4: False, 5: False}


def test_a_dry_run_looks_at_everything_and_keeps_the_cache_of_tokens_alone(captured, tmp_path, capsys):
    before = sorted(path for path in captured.root.rglob("*"))
    words = captured.train_words(tmp_path / "not-there-yet", data_cache=tmp_path / "tokens")
    assert main(["train", *words, "--dry_run"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert sorted(path for path in captured.root.rglob("*")) == before
    assert [path.name for path in tmp_path.iterdir()] == ["tokens"]
    assert {path.name.split("-")[0] for path in (tmp_path / "tokens").iterdir()} >= {"lm", "math_tool", "code"}
    assert {kind: row["coverage"] for kind, row in found["signal"].items()} == {"math_tool": 1.0, "code": 1.0}
    assert found["data"]["lm"]["train_tokens"] > 1000
    assert found["one_step"]["loss"] > 0
    assert found["schedules"][0]["kd_alpha"] == pytest.approx(0.7)
    assert found["estimate"]["parameters"] > 10_000


def test_a_dry_run_finds_the_missing_the_stale_and_the_corrupt(captured, tmp_path, capsys):
    store = tmp_path / "math"
    folders = {"math_logits_dir": store, "code_logits_dir": tmp_path / "code"}
    assert main(["capture", *captured.capture_words(**folders, logits_format="pt")]) == 0
    capsys.readouterr()
    missing, corrupt = sorted(store.glob("*.pt"))[:2]
    missing.unlink()
    corrupt.write_bytes(corrupt.read_bytes()[:-200])
    assert main(["train", *captured.train_words(tmp_path, math_logits_dir=store), "--dry_run"]) == 0
    row = json.loads(capsys.readouterr().out)["signal"]["math_tool"]
    assert (row["missing"], row["corrupt"], row["usable"]) == (1, 1, 38)
    assert set(row["examples"]) == {"missing", "corrupt"}
