"""What the job of a study decides by itself: what its files keep, and whose held-out text students are judged on."""

import json
from types import SimpleNamespace

import pytest

from liquid_llm.capture.job import CaptureSummary
from liquid_llm.jobs import study as job
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


@pytest.mark.parametrize("done", [[("b", 0), ("a", 1), ("b", 1)], [("a", 0), ("b", 0)]])
def test_students_are_judged_on_what_a_run_of_the_baseline_held_out(tmp_path, monkeypatch, done):
    """Also where its run of the first seed is not finished yet, but another arm's is."""
    asked = []

    def evaluate(students, given):
        asked.append(students)
        return [SimpleNamespace(plain=dict) for _ in students]

    monkeypatch.setattr(job, "evaluate_students", evaluate)
    place = StudyFolder(tmp_path)
    units = [Unit(*one) for one in done]
    job._Work(Study("train", [Arm("a", {}), Arm("b", {})], [0, 1], {}), place, lambda: False).evaluate(units)
    assert all(students[0].startswith(str(tmp_path / "runs" / "a")) for students in asked)
    assert all(json.loads((tmp_path / f"evaluations/{one.folder}.json").read_text())["asked"] == {} for one in units)


def test_captures_that_fill_one_store_in_turn_are_all_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(job, "capture_signal", lambda *_: CaptureSummary(written=5))
    monkeypatch.setattr(job.time, "monotonic", iter(range(0, 100, 7)).__next__)
    place, shared = StudyFolder(tmp_path), {"math_logits_dir": "S", "mc_teacher_id": "org/t"}
    captures = [{**shared, "dataset_manifest": name} for name in ("one.jsonl", "two.jsonl")]
    work = job._Work(Study("train", [], [0], {}, captures), place, lambda: False)
    for number in (0, 1, 0, 1):
        work.capture(number)
    assert [one["seconds"] for one in place.read("captures.json")] == [7, 7]
    changed = [captures[0], {**captures[1], "batch_size": 3}]
    job._Work(Study("train", [], [0], {}, changed), place, lambda: False).capture(1)
    kept = [one["options"] for one in place.read("captures.json")]
    assert kept == changed, "one that is asked for no longer is replaced by what is"
