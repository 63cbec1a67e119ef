"""What a run directory holds, read for a report: every file is optional, none is trusted.

series   one quantity over steps; a nan value is a gap (the run logged a value that was not finite)
column   the name of a series: ``loss``, or ``lm/kd`` for ``by_type.lm.kd``
notice   something a reader of the report must know: unreadable lines, values that were not finite
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from liquid_llm.errors import UsageError
from liquid_llm.metrics import FILE_NAME, iter_metrics

Floats = NDArray[np.float64]

_CHUNK_ROWS = 512
_PROVENANCE = "provenance"
_NOT_PLOTTED = frozenset({"kind", "step", "not_finite", "by_type"})


@dataclass(frozen=True)
class Series:
    """One quantity over steps.

    Attributes:
        steps: [n], rising.
        values: [n], nan where the run logged something that was not finite.
    """

    steps: Floats
    values: Floats

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def finite(self) -> Floats:
        """The values that are numbers."""
        return self.values[np.isfinite(self.values)]


@dataclass
class Columns:
    """The series of one kind of row, by column name, and the types in order of appearance."""

    series: dict[str, Series] = field(default_factory=dict)
    types: list[str] = field(default_factory=list)

    def get(self, name: str) -> Series | None:
        """The series, or None where it is absent or has no finite value."""
        one = self.series.get(name)
        return one if one is not None and one.finite.size else None


@dataclass
class RunData:
    """Everything a report shows."""

    name: str
    train: Columns
    evaluation: Columns
    num_rows: int
    notices: list[str]
    config: Any = None
    manifest: list[Any] = field(default_factory=list)
    readiness: Any = None
    datasets: Any = None
    environment: Any = None
    checkpoints: list[dict[str, Any]] = field(default_factory=list)
    summary: Any = None


def read_run(run_dir: str | Path) -> RunData:
    """Read what a run wrote; torn lines and unreadable files become notices.

    Raises:
        UsageError: the directory is none, or holds nothing a run writes.
    """
    folder = Path(run_dir)
    if not folder.is_dir():
        raise UsageError("no such directory", where=folder, remedy="give the directory of a run")
    sidecars = sorted(folder.glob("*.meta.json"))
    if not ((folder / FILE_NAME).is_file() or (folder / _PROVENANCE).is_dir() or sidecars):
        raise UsageError(
            "this is no run directory",
            where=folder,
            expected=f"{FILE_NAME}, {_PROVENANCE}/ or *.meta.json in it",
            remedy="give the directory a training run wrote (hybrid face: the output URI's sub-directory)",
        )
    notices: list[str] = []
    train, evaluation, num_rows = _read_rows(folder, notices)
    provenance = folder / _PROVENANCE
    return RunData(
        name=folder.resolve().name,
        train=train,
        evaluation=evaluation,
        num_rows=num_rows,
        notices=notices,
        config=_read_json(provenance / "config.json", notices),
        manifest=_read_json_lines(provenance / "manifest_snapshot.jsonl", notices),
        readiness=_read_json(provenance / "data_readiness.json", notices),
        datasets=_read_yaml(provenance / "datasets_snapshot.yaml", notices),
        environment=_read_json(provenance / "environment.json", notices),
        checkpoints=_read_checkpoints(sidecars, notices),
        summary=_read_json(folder / "summary.json", notices),
    )


# ------------------------------------------------------------------------------------------------------------- metrics


class _ColumnBuilder:
    """Gathers rows of one kind into arrays, a chunk at a time, so that a long run needs little memory.

    Rows with the same keys are kept as tuples and turned round at once: several times faster than value by value.
    """

    def __init__(self) -> None:
        self._shapes: dict[tuple[str, tuple[str, ...]], list[tuple[Any, ...]]] = {}
        self._parts: dict[str, list[tuple[Floats, Floats]]] = {}
        self._types: dict[str, None] = {}
        self._num_rows = 0

    def add(self, row: dict[str, Any]) -> None:
        step = row["step"]
        self._put("", step, row)
        by_type = row.get("by_type")
        if isinstance(by_type, dict):
            for kind, values in by_type.items():
                if isinstance(values, dict):
                    self._types[kind] = None
                    self._put(f"{kind}/", step, values)
        if isinstance(row.get("not_finite"), dict):
            for path in row["not_finite"]:
                self._append(_column_of(path), np.array([float(step)]), np.array([math.nan]))
        self._num_rows += 1
        if self._num_rows % _CHUNK_ROWS == 0:
            self._flush()

    def build(self) -> Columns:
        self._flush()
        return Columns({name: _joined(parts) for name, parts in self._parts.items()}, list(self._types))

    def _put(self, prefix: str, step: int, values: dict[str, Any]) -> None:
        self._shapes.setdefault((prefix, tuple(values)), []).append((step, *values.values()))

    def _flush(self) -> None:
        shapes, self._shapes = self._shapes, {}
        for (prefix, names), rows in shapes.items():
            all_steps, *columns = zip(*rows, strict=True)
            steps = np.array(all_steps, dtype=np.float64)
            for name, column in zip(names, columns, strict=True):
                if not prefix and name in _NOT_PLOTTED:
                    continue
                kept, numbers = _numbers(column)
                if len(numbers):
                    self._append(prefix + name, steps if kept is None else steps[kept], numbers)

    def _append(self, column: str, steps: Floats, numbers: Floats) -> None:
        self._parts.setdefault(column, []).append((steps, numbers))


def _column_of(path: str) -> str:
    """``by_type.lm.kd`` -> ``lm/kd``; a type's name may hold dots, a metric's does not."""
    if not path.startswith("by_type."):
        return path
    kind, _, name = path.removeprefix("by_type.").rpartition(".")
    return f"{kind}/{name}"


def _read_rows(folder: Path, notices: list[str]) -> tuple[Columns, Columns, int]:
    builders = {"train": _ColumnBuilder(), "eval": _ColumnBuilder()}
    bad: list[int] = []
    strange: list[tuple[int, str]] = []
    num_rows = last_line = 0
    for last_line, row in iter_metrics(folder):
        if row is None or not 0 <= row["step"] <= 2**53:
            bad.append(last_line)
            continue
        num_rows += 1
        kind = row.get("kind")
        builder = builders.get(kind) if isinstance(kind, str) else None
        if builder is not None:
            builder.add(row)
        if isinstance(row.get("not_finite"), dict) and row["not_finite"]:
            strange.append((row["step"], ", ".join(f"{key} = {value}" for key, value in row["not_finite"].items())))
    if bad and bad != [last_line]:
        notices.append(f"{len(bad)} unreadable line(s) of {FILE_NAME} are left out, the first is line {bad[0]}.")
    elif bad:
        notices.append(f"The last line of {FILE_NAME} is torn and left out: the run was killed, or is still writing.")
    if strange:
        notices.append(
            f"{len(strange)} row(s) hold values that are not finite, first at step {strange[0][0]}: {strange[0][1]}."
        )
    if not num_rows:
        notices.append(f"There are no metrics yet: {FILE_NAME} is absent or empty.")
    return builders["train"].build(), builders["eval"].build(), num_rows


def _numbers(column: tuple[Any, ...]) -> tuple[NDArray[np.bool_] | None, Floats]:
    """Which values are numbers (None: all of them), and these as floats; infinities become nan, a gap.

    A null is a value that does not exist (no signal in that row) and is passed over. A null that stands for nan or
    infinity is a gap, which the row's ``not_finite`` brings in.
    """
    kept = None
    if not set(map(type, column)) <= {float, int}:
        kept = np.array([isinstance(value, int | float) and not isinstance(value, bool) for value in column])
        column = tuple(value for value, keep in zip(column, kept.tolist(), strict=True) if keep)
    try:
        numbers = np.array(column, dtype=np.float64)
    except OverflowError:  # an integer beyond the range of floats
        numbers = np.array([math.nan if abs(value) > 1e300 else value for value in column], dtype=np.float64)
    numbers[np.isinf(numbers)] = np.nan
    return kept, numbers


def _joined(parts: Iterable[tuple[Floats, Floats]]) -> Series:
    steps, values = (np.concatenate(one) for one in zip(*parts, strict=True))
    order = np.argsort(steps, kind="stable")
    steps, values = steps[order], values[order]
    last_of_step = np.append(steps[1:] != steps[:-1], True)  # rows written twice for a step: the later one counts
    return Series(steps[last_of_step], values[last_of_step])


# --------------------------------------------------------------------------------------------------------- other files


def _read_json(path: Path, notices: list[str]) -> Any:
    text = _read_text(path, notices)
    if text is None:
        return None
    try:
        return json.loads(text)
    except ValueError:
        notices.append(f"{path.name} is not valid JSON and is left out.")
        return None


def _read_json_lines(path: Path, notices: list[str]) -> list[Any]:
    lines = []
    for number, line in enumerate((_read_text(path, notices) or "").splitlines(), start=1):
        try:
            lines.append(json.loads(line))
        except ValueError:
            notices.append(f"{path.name}, line {number} is not valid JSON and is left out.")
    return lines


def _read_yaml(path: Path, notices: list[str]) -> Any:
    text = _read_text(path, notices)
    try:
        return None if text is None else yaml.safe_load(text)
    except yaml.YAMLError:
        notices.append(f"{path.name} is not valid YAML and is left out.")
        return None


def _read_text(path: Path, notices: list[str]) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None
    except OSError as error:
        notices.append(f"{path.name} cannot be read ({error.strerror}) and is left out.")
        return None


def _read_checkpoints(sidecars: list[Path], notices: list[str]) -> list[dict[str, Any]]:
    """The sidecars' contents with ``name`` and, where the data file is there, ``size_bytes``; by step, then name."""
    found = []
    for path in sidecars:
        metadata = _read_json(path, notices)
        if not isinstance(metadata, Mapping):
            continue
        name = path.name.removesuffix(".meta.json")
        data_file = path.with_name(name if name.endswith(".pt") else f"{name}.pt")
        size = data_file.stat().st_size if data_file.is_file() else None
        found.append({**metadata, "name": data_file.name, "size_bytes": size})
    return sorted(found, key=lambda one: (one["step"] if isinstance(one.get("step"), int) else -1, one["name"]))
