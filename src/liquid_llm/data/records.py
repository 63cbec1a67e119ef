"""Records out of files, streamed.

record: ``{text, type?, sample_id?}``, anything else in it is ignored; body: what a record says, ``text`` or, where
there is none, ``messages`` (each ``{role, content}``) or ``prompt`` and ``completion`` (two strings, or a conversation
cut in two lists of messages); records of any form may be mixed; file: by its name ``.jsonl`` or ``.json`` (one JSON
object a line; plain, ``.gz`` or ``.zst``) or ``.parquet`` (columns of those names); location: ``file:line`` or
``file:row``, from 1, for messages.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from liquid_llm import storage
from liquid_llm.data.types import TextRecord, whole_text
from liquid_llm.errors import DataError, first_line
from liquid_llm.parsing import ParseError, parse_json
from liquid_llm.storage import FileInfo
from liquid_llm.storage.streams import CHUNK_BYTES, DamageError, lines, unpack

MAX_LINE_BYTES = 256 * 2**20  # a record is one text: what is longer is no record, or a bomb
_PARQUET_ROWS = 64  # taken out at once: rows may be whole books
_FORMATS = ".jsonl, .json, .jsonl.gz, .json.gz, .jsonl.zst, .json.zst or .parquet"
_PACKINGS = {"": None, ".gz": "gz", ".zst": "zst"}
FORMS = (("text",), ("messages",), ("prompt", "completion"))  # of a body; the first that a record has counts
_NAMES = ("type", "sample_id")
LINES_PER_FILE = 1 << 40  # of several files that are one source: a record's number says which it is of


class Body(NamedTuple):
    """What a record says; see ``TextRecord`` for the names."""

    text: str
    prompt: str | None = None
    messages: tuple[Mapping[str, Any], ...] | None = None
    prompt_messages: int = 0

    @property
    def whole(self) -> str:
        """All of it as one string."""
        return whole_text(self.text, self.prompt, self.messages)

    def as_record(self, type: str, sample_id: str) -> dict[str, Any]:
        """The record as an object of JSON, the body first."""
        names = {"type": type, "sample_id": sample_id}
        if self.messages is not None and self.prompt_messages:
            prompt, completion = self.messages[: self.prompt_messages], self.messages[self.prompt_messages :]
            return {"prompt": list(prompt), "completion": list(completion), **names}
        if self.messages is not None:
            return {"messages": list(self.messages), **names}
        if self.prompt is not None:
            return {"prompt": self.prompt, "completion": self.text, **names}
        return {"text": self.text, **names}


class BodyError(ValueError):
    """A record without a usable body; ``got`` is what is there instead."""

    def __init__(self, problem: str, got: str | None = None) -> None:
        super().__init__(problem)
        self.got = got


def stable_sample_id(type: str, whole: str) -> str:
    """Name of a record that has none: 32 hex digits of a hash of type and all it says, the same everywhere.

    A prompt with its completion has the name of the text, or conversation, that they make together: a data set that is
    cut in two keeps its names, its stored signal and its sides of the validation split.
    """
    return hashlib.blake2b(f"{type}\0{whole}".encode(), digest_size=16).hexdigest()


def read_body(value: Mapping[str, Any]) -> Body:
    """The body of a record, whatever its form; a text comes before all else, as it always did.

    Raises:
        BodyError: it has none, or one that is no text.
    """
    form = next((names for names in FORMS if any(value.get(name) is not None for name in names)), FORMS[0])
    if form == ("messages",):
        return Body("", None, read_messages(value["messages"], "messages"))
    if form == ("prompt", "completion"):
        prompt, completion = value.get("prompt"), value.get("completion")
        if isinstance(prompt, list) and isinstance(completion, list):
            asked = read_messages(prompt, "prompt")
            return Body("", None, asked + read_messages(completion, "completion"), len(asked))
        if isinstance(prompt, list) or isinstance(completion, list):
            got = f"prompt {_shown(prompt)}, completion {_shown(completion)}"
            raise BodyError("prompt and completion are neither two strings nor two lists of messages", got)
        if not isinstance(prompt, str):
            raise BodyError("prompt is not a string", _shown(prompt))
        return Body(_filled(value, "completion"), prompt)
    return Body(_filled(value, "text"))


def _filled(value: Mapping[str, Any], name: str) -> str:
    text = value.get(name)
    if not isinstance(text, str) or not text:
        raise BodyError(f"{name} is not a non-empty string", _shown(text))
    return text


def read_messages(value: object, name: str) -> tuple[Mapping[str, Any], ...]:
    """A record's messages under ``name``. Raises BodyError where they are none."""
    if not isinstance(value, list) or not value:
        raise BodyError(f"{name} is not a list of messages", _shown(value))
    of = "" if name == "messages" else f" of the {name}"
    for number, one in enumerate(value, start=1):
        if not isinstance(one, dict) or not isinstance(one.get("role"), str) or not isinstance(one.get("content"), str):
            raise BodyError(f"message {number}{of} is not an object with the strings role and content", _shown(one))
    # a parquet file gives each message the keys of all others, empty
    return tuple({name: part for name, part in one.items() if part is not None} for one in value)


