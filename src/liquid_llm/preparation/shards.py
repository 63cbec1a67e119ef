"""Documents -> shards: no text twice, each file published whole.

A record that has no ``sample_id`` is named by its type and text (``stable_sample_id``), so it keeps its name, its
stored teacher signal and its side of the validation split wherever it is read from.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import sqlite3
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from liquid_llm import storage
from liquid_llm.data.records import Body
from liquid_llm.preparation.catalog import Dataset
from liquid_llm.storage import translate_errors

# A scratch file: nothing is read from it after a crash, so nothing is spent on surviving one.
_PRAGMAS = ("journal_mode=OFF", "synchronous=OFF", "locking_mode=EXCLUSIVE", "cache_size=-16384")


class Seen:
    """The sample ids written so far, in a file in ``folder``: memory stays flat however many there are."""

    def __init__(self, folder: Path) -> None:
        self._database = sqlite3.connect(folder / "seen.sqlite", isolation_level=None)
        for words in _PRAGMAS:
            self._database.execute(f"PRAGMA {words}")
        self._database.execute("CREATE TABLE seen (name BLOB PRIMARY KEY, text BLOB) WITHOUT ROWID")
        self._database.execute("BEGIN")

    def add(self, sample_id: str, text: str) -> str:
        """``new``; ``repeated`` for an id and text seen before; ``conflict`` for an id seen with another text."""
        name, digest = (
            hashlib.blake2b(one.encode(), digest_size=size).digest() for one, size in ((sample_id, 16), (text, 8))
        )
        if self._database.execute("INSERT OR IGNORE INTO seen VALUES (?, ?)", (name, digest)).rowcount:
            return "new"
        (known,) = self._database.execute("SELECT text FROM seen WHERE name = ?", (name,)).fetchone()
        return "repeated" if known == digest else "conflict"

    def close(self) -> None:
        self._database.close()


@dataclass(frozen=True)
class ShardInfo:
    """One published shard, as markers name it."""

    name: str
    bytes: int
    records: int


class ShardWriter:
    """Writes the records of one input into shards; each appears under its name when it is whole.

    Args:
        dataset: says where they go, how they are named and how long one gets.
        input_number: the input's number among all.
        folder: an existing local folder for the shard being written.

    Attributes:
        published: the shards so far, complete once the writer is left without an exception.

    Raises:
        StorageError: a shard cannot be written.
    """

    def __init__(self, dataset: Dataset, input_number: int, folder: Path) -> None:
        self._dataset, self._input_number = dataset, input_number
        self._path = folder / "shard"
        self._files = ExitStack()
        self._stream: Any = None
        self._bytes = self._records = 0
        self.published: list[ShardInfo] = []

    def __enter__(self) -> ShardWriter:
        return self

    def write(self, body: Body, sample_id: str) -> None:
        record = body.as_record(self._dataset.type, sample_id)
        line = json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
        with translate_errors(self._path, writing=True):
            if self._stream is None:
                self._stream = self._open()
            self._stream.write(line)
        self._bytes += len(line)
        self._records += 1
        if self._bytes >= self._dataset.shard_bytes:
            self._publish()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None and self._records:
            self._publish()
        self._files.close()

    def _open(self) -> Any:
        file = self._files.enter_context(self._path.open("wb"))
        if not self._dataset.suffix.endswith(".gz"):
            return file
        # no name and no time in the header: the same records give the same bytes
        return self._files.enter_context(gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0, compresslevel=6))

    def _publish(self) -> None:
        name = self._dataset.shard_name(self._input_number, len(self.published))
        with translate_errors(self._path, writing=True):
            self._files.close()
            size = self._path.stat().st_size
        storage.upload(self._path, storage.join(self._dataset.out, name))
        self.published.append(ShardInfo(name, size, self._records))
        self._stream, self._bytes, self._records = None, 0, 0
