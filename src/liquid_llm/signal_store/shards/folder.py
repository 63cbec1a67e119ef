"""Layout ``shards``, a folder: which shards are there, where each sample's record is, and reading through both.

    key         16 bytes of hash of a sample id, as two numbers: high and low
    row         a record's number, counted through all shards in the order of their names
    index       the keys of all samples, sorted, and the row of each. Where two shards have a record of one sample, the
                one whose name sorts last counts
    index file  the same in one file of the folder; the shards themselves remain the truth
    listing     one look at a folder. It never changes: a reader that learns that the folder has changed puts another in
                its place in a single assignment, so that threads in the middle of a look-up see the one or the other

A shard that the index file does not name is read from its own header. One that it names and that is gone means that the
file is out of date: everything is read from the headers, and keys found nowhere else are lost records. So writers may
add shards, and replace several by one, without agreeing with each other; the file only makes opening quick.

What is wrong with a folder concerns only the records it hits: those of a damaged shard are corrupt where an index still
knows them, those of a lost one are missing.
"""

from __future__ import annotations

import threading
import zlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from liquid_llm import storage
from liquid_llm.errors import StorageError
from liquid_llm.signal_store.layout import Contents, Found
from liquid_llm.signal_store.records import Record, RecordError, RecordMissingError, SignalIdentity
from liquid_llm.signal_store.shards.file import (
    Reader,
    ShardHeader,
    is_shard,
    read_array,
    read_ids,
    read_safetensors_header,
    read_shard_header,
    sample_key,
    save_safetensors,
    unpack_record,
)
from liquid_llm.signal_store.shards.remote import MappedFile, RemoteShard, ShardCache, open_shard
from liquid_llm.signal_store.shards.writer import ShardsWriter
from liquid_llm.storage import FileInfo

INDEX_FILE = "index.safetensors"
INDEX_VERSION = 1

T = TypeVar("T")
_ARRAYS = ("high", "low", "rows")
_LISTINGS = 5  # times that a folder is listed anew because files vanish meanwhile
_PACKED = 5  # times that a folder may be packed while one record is looked for
_READERS = 8  # shards whose headers are fetched at the same time
_OPEN_FILES = 256  # maps kept open, each with a file descriptor


# ---------------------------------------------------------------------------------------------------------------- index


class ShardEntry(NamedTuple):
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
        self.starts = _starts(self.shards)

    def __len__(self) -> int:
        return int(self.high.size)

    @property
    def superseded(self) -> int:
        """Records in these shards that a later one of the same sample hides."""
        return int(self.starts[-1]) - len(self)

    @property
    def shard_of(self) -> NDArray[np.int64]:
        """[samples], number of the shard of each."""
        return self.starts.searchsorted(self.rows, side="right") - 1

    def find(self, key: bytes) -> tuple[int, int] | None:
        """Number of the shard and of the record in it, or None."""
        high, low = int.from_bytes(key[:8], "big"), int.from_bytes(key[8:], "big")
        at = int(self.high.searchsorted(np.uint64(high)))
        while at < self.high.size and int(self.high[at]) == high:
            if int(self.low[at]) == low:
                return self.locate(int(self.rows[at]))
            at += 1
        return None

    def locate(self, row: int) -> tuple[int, int]:
        """Number of the shard, and of the record in it, of a row."""
        shard = int(self.starts.searchsorted(row, side="right")) - 1
        return shard, row - int(self.starts[shard])

    def rows_of(self, shard: int) -> NDArray[np.int64]:
        """Which records of a shard count, ascending."""
        begin, end = int(self.starts[shard]), int(self.starts[shard + 1])
        mine = self.rows[(self.rows >= begin) & (self.rows < end)].astype(np.int64)
        return np.sort(mine - begin)

    def part(self, names: Collection[str]) -> ShardIndex:
        """What is known of some of the shards, for the ones that can no longer be asked."""
        chosen = [number for number, entry in enumerate(self.shards) if entry.name in names]
        entries = [self.shards[number] for number in chosen]
        moved = np.zeros(len(self.shards), np.int64)
        moved[chosen] = _starts(entries)[:-1] - self.starts[chosen]
        shards = self.shard_of
        mine = np.isin(shards, chosen)
        rows = (self.rows + moved[shards])[mine].astype(np.uint32)
        return ShardIndex(entries, self.high[mine], self.low[mine], rows)

    def lost(self, gone: Iterable[str], now: ShardIndex) -> int:
        """How many samples this index has in shards that are gone and ``now`` does not know."""
        names = set(gone)
        lost = np.array([entry.name in names for entry in self.shards], bool)
        chosen = np.flatnonzero(lost[self.shard_of])
        # The high half decides but for one pair in 10^19.
        return int(chosen.size - np.count_nonzero(np.isin(self.high[chosen], now.high)))


