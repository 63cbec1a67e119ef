"""Plain values as HTML tables. Every text that comes from a run is escaped here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from liquid_llm.formatting import format_count

MAX_ROWS = 400
_MAX_TEXT = 2000

Cell = str | tuple[str, str]  # ready HTML, or HTML and a class of its table cell


def text(value: Any) -> str:
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


def table(head: Sequence[Cell], rows: Iterable[Sequence[Cell]]) -> str:
    """A table that scrolls sideways where it is wider than the page; the first cell of a row is its header."""
    body: list[str] = []
    left_out = 0
    for row in rows:
        if len(body) >= MAX_ROWS:
            left_out += 1
            continue
        first, *others = row
        cells = [_cell("th", first, "row"), *(_cell("td", one) for one in others)]
        body.append(f"<tr>{''.join(cells)}</tr>")
    if left_out:
        body.append(f'<tr><td colspan="{len(head)}" class="none">and {left_out:,} more</td></tr>')
    columns = "".join(_cell("th", one, "col") for one in head)
    return f'<div class="scroll"><table><thead><tr>{columns}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'


def _cell(tag: str, cell: Cell, scope: str = "") -> str:
    html, kind = cell if isinstance(cell, tuple) else (cell, "")
    attributes = "".join(f' {name}="{value}"' for name, value in (("scope", scope), ("class", kind)) if value)
    return f"<{tag}{attributes}>{html}</{tag}>"


def number(value: Any) -> Cell:
    """A right-aligned cell; here whole numbers always have commas, so that a column reads evenly."""
    is_count = isinstance(value, int) and not isinstance(value, bool) and abs(value) < 10**18
    return (f"{value:,}" if is_count else text(value), "n")


def pairs(values: Mapping[str, Any]) -> str:
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
    elif isinstance(value, list):
        if any(isinstance(item, list | Mapping) for item in value):
            for index, item in enumerate(value):
                yield from flatten(item, f"{prefix}[{index}]")
        else:
            yield prefix, ", ".join(str(item) for item in value)
    else:
        yield prefix, value


def matrix(values: Any) -> str | None:
    """A mapping of mappings of plain values as one table, a row for each; None for any other shape."""
    if not isinstance(values, Mapping) or not values or not all(_is_flat(row) for row in values.values()):
        return None
    names = list(dict.fromkeys(str(key) for row in values.values() for key in row))
    if not names or len(names) > 10:
        return None
    rows = []
    for key, row in values.items():
        by_name = {str(name): item for name, item in row.items()}
        rows.append([text(key), *(number(by_name.get(name)) for name in names)])
    return table(["", *((text(name.replace("_", " ")), "n") for name in names)], rows)


def _is_flat(row: Any) -> bool:
    return isinstance(row, Mapping) and not any(isinstance(item, list | Mapping) for item in row.values())


def card(title: str, body: str, kind: str = "card") -> str:
    """A titled box. ``title`` is plain text, ``body`` ready HTML."""
    return f'<section class="{kind}"><h3>{text(title)}</h3>{body}</section>'
