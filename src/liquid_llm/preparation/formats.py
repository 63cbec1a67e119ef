"""An input of any known format -> its documents.

How a file is cut: ``lines`` (JSON objects, one a line), ``array`` (one JSON array), ``parquet``, ``problems`` (ASDiv's
XML) or ``text``; a zip holds members of any of these but parquet. Packing (gz, bz2, zst) is told by the first bytes,
the cut by the name where it says one and else by the content.
"""

from __future__ import annotations

import fnmatch
import json
import logging
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, NoReturn
from xml.etree import ElementTree

from liquid_llm import storage
from liquid_llm.data.records import Body, check_name, parquet_rows
from liquid_llm.data.texts import text_documents, wikitext_articles
from liquid_llm.errors import DataError
from liquid_llm.formatting import format_bytes
from liquid_llm.parsing import ParseError, parse_json
from liquid_llm.preparation.layouts import FORMATS, Layout, UnusableError, field_layout, find_layout
from liquid_llm.sources import FIRST_TYPES
from liquid_llm.storage.streams import DamageError, lines, unpack

EXCERPT_CHARACTERS = 200
MAX_LINE_BYTES = 64 * 2**20  # a longer line is not kept in memory
MAX_WHOLE_BYTES = 256 * 2**20  # of a JSON array or XML document, which are read whole

_log = logging.getLogger(__name__)
_MAGIC = {b"\x1f\x8b": "gz", b"BZh": "bz2", b"\x28\xb5\x2f\xfd": "zst", b"PK\x03\x04": "zip", b"PAR1": "parquet"}
_HEAD_BYTES = 1 << 16
_NAMED_CUTS = {"jsonl": "lines", "ndjson": "lines", "txt": "text", "text": "text", "raw": "text", "tokens": "text"}
_MEMBERS = re.compile(r"\.(jsonl|json|ndjson|xml|txt|text|raw|tokens)(\.(gz|bz2|zst))?$", re.IGNORECASE)
_TITLE_LINE = re.compile(rb"(?:\A|\n) ?\r?\n ?= (?!=)[^\n]*(?<! =) = *\r?\n|\A ?= (?!=)[^\n]*(?<! =) = *\r?\n")
_UNKNOWN_OBJECTS = 1000  # objects without a known key after which a file is given up


@dataclass(frozen=True, slots=True)
class Document:
    """What was found and where; ``sample_id`` where its record has one."""

    body: Body
    location: str
    sample_id: str | None = None

    @property
    def text(self) -> str:
        """All that it says."""
        return self.body.whole


@dataclass(frozen=True, slots=True)
class Reject:
    """A piece that is no document: where, why, and how it begins."""

    location: str
    reason: str
    excerpt: str = ""


Finding = Document | Reject


@dataclass(frozen=True)
class Reading:
    """What a catalog says of how a dataset's inputs are read."""

    type: str
    format: str | None = None
    field: str | None = None
    members: str = "*"


def documents(uri: str, reading: Reading, advance: Callable[[int], object]) -> Iterator[Finding]:
    """The findings of one input, in order; ``advance`` is told of bytes as they are read.

    Raises:
        DataError: while iterating: it fits no known format, or not the stated one; it is truncated or damaged.
        StorageError: it cannot be read.
    """
    with storage.open_read(uri) as stream:
        told = 0
        try:
            with storage.zip_errors():
                for finding in _Input(uri, reading).findings(stream):
                    yield finding
                    read = max(told, stream.tell())
                    advance(read - told)
                    told = read
        except (DamageError, zipfile.BadZipFile) as error:
            raise DataError(
                "the input cannot be read to its end", where=uri, got=str(error), remedy="copy or download it again"
            ) from error


