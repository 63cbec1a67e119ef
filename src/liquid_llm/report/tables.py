"""Plain values as HTML tables. Every text that comes from a run is escaped here."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from liquid_llm.formatting import format_count

MAX_ROWS = 400
_MAX_TEXT = 2000
_FIGURE = re.compile(r"[>−-]?\d[\d,]*(\.\d+)?( ?%)?")

Html = str


def text(value: Any) -> Html:
    """A value as escaped text: a dash for nothing, yes or no, long numbers with commas, long texts cut."""
    if value is None or value == "":
        return '<span class="none">–</span>'
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if 10**4 <= abs(value) < 10**18 else escape(str(value)[:_MAX_TEXT])
    if isinstance(value, float):
        return format_count(value) if 0.01 <= abs(value) < 1e9 else f"{value:g}"
    words = str(value)
    if len(words) > _MAX_TEXT:
        words = f"{words[:_MAX_TEXT]} … ({len(words):,} characters)"
    return escape(words.replace("\0", "\ufffd"))


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], what: str = "table") -> Html:
    """A table of plain values that scrolls sideways where it is wider than the page; numbers stand to the right.

    Args:
        head: names of the columns; the first may be empty.
        what: what the table is, for those who come to it by keyboard and do not see it.
    """
    rows = list(rows)
    samples = [next((row[place] for row in rows if row[place] is not None), None) for place in range(len(head))]
    sides = [_to_the_right(one) for one in samples]  # of a whole column, so that its dashes stand where its figures do
    body = []
    for first, *others in rows[:MAX_ROWS]:
        cells = "".join(f"<td{side}>{_number(one)}</td>" for one, side in zip(others, sides[1:], strict=True))
        body.append(f'<tr><th scope="row">{text(first)}</th>{cells}</tr>')
    if len(rows) > MAX_ROWS:
        body.append(f'<tr><td colspan="{len(head)}" class="none">and {len(rows) - MAX_ROWS:,} more</td></tr>')
    columns = "".join(
        f'<th scope="col"{side}>{text(name)}</th>' if name else "<td></td>"
        for name, side in zip(head, sides, strict=True)
    )
    # with a place in the keyboard's order, as else nobody without a pointer could scroll it
    box = f'<div class="scroll" role="group" tabindex="0" aria-label="{text(what)}">'
    return f"{box}<table><thead><tr>{columns}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"


def _to_the_right(value: Any) -> str:
    is_figure = isinstance(value, int | float) and not isinstance(value, bool)
    return ' class="n"' if is_figure or (isinstance(value, str) and _FIGURE.fullmatch(value)) else ""


def _number(value: Any) -> Html:
    """Here whole numbers always have commas, so that a column reads evenly."""
    is_whole = isinstance(value, int) and not isinstance(value, bool) and abs(value) < 10**18
    return f"{value:,}" if is_whole else text(value)


def fold(title: str, body: Html) -> Html:
    """A part that is shown when it is asked for. ``title`` is plain text, ``body`` ready HTML."""
    return f"<details><summary>{text(title)}</summary>{body}</details>" if body else ""


def pairs(values: Mapping[str, Any]) -> Html:
    """Names and values, nested names joined by dots."""
    flat = list(flatten(values))
    rows = [f'<tr><th scope="row">{text(name)}</th><td>{text(value)}</td></tr>' for name, value in flat[:MAX_ROWS]]
    if len(flat) > MAX_ROWS:
        rows.append(f'<tr><td colspan="2" class="none">and {len(flat) - MAX_ROWS:,} more</td></tr>')
    return f'<table class="pairs"><tbody>{"".join(rows)}</tbody></table>'


def flatten(value: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    """``(dotted name, leaf)`` of nested mappings; lists of plain values are one leaf, joined by commas."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from flatten(item, f"{prefix}.{key}" if prefix else str(key))
        if not value and prefix:
            yield prefix, None
    elif isinstance(value, list) and any(isinstance(item, list | Mapping) for item in value):
        for index, item in enumerate(value):
            yield from flatten(item, f"{prefix}[{index}]")
    else:
        yield prefix, ", ".join(map(str, value)) if isinstance(value, list) else value


def matrix(values: Any, what: str = "table") -> Html | None:
    """A mapping of mappings of plain values as one table, a row for each; None for any other shape."""
    if not isinstance(values, Mapping) or not all(isinstance(row, Mapping) for row in values.values()):
        return None
    names = list(dict.fromkeys(key for row in values.values() for key in row))
    if not 1 <= len(names) <= 10 or any(
        isinstance(one, list | Mapping) for row in values.values() for one in row.values()
    ):
        return None
    head = ["", *(str(name).replace("_", " ") for name in names)]
    return table(head, [[key, *map(row.get, names)] for key, row in values.items()], what)


def card(title: object, body: Html, style: str = "") -> Html:
    """A titled box. ``title`` is plain text, ``body`` ready HTML."""
    return f'<section class="card {style}"><h3>{text(title)}</h3>{body}</section>'


def cards(values: Mapping[Any, Any], general: str) -> Html:
    """A box for each mapping among the values, and one named ``general`` before them for the rest."""
    plain = {name: value for name, value in values.items() if not isinstance(value, Mapping)}
    nested = {_title(name): value for name, value in values.items() if isinstance(value, Mapping) and value}
    boxes = {**({general: plain} if plain else {}), **nested}
    return f'<div class="tables">{"".join(card(name, pairs(one)) for name, one in boxes.items())}</div>'


def _title(name: object) -> str:
    words = str(name).replace("_", " ")
    return words[:1].upper() + words[1:]
