"""Layout ``units``: a store that is filled shard by shard of its data, and looked into only where it is read.

    unit     what is captured at once: one file of a manifest, by its name there (``data.manifest.shard_name``)
    folder   ``units/NAME/``: the unit's records, as the shards of a small store of their own
    marker   ``done/NAME.json``: the unit is complete. It names what it was made of and the files that hold it, and is
             written last: what it says is there, and work on other input or with another setting is not taken for it
    plan     ``plan.json``: how many units there are to be, as whoever captured last has counted them

A sample says which file it is of, so no index of all records is needed: opening such a store costs a listing of its
markers, and a unit is opened when its first record is wanted. Few are kept open. A unit without a marker serves what
records it has: each says itself whether it is of the sample at hand.

Any number of processes may work on any units, the same one too: files appear whole, of one sample the record that
sorts last counts, and the marker that was written last says what is there.
"""

from __future__ import annotations

import json
import logging
import random
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from liquid_llm import storage
from liquid_llm.errors import SignalError
from liquid_llm.parsing import ParseError, parse_json
from liquid_llm.signal_store.description import read_store_file
from liquid_llm.signal_store.layout import Contents, Found
from liquid_llm.signal_store.records import Record, RecordMissingError, SignalIdentity
from liquid_llm.signal_store.shards.file import is_shard
from liquid_llm.signal_store.shards.folder import ShardsLayout
from liquid_llm.signal_store.shards.remote import ShardCache
from liquid_llm.signal_store.shards.replacing import replace_damaged
from liquid_llm.signal_store.shards.writer import ShardsWriter
from liquid_llm.storage import FileInfo

log = logging.getLogger(__name__)

MARKER_VERSION = 1
OPEN_UNITS = 64
_UNITS, _DONE, _PLAN, _SUFFIX = "units", "done", "plan.json", ".json"
_DRAWN_UNITS = 16  # that a sample of all records is drawn from: each costs its own opening


def unit_folder(uri: str, unit: str) -> str:
    """Where the records of a unit of store ``uri`` lie."""
    return storage.join(uri, _UNITS, unit)


# -------------------------------------------------------------------------------------------------------------- markers


class Marker(NamedTuple):
    """What is said of a complete unit.

    Attributes:
        fingerprint: of its input and of all that decides what its records are.
        input: the data file: ``uri``, ``size`` and ``version``.
        counts: ``records``, ``tokens`` and ``positions`` that it holds, as far as one capture has counted them.
        files: name -> size, of its shards.
    """

    fingerprint: str
    input: Mapping[str, Any]
    counts: Mapping[str, int]
    files: Mapping[str, int]


def write_marker(uri: str, unit: str, fingerprint: str, source: FileInfo) -> Marker:
    """Say that a unit is complete, after a look at what is there; shards that were cut or damaged are replaced by then.

    Raises:
        StorageError: its files cannot be read or written.
        SignalError: the description of the store is damaged.
    """
    folder = unit_folder(uri, unit)
    infos = storage.list_files(folder)
    layout = ShardsLayout(folder, infos)
    if layout.problems() and replace_damaged(folder, layout, read_store_file(uri).identity):
        infos = storage.list_files(folder)
        layout = ShardsLayout(folder, infos)
    types = sum(layout.contents().types.values(), Counter())
    layout.close()
    marker = Marker(
        fingerprint,
        {"uri": source.uri, "size": source.size, "version": source.version},
        {"records": len(layout), "tokens": types["tokens"], "positions": types["positions"]},
        {info.name: info.size for info in infos if is_shard(info.name)},
    )
    data = json.dumps({"format_version": MARKER_VERSION, "unit": unit, **marker._asdict()}, indent=1)
    storage.write_bytes(_marker_uri(uri, unit), data.encode())
    return marker


def read_marker(uri: str, unit: str) -> Marker | None:
    """What is said of a unit; None where it is not complete, or its marker is damaged or of a newer program."""
    place = _marker_uri(uri, unit)
    if not storage.exists(place):
        return None
    try:
        values = parse_json(storage.read_small(place))
        if int(values["format_version"]) > MARKER_VERSION:
            return None
        counts = {str(name): int(count) for name, count in values["counts"].items()}
        files = {str(name): int(size) for name, size in values["files"].items()}
        if min([0, *counts.values(), *files.values()]) < 0:
            return None
        return Marker(str(values["fingerprint"]), dict(values["input"]), counts, files)
    except (ParseError, KeyError, TypeError, ValueError, AttributeError, OverflowError):
        return None


def why_to_do(uri: str, unit: str, fingerprint: str) -> str:
    """Why a unit has to be captured, in words; "" where it is complete."""
    marker = read_marker(uri, unit)
    if marker is None:
        return "it is not complete"
    if marker.fingerprint != fingerprint:
        return "its data or how it is read have changed since it was captured"
    return _lost_files(uri, unit, marker)


def find_damaged(uri: str) -> Iterator[tuple[str, str]]:
    """Units of a store that are said to be complete and are not: each one's name, and why; a look at all files."""
    for unit in sorted(_marked(uri)):
        marker = read_marker(uri, unit)
        why = "its marker is damaged" if marker is None else _lost_files(uri, unit, marker)
        if why:
            yield unit, why


def _lost_files(uri: str, unit: str, marker: Marker) -> str:
    """What is missing of the files that a marker names, in words; "" where all are there, each as large as it was."""
    there = {info.name: info.size for info in storage.list_files(unit_folder(uri, unit))}
    lost = [name for name, size in marker.files.items() if there.get(name) != size]
    return (
        f"{len(lost)} of its files {'is' if len(lost) == 1 else 'are'} lost or cut, the first {lost[0]}" if lost else ""
    )


