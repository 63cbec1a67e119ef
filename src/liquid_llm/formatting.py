"""Numbers and texts as people read them, the same in logs, tables and reports (leaf)."""

from __future__ import annotations

import re
from collections.abc import Mapping

# all but tab and newline, and what turns the direction of writing around
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def escape_controls(text: str) -> str:
    """``text`` as a terminal can be given it: what would move its cursor, colour it or retitle it is written out.

    Names and values of other people's files are in messages.
    """
    return _CONTROLS.sub(lambda found: ascii(found[0])[1:-1], text)


def format_count(value: float) -> str:
    """Three digits below a hundred, whole numbers with commas above: ``7,473``, ``12.5``, ``0.31``."""
    if abs(value) >= 99.95 or float(value).is_integer():
        return f"{value:,.0f}"
    return f"{value:.3g}"


def format_counts(counts: Mapping[str, int]) -> str:
    """Several counts with their names: ``1,024 train samples, 96 validation samples``."""
    return ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in counts.items())


def format_bytes(value: float) -> str:
    """Binary units with three digits: ``2.47 GiB``."""
    size = float(value)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if abs(size) < 1023.5:
            return f"{format_count(size)} {unit}"
        size /= 1024
    return f"{format_count(size)} TiB"


def format_seconds(value: float) -> str:
    """``0.4 s``, ``42 s``, ``3 min 05 s``, ``2 h 07 min``, ``3 d 04 h``."""
    if value < 9.95:
        return f"{value:.1f} s"
    seconds = round(value)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    minutes = round(value / 60)
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    hours = round(value / 3600)
    return f"{hours // 24} d {hours % 24:02d} h"


def format_change(before: float | None, after: float | None) -> str:
    """Relative change with a true minus sign, ``−34.1 %``; a dash where it is not defined."""
    if before is None or after is None or not before > 0:
        return "–"
    return f"{100 * (after / before - 1):+.1f} %".replace("-", "−")


def format_sample(text: str, most: int = 160) -> str:
    """What a model said as one line of at most ``most`` characters."""
    said = " ".join(text.split()) or "(line ends alone)"
    return said if len(said) <= most else f"{said[:most]}…"