def build_index(tables: Iterable[tuple[ShardEntry, NDArray[np.uint64]]], base: ShardIndex | None = None) -> ShardIndex:
    """An index of shards, each with its keys [records, 2] in the order of its records, and of those in ``base``."""
    new = list(tables)
    old = () if base is None else base.shards
    shards = sorted([*old, *(entry for entry, _ in new)])
    starts = _starts(shards)
    begin = {entry.name: int(first) for entry, first in zip(shards, starts[:-1], strict=True)}
    keys = [np.zeros((0, 2), np.uint64), *(table for _, table in new)]
    rows = [np.zeros(0, np.int64), *(begin[entry.name] + np.arange(entry.num_records) for entry, _ in new)]
    if base is not None and len(base):
        moved = np.array([begin[entry.name] for entry in old]) - base.starts[:-1]
        keys.append(np.stack([base.high, base.low], axis=1))
        rows.append(base.rows + moved[base.shard_of])
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


def index_bytes(index: ShardIndex) -> bytes:
    """The index file."""
    arrays = {name: np.ascontiguousarray(getattr(index, name)) for name in _ARRAYS}
    values = {"format_version": INDEX_VERSION, "shards": index.shards, "arrays_crc": _checksum(arrays.values())}
    return save_safetensors(arrays, values)


def read_index(read: Reader) -> ShardIndex:
    """An index file, given a way to read its bytes ``[begin, end)``; the arrays are views of what that returns.

    Raises:
        RecordError: it is damaged, or of a newer program. The shards are then read without it.
    """
    try:
        values, spans = read_safetensors_header(read)
        if int(values["format_version"]) > INDEX_VERSION:
            raise RecordError(f"index format {values['format_version']}, this program reads {INDEX_VERSION}")
        arrays = [read_array(read, spans[name]) for name in _ARRAYS]
        if _checksum(arrays) != values["arrays_crc"] or len({array.size for array in arrays}) != 1:
            raise RecordError("its checksum does not match")
        entries = [ShardEntry(*entry) for entry in values["shards"]]
        if not all(
            isinstance(one.name, str) and 0 <= one.size < 2**63 and 0 <= one.num_records < 2**32 for one in entries
        ):
            raise RecordError("it names what are no shards")
        index = ShardIndex(entries, *arrays)
        if len(index) and int(index.rows.max()) >= int(index.starts[-1]):
            raise RecordError("it names records that its shards do not have")
        return index
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, OverflowError, OSError) as error:
        raise RecordError("it is damaged") from error


def write_index(uri: str) -> None:
    """Publish the index of what is in folder ``uri`` now, where it is not there already. Raises StorageError."""
    layout = ShardsLayout(uri, storage.list_files(uri))
    if layout.listing.index_due:
        storage.write_bytes(storage.join(uri, INDEX_FILE), index_bytes(layout.listing.index))
    layout.close()


def _checksum(arrays: Iterable[NDArray[np.unsignedinteger]]) -> int:
    checksum = 0
    for array in arrays:
        checksum = zlib.crc32(array.data, checksum)
    return checksum


def _starts(shards: Sequence[ShardEntry]) -> NDArray[np.int64]:
    """[shards + 1], the row at which each shard begins, and their number."""
    return np.concatenate([[0], np.cumsum([entry.num_records for entry in shards], dtype=np.int64)]).astype(np.int64)


# -------------------------------------------------------------------------------------------------------------- listing


