"""Numbers as people read them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from liquid_llm.formatting import escape_controls, format_bytes, format_change, format_count, format_seconds


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (7473, "7,473"), (99.96, "100"), (12.5, "12.5"), (0.3141, "0.314"), (99.94, "99.9"), (1e6, "1,000,000")],
)
def test_counts(value: float, text: str) -> None:
    assert format_count(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *[(0, "0 bytes"), (1023, "1,023 bytes"), (1024, "1 KiB"), (1024**2 - 1, "1 MiB"), (2.6e9, "2.42 GiB")],
        *[(3 * 2**40, "3 TiB"), (5000 * 2**40, "5,000 TiB")],
    ],
)
def test_bytes(value: float, text: str) -> None:
    assert format_bytes(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *[(0, "0.0 s"), (9.94, "9.9 s"), (9.96, "10 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (185, "3 min 05 s")],
        *[(3599.6, "1 h 00 min"), (7620, "2 h 07 min"), (3600 * 76.2, "3 d 04 h")],
    ],
)
def test_durations(value: float, text: str) -> None:
    assert format_seconds(value) == text


@given(st.floats(0, 1e5))
def test_no_duration_shows_sixty(value: float) -> None:
    assert "60" not in format_seconds(value).split()


@pytest.mark.parametrize(
    ("before", "after", "text"),
    [(2.0, 1.0, "−50.0 %"), (1.0, 1.5, "+50.0 %"), (None, 1.0, "–"), (1.0, None, "–"), (0.0, 1.0, "–")],
)
def test_changes(before: float | None, after: float | None, text: str) -> None:
    assert format_change(before, after) == text


def test_what_would_move_a_terminal_is_written_out():
    assert escape_controls("\x1b]0;title\x07 \r over \u202eback \x9b1m") == (
        "\\x1b]0;title\\x07 \\r over \\u202eback \\x9b1m"
    )
    assert escape_controls("tab\tline\n日本 é 🙂") == "tab\tline\n日本 é 🙂"
