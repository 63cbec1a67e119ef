"""What a session found, as JSON lines while it runs and as a table at its end.

row         one thing that was measured or proved, beside what was predicted of it
prediction  said by a process of its own beside the measurements, and joined to the row of the same part and name
status      measured, passed, failed, out of memory, or not measured (with the reason as its note); "ran, not measured"
            is what works without a GPU, where figures would say nothing
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

MEASURED, PASSED, FAILED, NO_ROOM, SKIPPED = "measured", "passed", "failed", "out of memory", "not measured"
RAN = "ran, not measured"
NO_GPU = "no GPU"
_NAME = 64  # characters of a name in the table
NO_TIME = "no time left in this part"


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        part: of the session.
        name: what was looked at.
        status: see the module.
        measured: in ``unit``.
        unit: of both figures.
        predicted: what was expected before, or None.
        basis: where the prediction comes from.
        within: largest relative distance between the two that is still called right, or None.
        note: anything else, in words.
        more: further figures, for programs.
    """

    part: str
    name: str
    status: str = MEASURED
    measured: float | None = None
    unit: str = ""
    predicted: float | None = None
    basis: str = ""
    within: float | None = None
    note: str = ""
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def distance(self) -> float | None:
        """Measured over predicted, minus one."""
        if self.measured is None or not self.predicted:
            return None
        return self.measured / self.predicted - 1.0

    @property
    def verdict(self) -> str:
        """The status, or whether the prediction was right."""
        if self.status != MEASURED or self.within is None:
            return self.status
        if self.distance is None:
            return f"{self.status}, no prediction"
        return f"{'within' if abs(self.distance) <= self.within else 'OUTSIDE'} {self.within:.0%}"


class Recorder:
    """Appends rows to a file of JSON lines: whatever happens later, what was found is there."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def add(self, row: Row) -> None:
        self._append({"kind": "row", **asdict(row)})
        print(as_text(row), flush=True)

    def predict(self, part: str, name: str, predicted: float, basis: str) -> None:
        self._append({"kind": "prediction", "part": part, "name": name, "predicted": predicted, "basis": basis})

    def _append(self, values: dict[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values, default=_plain) + "\n")


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else str(value)


def read(path: Path) -> list[Row]:
    """The rows of a file, each with the prediction that was made of it; a line cut off by a killed process is left."""
    rows: list[Row] = []
    predictions: dict[tuple[str, str], dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            values = json.loads(line)
        except ValueError:
            continue
        kind = values.pop("kind")
        if kind == "prediction":
            predictions[values["part"], values["name"]] = values
        elif kind == "row":
            rows.append(Row(**values))

    def joined(row: Row) -> Row:
        found = predictions.get((row.part, row.name))
        if found is None or row.predicted is not None:
            return row
        return replace(row, predicted=found["predicted"], basis=found["basis"])

    return [joined(row) for row in rows]


def figure(value: float | None) -> str:
    """A number with four digits that mean something."""
    if value is None:
        return "-"
    if not math.isfinite(value):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def as_text(row: Row) -> str:
    shown = f"{figure(row.measured)} {row.unit}".strip()
    return f"[{row.part}] {row.name}: {shown} ({row.verdict}{', ' + row.note if row.note else ''})"


def in_short(rows: Iterable[Row]) -> tuple[list[Row], int]:
    """Rows that say more than that a test passed, and how many others there are."""
    rows = list(rows)
    left = [row for row in rows if row.status != PASSED or row.note]
    return left, len(rows) - len(left)


def table(rows: Iterable[Row]) -> str:
    """All rows as one table of plain text, by part."""
    lines = []
    part = None
    for row in rows:
        if row.part != part:
            part = row.part
            lines += ["", f"{part:{_NAME}} {'measured':>12} {'predicted':>12} {'unit':14} verdict"]
        name = row.name if len(row.name) <= _NAME else f"{row.name[: _NAME - 33]}...{row.name[-30:]}"
        note = f": {row.note}" if row.note else f" ({row.basis})" if row.basis else ""
        figures = f"{figure(row.measured):>12} {figure(row.predicted):>12} {row.unit:14}"
        lines.append(f"{name:{_NAME}} {figures} {row.verdict}{note}"[:220].rstrip())
    return "\n".join(lines[1:]) + "\n"