class _Input:
    """One input, or one member of a zip, while it is read."""

    def __init__(self, where: str, reading: Reading) -> None:
        self.where, self.reading = where, reading

    def findings(self, stream: Any, *, in_zip: bool = False) -> Iterator[Finding]:
        start = stream.peek(8)
        packing = next((name for mark, name in _MAGIC.items() if start.startswith(mark)), None)
        if packing not in ("zip", "parquet"):
            return self._read_unpacked(unpack(stream, packing))
        if in_zip:
            self._refuse(f"a {packing} file inside a zip")
        if not stream.seekable():
            remedy = "download it and name the local file"
            raise DataError(f"a {packing} file cannot be read from this place", where=self.where, remedy=remedy)
        return self._zip(stream) if packing == "zip" else self._parquet(stream)

    def _read_unpacked(self, chunks: Iterator[bytes]) -> Iterator[Finding]:
        head, chunks = _with_head(chunks)
        cut = self._cut(head)
        self._require(cut)
        if cut == "text":
            return self._text(head, chunks)
        objects = {"lines": self._lines, "array": self._array, "problems": self._problems}[cut]
        return self._from_objects(objects(chunks))

    def _cut(self, head: bytes) -> str:
        """How the file is cut.

        Raises:
            DataError: in no known way.
        """
        endings = [one for one in self.where.lower().rsplit("/", 1)[-1].split(".")[1:] if one not in _MAGIC.values()]
        named = _NAMED_CUTS.get(endings[-1]) if endings else None
        start = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
        if not start:
            self._refuse("nothing in it")
        if b"\0" in head:
            self._refuse("bytes that are no text")
        if named == "text" or self.reading.format in ("txt", "wikitext"):
            return "text"
        if start == b"<" and b"<mediawiki" in head[:1024]:
            raise DataError(
                "MediaWiki dumps are not read any more",
                where=self.where,
                remedy="use articles as plain text, such as the parquet files of wikimedia/wikipedia on the hub",
            )
        by_content = {b"[": "array", b"{": "lines"}.get(start)
        if start == b"<" and b"<Problem" in head:
            by_content = "problems"
        return named or by_content or self._refuse(f"a beginning like {head[:40]!r}")

    def _require(self, cut: str) -> None:
        stated = self.reading.format
        if stated is not None and cut not in FORMATS[stated].cuts:
            self._refuse(f"a file of {cut}")

    def _refuse(self, got: str) -> NoReturn:
        stated = self.reading.format
        raise DataError(
            f"the input is not of the stated format {stated}" if stated else "the input fits no known format",
            where=self.where,
            got=got,
            expected=None if stated else f"one of {', '.join(FORMATS)}",
            remedy="correct format: of the dataset" if stated else "state format: or field: of the dataset",
        )

    # ------------------------------------------------------------------------------------------------- text and objects

    def _text(self, head: bytes, chunks: Iterator[bytes]) -> Iterator[Finding]:
        stated = self.reading.format
        is_wikitext = stated == "wikitext" or (stated is None and _TITLE_LINE.search(head[:4096]) is not None)
        found = (wikitext_articles if is_wikitext else text_documents)(map(_decode, _number_lines(chunks)))
        for number, text in found:
            location = f"{self.where}:{number + 1}"
            yield Reject(location, "not UTF-8 or far too long") if text is None else Document(Body(text), location)

    def _lines(self, chunks: Iterator[bytes]) -> Iterator[tuple[str, Any] | Reject]:
        for number, line in _number_lines(chunks):
            location = f"{self.where}:{number}"
            if line is None:
                yield Reject(location, "the line is far too long")
            elif line.strip():
                try:
                    yield location, parse_json(line, "utf-8-sig" if number == 1 else "utf-8")
                except ParseError as error:
                    yield Reject(location, f"not JSON ({shorten(error)})", shorten(line.decode(errors="replace")))

    def _array(self, chunks: Iterator[bytes]) -> Iterator[tuple[str, Any]]:
        try:
            items = parse_json(self._whole(chunks), "utf-8-sig", MAX_WHOLE_BYTES)
        except ParseError as error:
            raise DamageError(f"not a JSON array ({shorten(error)})") from error
        return ((f"{self.where}:{number}", item) for number, item in enumerate(items, start=1))

    def _problems(self, chunks: Iterator[bytes]) -> Iterator[tuple[str, Any]]:
        try:  # as text: an encoding that the document names could hide what is looked for below
            text = self._whole(chunks).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise DamageError(f"the XML is not UTF-8 ({error.reason} at byte {error.start})") from error
        if "<!ENTITY" in text:  # it could stand for gigabytes, or for files
            raise DamageError("it declares an entity, which is refused")
        try:
            problems = ElementTree.fromstring(text).iter("Problem")
        except (ElementTree.ParseError, ValueError) as error:
            raise DamageError(f"not well-formed XML ({error})") from error
        for number, problem in enumerate(problems, start=1):
            yield f"{self.where}:{problem.get('ID', number)}", {part.tag: part.text or "" for part in problem}

    def _whole(self, chunks: Iterator[bytes]) -> bytes:
        data = bytearray()
        for chunk in chunks:
            data += chunk
            if len(data) > MAX_WHOLE_BYTES:
                raise DataError(
                    "a JSON array or XML document is read whole, and this one is too large",
                    where=self.where,
                    expected=f"at most {format_bytes(MAX_WHOLE_BYTES)}",
                    remedy="write it as JSON lines, one object a line",
                )
        return bytes(data)

    def _from_objects(self, found: Iterable[tuple[str, Any] | Reject]) -> Iterator[Finding]:
        layout = self._stated_layout()
        unknown = 0
        for item in found:
            if isinstance(item, Reject):
                yield item
                continue
            location, value = item
            if not isinstance(value, Mapping):
                yield Reject(location, f"not an object but {type(value).__name__}", shorten(value))
                continue
            layout = layout or self._layout_of(value)
            if layout is not None:
                yield self._from_object(location, value, layout)
                continue
            unknown += 1
            keys = shorten(", ".join(map(str, value)))
            if unknown == _UNKNOWN_OBJECTS:
                self._refuse(f"objects with the keys {keys}")
            yield Reject(location, f"none of its names is known ({keys})", shorten(value))

    def _stated_layout(self) -> Layout | None:
        if self.reading.field is not None:
            return field_layout(self.reading.field)
        return FORMATS[self.reading.format].layout if self.reading.format else None

    def _layout_of(self, keys: Iterable[str]) -> Layout | None:
        plain = self.reading.format in ("jsonl", "json", "parquet") and "text" in keys
        return field_layout("text") if plain else find_layout(list(keys))

    def _from_object(self, location: str, value: Mapping[str, Any], layout: Layout) -> Finding:
        stated, name = value.get("type"), value.get("sample_id")
        try:
            body = layout.body(value)
            if stated in FIRST_TYPES and stated != self.reading.type:  # any other is the data's own word
                raise UnusableError(f"its type is {stated}, the dataset's is {self.reading.type}")
            return Document(body, location, check_name(name))
        except ValueError as error:
            return Reject(location, str(error), shorten(json.dumps(value, ensure_ascii=False, default=str)))

    # ------------------------------------------------------------------------------------------------ zip and parquet

    def _zip(self, stream: Any) -> Iterator[Finding]:
        with zipfile.ZipFile(stream) as opened:
            members = [one for one in opened.infolist() if one.filename and not one.is_dir()]
            wanted = sorted((one for one in members if self._is_wanted(one.filename)), key=lambda one: one.filename)
            if not wanted:
                names = ", ".join(one.filename for one in members[:5])
                self._refuse(f"a zip without a member to read that matches {self.reading.members!r} ({names})")
            _log.info("%s: reads %s", self.where, shorten(", ".join(one.filename for one in wanted)))
            for member in wanted:
                if member.flag_bits & 1:
                    self._refuse(f"an encrypted member {member.filename}")
                if storage.is_far(member.compress_size, member.file_size):
                    raise DamageError(f"{member.filename} unpacks to far more than it should")
                with opened.open(member) as raw:
                    yield from _Input(f"{self.where}!{member.filename}", self.reading).findings(raw, in_zip=True)

    def _is_wanted(self, name: str) -> bool:
        if name.startswith("__MACOSX/") or not _MEMBERS.search(name):
            return False
        return fnmatch.fnmatchcase(name, self.reading.members)

    def _parquet(self, stream: Any) -> Iterator[Finding]:
        self._require("parquet")
        layout = self._stated_layout()

        def choose(names: list[str]) -> list[str]:
            nonlocal layout
            layout = layout or self._layout_of(names)
            if layout is None or not set(layout.keys) <= set(names):
                self._refuse(f"columns {', '.join(names)}")
            return [name for name in names if name in (*layout.keys, *layout.more_keys, "type", "sample_id")]

        for number, (value, _) in enumerate(parquet_rows(stream, choose), start=1):
            assert layout is not None
            yield self._from_object(f"{self.where}:{number}", value, layout)


