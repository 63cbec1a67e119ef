"""Where a run's metric rows go besides ``metrics.jsonl``: one adapter for each tool that shows them.

A tracker is a class in a file of its own and a line in ``registry.TRACKERS``. It is made with
``(run_dir, resume_step)``: the run directory, and the finished steps of the checkpoint being continued, whose later
rows are about to be written again (None: the run starts afresh).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from liquid_llm import registry


class Tracker(Protocol):
    """One tool that a run's rows are handed to, in order, by the process that writes ``metrics.jsonl``."""

    def log(self, row: Mapping[str, Any]) -> None:
        """Take one row as ``metrics.jsonl`` has it: ``kind``, ``step``, plain values and mappings of these.

        Raises:
            StorageError: it could not be written.
        """

    def close(self) -> None:
        """Write what is pending and let go."""


def open_trackers(names: Sequence[str], run_dir: str | Path, resume_step: int | None) -> list[Tracker]:
    """The trackers of these names (keys of ``registry.TRACKERS``), ready for rows after ``resume_step``."""
    return [registry.load(registry.TRACKERS, name)(Path(run_dir), resume_step) for name in names]


def numbers(row: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """All numbers of a row under flat names: ``train/loss``, ``train/by_type/lm/ce``."""
    yield from _flatten({key: value for key, value in row.items() if key != "step"}, str(row["kind"]))


def _flatten(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}/{key}")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}/{key}", float(value)
