"""Layout ``shards``, bytes of one shard: from this machine's memory map, or from a bucket by ranges or as a whole.

A range costs one request's wait and its own bytes; the whole shard costs one wait and all its bytes, once. Nobody knows
how many records of it will be wanted. So ranges are asked for until they have cost what the whole costs, which is then
fetched: never more than twice the cheaper of the two, whatever comes (the ski rental problem). At 43 ms a request and
205 MB/s a shard of 64 MB is fetched after about eight of its records.

Whole shards lie in a local folder of bounded size, which the processes of a host share: what one has fetched the others
use, in memory too, as all map the same file. The ones not used for longest make room.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import threading
import weakref
from collections.abc import Callable
from pathlib import Path

from liquid_llm import storage
from liquid_llm.errors import StorageError
from liquid_llm.storage import FileInfo, translate_errors

log = logging.getLogger(__name__)

REQUEST_SECONDS = 0.043
BYTES_PER_SECOND = 205e6
DEFAULT_CACHE_BYTES = 16 * 2**30

_HEADER_BYTES = 2**17  # of a remote shard: header and table of most shards in one request


def cost_seconds(num_bytes: int) -> float:
    """What fetching so many bytes with one request is taken to cost."""
    return REQUEST_SECONDS + num_bytes / BYTES_PER_SECOND


class MappedFile:
    """A local file in a memory map. Raises StorageError where it cannot be opened."""

    def __init__(self, path: Path) -> None:
        with translate_errors(path), path.open("rb") as stream:
            empty = os.fstat(stream.fileno()).st_size == 0
            self._map = b"" if empty else mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)

    def __call__(self, begin: int, end: int) -> bytes:
        return self._map[begin:end]

    header = __call__

    def view(self, begin: int, end: int) -> memoryview:
        """The bytes without a copy."""
        return memoryview(self._map)[begin:end]


class ShardCache:
    """Whole shards in a local folder of bounded size; several processes may share it.

    Args:
        folder: where; a temporary one, removed with this object, when None.
        max_bytes: how much may lie there. A shard larger than that is never fetched whole.
    """

    def __init__(self, folder: Path | None = None, max_bytes: int = DEFAULT_CACHE_BYTES) -> None:
        self.max_bytes = max_bytes
        self._folder = folder
        self._scratch = contextlib.ExitStack()
        self._remove: Callable[[], object] | None = None
        self._lock = threading.Lock()

    def find(self, info: FileInfo) -> MappedFile | None:
        """The shard, where it is here and whole."""
        if self._folder is None:
            return None
        path = self._path(self._folder, info)
        try:
            if path.stat().st_size != info.size:
                return None
            os.utime(path)
            return MappedFile(path)
        except (OSError, StorageError):  # another process made room
            return None

    def fetch(self, info: FileInfo) -> MappedFile:
        """Download the shard, making room for it; one at a time, since they share a line. Raises StorageError.

        Of several processes that want a shard one downloads it, and the others wait: ranks of a host draw from the same
        ones.
        """
        with self._lock:
            if self._folder is None:
                self._folder = self._scratch.enter_context(storage.scratch("shards"))
                self._remove = weakref.finalize(self, self._scratch.close)
            path = self._path(self._folder, info)
            lock = path.with_suffix(".lock")
            with translate_errors(lock, writing=True):
                lock.parent.mkdir(parents=True, exist_ok=True)
                with storage.locked(lock):
                    found = self.find(info)
                    if found is None:
                        self._make_room(self._folder, info.size)
                        storage.download(info.uri, path)
                        found = MappedFile(path)
                    lock.unlink(missing_ok=True)  # whoever waits for it finds that out
            return found

    def forget(self, info: FileInfo) -> None:
        """Drop the shard: what is here is damaged."""
        if self._folder is not None:
            self._path(self._folder, info).unlink(missing_ok=True)

    def close(self) -> None:
        """Remove a temporary folder."""
        with self._lock:
            if self._remove is not None:
                self._remove()
                self._remove = self._folder = None

    def _make_room(self, folder: Path, num_bytes: int) -> None:
        files = []
        for path in folder.glob("*.shard") if folder.is_dir() else ():
            with contextlib.suppress(FileNotFoundError):  # another process made room too
                status = path.stat()
                files.append((status.st_mtime, status.st_size, path))
        held = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if held + num_bytes <= self.max_bytes:
                break
            path.unlink(missing_ok=True)
            held -= size

    def _path(self, folder: Path, info: FileInfo) -> Path:
        return folder / f"{info.key}.shard"


class RemoteShard:
    """A shard in a bucket: ranges first, the whole once that is cheaper. Safe to use from several threads."""

    def __init__(self, info: FileInfo, cache: ShardCache) -> None:
        self.info = info
        self._cache = cache
        self._lock = threading.Lock()
        self._local = cache.find(info)
        self._header = b""
        self._spent_seconds = 0.0
        self._fetching = False

    def __call__(self, begin: int, end: int) -> bytes:
        local = self._local or self._fetch(begin, end)
        return local(begin, end) if local is not None else storage.read_bytes(self.info.uri, begin, end)

    def header(self, begin: int, end: int) -> bytes:
        """As a call, for the header, which is asked for in several small pieces."""
        if self._local is not None:
            return self._local(begin, end)
        if end > len(self._header):
            # The ids follow; they are wanted whenever a table is read without an index.
            self._header = storage.read_bytes(self.info.uri, 0, max(end, min(self.info.size, _HEADER_BYTES)))
        return self._header[begin:end]

    def drop_header(self) -> None:
        """The header has been read."""
        self._header = b""

    def drop_copy(self) -> bool:
        """Do without the local copy, which is damaged; whether there was one."""
        with self._lock:
            had, self._local, self._spent_seconds = self._local is not None, None, 0.0
        if had:
            self._cache.forget(self.info)
        return had

    def _fetch(self, begin: int, end: int) -> MappedFile | None:
        """The whole shard if its price has been spent on ranges by now, this one included."""
        size = self.info.size
        with self._lock:
            self._spent_seconds += cost_seconds(end - begin)
            dear = self._spent_seconds < cost_seconds(size) or size > self._cache.max_bytes
            if dear or self._fetching:  # while one thread fetches it the others go on with ranges
                self._local = self._local or self._cache.find(self.info)  # another process has it
                return self._local
            self._fetching = True
        try:
            found = self._cache.find(self.info) or self._cache.fetch(self.info)
        except StorageError as error:
            if not storage.exists(self.info.uri):
                raise
            log.warning("no local copy of %s, reading it by ranges: %s", self.info.uri, error)
            with self._lock:  # never again: this disk is full or cannot be written
                self._spent_seconds = -float("inf")
            return None
        finally:
            self._fetching = False
        self._local = found
        return found


def open_shard(info: FileInfo, cache: ShardCache) -> MappedFile | RemoteShard:
    """The bytes of a shard, wherever it is.

    Raises:
        StorageError: a local one cannot be opened; a bucket keeps it packed, so that no part of it can be read.
    """
    if info.packed:
        raise StorageError(
            "the bucket keeps this shard packed, and of such an object no part can be read by itself",
            where=info.uri,
            got="Content-Encoding: gzip",
            remedy="copy the store there again without -Z or -z (gsutil, gcloud storage): what was captured is whole",
        )
    return RemoteShard(info, cache) if storage.is_remote(info.uri) else MappedFile(storage.local_path(info.uri))
