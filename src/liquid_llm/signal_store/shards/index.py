"""Layout ``shards``, finding a record: the keys of all samples, sorted, and where each one's record is.

    key         16 bytes of hash of a sample id, as two numbers: high and low
    row         a record's number, counted through all shards in the order of their names
    index file  keys and rows in one file of the folder; the shards themselves remain the truth

A shard that the index file does not name is read from its own front. One that it names and that is gone means that the
file is out of date: everything is read from the fronts, and keys found nowhere else are lost records. So writers may
add shards, and replace several by one, without agreeing with each other; the file only makes opening quick.

Where two shards have a record of one sample, the one whose name sorts last counts.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import astuple, dataclass

import numpy as np
from numpy.typing import NDArray

from liquid_llm.signal_store.records import RecordError
from liquid_llm.signal_store.shards.file import Reader, checked_text, read_array, read_safetensors_head, sample_key

INDEX_FILE = "index.safetensors"
INDEX_VERSION = 1

_METADATA = "liquid_llm"
_ARRAYS = ("high", "low", "rows")


@dataclass(frozen=True)
class ShardEntry:
    """A shard in an index: its file's name and size, and the number of its records."""

    name: str
    size: int
    num_records: int


class ShardIndex:
    """Where the records of some shards are. One row a sample; older records of a sample are not in it.

    Args:
        shards: in the order of their names.
        high, low: [samples] uint64, sorted as pairs.
        rows: [samples] uint32.
    """

    def __init__(
        self,
        shards: Sequence[ShardEntry],
        high: NDArray[np.uint64],
        low: NDArray[np.uint64],
        rows: NDArray[np.uint32],
    ) -> None:
        self.shards = tuple(shards)
        self.high, self.low, self.rows = high, low, rows
        self._starts = _starts(self.shards)

    def __len__(self) -> int:
        return int(self.high.size)

    @property
    def superseded(self) -> int:
        """Records in these shards that a later one of the same sample hides."""
        return int(self._starts[-1]) - len(self)

    def find(self, key: bytes) -> tuple[int, int] | None:
        """Number of the shard and of the record in it, or None."""
        high, low = int.from_bytes(key[:8], "big"), int.from_bytes(key[8:], "big")
        at = int(self.high.searchsorted(np.uint64(high)))
        while at < self.high.size and int(self.high[at]) == high:
            if int(self.low[at]) == low:
                return self.place(int(self.rows[at]))
            at += 1
        return None

    def place(self, row: int) -> tuple[int, int]:
        """Number of the shard, and of the record in it, of a row."""
        shard = int(self._starts.searchsorted(row, side="right")) - 1
        return shard, row - int(self._starts[shard])

    def rows_of(self, shard: int) -> NDArray[np.int64]:
        """Which records of a shard count, ascending."""
        begin, end = int(self._starts[shard]), int(self._starts[shard + 1])
        mine = self.rows[(self.rows >= begin) & (self.rows < end)].astype(np.int64)
        return np.sort(mine - begin)

    def keys(self) -> tuple[NDArray[np.uint64], NDArray[np.uint64], NDArray[np.int64]]:
        """High, low and number of the shard of each sample."""
        shards = self._starts.searchsorted(self.rows, side="right") - 1
        return self.high, self.low, shards.astype(np.int64)

    def part(self, names: Collection[str]) -> ShardIndex:
        """What is known of some of the shards, for the ones that can no longer be asked."""
        chosen = [number for number, entry in enumerate(self.shards) if entry.name in names]
        entries = [self.shards[number] for number in chosen]
        moved = np.zeros(len(self.shards), np.int64)
        moved[chosen] = _starts(entries)[:-1] - self._starts[chosen]
        high, low, shards = self.keys()
        mine = np.isin(shards, chosen)
        return ShardIndex(entries, high[mine], low[mine], (self.rows + moved[shards])[mine].astype(np.uint32))


