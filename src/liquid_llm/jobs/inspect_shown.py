"""What was found by ``liquid inspect``, for people: facts in two columns, and a table for what there are several of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from liquid_llm.formatting import escape_controls, format_bytes, format_count
from liquid_llm.terminal import print_facts, result_console, result_table

_WIDTH = 160  # of a table in a file or a pipe
_LONG = 100  # characters of a value
_LARGEST = 1e30  # of a number that is counted: a damaged file may hold any


def show(found: Mapping[str, Any], where: str, console: Console | None = None) -> None:
    """Print a mapping of ``describe`` on standard output."""
    console = result_console(console, _WIDTH)
    facts: list[tuple[str, str]] = []
    tables: list[tuple[str, list[Mapping[str, Any]]]] = []
    sentences: list[str] = []
    for key, value in found.items():
        if key == "kind" or value is None or value in ({}, [], ()):
            continue
        if key == "sentences" and isinstance(value, list):
            sentences = [str(one) for one in value]
        elif rows := _rows_of(value):
            tables.append((_words(key), rows))
        else:
            facts += _facts(key, value)
    print_facts(escape_controls(f"{found['kind']}: {where}"), facts, console)
    for title, rows in tables:
        table = result_table(title)
        names = dict.fromkeys(name for row in rows for name, value in row.items() if value not in (None, {}, []))
        for name in names:
            numbers = all(isinstance(row.get(name), int | float | None) for row in rows)
            table.add_column(_words(name), justify="right" if numbers else "left", overflow="fold")
        for row in rows:
            table.add_row(*(Text(_shown(name, row.get(name))) for name in names))
        console.print()
        console.print(table)
    for sentence in sentences:
        console.print(Text(escape_controls(sentence)), soft_wrap=True)


def _rows_of(value: Any) -> list[Mapping[str, Any]]:
    """The rows of a table: of mappings by name, or in a list; [] for what is none."""
    if isinstance(value, Mapping) and value and all(isinstance(one, Mapping) and one for one in value.values()):
        return [{"": name, **_flat(one)} for name, one in value.items()]
    if isinstance(value, list) and value and all(isinstance(one, Mapping) for one in value):
        return [_flat(one) for one in value]
    return []


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row whose mappings are columns of their own."""
    flat: dict[str, Any] = {}
    for name, value in row.items():
        flat |= {f"{name} {key}": one for key, one in value.items()} if isinstance(value, Mapping) else {name: value}
    return flat


def _facts(key: str, value: Any) -> list[tuple[str, str]]:
    """One line, or for a mapping one for each of its values; what is nested deeper is left to ``--json``."""
    if not isinstance(value, Mapping):
        return [(_words(key), _shown(key, value))]
    plain = {name: one for name, one in value.items() if one is not None and not _is_nested(one)}
    if len(plain) <= 1 or sum(len(_shown(name, one)) for name, one in plain.items()) > _LONG:
        return [(f"{_words(key)}: {_words(name)}", _shown(name, one)) for name, one in plain.items()]
    return [(_words(key), ", ".join(f"{_words(name)} {_shown(name, one)}" for name, one in plain.items()))]


def _is_nested(value: Any) -> bool:
    return isinstance(value, Mapping) or (
        isinstance(value, Sequence) and not isinstance(value, str) and any(isinstance(one, Mapping) for one in value)
    )


def _words(key: object) -> str:
    return escape_controls(str(key)).replace("_", " ")


def _shown(name: object, value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float) and abs(value) < _LARGEST:
        if "bytes" in str(name).split("_"):
            return format_bytes(value)
        return format_count(value) if isinstance(value, int) or value.is_integer() else f"{value:.5g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{_words(key)} {_shown(key, one)}" for key, one in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_shown(name, one) for one in value)
    text = escape_controls(" ".join(str(value).split()))
    return text if len(text) <= 2 * _LONG else f"{text[: 2 * _LONG]}…"