def _with_head(chunks: Iterator[bytes]) -> tuple[bytes, Iterator[bytes]]:
    """The first ``_HEAD_BYTES`` or a few more, and all chunks again."""
    taken: list[bytes] = []
    while sum(map(len, taken)) < _HEAD_BYTES and (chunk := next(chunks, b"")):
        taken.append(chunk)
    return b"".join(taken), chain(taken, chunks)


def _number_lines(chunks: Iterator[bytes]) -> Iterator[tuple[int, bytes | None]]:
    return enumerate(lines(chunks, MAX_LINE_BYTES), start=1)


def _decode(numbered: tuple[int, bytes | None]) -> str | None:
    """A line of text with its newline, ``""`` for a blank one, None for one that is not UTF-8 or far too long."""
    number, line = numbered
    if line is None:
        return None
    try:
        text = line.removesuffix(b"\r").decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError:
        return None
    return f"{text}\n" if text.strip() else ""


def shorten(value: object) -> str:
    """At most ``EXCERPT_CHARACTERS`` of a text, and what UTF-8 can hold of them."""
    text = str(value)
    text = text if len(text) <= EXCERPT_CHARACTERS else text[: EXCERPT_CHARACTERS - 1] + "…"
    return text.encode("utf-8", errors="replace").decode()