def _shown(value: object) -> str:
    return "none" if value is None else "an empty string" if value == "" else first_line(repr(value))


def check_name(sample_id: object) -> str | None:
    """A record's own ``sample_id`` as a string, None where it has none.

    Raises:
        ValueError: it is not a non-empty string, or whole number.
    """
    if sample_id is None:
        return None
    if isinstance(sample_id, bool) or not isinstance(sample_id, (str, int)) or sample_id == "":
        raise ValueError("sample_id is not a non-empty string")
    return str(sample_id)


def read_records(uri: str, type: str) -> Iterator[TextRecord]:
    """The records of one file, in order; every one of ``type``. See ``RecordFile`` for the errors."""
    return (record for _, record in RecordFile(uri, type))


class RecordFile:
    """The numbered records of one file, and how far reading has come.

    Args:
        uri: any fsspec URL.
        type: what the manifest says the records are.

    Attributes:
        bytes_read: bytes of the file consumed so far, for progress.

    Raises:
        DataError: while iterating, with the location: a line that is no JSON object or far too long; a text (or
            completion) that is missing, empty or not a string; messages that are none; a type that contradicts the
            manifest; a truncated or unreadable file; no record at all; an unknown file name ending.
        StorageError: the file cannot be read.
    """

    def __init__(self, uri: str, type: str) -> None:
        self.uri = uri
        self.type = type
        self.bytes_read = 0

    def location(self, number: int) -> str:
        return f"{self.uri}:{number}"

    def __iter__(self) -> Iterator[tuple[int, TextRecord]]:
        number = 0
        try:
            for number, value in self._values():
                yield number, self._record(value, number)
        except DamageError as error:
            raise DataError(f"the file is {error}", where=self.uri, remedy="write or copy it again") from error
        if number == 0:
            raise DataError("the file has no record", where=self.uri, remedy="remove it or write it again")

    def _values(self) -> Iterator[tuple[int, Any]]:
        name = self.uri.lower()
        with storage.open_read(self.uri) as stream:
            if name.endswith(".parquet"):
                size = stream.seek(0, 2)
                for number, (value, share) in enumerate(parquet_rows(stream, self._choose), start=1):
                    self.bytes_read = int(size * share)
                    yield number, value
                return
            for ending, packing in _PACKINGS.items():
                if name.endswith((f".jsonl{ending}", f".json{ending}")):
                    for number, line in enumerate(lines(unpack(stream, packing), MAX_LINE_BYTES), start=1):
                        if line is None or line.strip():
                            self.bytes_read = stream.tell()
                            yield number, self._parse(line, number)
                    return
        raise DataError("unknown kind of file", where=self.uri, expected=f"a name ending in {_FORMATS}")

    def _choose(self, columns: list[str]) -> list[str]:
        bodies = {name for form in FORMS if set(form) <= set(columns) for name in form}
        if not bodies:
            raise DataError(
                "no column named text",
                where=self.uri,
                got=f"columns {', '.join(columns)}",
                expected="text, messages, or prompt and completion",
            )
        return [name for name in columns if name in bodies or name in _NAMES]

    def _parse(self, line: bytes | None, number: int) -> Any:
        if line is None:
            expected = f"at most {MAX_LINE_BYTES:,} bytes"
            raise DataError("the line is far too long", where=self.location(number), expected=expected)
        try:
            return parse_json(line, "utf-8-sig" if number == 1 else "utf-8", MAX_LINE_BYTES)
        except ParseError as error:
            raise DataError(f"not a JSON object ({error})", where=self.location(number)) from error

    def _record(self, value: Any, number: int) -> TextRecord:
        where = self.location(number)
        if not isinstance(value, dict):
            raise DataError("not a JSON object", where=where, got=first_line(value))
        stated, name = (value.get(key) for key in _NAMES)
        try:
            body = read_body(value)
        except BodyError as error:
            remedy = "records have text, messages, or prompt and completion; liquid prepare makes them of raw data"
            raise DataError(str(error), where=where, got=error.got, remedy=remedy) from error
        if stated is not None and stated != self.type:
            raise DataError(
                "the record's type contradicts the manifest",
                where=where,
                got=first_line(repr(stated)),
                expected=repr(self.type),
                remedy="list this file under its own type, or correct the record",
            )
        try:
            sample_id = check_name(name) or stable_sample_id(self.type, body.whole)
            (body.whole + sample_id).encode()
        except UnicodeEncodeError as error:
            got = ascii(error.object[error.start])
            raise DataError("half of a surrogate pair, which is not text", where=where, got=got) from error
        except ValueError as error:
            raise DataError(str(error), where=where, got=first_line(repr(name))) from error
        return TextRecord(body.text, self.type, sample_id, body.prompt, body.messages, body.prompt_messages)


