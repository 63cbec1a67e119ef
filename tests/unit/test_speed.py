"""How ``bench_speed`` makes ratios of turns, and what it says when a contestant's process ends."""

from __future__ import annotations

import os
import sys

import pytest
from benchmarks.bench_speed import OURS, OWN, RATIOS, Ratio, Rounds
from benchmarks.speed.turns import Child, Took

SPEAKS = """
import sys
sys.path.insert(0, {root!r})
from benchmarks.speed.turns import Turns
turns = Turns()
print("noise that is no answer")
turns.say(name="ours")
done = []
turns.serve({{"work": lambda: done.append(1) or (done[:2] == done or exit("tired"))}}, {{}}, lambda: None)
"""


def rounds(**turns: list[float]) -> Rounds:
    return {name: [Took(2 * each, each) for each in found] for name, found in turns.items()}


def test_a_ratio_is_the_median_of_the_rounds_own_and_sums_its_parts() -> None:
    found = rounds(a=[1.0, 2.0, 30.0], b=[1.0, 1.0, 1.0], c=[1.0, 1.0, 9.0])
    ratio = Ratio("", ("a",), ("b", "c"), 1.05)
    value = ratio.of(found, "processor")
    assert value is not None
    assert value[0] == 1.0  # of 0.5, 1.0 and 3.0: a slow moment of the machine hits one round
    assert ratio.of(found, "wall") == value
    assert ratio.verdict(1.05) == "at most 1.05: held"
    assert ratio.verdict(1.06) == "at most 1.05: MISSED"
    assert Ratio("", ("a",), ("b",), 1.2, at_least=True).verdict(1.1) == "at least 1.2: MISSED"
    assert Ratio("", ("a",), ("d",)).of(found, "wall") is None
    assert Ratio("", ("a",), ("b",)).of(rounds(a=[3.0], b=[2.0]), "wall") == (1.5, 1.5, 1.5)


def test_every_ratio_is_of_what_is_measured() -> None:
    known = {*OURS, *OWN, "trainer", "trainer-liger", "trl"}
    assert {name for ratio in RATIOS for name in (*ratio.over, *ratio.under)} <= known


def test_a_process_takes_turns_and_its_end_is_told_with_its_last_words() -> None:
    child = Child([sys.executable, "-c", SPEAKS.format(root=os.getcwd())], dict(os.environ))
    try:
        assert child.wait_until_ready() == {"name": "ours"}
        for _ in range(2):
            took = child.take_turn("work")
            assert took.wall > 0
            assert took.processor >= 0
        with pytest.raises(RuntimeError, match="tired"):
            child.take_turn("work")
    finally:
        child.kill()
