"""Bytes of raw inputs, cut into lines, array items and elements, never a whole file at a time.

chunk: bytes as they come; what is cut out of chunks never depends on where one chunk ends and the next begins.
"""

from __future__ import annotations

import codecs
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any, BinaryIO
from xml.parsers import expat

from liquid_llm.storage.streams import DamageError

MAX_PIECE_BYTES = 64 * 2**20  # a longer line, item or element is not kept in memory
HEAD_BYTES = 1 << 16

_BUFFER_BYTES = 1 << 20
_OPEN_NUMBER = re.compile(r"[0-9.eE+\-]*\Z")  # what may still be a number when more comes
_MAGIC = {b"\x1f\x8b": "gz", b"BZh": "bz2", b"\x28\xb5\x2f\xfd": "zst", b"PK\x03\x04": "zip", b"PAR1": "parquet"}


class CountedStream(io.RawIOBase):
    """A stream that tells ``advance`` how many bytes were read from it."""

    def __init__(self, stream: BinaryIO, advance: Callable[[int], None]) -> None:
        super().__init__()
        self._stream, self._advance = stream, advance

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._stream.seekable()

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._stream.seek(offset, whence)

    def tell(self) -> int:
        return self._stream.tell()

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        self._advance(len(data))
        return len(data)


def buffered(stream: Any, advance: Callable[[int], None] = lambda _: None) -> Any:
    """A stream one can peek into (an ``io.BufferedReader``, whose type differs between Python versions)."""
    return io.BufferedReader(CountedStream(stream, advance), _BUFFER_BYTES)


def magic(stream: Any) -> str | None:
    """``gz``, ``bz2``, ``zst``, ``zip`` or ``parquet`` by the first bytes, None for anything else."""
    head = stream.peek(8)
    return next((name for mark, name in _MAGIC.items() if head.startswith(mark)), None)


def with_head(chunks: Iterator[bytes]) -> tuple[bytes, Iterator[bytes]]:
    """The first ``HEAD_BYTES`` or a few more, and all chunks again."""
    taken: list[bytes] = []
    while sum(map(len, taken)) < HEAD_BYTES:
        chunk = next(chunks, None)
        if chunk is None:
            break
        taken.append(chunk)
    return b"".join(taken), chain(taken, chunks)


def array_items(chunks: Iterable[bytes], limit: int = MAX_PIECE_BYTES) -> Iterator[Any]:
    """The items of one JSON array, one at a time.

    Raises:
        DamageError: while iterating: the text stops being a JSON array, or an item is longer than ``limit``.
    """
    decode = codecs.getincrementaldecoder("utf-8")().decode
    reader = _ArrayReader(limit)
    try:
        for chunk in chunks:
            yield from reader.feed(decode(chunk), final=False)
        yield from reader.feed(decode(b"", final=True), final=True)
    except UnicodeDecodeError as error:
        raise DamageError(f"not UTF-8 ({error.reason})") from error


class _ArrayReader:
    """The state between chunks: what is still to be read, and what may come next."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._decoder = json.JSONDecoder()
        self._text = ""
        self._expected = "["  # then "item" or "first" (which may be "]"), "," and at last "end"

    def feed(self, text: str, *, final: bool) -> Iterator[Any]:
        self._text += text
        position = 0
        while True:
            position = _after_blanks(self._text, position)
            if position == len(self._text):
                break
            letter = self._text[position]
            if self._expected in ("[", ","):
                position = self._separator(letter, position)
            elif self._expected == "end":
                raise DamageError(f"something follows the array: {letter!r}")
            elif self._expected == "first" and letter == "]":
                self._expected, position = "end", position + 1
            else:
                item, end = self._item(position, final)
                if end is None:
                    break
                self._expected, position = ",", end
                yield item
        self._text = self._text[position:]
        if final and self._expected != "end":
            raise DamageError("the array is cut off")

    def _separator(self, letter: str, position: int) -> int:
        allowed = {"[": {"[": "first", "\ufeff": "["}, ",": {",": "item", "]": "end"}}[self._expected]
        if letter not in allowed:
            raise DamageError(f"not a JSON array: {letter!r} where {' or '.join(allowed)} belongs")
        self._expected = allowed[letter]
        return position + 1

    def _item(self, position: int, final: bool) -> tuple[Any, int | None]:
        try:
            item, end = self._decoder.raw_decode(self._text, position)
        except (ValueError, RecursionError) as error:
            if final or isinstance(error, RecursionError):
                raise DamageError(f"not a JSON array ({error})") from error
            if len(self._text) - position > self._limit:
                raise DamageError(f"an item is not JSON or longer than {self._limit:,} characters") from error
            return None, None  # its end may be in the next chunk
        if not final and _OPEN_NUMBER.match(self._text, end) and len(self._text) - position <= self._limit:
            return None, None  # 12 may go on as 123, and "0." as 0.5
        return item, end


def _after_blanks(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def elements(chunks: Iterable[bytes], names: Iterable[str], limit: int = MAX_PIECE_BYTES) -> Iterator[dict[str, str]]:
    """Every element of those names in an XML document, as ``{path inside it: text}``; "" is its own name.

    Attributes are filed under ``path@name``. Of several elements with one path the last counts. Declared entities are
    refused: they could stand for gigabytes or for files.

    Raises:
        DamageError: while iterating: not well-formed, cut off, a declared entity, an element over ``limit``.
    """
    builder = _ElementBuilder(frozenset(names), limit)
    try:
        for chunk in chunks:
            builder.parser.Parse(chunk, False)
            yield from builder.taken()
        builder.parser.Parse(b"", True)
    except expat.ExpatError as error:
        raise DamageError(f"not well-formed XML ({error})") from error
    yield from builder.taken()


class _ElementBuilder:
    def __init__(self, names: frozenset[str], limit: int) -> None:
        self._names, self._limit = names, limit
        self._path: list[str] = []
        self._fields: dict[str, str] | None = None
        self._texts: list[str] = []
        self._size = 0
        self._done: list[dict[str, str]] = []
        self.parser = expat.ParserCreate()
        self.parser.buffer_text = True
        self.parser.StartElementHandler = self._start
        self.parser.EndElementHandler = self._end
        self.parser.CharacterDataHandler = self._characters
        self.parser.EntityDeclHandler = self._entity

    def taken(self) -> list[dict[str, str]]:
        done, self._done = self._done, []
        return done

    def _start(self, name: str, attributes: dict[str, str]) -> None:
        if self._fields is None:
            if name not in self._names:
                return
            self._fields, self._path, self._size = {"": name}, [], 0
        else:
            self._path.append(name)
        path = "/".join(self._path)
        self._texts = []
        for key, value in attributes.items():
            self._fields[f"{path}@{key}"] = value

    def _end(self, name: str) -> None:
        if self._fields is None:
            return
        if self._path:
            self._fields["/".join(self._path)] = "".join(self._texts)
            self._texts = []
            self._path.pop()
            return
        self._fields["#text"] = "".join(self._texts)
        self._done.append(self._fields)
        self._fields, self._texts = None, []

    def _characters(self, text: str) -> None:
        if self._fields is not None:
            self._size += len(text)
            if self._size > self._limit:
                raise DamageError(f"an element is longer than {self._limit:,} characters")
            self._texts.append(text)

    def _entity(self, name: str, *_: object) -> None:
        raise DamageError(f"it declares the entity {name!r}, which is refused")
