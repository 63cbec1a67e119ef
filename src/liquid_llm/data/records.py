"""Records out of shards, streamed.

shard: a file of records, by its name ``.jsonl`` or ``.json`` (one JSON object a line; plain, ``.gz`` or ``.zst``) or
``.parquet`` (columns ``text``, optional ``type`` and ``sample_id``); record: ``{text, type?, sample_id?}``, anything
else in it is ignored; place: ``shard:line`` or ``shard:row``, from 1, for messages.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

from liquid_llm import storage
from liquid_llm.data.types import Record
from liquid_llm.errors import DataError, first_line
from liquid_llm.storage.streams import DamageError, lines, unpack

_PARQUET_ROWS = 1024
_PARQUET_BUFFER_BYTES = 2**18
_FORMATS = ".jsonl, .json, .jsonl.gz, .json.gz, .jsonl.zst, .json.zst or .parquet"
_PACKINGS = {"": None, ".gz": "gz", ".zst": "zst"}
_COLUMNS = ("text", "type", "sample_id")


def stable_sample_id(type: str, text: str) -> str:
    """Name of a record that has none: 32 hex digits of a hash of type and text, the same everywhere."""
    return hashlib.blake2b(f"{type}\0{text}".encode(), digest_size=16).hexdigest()


def read_records(uri: str, type: str) -> Iterator[Record]:
    """The records of one shard, in order; every one of ``type``. See ``Shard`` for the errors."""
    return (record for _, record in Shard(uri, type))


class Shard:
    """The numbered records of one shard, and how far reading has come.

    Args:
        uri: any fsspec URL.
        type: what the manifest says the records are.

    Attributes:
        bytes_read: bytes of the file consumed so far, for progress.

    Raises:
        DataError: while iterating, with the place: a line that is no JSON object; a text that is missing, empty or
            not a string; a type that contradicts the manifest; a truncated or unreadable file; no record at all; an
            unknown file name ending.
        StorageError: the file cannot be read.
    """

    def __init__(self, uri: str, type: str) -> None:
        self.uri = uri
        self.type = type
        self.bytes_read = 0

    def place(self, number: int) -> str:
        return f"{self.uri}:{number}"

    def __iter__(self) -> Iterator[tuple[int, Record]]:
        number = 0
        for number, value in self._values():
            yield number, self._record(value, number)
        if number == 0:
            raise DataError("the shard has no record", where=self.uri, remedy="remove it or write it again")

    def _values(self) -> Iterator[tuple[int, Any]]:
        name = self.uri.lower()
        if name.endswith(".parquet"):
            return self._parquet_rows()
        for ending, packing in _PACKINGS.items():
            if name.endswith((f".jsonl{ending}", f".json{ending}")):
                return self._json_lines(packing)
        raise DataError("unknown kind of shard", where=self.uri, expected=f"a name ending in {_FORMATS}")

    def _json_lines(self, packing: str | None) -> Iterator[tuple[int, Any]]:
        with storage.open_read(self.uri) as stream:
            try:
                for number, line in enumerate(lines(unpack(stream, packing)), start=1):
                    if line is not None and line.strip():
                        self.bytes_read = stream.tell()
                        yield number, self._parsed(line, number)
            except DamageError as error:
                raise DataError(f"the file is {error}", where=self.uri, remedy="write or copy it again") from error

    def _parsed(self, line: bytes, number: int) -> Any:
        try:
            return json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
            raise DataError(f"not a JSON object ({error})", where=self.place(number)) from error

    def _parquet_rows(self) -> Iterator[tuple[int, Any]]:
        import pyarrow
        from pyarrow import parquet

        size = storage.stat(self.uri)
        number = 0
        with storage.open_read(self.uri) as stream:
            try:
                # a whole row group would be read ahead, compressed, otherwise
                table = parquet.ParquetFile(stream, pre_buffer=False, buffer_size=_PARQUET_BUFFER_BYTES)
                columns = [name for name in table.schema_arrow.names if name in _COLUMNS]
                if "text" not in columns:
                    raise DataError(
                        "no column named text", where=self.uri, got=f"columns {', '.join(table.schema_arrow.names)}"
                    )
                for batch in table.iter_batches(_PARQUET_ROWS, columns=columns):
                    for value in batch.to_pylist():
                        number += 1
                        yield number, value
                    if size is not None:
                        self.bytes_read = size.size * number // table.metadata.num_rows
            except (pyarrow.ArrowException, OSError) as error:
                raise DataError(
                    f"not a readable parquet file ({first_line(error)})",
                    where=self.uri,
                    remedy="write or copy it again",
                ) from error

    def _record(self, value: Any, number: int) -> Record:
        if not isinstance(value, dict):
            raise DataError("not a JSON object", where=self.place(number), got=first_line(value))
        text, type_, name = (value.get(key) for key in _COLUMNS)
        if not isinstance(text, str) or not text:
            got = "none" if text is None else "an empty string" if text == "" else first_line(repr(text))
            raise DataError("text is not a non-empty string", where=self.place(number), got=got)
        if type_ is not None and type_ != self.type:
            raise DataError(
                "the record's type contradicts the manifest",
                where=self.place(number),
                got=first_line(repr(type_)),
                expected=repr(self.type),
                remedy="list this file under its own type, or correct the record",
            )
        if name is not None and (isinstance(name, bool) or not isinstance(name, (str, int)) or name == ""):
            raise DataError("sample_id is not a non-empty string", where=self.place(number), got=first_line(repr(name)))
        try:
            text.encode()
            sample_id = stable_sample_id(self.type, text) if name is None else str(name)
            sample_id.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                "half of a surrogate pair, which is not text",
                where=self.place(number),
                got=ascii(error.object[error.start]),
            ) from error
        return Record(text, self.type, sample_id)
