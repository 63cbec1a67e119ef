"""What ``bench_noise`` makes of its rows."""

from __future__ import annotations

from typing import Any

import pytest
from benchmarks.retention.flags import Setting, compare, interval, report


def row(arm: str, ce: float, draws: str = "48", variance: float = 0.0) -> dict[str, Any]:
    """Ten texts of 5 positions, each ``ce`` nats a position and some way of its own from that."""
    setting = Setting("gpt2", 128, 2.0, 0.5, draws)
    texts = [[5 * (ce + number / 10), 5] for number in range(10)]
    name = setting.name_of(arm)
    return {"run": name, "arm": arm, **vars(setting), "variance": (variance, 0.0), "positions": 128.0, "texts": texts}


def test_a_difference_is_paired_by_text() -> None:
    """Texts differ by 0.9 nats and the arms by 0.1 in each: the interval is a point."""
    assert compare(row("stored", 4.1), row("ce", 4.0)) == pytest.approx((0.1, 0.1, 0.1))


@pytest.mark.parametrize(
    ("count", "total", "expected"),
    [(9, 10, "9 of 10 (60 to 98 %)"), (0, 20, "0 of 20 (0 to 16 %)"), (3, 3, "3 of 3 (44 to 100 %)"), (0, 0, "none")],
)
def test_the_interval_of_a_share(count: int, total: int, expected: str) -> None:
    """Newcombe (1998) has 0 of 20 as 0 to 0.1611."""
    assert interval(count, total) == expected


def test_rates_are_of_those_that_end_worse_and_of_those_that_do_not() -> None:
    rows = [row("ce", 4.0), row("full", 3.8)]
    rows += [row("stored", 4.1, "1", 1.0), row("stored", 4.1, "2", 0.0), row("stored", 3.9, "3", 0.0)]
    words = report(rows)
    assert "worse than plain and flagged: 1 of 2" in words
    assert "not worse, and flagged: 0 of 1" in words
    assert "| yes | +0.100 (+0.100 to +0.100) | -0.200 | +0.300 |" in words
