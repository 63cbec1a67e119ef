"""Verdicts as a table: one line an arm or student and type, each measure as a difference with its 95 % interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from liquid_llm.study.verdict import BETTER, MEASURES, NOT_BETTER
from liquid_llm.terminal import result_table

_HEADS = {"ce": "cross-entropy", "kl": "KL", "agreement": "agree %", "overlap": "overlap %", "answers": "answers %"}
_STYLES = {BETTER: "green", NOT_BETTER: "red"}


def difference_table(title: str, heads: Mapping[str, str], verdicts: Sequence[Mapping[str, Any]]) -> Table:
    """A table of verdicts as plain values.

    Args:
        heads: what tells one line from another, name -> heading of its column.
        verdicts: see ``study.verdict.Verdict.as_dict``; each with the names of ``heads``.
    """
    measures = [key for key in MEASURES if any(one["measure"] == key for one in verdicts)]
    table = result_table(title)
    for head in heads.values():
        table.add_column(head)
    for key in measures:
        table.add_column(_HEADS[key], justify="right")
    lines: dict[tuple[str, ...], dict[str, Mapping[str, Any]]] = {}
    for one in verdicts:
        lines.setdefault(tuple(str(one[name]) for name in heads), {})[one["measure"]] = one
    for line, cells in lines.items():
        table.add_row(*map(Text, line), *(_cell(cells.get(key)) for key in measures))
    return table


def _cell(verdict: Mapping[str, Any] | None) -> Text:
    if verdict is None:
        return Text("–")
    measure = MEASURES[verdict["measure"]]
    digits = 3 if measure.scale == 1 else 1
    open_ends = {"low": "−∞", "high": "+∞"}  # of a single text
    ends = (
        end if verdict[key] is None else f"{verdict[key] * measure.scale:+.{digits}f}" for key, end in open_ends.items()
    )
    text = f"{verdict['difference'] * measure.scale:+.{digits}f} [{', '.join(ends)}]".replace("-", "−")
    return Text(text, _STYLES.get(verdict["word"], ""))
