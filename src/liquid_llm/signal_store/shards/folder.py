"""Layout ``shards``, reading: records of a folder of shards, local or behind any URL.

The folder has been listed once. What is wrong with it as a whole is kept in words (``problems``) and concerns only the
records it hits: those of a damaged shard are corrupt where an index still knows them, those of a lost one are missing.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import groupby

import numpy as np

from liquid_llm import storage
from liquid_llm.errors import StorageError
from liquid_llm.signal_store.records import Record, RecordError, RecordMissingError
from liquid_llm.signal_store.shards.file import ShardHead, read_head, read_ids, sample_key, unpack_record
from liquid_llm.signal_store.shards.index import ShardEntry, ShardIndex
from liquid_llm.signal_store.shards.listing import Condition, Listing, take_listing
from liquid_llm.signal_store.shards.remote import MappedFile, RemoteShard, ShardCache, open_shard
from liquid_llm.storage import FileInfo

_OPEN_FILES = 256  # maps kept open, each with a file descriptor
_PACKED = 5  # times that a folder may be packed while one record is looked for


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
        self._listing_again = threading.Lock()
        self._open: OrderedDict[str, _Open] = OrderedDict()
        self._listing = take_listing(uri, infos, self._cache)

    @property
    def files(self) -> dict[str, FileInfo]:
        """The shards by name."""
        return self._listing.files

    @property
    def index(self) -> ShardIndex:
        """Where each sample's record is."""
        return self._listing.index

    @property
    def condition(self) -> Condition:
        """What was found when the folder was listed."""
        return self._listing.condition

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
        left = _PACKED
        while True:
            listing = self._listing  # another thread may replace it at any moment
            entry, row = self._place(listing.index, sample_id)
            try:
                return self._read(listing.files[entry.name], row, sample_id)
            except StorageError:
                left -= 1
                if not left or storage.exists(listing.files[entry.name].uri):
                    raise
            self._list_again(listing)  # somebody packed the folder: the record lies in another shard now

    def records(self) -> Iterator[tuple[str, Record | RecordError]]:
        """Every sample's id and record, shard by shard; a shard that cannot be read is one error under its name.

        Remote shards are fetched whole, one after the other; one whose records are all superseded is not.
        """
        listing = self._listing
        for number, entry in enumerate(listing.index.shards):
            rows = listing.index.rows_of(number).tolist()
            if not rows:
                continue
            try:
                read = self._whole(listing.files[entry.name])
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
        for name, why in listing.condition.damaged.items():
            yield name, RecordError(why)

    def some(self, count: int, seed: int) -> Iterator[tuple[str, Record | RecordError]]:
        """``count`` samples drawn at random, all where there are fewer, as :meth:`records` gives them."""
        listing = self._listing
        index = listing.index
        rows = np.random.default_rng(seed).permutation(len(index))[:count]
        places = sorted(index.place(int(row)) for row in index.rows[rows])
        for number, mine in groupby(places, key=lambda place: place[0]):
            info = listing.files[index.shards[number].name]
            try:
                front = open_shard(info, self._cache).front
                ids = read_ids(read_head(front, index.shards[number].size), front)
            except RecordError as error:
                yield info.name, error
                continue
            for _, row in mine:
                found: Record | RecordError
                try:
                    found = self._read(info, row, ids[row])
                except RecordError as error:
                    found = error
                yield ids[row], found

    def heads(self) -> Iterator[tuple[ShardEntry, ShardHead | RecordError]]:
        """The front of every shard."""
        listing = self._listing
        for entry in listing.index.shards:
            try:
                yield entry, self._shard(listing.files[entry.name]).head
            except RecordError as error:
                yield entry, error

    def close(self) -> None:
        """Close the files and remove a temporary cache."""
        with self._lock:
            self._open.clear()
        self._cache.close()

    # ------------------------------------------------------------------------------------------------------ the shards

    def _list_again(self, listing: Listing) -> None:
        with self._listing_again:
            if self._listing is listing:
                self._listing = take_listing(self._uri, storage.list_files(self._uri), self._cache)

    def _place(self, index: ShardIndex, sample_id: str) -> tuple[ShardEntry, int]:
        place = index.find(sample_key(sample_id))
        if place is None:
            raise RecordMissingError(f"no record in {self._uri}")
        return index.shards[place[0]], place[1]

    def _read(self, info: FileInfo, row: int, sample_id: str) -> Record:
        shard = self._shard(info)
        if row >= len(shard.head):
            raise RecordError(f"shard {info.name} has {len(shard.head)} records, number {row} wanted")
        begin, end = shard.head.span(row)
        try:
            return unpack_record(shard.head, sample_id, self._span(shard, info.name, begin, end))
        except RecordError:
            if not (isinstance(shard.read, RemoteShard) and shard.read.drop_copy()):
                raise
        return unpack_record(shard.head, sample_id, self._span(shard, info.name, begin, end))

    def _span(self, shard: _Open, name: str, begin: int, end: int) -> bytes:
        data = shard.read(begin, end)
        if len(data) < end - begin:
            raise RecordError(f"shard {name} is truncated: {end} bytes wanted of {shard.head.size}")
        return data

    def _shard(self, info: FileInfo) -> _Open:
        with self._lock:
            shard = self._open.get(info.name)
            if shard is not None:
                self._open.move_to_end(info.name)
                return shard
        reader = open_shard(info, self._cache)
        try:
            shard = _Open(read_head(reader.front, info.size), reader)
        except RecordError as error:
            raise RecordError(f"shard {info.name} cannot be read: {error}") from error
        if isinstance(reader, RemoteShard):
            reader.drop_front()
        with self._lock:
            shard = self._open.setdefault(info.name, shard)
            while not self._remote and len(self._open) > _OPEN_FILES:
                self._open.popitem(last=False)
        return shard

    def _whole(self, info: FileInfo) -> Callable[[int, int], bytes]:
        reader = open_shard(info, self._cache)
        if isinstance(reader, MappedFile):
            return reader
        return self._cache.find(info) or partial(_slice, storage.read_bytes(info.uri))


def _slice(data: bytes, begin: int, end: int) -> bytes:
    return data[begin:end]
