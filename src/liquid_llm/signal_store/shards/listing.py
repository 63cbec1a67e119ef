"""Layout ``shards``, one look at a folder: its shards, where each sample's record is, and what is wrong with it.

A listing never changes. A reader that learns that the folder has changed takes another and puts it in the place of the
old one in a single assignment, so that threads in the middle of a look-up see the one or the other, whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from liquid_llm import storage
from liquid_llm.errors import StorageError
from liquid_llm.signal_store.records import RecordError
from liquid_llm.signal_store.shards.file import PREFIX, SUFFIX, read_head, read_ids
from liquid_llm.signal_store.shards.index import (
    INDEX_FILE,
    ShardEntry,
    ShardIndex,
    build_index,
    keys_of,
    lost_keys,
    read_index,
)
from liquid_llm.signal_store.shards.remote import MappedFile, ShardCache, open_shard
from liquid_llm.storage import FileInfo

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


@dataclass(frozen=True)
class Listing:
    """A folder of shards as it was at one moment.

    Attributes:
        files: the shards by name, ordered; those that could not be read too.
        index: where each sample's record is; it names nothing that is not in ``files``.
        condition: what was found.
    """

    files: dict[str, FileInfo]
    index: ShardIndex
    condition: Condition


def take_listing(uri: str, infos: Iterable[FileInfo], cache: ShardCache) -> Listing:
    """Take note of the files of a folder; list them again where some vanish meanwhile, replaced by a writer.

    Raises:
        StorageError: a file that is there cannot be read.
    """
    for _ in range(_LISTINGS):
        taking = _Taking(uri, infos, cache)
        listing = taking.listing()
        if not taking.vanished:
            break
        infos = storage.list_files(uri)
    return listing


def is_shard(name: str) -> bool:
    """Whether a file of a folder is one of its shards."""
    return name.startswith(PREFIX) and name.endswith(SUFFIX) and "/" not in name


class _Taking:
    """One attempt. ``vanished``: whether a shard was listed and then not there."""

    def __init__(self, uri: str, infos: Iterable[FileInfo], cache: ShardCache) -> None:
        files = {info.name: info for info in infos}
        self.vanished = False
        self._files = {name: info for name, info in sorted(files.items()) if is_shard(name)}
        self._index_info = files.get(INDEX_FILE)
        self._condition = Condition()
        self._remote = storage.is_remote(uri)
        self._cache = cache

    def listing(self) -> Listing:
        condition = self._condition
        known = self._index_file()
        base = known
        if known is not None:
            sizes = {name: info.size for name, info in self._files.items()}
            condition.gone = [entry.name for entry in known.shards if entry.name not in sizes]
            condition.truncated = [
                entry.name for entry in known.shards if sizes.get(entry.name, entry.size) < entry.size
            ]
            base = None if condition.gone else known
        named = set() if base is None else {entry.name for entry in base.shards}
        condition.unindexed = [name for name in self._files if name not in named]
        tables = [table for table in self._in_threads(self._table, condition.unindexed) if table is not None]
        if known is not None and base is None:
            base = self._unreadable(known)
        index = base if base is not None and not tables else build_index(tables, base)
        if known is not None and condition.gone:
            condition.lost = lost_keys(known, condition.gone, index)
        return Listing(self._files, index, condition)

    def _unreadable(self, known: ShardIndex) -> ShardIndex | None:
        """What an index that is out of date says of shards with damaged fronts: nothing else can tell."""
        names = self._condition.damaged.keys() & {entry.name for entry in known.shards}
        for name in names:
            del self._condition.damaged[name]
            self._condition.unindexed.remove(name)
        return known.part(names) if names else None

    def _index_file(self) -> ShardIndex | None:
        if self._index_info is None:
            return None
        try:
            if self._remote:
                data = storage.read_bytes(self._index_info.uri)
                return read_index(lambda begin, end: data[begin:end])
            view = MappedFile(storage.local_path(self._index_info.uri)).view
            return read_index(view)  # type: ignore[arg-type]  # a view serves as bytes, without a copy of the arrays
        except RecordError as error:
            self._condition.index_problem = str(error)
            return None

    def _table(self, name: str) -> tuple[ShardEntry, NDArray[np.uint64]] | None:
        """A shard's keys from its own front; None where that is damaged or the shard has gone."""
        info = self._files[name]
        try:
            front = open_shard(info, self._cache).front
            head = read_head(front, info.size)
            keys = keys_of(read_ids(head, front))
        except StorageError:
            if storage.exists(info.uri):
                raise
            self.vanished = True
            return None
        except RecordError as error:
            self._condition.damaged[name] = str(error)
            return None
        if info.size < head.size:
            self._condition.truncated += [name] * (name not in self._condition.truncated)
        return ShardEntry(name, head.size, len(head)), keys

    def _in_threads(self, function: Callable[[str], T], names: list[str]) -> list[T]:
        if not self._remote or len(names) < 2:
            return list(map(function, names))
        with ThreadPoolExecutor(_READERS, "shards") as threads:
            return list(threads.map(function, names))


def _shards(count: int) -> str:
    return "1 shard" if count == 1 else f"{count} shards"
