"""Capture unit by unit: which data files there are, which of them are a task's, and when one has to be captured.

    unit     one data file of a manifest, whose signal is captured, and marked as complete, by itself
    number   of a unit among all of a manifest's, in the order of its lines and of the names that a line matches
    share    ``(index, count)``: unit ``number`` is of the task ``number mod count``

Which units a task takes follows from its index alone, so any scheduler that gives each of its tasks a number will do,
and nobody waits for a lock. Neighbours differ in tasks: types, and long files among short ones, spread over all.

What is known of all units is their files' names, one after the other; only a task's own are kept. A line that names a
file, and no pattern, is not even looked at by others than the task whose unit it is.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from liquid_llm.capture.job import CaptureSummary
from liquid_llm.data.manifest import entry_files, shard_name
from liquid_llm.data.types import ManifestEntry
from liquid_llm.storage import FileInfo

_PATTERN = re.compile(r"[*?\[]")


@dataclass(frozen=True, slots=True)
class Unit:
    """One data file.

    Attributes:
        number: among all units of the manifest.
        type: of its texts.
        file: its URI.
        name: what it is called in a store.
        where: the line of the manifest, for messages.
    """

    number: int
    type: str
    file: str
    name: str
    where: str = ""


def list_units(entries: Iterable[ManifestEntry], manifest: str) -> Iterator[Unit]:
    """All units of a manifest's entries, one after the other. Raises DataError: a pattern matches no file."""
    number = 0
    seen: set[tuple[str, str]] = set()
    for entry in entries:
        if (entry.path, entry.type) in seen:
            continue  # listed twice, to be drawn more often
        seen.add((entry.path, entry.type))
        for file in entry_files(entry) if _PATTERN.search(entry.path) else [entry.path]:
            yield Unit(number, entry.type, file, shard_name(file, manifest), entry.where)
            number += 1


def claim(units: Iterable[Unit], share: tuple[int, int]) -> tuple[list[Unit], int]:
    """The units of one task, and the number of all."""
    index, count = share
    mine, total = [], 0
    for unit in units:
        total += 1
        if unit.number % count == index:
            mine.append(unit)
    return mine, total


def fingerprint(source: FileInfo, decided: Sequence[Any]) -> str:
    """What changes whenever the records of a unit would: 32 hex digits.

    Args:
        source: the data file, whose place is left out: it may be moved.
        decided: plain values: teacher, codec, framing, window and what else its records follow from.
    """
    known = json.dumps([source.size, source.version, *decided], sort_keys=True)
    return hashlib.blake2b(known.encode(), digest_size=16).hexdigest()


@dataclass
class UnitsSummary(CaptureSummary):
    """What a task did.

    Attributes:
        units: this task's.
        units_complete: of them, those that are complete now.
        units_skipped: of these, those that were complete before.
        units_of_all: units of all tasks.
        broken: units that could not be captured -> why: the file has to be mended. The others are.
    """

    units: int = 0
    units_complete: int = 0
    units_skipped: int = 0
    units_of_all: int = 0
    broken: dict[str, str] = field(default_factory=dict)

    def add(self, one: CaptureSummary) -> None:
        """Count in what came of one unit."""
        self.add_failures(one)
        self.consumers = self.consumers or one.consumers
        self.interrupted |= one.interrupted
        for name in ("written", "skipped", "too_large", "tokens", "positions", "padded_tokens", "bytes", "seconds"):
            setattr(self, name, getattr(self, name) + getattr(one, name))
