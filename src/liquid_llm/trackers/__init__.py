"""Where a run's metric rows go besides ``metrics.jsonl``: one adapter for each tool that shows them.

A tracker is a class in a file of its own and a line in ``registry.TRACKERS``. It is made with
``(run_dir, resume_step)``: the run directory, and the finished steps of the checkpoint being continued, whose later
rows are about to be written again (None: the run starts afresh).

A tool that fails is said once and gets no more rows: it never stops a run. What the disk refuses does, as it is the
run's own files that could not be written next.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from liquid_llm import registry
from liquid_llm.errors import StorageError
from liquid_llm.masking import process_masker
from liquid_llm.parsing import ParseError, parse_json
from liquid_llm.storage import publish, translate_errors

RUNS_FILE = "trackers.json"  # under which names trackers know this run; goes where its rows go
PROJECT = "liquid-llm"  # where the tool's own variable names no other

_log = logging.getLogger(__name__)


class Tracker(Protocol):
    """One tool that a run's rows are handed to, in order, by the process that writes ``metrics.jsonl``."""

    def log(self, row: Mapping[str, Any]) -> None:
        """Take one row as ``metrics.jsonl`` has it: ``kind``, ``step``, plain values and mappings of these.

        Raises:
            StorageError: it could not be written.
        """

    def log_sample(self, row: Mapping[str, Any]) -> None:
        """Take what the student said to a prompt, as ``samples.jsonl`` has it: ``step``, ``prompt``, ``text``."""

    def close(self) -> None:
        """Write what is pending, the run's report where there is one, and let go."""


def open_trackers(names: Sequence[str], run_dir: str | Path, resume_step: int | None) -> list[Tracker]:
    """The trackers of these names (keys of ``registry.TRACKERS``), ready for rows after ``resume_step``."""
    return [_Guarded(name, Path(run_dir), resume_step) for name in names]


class _Guarded:
    """A tracker whose failures, making it included, are said and end it alone."""

    def __init__(self, name: str, run_dir: Path, resume_step: int | None) -> None:
        self._name = name
        self._tracker: Any = None
        self._do(lambda: self._open(run_dir, resume_step))

    def log(self, row: Mapping[str, Any]) -> None:
        self._do(lambda: self._tracker.log(row))

    def log_sample(self, row: Mapping[str, Any]) -> None:
        self._do(lambda: self._tracker.log_sample(row))

    def close(self) -> None:
        self._do(lambda: self._tracker.close())

    def _open(self, run_dir: Path, resume_step: int | None) -> None:
        self._tracker = False  # until it is there
        self._tracker = registry.load(registry.TRACKERS, self._name)(run_dir, resume_step)

    def _do(self, action: Callable[[], None]) -> None:
        if self._tracker is False:
            return
        try:
            action()
        except StorageError:
            raise
        except Exception as error:  # noqa: BLE001  what a foreign tool throws is no reason to end a run
            self._tracker = False
            words = process_masker().text(f"{type(error).__name__}: {error}")
            _log.warning("the tracker %s failed and gets nothing more; the run goes on: %.500s", self._name, words)


def numbers(row: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """All numbers of a row under flat names: ``train/loss``, ``train/by_type/lm/ce``."""
    yield from _flatten({key: value for key, value in row.items() if key != "step"}, str(row["kind"]))


def _flatten(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}/{key}")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}/{key}", float(value)


def configuration(run_dir: Path) -> dict[str, Any]:
    """What the run was made of, as its provenance has it, secrets masked; empty where it has none."""
    return _read_mapping(run_dir / "provenance" / "config.json")


def report_of(run_dir: Path) -> Path | None:
    """The page of the run, where it has come to one."""
    path = run_dir / "report.html"
    return path if path.is_file() else None


def earlier_run(run_dir: Path, tool: str, resume_step: int | None) -> str | None:
    """The name under which a tool knows the run that is gone on with; None where it begins, or the tool does."""
    if resume_step is None:
        return None
    name = _read_mapping(run_dir / RUNS_FILE).get(tool)
    return name if isinstance(name, str) else None


def remember_run(run_dir: Path, tool: str, name: str) -> None:
    """Keep that name, so that the run is one run to the tool too, however often it is continued."""
    path = run_dir / RUNS_FILE
    with translate_errors(path, writing=True), publish(path) as temporary:
        temporary.write_text(json.dumps({**_read_mapping(path), tool: name}, indent=1) + "\n")


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        found = parse_json(path.read_bytes())
    except (OSError, ParseError):
        return {}
    return dict(found) if isinstance(found, Mapping) else {}