@dataclass
class Listing:
    """A folder of shards as it was at one moment, and what was found wrong with it.

    Attributes:
        files: the shards by name, ordered; those that could not be read too.
        index_info: the index file, where there is one.
        index: where each sample's record is; it names nothing that is not in ``files``.
        unindexed: shards that the index file does not name.
        damaged: shard -> what is wrong with its header; only of shards that no index knows.
        truncated: shards that are shorter than they were written.
        gone: shards that the index file names and that are not there.
        lost: samples that had a record in those and have none elsewhere.
        index_problem: why the index file could not be used, or "".
    """

    files: dict[str, FileInfo] = field(default_factory=dict)
    index_info: FileInfo | None = None
    index: ShardIndex = field(default_factory=lambda: build_index([]))
    unindexed: list[str] = field(default_factory=list)
    damaged: dict[str, str] = field(default_factory=dict)
    truncated: list[str] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)
    lost: int = 0
    index_problem: str = ""

    @property
    def index_due(self) -> bool:
        """Whether the index file is missing, damaged or does not name what can be read."""
        return bool(self.index.shards) and bool(self.gone or set(self.unindexed) - self.damaged.keys())

    def problems(self) -> list[str]:
        """In words; nothing for shards that no index names yet, which is usual while a capture runs."""
        found = []
        if self.damaged:
            name, why = next(iter(self.damaged.items()))
            found.append(
                f"{_shards(len(self.damaged))} cannot be read, the first {name} ({why}):"
                " copy the store again, or capture again, after that such a file may be removed"
            )
        if self.truncated:
            verb = "is" if len(self.truncated) == 1 else "are"
            found.append(
                f"{_shards(len(self.truncated))} {verb} truncated, the first {self.truncated[0]}:"
                " copy the store again, or capture again"
            )
        if self.gone and self.lost:
            verb = "is" if len(self.gone) == 1 else "are"
            lost = "1 sample has lost its record" if self.lost == 1 else f"{self.lost} samples have lost their record"
            found.append(f"{_shards(len(self.gone))} of the index {verb} not there, the first {self.gone[0]}: {lost}")
        if self.index_problem:
            found.append(f"{INDEX_FILE} is not used ({self.index_problem}): the shards are read without it")
        return found


def take_listing(uri: str, infos: Iterable[FileInfo], cache: ShardCache) -> Listing:
    """Take note of the files of a folder; list them again where some vanish meanwhile, replaced by a writer.

    Raises:
        StorageError: a file that is there cannot be read.
    """
    for _ in range(_LISTINGS):
        listing, vanished = _list(uri, {info.name: info for info in infos}, cache)
        if not vanished:
            break
        infos = storage.list_files(uri)
    return listing


def _list(uri: str, infos: dict[str, FileInfo], cache: ShardCache) -> tuple[Listing, bool]:
    """One attempt, and whether a shard was listed and then not there."""
    found = Listing({name: info for name, info in sorted(infos.items()) if is_shard(name)}, infos.get(INDEX_FILE))
    sizes = {name: info.size for name, info in found.files.items()}
    known: ShardIndex | None = None
    if found.index_info is not None:
        try:
            known = _index_file(found.index_info)
            found.gone = [entry.name for entry in known.shards if entry.name not in sizes]
            found.truncated = [entry.name for entry in known.shards if sizes.get(entry.name, entry.size) < entry.size]
        except RecordError as error:
            found.index_problem = str(error)
    base = None if found.gone else known
    named = set() if base is None else {entry.name for entry in base.shards}
    unnamed = [name for name in found.files if name not in named]
    tables = []
    vanished = False
    for name, table in zip(unnamed, _tables([found.files[name] for name in unnamed], cache), strict=True):
        if isinstance(table, RecordError):
            found.damaged[name] = str(table)
        elif table is None:
            vanished = True
        else:
            tables.append(table)
            if sizes[name] < table[0].size and name not in found.truncated:
                found.truncated.append(name)
    if known is not None and found.gone:
        # What an index that is out of date says of shards with damaged headers: nothing else can tell.
        unreadable = found.damaged.keys() & {entry.name for entry in known.shards}
        found.damaged = {name: why for name, why in found.damaged.items() if name not in unreadable}
        base = known.part(unreadable)
        unnamed = [name for name in unnamed if name not in unreadable]
    found.unindexed = unnamed
    found.index = base if base is not None and not tables else build_index(tables, base)
    if known is not None and found.gone:
        found.lost = known.lost(found.gone, found.index)
    return found, vanished


def _index_file(info: FileInfo) -> ShardIndex:
    if storage.is_remote(info.uri):
        data = storage.read_bytes(info.uri)
        return read_index(lambda begin, end: data[begin:end])
    view = MappedFile(storage.local_path(info.uri)).view
    return read_index(view)  # type: ignore[arg-type]  # a view serves as bytes, without a copy of the arrays


Table: TypeAlias = tuple[ShardEntry, NDArray[np.uint64]]


