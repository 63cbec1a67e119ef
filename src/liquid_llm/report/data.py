"""What a run directory holds, read for a report: every file is optional, none is trusted.

series   one quantity over steps; a nan value is a gap (the run logged a value that was not finite)
column   the name of a series: ``loss``, or ``lm/kd`` for ``by_type.lm.kd``
notice   something a reader of the report must know: unreadable lines, values that were not finite
"""

from __future__ import annotations

import math
import re
from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from liquid_llm.metrics import FILE_NAME, SAMPLES_FILE, iter_metrics
from liquid_llm.parsing import ParseError, parse_json, parse_yaml
from liquid_llm.report.runs import PROVENANCE, SIDECAR, SUMMARY_FILE, Opened, last_part, open_run

Floats = NDArray[np.float64]


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
    def finite(self) -> Series:
        """The points whose values are numbers."""
        kept = np.isfinite(self.values)
        return Series(self.steps[kept], self.values[kept])


@dataclass
class Columns:
    """The series of one kind of row, by column name, and the types in order of appearance."""

    series: dict[str, Series] = field(default_factory=dict)
    types: list[str] = field(default_factory=list)

    def get(self, name: str) -> Series | None:
        """The series, or None where it is absent or has no finite value."""
        one = self.series.get(name)
        return one if one is not None and len(one.finite) else None

    def total(self, name: str) -> float:
        """The sum of a column's values, 0 where it is absent."""
        one = self.get(name)
        return 0.0 if one is None else float(one.finite.values.sum())


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
    samples: list[dict[str, Any]] = field(default_factory=list)


def read_run(run: str | Path) -> RunData:
    """Read what a run wrote, at a path or URL; torn lines and unreadable files become notices.

    Raises:
        UsageError: there is nothing, or nothing that a run writes.
        StorageError: it cannot be read.
    """
    with open_run(str(run)) as opened:
        return _read_folder(opened, last_part(str(run)))


def _read_folder(opened: Opened, name: str) -> RunData:
    folder = opened.folder
    sidecars = sorted(folder.glob(f"*{SIDECAR}"))
    notices: list[str] = []
    train, evaluation, num_rows = _read_rows(folder, notices)
    provenance = folder / PROVENANCE
    return RunData(
        name=name,
        train=train,
        evaluation=evaluation,
        num_rows=num_rows,
        notices=notices,
        config=_read(provenance / "config.json", notices),
        manifest=_read(
            provenance / "manifest_snapshot.jsonl", notices, lambda lines: list(map(parse_json, lines.splitlines()))
        )
        or [],
        readiness=_read(provenance / "data_readiness.json", notices),
        datasets=_read(provenance / "datasets_snapshot.yaml", notices, parse_yaml),
        environment=_read(provenance / "environment.json", notices),
        checkpoints=_read_checkpoints(sidecars, opened.sizes, notices),
        summary=_read(folder / SUMMARY_FILE, notices),
        samples=[row for _, row in iter_metrics(folder, SAMPLES_FILE) if row is not None],
    )


# ------------------------------------------------------------------------------------------------------------- metrics


class _Gatherer:
    """Gathers rows of one kind into columns of eight bytes a value."""

    def __init__(self) -> None:
        self._columns: dict[str, dict[str, tuple[array[float], array[float]]]] = {}  # by prefix, then name
        self._types: dict[str, None] = {}

    def add(self, row: dict[str, Any]) -> None:
        step = row["step"]
        self._take("", step, row)
        for type, values in _mapping(row.get("by_type")).items():
            if isinstance(values, dict):
                self._types[type] = None
                self._take(f"{type}/", step, values)
        for path in _mapping(row.get("not_finite")):
            of_type = re.fullmatch(
                r"by_type\.(.*)\.(.*)", path, re.DOTALL
            )  # a type may hold dots, a metric's name none
            self._take(f"{of_type[1]}/" if of_type else "", step, {of_type[2] if of_type else path: math.nan})

    def _take(self, prefix: str, step: int, values: Mapping[str, Any]) -> None:
        """Take the numbers among values. A null does not exist (no signal in that row) and is passed over; one that
        stands for nan or infinity is a gap, which the row's ``not_finite`` brings in."""
        columns = self._columns.setdefault(prefix, {})
        for name, value in values.items():
            if type(value) is float or type(value) is int:  # and no bool
                column = columns.get(name)
                if column is None:
                    column = columns[name] = array("d"), array("d")
                column[0].append(step)
                column[1].append(value if abs(value) < 1e300 else math.nan)

    def build(self) -> Columns:
        every = {prefix + name: one for prefix, those in self._columns.items() for name, one in those.items()}
        return Columns({name: _series(*one) for name, one in every.items()}, list(self._types))


def _series(all_steps: array[float], all_values: array[float]) -> Series:
    steps, values = np.frombuffer(all_steps), np.frombuffer(all_values)
    order = np.argsort(steps, kind="stable")
    steps, values = steps[order], values[order]
    last_of_step = np.append(steps[1:] != steps[:-1], True)  # rows written twice for a step: the later one counts
    return Series(steps[last_of_step], values[last_of_step])


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _read_rows(folder: Path, notices: list[str]) -> tuple[Columns, Columns, int]:
    gatherers = {"train": _Gatherer(), "eval": _Gatherer()}
    bad: list[int] = []
    strange: list[tuple[int, str]] = []
    num_rows = last_line = 0
    for last_line, row in iter_metrics(folder):
        if row is None or not 0 <= row["step"] <= 2**53:
            bad.append(last_line)
            continue
        num_rows += 1
        if row.get("kind") in ("train", "eval"):
            gatherers[row["kind"]].add(row)
        if not_finite := _mapping(row.get("not_finite")):
            strange.append((row["step"], ", ".join(f"{key} = {value}" for key, value in not_finite.items())))
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
    return gatherers["train"].build(), gatherers["eval"].build(), num_rows


# --------------------------------------------------------------------------------------------------------- other files


def _read(path: Path, notices: list[str], parse: Callable[[str], Any] = parse_json) -> Any:
    """A file's contents, or None with a notice where it cannot be read; None alone where there is no such file."""
    try:
        return parse(path.read_text(encoding="utf-8", errors="replace"))
    except FileNotFoundError:
        return None
    except OSError as error:
        notices.append(f"{path.name} cannot be read ({error.strerror}) and is left out.")
    except ParseError:
        notices.append(f"{path.name} is not valid {'YAML' if parse is parse_yaml else 'JSON'} and is left out.")
    return None


def _read_checkpoints(
    sidecars: list[Path], sizes: Mapping[str, int] | None, notices: list[str]
) -> list[dict[str, Any]]:
    """The sidecars' contents with ``name`` and, where the data file is there, ``size_bytes``; by step, then name."""
    found = []
    for path in sidecars:
        metadata = _read(path, notices)
        if not isinstance(metadata, Mapping):
            continue
        name = path.name.removesuffix(SIDECAR)
        data_file = path.with_name(name if name.endswith(".pt") else f"{name}.pt")
        if sizes is not None:
            size = sizes.get(data_file.name)
        else:
            size = data_file.stat().st_size if data_file.is_file() else None
        found.append({**metadata, "name": data_file.name, "size_bytes": size})
    return sorted(found, key=lambda one: (one["step"] if isinstance(one.get("step"), int) else -1, one["name"]))