def write_plan(uri: str, num_units: int) -> None:
    """Say how many units a store is to have, where that is not what it says. Raises StorageError."""
    if read_plan(uri) != num_units:
        storage.write_bytes(storage.join(uri, _PLAN), json.dumps({"units": num_units}).encode())


def read_plan(uri: str) -> int | None:
    """How many units a store is to have; None where nobody has said."""
    place = storage.join(uri, _PLAN)
    try:
        planned = int(parse_json(storage.read_small(place))["units"]) if storage.exists(place) else -1
        return planned if planned >= 0 else None
    except (ParseError, KeyError, TypeError, ValueError, OverflowError):
        return None


def _marker_uri(uri: str, unit: str) -> str:
    return storage.join(uri, _DONE, unit + _SUFFIX)


def _marked(uri: str) -> frozenset[str]:
    """The units that have a marker, by a listing."""
    listed = storage.list_files(storage.join(uri, _DONE))
    return frozenset(info.name.removesuffix(_SUFFIX) for info in listed if info.name.endswith(_SUFFIX))


# -------------------------------------------------------------------------------------------------------------- reading


class UnitsLayout:
    """Records of a store of units, local or behind any URL; see ``layout.Layout``.

    A sample of which nobody says the file is looked for in all units, one after the other.

    Args:
        infos: of no use here; the folder is not listed.
        open_units: most units whose tables are in memory.
    """

    name = "units"

    def __init__(
        self,
        uri: str,
        infos: Iterable[FileInfo] = (),
        cache: ShardCache | None = None,
        *,
        open_units: int = OPEN_UNITS,
    ) -> None:
        self._uri = uri
        self._cache = cache or ShardCache()
        self._most = open_units
        self._lock = threading.Lock()
        self._open: OrderedDict[str, ShardsLayout] = OrderedDict()
        self.complete = _marked(uri)

    def __len__(self) -> int:
        """As the markers say, which are all read: a request each."""
        markers = (read_marker(self._uri, unit) for unit in sorted(self.complete))
        return sum(marker.counts.get("records", 0) for marker in markers if marker is not None)

    @property
    def num_open(self) -> int:
        """Units whose tables are in memory."""
        return len(self._open)

    @property
    def superseded(self) -> int:
        return sum(self._unit(name).superseded for name in self._names())

    def is_empty(self) -> bool:
        return not self.complete and not self._names()

    def counts(self) -> dict[str, int]:
        planned = read_plan(self._uri)
        return {"units": len(self.complete), **({} if planned is None else {"units_planned": planned})}

    def has(self, sample_id: str, shard: str | None = None) -> bool:
        return any(self._unit(name).has(sample_id) for name in self._places(shard))

    def read(self, sample_id: str, shard: str | None = None) -> Record:
        for name in self._places(shard):
            unit = self._unit(name)
            if unit.has(sample_id):
                return unit.read(sample_id)
        raise RecordMissingError(f"no record in {self._uri if shard is None else unit_folder(self._uri, shard)}")

    def records(self) -> Iterator[Found]:
        for name in self._names():
            yield from self._unit(name).records()

    def draw(self, count: int, seed: int) -> Iterator[Found]:
        """See ``Layout``; from a few units, which are drawn at random."""
        names = self._names()
        random.Random(seed).shuffle(names)
        left, each = count, -(-count // max(1, min(len(names), _DRAWN_UNITS)))
        for number, name in enumerate(names):
            if left <= 0:
                return
            for found in self._unit(name).draw(min(each, left), seed + number):
                left -= 1
                yield found

    def contents(self) -> Contents:
        found = Contents(len(self.complete))
        for name in self._names():
            one = self._unit(name).contents()
            found.files += one.files
            for type, counts in one.types.items():
                found.types.setdefault(type, Counter()).update(counts)
            found.parts.update(one.parts)
            found.unreadable += one.unreadable
            found.unreadable_bytes += one.unreadable_bytes
            found.damaged |= {f"{name}/{file}": why for file, why in one.damaged.items()}
        return found

    def problems(self) -> list[str]:
        """Nothing: what is wrong with a unit is said when it is opened."""
        return []

    def replaceable(self, left_out: set[str]) -> list[FileInfo]:
        return []

    def writer(self, identity: SignalIdentity, *, shard_bytes: int, part_seconds: float) -> ShardsWriter:
        """Raises SignalError: a store of units is written unit by unit."""
        raise SignalError("a store of units is captured unit by unit", where=self._uri, remedy="give --unit=0/1")

    def close(self) -> None:
        with self._lock:
            self._open.clear()
        self._cache.close()

    def _names(self) -> list[str]:
        """All units that have a folder, complete or not."""
        return storage.list_folders(storage.join(self._uri, _UNITS))

    def _places(self, shard: str | None) -> list[str]:
        return self._names() if shard is None else [shard]

    def _unit(self, name: str) -> ShardsLayout:
        with self._lock:
            unit = self._open.get(name)
            if unit is not None:
                self._open.move_to_end(name)
                return unit
        folder = unit_folder(self._uri, name)
        unit = ShardsLayout(folder, storage.list_files(folder), self._cache)  # beside other threads, which need others
        for problem in unit.problems():
            log.warning("%s: %s", folder, problem)
        with self._lock:
            unit = self._open.setdefault(name, unit)
            while len(self._open) > self._most:
                self._open.popitem(last=False)  # not closed: a thread may be reading there
        return unit
