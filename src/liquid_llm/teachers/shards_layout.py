"""Layout ``shards``, reading: records of a folder of shards, local or behind any URL.

The folder has been listed once. What is wrong with it as a whole is kept in words (``problems``) and concerns only the
records it hits: those of a damaged shard are corrupt where an index still knows them, those of a lost one are missing.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from liquid_llm import storage
from liquid_llm.errors import StorageError
from liquid_llm.storage import FileInfo
from liquid_llm.teachers.records import Record, RecordError, RecordMissingError
from liquid_llm.teachers.shards import (
    PREFIX,
    SUFFIX,
    ShardHead,
    read_head,
    read_ids,
    sample_key,
    unpack_record,
)
from liquid_llm.teachers.shards_index import (
    INDEX_FILE,
    ShardEntry,
    ShardIndex,
    build_index,
    keys_of,
    lost_keys,
    read_index,
)
from liquid_llm.teachers.shards_remote import MappedFile, RemoteShard, ShardCache

_OPEN_FILES = 256  # maps kept open, each with a file descriptor
_LISTINGS = 5
_READERS = 8  # shards whose fronts are fetched at the same time

T = TypeVar("T")


@dataclass
class Condition:
    """What was found when a folder of shards was opened.

    Attributes:
        unindexed: shards that the index file does not name.
        damaged: shard -> what is wrong with its front; only of shards that no index knows.
        truncated: shards that are shorter than they were written.
        gone: shards that the index file names and that are not there.
        lost: samples that had a record in those and have none elsewhere.
        index_problem: why the index file could not be used, or "".
    """

    unindexed: list[str] = field(default_factory=list)
    damaged: dict[str, str] = field(default_factory=dict)
    truncated: list[str] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)
    lost: int = 0
    index_problem: str = ""

    def problems(self) -> list[str]:
        """In words; nothing for shards that no index names yet, which is usual while a capture runs."""
        found = []
        if self.damaged:
            name, why = next(iter(self.damaged.items()))
            found.append(
                f"{_shards(len(self.damaged))} cannot be read, the first {name} ({why}):"
                " capture again, after that such a file may be removed"
            )
        if self.truncated:
            verb = "is" if len(self.truncated) == 1 else "are"
            found.append(
                f"{_shards(len(self.truncated))} {verb} truncated, the first {self.truncated[0]}: capture again"
            )
        if self.gone and self.lost:
            verb = "is" if len(self.gone) == 1 else "are"
            lost = "1 sample has lost its record" if self.lost == 1 else f"{self.lost} samples have lost their record"
            found.append(f"{_shards(len(self.gone))} of the index {verb} not there, the first {self.gone[0]}: {lost}")
        if self.index_problem:
            found.append(f"{INDEX_FILE} is not used ({self.index_problem}): the shards are read without it")
        return found


@dataclass
class _Open:
    """A shard in use."""

    head: ShardHead
    read: Callable[[int, int], bytes]


class ShardsLayout:
    """Records of one folder; safe to use from several threads.

    Args:
        uri: the folder.
        infos: of the files in it.
        cache: where whole remote shards go.
    """

    name = "shards"

    def __init__(self, uri: str, infos: Iterable[FileInfo], cache: ShardCache | None = None) -> None:
        self._uri = uri
        self._remote = storage.is_remote(uri)
        self._cache = cache or ShardCache()
        self._lock = threading.Lock()
        self._reloading = threading.Lock()
        self._open: OrderedDict[str, _Open] = OrderedDict()
        self._load(infos)

    def __len__(self) -> int:
        return len(self.index)

    @property
    def index_due(self) -> bool:
        """Whether the index file is missing, damaged or does not name what can be read, as found when opened."""
        new = set(self.condition.unindexed) - self.condition.damaged.keys()
        return bool(self.index.shards) and bool(self.condition.gone or new)

    def has(self, sample_id: str) -> bool:
        """Whether the index knows the sample."""
        return self.index.find(sample_key(sample_id)) is not None

    def shard_of(self, sample_id: str) -> str | None:
        """Name of the shard whose record of the sample counts."""
        place = self.index.find(sample_key(sample_id))
        return None if place is None else self.index.shards[place[0]].name

    def read(self, sample_id: str) -> Record:
        """The sample's record. Raises RecordError or StorageError."""
        entry, row = self._place(sample_id)
        try:
            return self._read(entry, row, sample_id)
        except StorageError:
            if storage.exists(storage.join(self._uri, entry.name)):
                raise
        # Somebody packed the folder: the record may lie in another shard now.
        with self._reloading:
            self._load(storage.list_files(self._uri))
        return self._read(*self._place(sample_id), sample_id)

    def records(self) -> Iterator[tuple[str, Record | RecordError]]:
        """Every sample's id and record, shard by shard; a shard that cannot be read is one error under its name.

        Remote shards are fetched whole, one after the other; one whose records are all superseded is not.
        """
        for number, entry in enumerate(self.index.shards):
            rows = self.index.rows_of(number).tolist()
            if not rows:
                continue
            try:
                read = self._whole(entry.name)
                head = read_head(read, entry.size)
                ids = read_ids(head, read)
            except RecordError as error:
                yield entry.name, error
                continue
            for row in rows:
                found: Record | RecordError
                try:
                    found = unpack_record(head, ids[row], read(*head.span(row)))
                except RecordError as error:
                    found = error
                yield ids[row], found
        for name, why in self.condition.damaged.items():
            yield name, RecordError(why)

    def some(self, count: int, seed: int) -> Iterator[tuple[str, Record | RecordError]]:
        """``count`` samples drawn at random, all where there are fewer, as :meth:`records` gives them."""
        rows = np.random.default_rng(seed).permutation(len(self.index))[:count]
        places = sorted(self.index.place(int(row)) for row in self.index.rows[rows])
        for number, mine in groupby(places, key=lambda place: place[0]):
            entry = self.index.shards[number]
            try:
                reader = self._reader(entry.name)
                front = reader.front if isinstance(reader, RemoteShard) else reader
                ids = read_ids(read_head(front, entry.size), front)
            except RecordError as error:
                yield entry.name, error
                continue
            for _, row in mine:
                found: Record | RecordError
                try:
                    found = self._read(entry, row, ids[row])
                except RecordError as error:
                    found = error
                yield ids[row], found

    def heads(self) -> Iterator[tuple[ShardEntry, ShardHead | RecordError]]:
        """The front of every shard."""
        for entry in self.index.shards:
            try:
                yield entry, self._shard(entry.name).head
            except RecordError as error:
                yield entry, error

    def close(self) -> None:
        """Close the files and remove a temporary cache."""
        with self._lock:
            self._open.clear()
        self._cache.close()

    # ------------------------------------------------------------------------------------------------------- the index

    def _load(self, infos: Iterable[FileInfo]) -> None:
        """Take note of the files; list them again where some vanish meanwhile, replaced by a writer."""
        for _ in range(_LISTINGS):
            self._vanished = False
            self._load_once(infos)
            if not self._vanished:
                break
            infos = storage.list_files(self._uri)

    def _load_once(self, infos: Iterable[FileInfo]) -> None:
        files = {info.name: info for info in infos}
        self.files = {name: info for name, info in sorted(files.items()) if is_shard(name)}
        self.condition = condition = Condition()
        known = self._index_file(files.get(INDEX_FILE))
        base = known
        if known is not None:
            sizes = {name: info.size for name, info in self.files.items()}
            condition.gone = [entry.name for entry in known.shards if entry.name not in sizes]
            condition.truncated = [
                entry.name for entry in known.shards if sizes.get(entry.name, entry.size) < entry.size
            ]
            base = None if condition.gone else known
        named = set() if base is None else {entry.name for entry in base.shards}
        condition.unindexed = [name for name in self.files if name not in named]
        tables = [table for table in self._in_threads(self._table, condition.unindexed) if table is not None]
        if known is not None and base is None:
            base = self._unreadable(known)
        self.index = base if base is not None and not tables else build_index(tables, base)
        if known is not None and condition.gone:
            condition.lost = lost_keys(known, condition.gone, self.index)

    def _unreadable(self, known: ShardIndex) -> ShardIndex | None:
        """What an index that is out of date says of shards with damaged fronts: nothing else can tell."""
        names = self.condition.damaged.keys() & {entry.name for entry in known.shards}
        for name in names:
            del self.condition.damaged[name]
            self.condition.unindexed.remove(name)
        return known.part(names) if names else None

    def _index_file(self, info: FileInfo | None) -> ShardIndex | None:
        if info is None:
            return None
        try:
            if self._remote:
                data = storage.read_bytes(info.uri)
                return read_index(lambda begin, end: data[begin:end])
            view = MappedFile(storage.local_path(info.uri)).view
            return read_index(view)  # type: ignore[arg-type]  # a view serves as bytes, without a copy of the arrays
        except RecordError as error:
            self.condition.index_problem = str(error)
            return None

    def _table(self, name: str) -> tuple[ShardEntry, NDArray[np.uint64]] | None:
        """A shard's keys from its own front; None where that is damaged."""
        try:
            reader = self._reader(name)
            front = reader.front if isinstance(reader, RemoteShard) else reader
            head = read_head(front, self.files[name].size)
            keys = keys_of(read_ids(head, front))
        except StorageError:
            if storage.exists(storage.join(self._uri, name)):
                raise
            self._vanished = True
            return None
        except RecordError as error:
            self.condition.damaged[name] = str(error)
            return None
        if self.files[name].size < head.size:
            self.condition.truncated += [name] * (name not in self.condition.truncated)
        return ShardEntry(name, head.size, len(head)), keys

    def _in_threads(self, function: Callable[[str], T], names: list[str]) -> list[T]:
        if not self._remote or len(names) < 2:
            return list(map(function, names))
        with ThreadPoolExecutor(_READERS, "shards") as threads:
            return list(threads.map(function, names))

    # ------------------------------------------------------------------------------------------------------ the shards

    def _place(self, sample_id: str) -> tuple[ShardEntry, int]:
        index = self.index  # another thread may replace it
        place = index.find(sample_key(sample_id))
        if place is None:
            raise RecordMissingError(f"no record in {self._uri}")
        return index.shards[place[0]], place[1]

    def _read(self, entry: ShardEntry, row: int, sample_id: str) -> Record:
        shard = self._shard(entry.name)
        if row >= len(shard.head):
            raise RecordError(f"shard {entry.name} has {len(shard.head)} records, number {row} wanted")
        begin, end = shard.head.span(row)
        try:
            return unpack_record(shard.head, sample_id, self._span(shard, entry, begin, end))
        except RecordError:
            if not (isinstance(shard.read, RemoteShard) and shard.read.drop_copy()):
                raise
        return unpack_record(shard.head, sample_id, self._span(shard, entry, begin, end))

    def _span(self, shard: _Open, entry: ShardEntry, begin: int, end: int) -> bytes:
        data = shard.read(begin, end)
        if len(data) < end - begin:
            raise RecordError(f"shard {entry.name} is truncated: {end} bytes wanted of {entry.size}")
        return data

    def _shard(self, name: str) -> _Open:
        with self._lock:
            shard = self._open.get(name)
            if shard is not None:
                self._open.move_to_end(name)
                return shard
        reader = self._reader(name)
        front = reader.front if isinstance(reader, RemoteShard) else reader
        try:
            shard = _Open(read_head(front, self.files[name].size), reader)
        except RecordError as error:
            raise RecordError(f"shard {name} cannot be read: {error}") from error
        if isinstance(reader, RemoteShard):
            reader.drop_front()
        with self._lock:
            shard = self._open.setdefault(name, shard)
            while not self._remote and len(self._open) > _OPEN_FILES:
                self._open.popitem(last=False)
        return shard

    def _reader(self, name: str) -> MappedFile | RemoteShard:
        info = self.files.get(name)
        if info is None:
            raise RecordMissingError(f"shard {name} has been removed")
        return RemoteShard(info, self._cache) if self._remote else MappedFile(storage.local_path(info.uri))

    def _whole(self, name: str) -> Callable[[int, int], bytes]:
        reader = self._reader(name)
        if isinstance(reader, MappedFile):
            return reader
        return self._cache.find(reader.info) or partial(_slice, storage.read_bytes(reader.info.uri))


def _shards(count: int) -> str:
    return "1 shard" if count == 1 else f"{count} shards"


def _slice(data: bytes, begin: int, end: int) -> bytes:
    return data[begin:end]


def is_shard(name: str) -> bool:
    """Whether a file of a folder is one of its shards."""
    return name.startswith(PREFIX) and name.endswith(SUFFIX) and "/" not in name