def parquet_rows(stream: Any, choose: Callable[[list[str]], list[str]]) -> Iterator[tuple[dict[str, Any], float]]:
    """The rows of a parquet file, and the share of them that came so far; ``choose`` picks from its columns.

    Raises:
        DamageError: while iterating: it is not a readable parquet file.
    """
    import pyarrow
    from pyarrow import parquet

    count = 0
    try:
        # by default it reads every row group ahead: the whole file would come to lie in memory
        table = parquet.ParquetFile(stream, pre_buffer=False, buffer_size=CHUNK_BYTES)
        columns = choose(table.schema_arrow.names)
        _require_modest(table.metadata, stream.seek(0, 2))
        for batch in table.iter_batches(_PARQUET_ROWS, columns=columns):
            for value in batch.to_pylist():
                count += 1
                yield value, count / table.metadata.num_rows
    except (pyarrow.ArrowException, OSError) as error:
        raise DamageError(f"not a readable parquet file ({first_line(error)})") from error


def _require_modest(metadata: Any, size: int) -> None:
    """Refuse a file of ``size`` bytes whose pages unpack to far more: a few kilobytes can stand for gigabytes.

    What the footer says of single columns would say more, and asking pyarrow for it ends the process where a footer is
    damaged (found by fuzzing).

    Raises:
        DamageError: it is such a one.
    """
    unpacked = sum(metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups))
    if storage.is_far(size, unpacked):
        raise DamageError(f"a parquet file that unpacks to far more than it should ({size:,} bytes are {unpacked:,})")


Shard = RecordFile
"""The name of ``RecordFile`` before types became free: scripts of others read a file through it."""


class RecordFiles:
    """The records of several files of one type as one source, numbered on; see ``tokens.RecordSource``.

    Args:
        infos: what ``storage.stat`` says of each, where that is known already.
    """

    def __init__(self, uris: Sequence[str], type: str, infos: Sequence[FileInfo | None] | None = None) -> None:
        self.type = type
        self._files = [RecordFile(uri, type) for uri in uris]
        infos = [storage.stat(uri) for uri in uris] if infos is None else infos
        for uri, info in zip(uris, infos, strict=True):
            if info is None:
                raise DataError("no such file", where=uri)
        self._size = sum(info.size for info in infos if info is not None)
        self.num_files = len(uris)
        self.identity: object = [[info.uri, info.size, info.version] for info in infos if info is not None]

    @property
    def fraction_read(self) -> float:
        return sum(file.bytes_read for file in self._files) / max(1, self._size)

    def __iter__(self) -> Iterator[tuple[int, TextRecord]]:
        for index, file in enumerate(self._files):
            for line, record in file:
                yield index * LINES_PER_FILE + line, record

    def location(self, number: int) -> str:
        index, line = divmod(number, LINES_PER_FILE)
        return self._files[index].location(line) if line else self._files[index].uri
