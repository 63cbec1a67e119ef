"""A tracker that writes every number of a run into ``metrics.csv``, for spreadsheets: ``--trackers=csv``."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from liquid_llm.storage import translate_errors
from liquid_llm.trackers import numbers

FILE = "metrics.csv"


class CsvTracker:
    """One line a number: step, name, value. A continued run goes on after the step of its checkpoint.

    Raises:
        StorageError: the file cannot be written.
    """

    def __init__(self, run_dir: Path, resume_step: int | None) -> None:
        self._path = run_dir / FILE
        kept: list[list[str]] = []
        with translate_errors(self._path, writing=True):
            if resume_step is not None and self._path.exists():
                with self._path.open(newline="") as old:
                    kept = [line for line in csv.reader(old) if line[0].isdigit() and int(line[0]) <= resume_step]
            self._file = self._path.open("w", newline="")
            self._lines = csv.writer(self._file)
            self._lines.writerows([["step", "name", "value"], *kept])

    def log(self, row: Mapping[str, Any]) -> None:
        with translate_errors(self._path, writing=True):
            self._lines.writerows([row["step"], name, repr(value)] for name, value in numbers(row))
            self._file.flush()

    def log_sample(self, row: Mapping[str, Any]) -> None:
        """Texts do not go into a table of numbers; ``samples.jsonl`` has them."""

    def close(self) -> None:
        with translate_errors(self._path, writing=True):
            self._file.close()
