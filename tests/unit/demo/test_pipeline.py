"""What the demo says at its end."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from liquid_llm.demo.pipeline import print_summary

SUMMARY = {
    "rows": [
        {"type": "lm", "val_loss_before": 10.8, "val_loss_after": 5.4, "val_kd_before": 8.0, "val_kd_after": 2.0},
        {"type": "[b]odd", "val_loss_before": 1.0, "val_loss_after": 1.5, "val_kd_before": 4.0, "val_kd_after": 4.0},
    ],
    "bytes_per_token": 48.66,
    "tokens_per_second": 412.6,
    "peak_memory_bytes": 2.6e9,
    "device_peak_memory_bytes": None,
    "seconds": 300.0,
    "sample": {"prompt": "Q: [/x]", "text": " <<1+1=2>>"},
}


def test_the_summary_has_every_figure_and_goes_to_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    path = Path("/a" * 100)
    print_summary(SUMMARY, {"run": path, "report": path / "report.html"})
    out, err = capsys.readouterr()
    assert err == ""
    for words in ("−50.0 %", "−75.0 %", "+50.0 %", "[b]odd", "48.7 bytes a token", "413 real tokens a second"):
        assert words in out
    assert re.search(r"lm +10\.800 +5\.400 +−50\.0 % +8\.000 +2\.000 +−75\.0 %", out)
    for words in ("2.42 GiB", "5 min 00 s", "Q: [/x] <<1+1=2>>", f"{path}/report.html\n"):
        assert words in out
    assert max(len(line) for line in out.splitlines() if "/a/a" not in line) <= 80
    assert "device" not in out


def test_figures_that_are_not_known_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    print_summary({**SUMMARY, "bytes_per_token": None, "device_peak_memory_bytes": 2**30}, {})
    out = capsys.readouterr().out
    assert "stored signal" not in out
    assert "peak device memory  1 GiB" in out
    assert "None" not in out


def test_a_student_that_says_nothing_is_not_shown_as_an_empty_answer(capsys: pytest.CaptureFixture[str]) -> None:
    print_summary({**SUMMARY, "sample": {"prompt": "Q: 1", "text": "\n\n\n"}}, {})
    assert "Q: 1 (line ends alone" in capsys.readouterr().out
