"""``liquid demo`` from end to end with a small teacher: what `make demo` runs, at a fraction of its size."""

import json

import pytest
from tests.support.tiny import build

from liquid_llm.cli.main import main

pytestmark = pytest.mark.slow


def test_the_demo_runs_every_stage_and_shows_its_result(tmp_path, capsys):
    tiny = build(tmp_path / "tiny", teacher_steps=150)
    words = ["demo", "--dir", str(tmp_path / "demo"), "--teacher", str(tiny.teacher), "--student", "liquid-test"]
    words += ["--scale", "0.6"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    (run,) = (tmp_path / "demo" / "runs").iterdir()
    for name in ("lm", "math_tool", "code", "bytes a token", "real tokens a second", "peak host memory"):
        assert name in shown
    assert str(run) in shown
    assert str(run / "report.html") in shown
    summary = json.loads((run / "summary.json").read_text())
    assert {row["type"] for row in summary["rows"]} == {"lm", "math_tool", "code"}
    for row in summary["rows"]:
        assert row["val_loss_before"] > 0
        assert row["val_kd_before"] > 0
    assert summary["sample"]["text"]
    signal = tmp_path / "demo" / "signal"
    for store in ("math", "code"):
        assert list((signal / store).glob("shard-*")), "the layout that capture writes when nothing is said"
    captured = json.loads((tmp_path / "demo" / "capture.json").read_text())
    assert captured["positions"] == captured["tokens"] - captured["written"], "a sample's first token is not predicted"
    on_disk = sum(path.stat().st_size for path in signal.rglob("*") if path.is_file())
    assert summary["bytes_per_token"] == pytest.approx(on_disk / captured["positions"], rel=0.01)
    assert main(words) == 0, "a second call shows the result again"
    again = capsys.readouterr().out
    assert str(run / "report.html") in again
    assert "bytes a token" in again


def test_a_scale_that_makes_no_sense_is_refused(tmp_path, capsys):
    assert main(["demo", "--dir", str(tmp_path), "--scale", "0"]) == 2
    assert "--scale" in capsys.readouterr().err
