"""What of a row a tracker can draw."""

from __future__ import annotations

from liquid_llm.trackers import numbers


def test_numbers_of_a_row_have_flat_names() -> None:
    row = {
        "kind": "train",
        "step": 7,
        "loss": 1.5,
        "kd": None,
        "cut": True,
        "words": "a",
        "not_finite": {"ce": "nan"},
        "by_type": {"lm": {"ce": 2, "kd": None}, "a/b": {"ce": 0.5}},
    }
    assert dict(numbers(row)) == {"train/loss": 1.5, "train/by_type/lm/ce": 2.0, "train/by_type/a/b/ce": 0.5}
