"""Seconds of a step, the captures' shares, and the steps that take as long."""

import json

import pytest

from liquid_llm.study.pace import scale_steps, share_captures, step_seconds


def write_rows(folder, rows):
    folder.mkdir()
    names = ("step", "positions", "tokens_per_second")
    lines = [{"kind": "train", **dict(zip(names, row, strict=True))} for row in rows]
    lines.insert(1, {"kind": "eval", "step": 0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_seconds_of_a_step_are_the_median_over_the_rows_of_all_runs(tmp_path):
    quiet = write_rows(tmp_path / "a", [(10, 1000, 500.0), (20, 1000, 250.0), (25, 500, 500.0)])
    busy = write_rows(tmp_path / "b", [(10, 1000, 100.0), (20, 1000, 400.0), (30, 1000, None)])
    assert step_seconds([quiet]) == pytest.approx(0.2)
    assert step_seconds([quiet, busy]) == pytest.approx(0.25)
    assert step_seconds([tmp_path / "none"]) is None


def test_a_store_is_paid_by_the_arms_that_read_it():
    captures = [{"stores": ["maths", "code"], "seconds": 90.0}, {"stores": ["other"], "seconds": 5.0}]
    stores = {"plain": [], "online": [], "t1": ["maths", "code"], "t2": ["code"], "both": ["maths", "other"]}
    assert share_captures(captures, stores) == {"plain": 0, "online": 0, "t1": 30, "t2": 30, "both": 35}


def test_the_baseline_trains_for_as_long_as_the_arm_takes():
    assert scale_steps(100, 0.5, 75.0, []) == 150
    assert scale_steps(100, 0.5, 25.0, []) == 50
    assert scale_steps(100, 0.5, 50.6, []) == 100, "its own run is near enough"
    assert scale_steps(100, 0.5, 75.6, [150, 400]) == 150, "one that runs anyway is near enough"
    assert scale_steps(100, 0.5, 78.0, [150]) == 150, "seconds are never the same twice"
    assert scale_steps(100, 0.5, 80.0, [150]) == 160
    assert scale_steps(100, 0.5, 0.1, []) == 1