def build_index(tables: Iterable[tuple[ShardEntry, NDArray[np.uint64]]], base: ShardIndex | None = None) -> ShardIndex:
    """An index of shards, each with its keys [records, 2] in the order of its records, and of those in ``base``."""
    new = list(tables)
    old = () if base is None else base.shards
    shards = sorted([*old, *(entry for entry, _ in new)], key=lambda entry: entry.name)
    starts = _starts(shards)
    begin = {entry.name: int(first) for entry, first in zip(shards, starts[:-1], strict=True)}
    keys = [table for _, table in new]
    rows = [begin[entry.name] + np.arange(entry.num_records) for entry, _ in new]
    if base is not None and len(base):
        moved = np.array([begin[entry.name] for entry in old]) - base._starts[:-1]
        keys.append(np.stack([base.high, base.low], axis=1))
        rows.append(base.rows + moved[base.keys()[2]])
    if not keys:
        keys, rows = [np.zeros((0, 2), np.uint64)], [np.zeros(0, np.int64)]
    all_keys, all_rows = np.concatenate(keys), np.concatenate(rows)
    order = np.lexsort((all_rows, all_keys[:, 1], all_keys[:, 0]))
    high, low, all_rows = all_keys[order, 0], all_keys[order, 1], all_rows[order]
    last = np.ones(high.size, bool)
    last[:-1] = (high[1:] != high[:-1]) | (low[1:] != low[:-1])
    return ShardIndex(shards, high[last], low[last], all_rows[last].astype(np.uint32))


def keys_of(sample_ids: Sequence[str]) -> NDArray[np.uint64]:
    """[ids, 2]: high and low of each."""
    data = b"".join(map(sample_key, sample_ids))
    return np.frombuffer(data, ">u8").reshape(-1, 2).astype(np.uint64)


def lost_keys(known: ShardIndex, gone: Iterable[str], now: ShardIndex) -> int:
    """How many samples ``known`` places in shards that are gone and ``now`` does not know."""
    names = set(gone)
    lost = np.array([entry.name in names for entry in known.shards], bool)
    high, low, shards = known.keys()
    chosen = np.flatnonzero(lost[shards])
    there = np.isin(high[chosen], now.high)  # the high half decides but for one pair in 10^19
    return int(chosen.size - np.count_nonzero(there)) if low.size else 0


def index_bytes(index: ShardIndex) -> bytes:
    """The index file."""
    from safetensors.numpy import save

    arrays = {name: np.ascontiguousarray(getattr(index, name)) for name in _ARRAYS}
    checksum = 0
    for array in arrays.values():
        checksum = zlib.crc32(array.data, checksum)
    values = {
        "format_version": INDEX_VERSION,
        "shards": [astuple(entry) for entry in index.shards],
        "arrays_crc": checksum,
    }
    text = json.dumps(values, sort_keys=True)
    return bytes(save(arrays, {_METADATA: f"{zlib.crc32(text.encode()):08x} {text}"}))


def read_index(read: Reader) -> ShardIndex:
    """An index file, given a way to read its bytes ``[begin, end)``; the arrays are views of what that returns.

    Raises:
        RecordError: it is damaged, or of a newer program. The shards are then read without it.
    """
    try:
        metadata, places = read_safetensors_head(read)
        values = json.loads(checked_text(metadata[_METADATA]))
        if int(values["format_version"]) > INDEX_VERSION:
            raise RecordError(f"index format {values['format_version']}, this program reads {INDEX_VERSION}")
        arrays = [read_array(read, places[name]) for name in _ARRAYS]
        checksum = 0
        for array in arrays:
            checksum = zlib.crc32(array.data, checksum)
        if checksum != values["arrays_crc"] or len({array.size for array in arrays}) != 1:
            raise RecordError("its checksum does not match")
        return ShardIndex([ShardEntry(*entry) for entry in values["shards"]], *arrays)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, OSError) as error:
        raise RecordError("it is damaged") from error


def _starts(shards: Sequence[ShardEntry]) -> NDArray[np.int64]:
    """[shards + 1], the row at which each shard begins, and their number."""
    return np.concatenate([[0], np.cumsum([entry.num_records for entry in shards], dtype=np.int64)]).astype(np.int64)
