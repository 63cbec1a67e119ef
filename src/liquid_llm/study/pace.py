"""How fast arms train, and how long the baseline trains to take an arm's seconds.

Seconds of a step are the median over the metric rows of all seeds of an arm: arms take turns, and a machine that was
disturbed for a while disturbs few rows. Evaluation, checkpoints and starting up do not count. An arm that reads a store
takes its share of what the store's capture took: shared evenly by the arms that read it, not by their seeds, as who
trains once pays it once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from liquid_llm.metrics import read_metrics, seconds_of

NEAR = 0.05
"""Steps that differ by less than this share are the same: one run of the baseline serves both."""


def step_seconds(run_dirs: Sequence[Path]) -> float | None:
    """The median of the seconds a step takes, over the rows of several runs; None where they have none."""
    found = [one for folder in run_dirs for one in _step_seconds(read_metrics(folder))]
    return median(found) if found else None


def _step_seconds(rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """Of each row of one run."""
    found, before = [], 0
    for row in rows:
        if row.get("kind") != "train":
            continue
        seconds, steps = seconds_of(row), row["step"] - before
        before = row["step"]
        if seconds is not None and steps > 0:
            found.append(seconds / steps)
    return found


def share_captures(captures: Sequence[Mapping[str, Any]], stores: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Arm -> seconds of the captures that it has to bear.

    Args:
        captures: each with ``stores`` and ``seconds``.
        stores: arm -> the stores it reads.
    """
    shares = dict.fromkeys(stores, 0.0)
    for one in captures:
        readers = [arm for arm, read in stores.items() if set(read) & set(one["stores"])]
        for arm in readers:
            shares[arm] += one["seconds"] / len(readers)
    return shares


def scale_steps(steps: int, baseline_seconds: float, seconds: float, known: Sequence[int]) -> int:
    """The steps in which the baseline takes ``seconds``.

    Args:
        steps: the baseline's own.
        baseline_seconds: of one of its steps.
        known: numbers of steps that it trains anyway, its own among them; one that is near is taken.
    """
    wanted = max(1, round(seconds / baseline_seconds))
    near = [one for one in (steps, *known) if abs(one - wanted) <= NEAR * wanted]
    return min(near, key=lambda one: abs(one - wanted)) if near else wanted