def _tables(infos: Sequence[FileInfo], cache: ShardCache) -> list[Table | RecordError | None]:
    """The keys of shards from their own headers, or what is wrong with a header; None where a shard has gone."""

    def read_table(info: FileInfo) -> Table | RecordError | None:
        try:
            read = open_shard(info, cache).header
            header = read_shard_header(read, info.size)
            return ShardEntry(info.name, header.size, header.num_records), keys_of(read_ids(header, read))
        except StorageError:
            if storage.exists(info.uri):
                raise
            return None
        except RecordError as error:
            return error

    if len(infos) < 2 or not storage.is_remote(infos[0].uri):
        return list(map(read_table, infos))
    with ThreadPoolExecutor(_READERS, "shards") as threads:
        return list(threads.map(read_table, infos))


def _shards(count: int) -> str:
    return "1 shard" if count == 1 else f"{count} shards"


# -------------------------------------------------------------------------------------------------------------- reading


class _Open(NamedTuple):
    """A shard in use."""

    header: ShardHeader
    read: Reader


class ShardsLayout:
    """Records of one folder of shards, local or behind any URL; see ``layout.Layout``."""

    name = "shards"

    def __init__(self, uri: str, infos: Iterable[FileInfo], cache: ShardCache | None = None) -> None:
        self._uri = uri
        self._cache = cache or ShardCache()
        self._lock = threading.Lock()
        self._listing_again = threading.Lock()
        self._open: OrderedDict[str, _Open] = OrderedDict()
        self.listing = take_listing(uri, infos, self._cache)

    def __len__(self) -> int:
        return len(self.listing.index)

    @property
    def superseded(self) -> int:
        return self.listing.index.superseded

    def is_empty(self) -> bool:
        return not len(self)

    def counts(self) -> dict[str, int]:
        return {"records": len(self)}

    def has(self, sample_id: str, shard: str | None = None) -> bool:
        return self.listing.index.find(sample_key(sample_id)) is not None

    def problems(self) -> list[str]:
        return self.listing.problems()

    def read(self, sample_id: str, shard: str | None = None) -> Record:
        left = _PACKED
        while True:
            listing = self.listing  # another thread may replace it at any moment
            entry, row = self._locate(listing.index, sample_id)
            try:
                return self._read(listing.files[entry.name], row, sample_id)
            except StorageError:
                left -= 1
                if not left or storage.exists(listing.files[entry.name].uri):
                    raise
            with self._listing_again:  # somebody packed the folder: the record lies in another shard now
                if self.listing is listing:
                    self.listing = take_listing(self._uri, storage.list_files(self._uri), self._cache)

    def records(self, of: Collection[str] | None = None) -> Iterator[Found]:
        """See ``Layout``. Remote shards are fetched whole, one after the other, those without live records not.

        Args:
            of: names of the shards whose records are wanted, if not of all.
        """
        listing = self.listing
        for number, entry in enumerate(listing.index.shards):
            rows = listing.index.rows_of(number).tolist() if of is None or entry.name in of else []
            if not rows:
                continue
            try:
                read = self._whole(listing.files[entry.name])
                header = read_shard_header(read, entry.size)
                ids = read_ids(header, read)
            except RecordError as error:
                yield entry.name, error
                continue
            for row in rows:
                yield ids[row], _or_error(unpack_record, header, ids[row], read(*header.span(row)))
        for name, why in listing.damaged.items():
            yield name, RecordError(why)

    def draw(self, count: int, seed: int) -> Iterator[Found]:
        listing = self.listing
        index = listing.index
        drawn = np.random.default_rng(seed).permutation(len(index))[:count]
        found = sorted(index.locate(int(row)) for row in index.rows[drawn])
        for number, mine in groupby(found, key=lambda one: one[0]):
            info = listing.files[index.shards[number].name]
            try:
                read = open_shard(info, self._cache).header
                ids = read_ids(read_shard_header(read, index.shards[number].size), read)
            except RecordError as error:
                yield info.name, error
                continue
            for _, row in mine:
                yield ids[row], _or_error(self._read, info, row, ids[row])

    def contents(self) -> Contents:
        """See ``Layout``. Only headers are read; what is cut off a shard is missing from its parts in proportion."""
        listing = self.listing
        found = Contents(len(listing.files) + (listing.index_info is not None), damaged=dict(listing.damaged))
        for number, entry in enumerate(listing.index.shards):
            rows, size = listing.index.rows_of(number), listing.files[entry.name].size
            shard = _or_error(self._shard, listing.files[entry.name])
            if isinstance(shard, RecordError):
                found.damaged[entry.name] = str(shard)
                found.unreadable += rows.size
                continue
            header, payload_bytes = shard.header, 0
            for type, counts in header.by_type.items():
                found.types.setdefault(type, Counter()).update(counts)
                payload_bytes += counts["payload_bytes"]
            found.unreadable += int(np.count_nonzero(header.begin + header.ends[rows] > size))
            record_bytes = min(size, header.size) - header.begin
            payload_bytes = payload_bytes * record_bytes // max(1, header.size - header.begin)
            found.parts["payload"] += payload_bytes
            found.parts["record headers"] += record_bytes - payload_bytes
            found.parts["sample ids"] += header.ids[1] - header.ids[0]
            found.parts["shard headers and tables"] += header.begin - (header.ids[1] - header.ids[0])
        found.parts["index"] = listing.index_info.size if listing.index_info is not None else 0
        found.unreadable_bytes = sum(listing.files[name].size for name in found.damaged)
        return found

    def replaceable(self, left_out: set[str]) -> list[FileInfo]:
        """See ``Layout``: shards that hold nothing of what was left out, and empty files."""
        index, kept = self.listing.index, set(left_out)
        for found in map(index.find, map(sample_key, left_out)):
            kept |= set() if found is None else {index.shards[found[0]].name}
        known = [entry.name for entry in index.shards if entry.name not in kept]
        empty = [name for name in self.listing.damaged if not self.listing.files[name].size]
        return [self.listing.files[name] for name in known + empty if name in self.listing.files]

    def writer(self, identity: SignalIdentity, *, shard_bytes: int, part_seconds: float) -> ShardsWriter:
        return ShardsWriter(
            self._uri,
            identity,
            self.listing.files,
            publish_index=write_index,
            index_due=self.listing.index_due,
            shard_bytes=shard_bytes,
            part_seconds=part_seconds,
        )

    def close(self) -> None:
        """Close the files and remove a temporary cache."""
        with self._lock:
            self._open.clear()
        self._cache.close()

    def _locate(self, index: ShardIndex, sample_id: str) -> tuple[ShardEntry, int]:
        found = index.find(sample_key(sample_id))
        if found is None:
            raise RecordMissingError(f"no record in {self._uri}")
        return index.shards[found[0]], found[1]

    def _read(self, info: FileInfo, row: int, sample_id: str) -> Record:
        shard = self._shard(info)
        if row >= shard.header.num_records:
            raise RecordError(f"shard {info.name} has {shard.header.num_records} records, number {row} wanted")
        try:
            return self._unpack(shard, info.name, row, sample_id)
        except RecordError:
            if not (isinstance(shard.read, RemoteShard) and shard.read.drop_copy()):
                raise
        return self._unpack(shard, info.name, row, sample_id)

    def _unpack(self, shard: _Open, name: str, row: int, sample_id: str) -> Record:
        begin, end = shard.header.span(row)
        data = shard.read(begin, end)
        if len(data) < end - begin:
            raise RecordError(f"shard {name} is truncated: {end} bytes wanted of {shard.header.size}")
        return unpack_record(shard.header, sample_id, data)

    def _shard(self, info: FileInfo) -> _Open:
        with self._lock:
            shard = self._open.get(info.name)
            if shard is not None:
                self._open.move_to_end(info.name)
                return shard
        reader = open_shard(info, self._cache)
        try:
            shard = _Open(read_shard_header(reader.header, info.size), reader)
        except RecordError as error:
            raise RecordError(f"shard {info.name} cannot be read: {error}") from error
        if isinstance(reader, RemoteShard):
            reader.drop_header()
        with self._lock:
            shard = self._open.setdefault(info.name, shard)
            while isinstance(reader, MappedFile) and len(self._open) > _OPEN_FILES:
                self._open.popitem(last=False)
        return shard

    def _whole(self, info: FileInfo) -> Reader:
        reader = open_shard(info, self._cache)
        if isinstance(reader, MappedFile):
            return reader
        if (copy := self._cache.find(info)) is not None:
            return copy
        data = storage.read_bytes(info.uri)
        return lambda begin, end: data[begin:end]


def _or_error(read: Callable[..., T], *arguments: object) -> T | RecordError:
    try:
        return read(*arguments)
    except RecordError as error:
        return error
