"""What the job of a study decides by itself: what its files keep, and whose held-out text students are judged on."""

import json
import os
import signal
import time
from types import SimpleNamespace

import pytest

from liquid_llm.capture.job import CaptureSummary
from liquid_llm.errors import Interrupted, UsageError
from liquid_llm.jobs import study as job
from liquid_llm.runtime import StopSignal
from liquid_llm.study.folder import StudyFolder
from liquid_llm.study.plan import Arm, Study, Unit

SECRET = "hunter2hunter2"


def test_no_secret_of_an_option_reaches_a_file_of_the_study(tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_PASSWORD", "correct-horse-battery")
    options = {"dataset_manifest": f"https://me:{SECRET}@host/m.jsonl", "lm_teacher_id": "org/correct-horse-battery"}
    arms = [Arm("a", {}), Arm("b", {"data_cache": f"https://me:{SECRET}@host/cache", "lr": 0.5})]
    study, place = Study("train", arms, [0], {**options, "mc_teacher_id": "org/t"}), StudyFolder(tmp_path)
    place.add_to_plan(job._describe(study, place))
    place.add_to_plan(job._describe(study, place))  # what is kept is compared with what is asked
    kept = (tmp_path / "plan.json").read_text()
    assert SECRET not in kept
    assert "correct-horse" not in kept
    assert "https://***@host/m.jsonl" in kept


def test_arms_that_differ_in_a_secret_alone_are_two(tmp_path):
    urls = [f"https://me:{word}@host/m.jsonl" for word in ("onepassword", "otherpassword")]
    arms = [Arm(name, {"dataset_manifest": url}) for name, url in zip("ab", urls, strict=True)]
    study, place = Study("train", arms, [0], {"mc_teacher_id": "org/t"}), StudyFolder(tmp_path)
    assert len(job._describe(study, place)["arms"]) == 2


PLAIN = {"kd_alpha_start": 0, "kd_alpha_end": 0}
HYBRID = {"dataset_manifest": "m.jsonl", "lm_teacher_id": "org/t", "mc_teacher_id": "org/t", "math_logits_dir": "S"}
TYPES = {"sources": {"lm": {"alpha": 0.0}, "math_tool": {"alpha": 0.0}}}


def described(tmp_path, face, shared, *arms):
    study = Study(face, [Arm(name, one) for name, one in zip("abc", arms, strict=False)], [0], shared)
    return job._describe(study, StudyFolder(tmp_path))


@pytest.mark.parametrize(
    ("face", "shared", "arms", "names"),
    [
        ("train", HYBRID | PLAIN, [{}, {"kd_temperature": 4.0}], "kd_temperature"),
        ("train", HYBRID | PLAIN, [{"divergence": "reverse_kl", "kd_positions": 0.5}, {}], "divergence, kd_positions"),
        ("train", HYBRID | TYPES, [{"kd_alpha_end": 0.1}, {"kd_temperature": 4.0}], "kd_temperature, kd_alpha_end"),
        ("train", HYBRID | PLAIN, [{}, {"sources": {"lm": {"temperature": 2.0}}}], "teachers"),
        ("train", HYBRID | {"kd_alpha_end": 0.7}, [{}, {"kd_anneal_pct": 0.9}], "kd_anneal_pct"),
        ("train", HYBRID, [{}, {"keep_old_logit_l2_fade_step": 9}], "keep_old_logit_l2_fade_step"),
        ("anneal", {"dataset_name": "d", "alpha": 0.0}, [{"T": 3.0}, {"temp_schedule": "5:2"}], "T, temp_schedule"),
        ("anneal", {"dataset_name": "d"}, [{"alpha": 0.2}, {"alpha_schedule": "0:0.2"}], "alpha, alpha_schedule"),
    ],
)
def test_arms_that_differ_in_what_plays_no_part_are_the_same(tmp_path, face, shared, arms, names):
    with pytest.raises(UsageError, match=f"arms 'a' and 'b' are the same training: .* plays no part .*{names}\\)"):
        described(tmp_path, face, shared, *arms)


@pytest.mark.parametrize(
    ("shared", "arms"),
    [
        (HYBRID | PLAIN, [{}, {"lr": 0.5}]),
        (HYBRID | PLAIN, [{}, {"keep_old_logit_l2": 0.1, "resume_gcs_uri": "there"}]),
        (HYBRID, [{}, {"kd_temperature": 4.0}]),
        (HYBRID, [{}, {"kd_positions": 0.5}]),
        (
            HYBRID | PLAIN,
            [{"sources": {"lm": {"alpha": 0.1}}}, {"sources": {"lm": {"alpha": 0.1, "temperature": 2.0}}}],
        ),
        (HYBRID | {"kd_alpha_end": 0.0}, [{}, {"kd_temperature": 4.0}]),
    ],
)
def test_arms_that_differ_in_what_plays_a_part_at_some_step_are_two(tmp_path, shared, arms):
    assert len(described(tmp_path, "train", shared, *arms)["arms"]) == 2


@pytest.mark.parametrize("done", [[("b", 0), ("a", 1), ("b", 1)], [("a", 0), ("b", 0)]])
def test_students_are_judged_on_what_a_run_of_the_baseline_held_out(tmp_path, monkeypatch, done):
    """Also where its run of the first seed is not finished yet, but another arm's is."""
    asked = []

    def evaluate(students, given, **_):
        asked.append(students)
        return [SimpleNamespace(plain=dict) for _ in students]

    monkeypatch.setattr(job, "evaluate_students", evaluate)
    place = StudyFolder(tmp_path)
    units = [Unit(*one) for one in done]
    job._Work(Study("train", [Arm("a", {}), Arm("b", {})], [0, 1], {}), place, StopSignal()).evaluate(units)
    assert all(students[0].startswith(str(tmp_path / "runs" / "a")) for students in asked)
    assert all(json.loads((tmp_path / f"evaluations/{one.folder}.json").read_text())["asked"] == {} for one in units)


def test_captures_that_fill_one_store_in_turn_are_all_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(job, "capture_signal", lambda *_: CaptureSummary(written=5))
    monkeypatch.setattr(job.time, "monotonic", iter(range(0, 100, 7)).__next__)
    place, shared = StudyFolder(tmp_path), {"math_logits_dir": "S", "mc_teacher_id": "org/t"}
    captures = [{**shared, "dataset_manifest": name} for name in ("one.jsonl", "two.jsonl")]
    work = job._Work(Study("train", [], [0], {}, captures), place, StopSignal())
    for number in (0, 1, 0, 1):
        work.capture(number)
    assert [one["seconds"] for one in place.read("captures.json")] == [7, 7]
    changed = [captures[0], {**captures[1], "batch_size": 3}]
    job._Work(Study("train", [], [0], {}, changed), place, StopSignal()).capture(1)
    kept = [one["options"] for one in place.read("captures.json")]
    assert kept == changed, "one that is asked for no longer is replaced by what is"


def test_a_signal_while_students_are_judged_is_heard_at_once(tmp_path, monkeypatch):
    place = StudyFolder(tmp_path)

    def judge(*_, **__):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(20)

    monkeypatch.setattr(job, "evaluate_students", judge)
    began = time.monotonic()
    with StopSignal() as stop, pytest.raises(Interrupted, match="the study was stopped"):
        job._Work(Study("train", [Arm("a", {})], [0], {}), place, stop).evaluate([Unit("a", 0)])
    assert time.monotonic() - began < 10
    assert place.evaluation(Unit("a", 0)) is None


def test_a_process_that_does_not_hear_is_asked_again(monkeypatch):
    """A signal that comes between a fork and what the child becomes is lost."""
    monkeypatch.setattr(job, "_ASK_AGAIN_SECONDS", 0.0)
    asked = []
    deaf = SimpleNamespace(is_alive=lambda: len(asked) < 3, terminate=lambda: asked.append(1), join=lambda _: None)
    job._end([deaf])
    assert len(asked) == 3
