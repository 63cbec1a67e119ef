"""Layout ``shards``, writing: records are gathered and published as whole files, never changed afterwards.

    part    the records since the last part, published when a minute has passed: no more than that is lost to a crash
    full    some 64 MB of records, or what there is at the end; published, and only then its parts are removed

A file's name is ``shard-GENERATION-NUMBER-TOKEN``. The token belongs to one writer, so that any number of processes may
write into one folder. A writer's generation is one above any it found, so that what is captured again counts instead
of what was there. A crash between publishing and removing leaves a record twice, which no reader shows.
"""

from __future__ import annotations

import logging
import re
import threading
import uuid
from collections.abc import Callable, Iterable

from liquid_llm import storage
from liquid_llm.errors import StorageError
from liquid_llm.signal_store.records import Record, SignalIdentity
from liquid_llm.signal_store.shards.file import PREFIX, SUFFIX, PackedRecord, Tables, build_shard, pack_record

log = logging.getLogger(__name__)

SHARD_BYTES = 64 * 10**6
PART_SECONDS = 60.0

_GENERATION = re.compile(re.escape(PREFIX) + r"(\d{1,9})-")
_FAILURES = 3  # in a row: storage has tried each again already, so the rest would fail too
_INDEX_BYTES = 20  # a record


class ShardsWriter:
    """Writes records into a folder; safe to use from several threads, beside any number of other writers.

    Args:
        names: of the shards in it.
        publish_index: publishes the index of what is in the folder, given its name.
        index_due: the index file is missing or out of date, so that ``finish`` publishes it in any case.
        shard_bytes: of records in a full shard; a longer record has one of its own.
        part_seconds: the longest that records are held back.
    """

    def __init__(
        self,
        uri: str,
        identity: SignalIdentity,
        names: Iterable[str],
        *,
        publish_index: Callable[[str], None],
        index_due: bool,
        shard_bytes: int,
        part_seconds: float,
    ) -> None:
        self._uri = uri
        self._identity = identity
        self._publish_index, self._index_due = publish_index, index_due
        self._shard_bytes = shard_bytes
        self._part_seconds = part_seconds
        found = (_GENERATION.match(name) for name in names)
        self._generation = 1 + max((int(match[1]) for match in found if match), default=0)
        self._token = uuid.uuid4().hex[:8]  # tells this writer's files from any other's
        self._number = 0
        self._tables = Tables()
        self._lock = threading.Lock()
        self._publishing = threading.Lock()
        self._records: list[PackedRecord] = []  # since the last full shard
        self._bytes = 0
        self._in_parts = 0  # how many of them, from the first, are in parts
        self._parts: list[str] = []
        self._timer: threading.Timer | None = None
        self._failures = 0
        self._error: StorageError | None = None  # of the last of several failures; None once something is published
        self._overhead = 0

    def write(self, record: Record) -> int:
        """Take a record; returns its bytes. It is certain to be in the folder after ``finish`` only.

        Raises:
            StorageError: publishing failed three times in a row, here or behind the timer. The record is kept and
                tried again all the same.
        """
        with self._lock:
            packed = pack_record(record, self._tables)
            self._records.append(packed)
            self._bytes += len(packed.data)
            full = self._bytes >= self._shard_bytes
            if self._timer is None:
                self._timer = threading.Timer(self._part_seconds, self._write_part)
                self._timer.daemon = True
                self._timer.start()
        if full and self._publishing.acquire(blocking=False):  # other threads go on meanwhile
            try:
                self._publish(full=True)
            except StorageError as error:
                self._failed(error)
            finally:
                self._publishing.release()
        failed = self._error  # the timer may take it back at any moment
        if failed is not None:
            raise failed
        return len(packed.data)

    def finish(self) -> int:
        """Publish all that was taken, and the index; returns the bytes of files beyond those that ``write`` told.

        Raises:
            StorageError: not everything could be published; what was not is tried again by the next call.
        """
        with self._publishing:
            if self._records:
                self._publish(full=True)
        self._finish_index()
        overhead, self._overhead = self._overhead, 0
        return overhead

    def _finish_index(self) -> None:
        if not self._number and not self._index_due:
            return
        try:
            self._publish_index(self._uri)
        except StorageError as error:
            if self._number:
                raise
            # The shards are read without it, and nothing else was to be written.
            log.warning("the index could not be repaired: %s", error)
            return
        self._index_due = False

    def _write_part(self) -> None:
        """What the timer does: a thread of its own, since a slow teacher lets no record come for minutes."""
        with self._publishing:
            try:
                self._publish(full=False)
            except StorageError as error:
                self._failed(error)

    def _failed(self, error: StorageError) -> None:
        self._failures += 1
        if self._failures >= _FAILURES:
            self._error = error  # the next write raises it
        log.warning("a shard could not be written; its records are kept and tried again: %s", error)

    def _publish(self, *, full: bool) -> None:
        with self._lock:
            count = len(self._records)
            records = self._records[:] if full else self._records[self._in_parts :]
            tables = self._tables.copy()
            if self._timer is not None and (full or not records):
                self._timer.cancel()
            self._timer = None
        if not records:
            return
        name = f"{PREFIX}{self._generation:06d}-{self._number:06d}-{self._token}{SUFFIX}"
        latest = {record.sample_id: record for record in records}
        data = build_shard(latest.values(), tables, self._identity)
        storage.write_bytes(storage.join(self._uri, name), data)
        self._failures, self._error = 0, None
        self._number += 1
        if not full:
            self._parts.append(name)
            self._in_parts = count
            return
        with self._lock:
            del self._records[:count]
            self._bytes = sum(len(record.data) for record in self._records)
            self._in_parts = 0
        self._overhead += len(data) - sum(len(record.data) for record in records) + _INDEX_BYTES * len(latest)
        parts, self._parts = self._parts, []
        for part in parts:
            storage.remove(storage.join(self._uri, part))
