"""An input of any known format -> its documents.

kind: how a file is cut: ``lines`` (JSON objects, one a line), ``array`` (one JSON array), ``parquet``, ``mediawiki``
(an XML dump), ``problems`` (ASDiv's XML), ``text``; a zip holds members of any kind but parquet. Packing (gz, bz2, zst)
is found from the first bytes, the kind from the name where it says one and else from the content.
"""

from __future__ import annotations

import fnmatch
import json
import logging
import re
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from liquid_llm import storage
from liquid_llm.errors import DataError
from liquid_llm.preparation import streams
from liquid_llm.preparation.layouts import FORMATS, Layout, UnusableError, field_layout, find_layout
from liquid_llm.preparation.mediawiki import plain_text
from liquid_llm.preparation.texts import looks_like_wikitext, text_documents, wikitext_articles
from liquid_llm.storage.streams import CHUNK_BYTES, DamageError, lines, unpack

EXCERPT_CHARACTERS = 200

_log = logging.getLogger(__name__)
_NAMED_KINDS = {"jsonl": "lines", "ndjson": "lines", "txt": "text", "text": "text", "raw": "text", "tokens": "text"}
_PACKINGS = ("gz", "bz2", "zst")
_MEMBERS = re.compile(r"\.(jsonl|json|ndjson|xml|txt|text|raw|tokens)(\.(gz|bz2|zst))?$", re.IGNORECASE)
_MEDIAWIKI = re.compile(rb"\s*(?:<\?xml[^>]*>)?\s*(?:<!--.*?-->\s*)*<mediawiki\b", re.DOTALL)
_UNKNOWN_OBJECTS = 1000  # objects without a known key after which a file is given up
_PARQUET_ROWS = 16  # taken out at once: rows may be whole books
_FILE_NAMESPACES = ("6", "14")  # MediaWiki's numbers of File and Category
_ARTICLES = "0"


@dataclass(frozen=True, slots=True)
class Document:
    """One text and where it was found; ``sample_id`` where its record has one."""

    text: str
    place: str
    sample_id: str | None = None


@dataclass(frozen=True, slots=True)
class Reject:
    """A piece that is no document: where, why, and how it begins."""

    place: str
    reason: str
    excerpt: str


Finding = Document | Reject | None  # None: left out on purpose (a redirect, a page without words)


@dataclass(frozen=True)
class Reading:
    """What a catalog says of how a dataset's inputs are read."""

    type: str
    format: str | None = None
    field: str | None = None
    members: str = "*"


def documents(uri: str, reading: Reading, advance: Callable[[int], None]) -> Iterator[Finding]:
    """The findings of one input, in order.

    Raises:
        DataError: while iterating: it fits no known format, or not the stated one; it is truncated or damaged.
        StorageError: it cannot be read.
    """
    with storage.open_read(uri) as opened:
        stream = streams.buffered(opened, advance)
        try:
            yield from _Input(uri, reading).findings(stream)
        except (DamageError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
            raise DataError(
                "the input cannot be read to its end", where=uri, got=str(error), remedy="copy or download it again"
            ) from error


class _Input:
    """One input, or one member of a zip, while it is read."""

    def __init__(self, where: str, reading: Reading) -> None:
        self.where, self.reading = where, reading

    def findings(self, stream: Any, *, in_zip: bool = False) -> Iterator[Finding]:
        packing = streams.magic(stream)
        if packing in ("zip", "parquet"):
            if in_zip:
                raise self._unfit(f"a {packing} file inside a zip")
            if not stream.seekable():
                remedy = "download it and name the local file"
                raise DataError(f"a {packing} file cannot be read from this place", where=self.where, remedy=remedy)
            return self._zip_findings(stream) if packing == "zip" else self._parquet_findings(stream)
        return self._unpacked_findings(stream, packing)

    def _unpacked_findings(self, stream: Any, packing: str | None) -> Iterator[Finding]:
        head, chunks = streams.with_head(unpack(stream, packing))
        kind = self._kind(head)
        self._require(kind)
        if kind == "mediawiki":
            yield from self._pages(chunks)
        elif kind == "text":
            is_wikitext = self.reading.format == "wikitext" or (
                self.reading.format is None and looks_like_wikitext(head)
            )
            for number, text in (wikitext_articles if is_wikitext else text_documents)(
                lines(chunks, streams.MAX_PIECE_BYTES)
            ):
                yield self._document(number, text)
        else:
            yield from self._from_objects(self._objects(kind, chunks))

    def _kind(self, head: bytes) -> str:
        """How the file is cut.

        Raises:
            DataError: it is of no known kind.
        """
        endings = self.where.lower().rsplit("/", 1)[-1].split(".")[1:]
        while endings and endings[-1] in _PACKINGS:
            endings.pop()
        start = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
        named = _NAMED_KINDS.get(endings[-1]) if endings else None
        if not start:
            raise self._unfit("nothing in it")
        if b"\0" in head:
            raise self._unfit("bytes that are no text")
        if named == "text" or (self.reading.format in ("txt", "wikitext")):
            return "text"
        by_content = {b"[": "array", b"{": "lines", b"<": "xml"}.get(start)
        if by_content == "xml":
            by_content = "mediawiki" if _MEDIAWIKI.match(head) else "problems" if b"<Problem" in head else None
        if named == "lines" or by_content is not None:
            return named or str(by_content)
        raise self._unfit(f"a beginning like {head[:40]!r}")

    def _require(self, kind: str) -> None:
        stated = self.reading.format
        if stated is not None and kind not in FORMATS[stated].kinds:
            raise self._unfit(f"a file of the kind {kind}")

    def _unfit(self, got: str) -> DataError:
        stated = self.reading.format
        return DataError(
            f"the input is not of the stated format {stated}" if stated else "the input fits no known format",
            where=self.where,
            got=got,
            expected=None if stated else f"one of {', '.join(FORMATS)}",
            remedy="correct format: of the dataset" if stated else "state format: or field: of the dataset",
        )

    def _document(self, number: object, text: str | None) -> Finding:
        place = f"{self.where}:{number}"
        return Document(text, place) if text is not None else Reject(place, "not UTF-8 or far too long", "")

    # ------------------------------------------------------------------------------------------------------- objects

    def _objects(self, kind: str, chunks: Iterator[bytes]) -> Iterator[tuple[str, Any] | Reject]:
        if kind == "lines":
            yield from self._line_objects(chunks)
        elif kind == "array":
            for number, item in enumerate(streams.array_items(chunks), start=1):
                yield f"{self.where}:{number}", item
        else:
            for number, fields in enumerate(streams.elements(chunks, ["Problem"]), start=1):
                yield f"{self.where}:{fields.get('@ID', number)}", fields

    def _line_objects(self, chunks: Iterator[bytes]) -> Iterator[tuple[str, Any] | Reject]:
        for number, line in enumerate(lines(chunks, streams.MAX_PIECE_BYTES), start=1):
            place = f"{self.where}:{number}"
            if line is None:
                yield Reject(place, "the line is far too long", "")
            elif line.strip():
                try:
                    yield place, json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                except (ValueError, RecursionError) as error:
                    yield Reject(place, f"not JSON ({_short(error)})", _short(line.decode(errors="replace")))

    def _from_objects(self, found: Iterable[tuple[str, Any] | Reject]) -> Iterator[Finding]:
        layout = self._stated_layout()
        unknown = 0
        for item in found:
            if isinstance(item, Reject):
                yield item
                continue
            place, value = item
            if not isinstance(value, Mapping):
                yield Reject(place, f"not an object but {type(value).__name__}", _short(value))
                continue
            layout = layout or self._layout_of(value)
            if layout is not None:
                yield self._from_object(place, value, layout)
                continue
            unknown += 1
            if unknown == _UNKNOWN_OBJECTS:
                raise self._unfit(f"objects with the keys {_short(', '.join(map(str, value)))}")
            yield Reject(place, f"no known keys: {_short(', '.join(map(str, value)))}", _short(value))

    def _stated_layout(self) -> Layout | None:
        if self.reading.field is not None:
            return field_layout(self.reading.field)
        return FORMATS[self.reading.format].layout if self.reading.format else None

    def _layout_of(self, keys: Iterable[str]) -> Layout | None:
        plain = self.reading.format in ("jsonl", "json", "parquet") and "text" in keys
        return field_layout("text") if plain else find_layout(list(keys))

    def _from_object(self, place: str, value: Mapping[str, Any], layout: Layout) -> Finding:
        kind, name = value.get("type"), value.get("sample_id")
        try:
            text = layout.text(value)
            if kind in ("lm", "math_tool", "code") and kind != self.reading.type:
                raise UnusableError(f"its type is {kind}, the dataset's is {self.reading.type}")
            if name is not None and (isinstance(name, bool) or not isinstance(name, (str, int)) or name == ""):
                raise UnusableError("sample_id is not a non-empty string")
        except UnusableError as error:
            return Reject(place, str(error), _short(json.dumps(value, ensure_ascii=False, default=str)))
        return Document(text, place, None if name is None else str(name))

    # --------------------------------------------------------------------------------------------- wiki, zip, parquet

    def _pages(self, chunks: Iterator[bytes]) -> Iterator[Finding]:
        namespaces: set[str] = set()
        for page in streams.elements(chunks, ["page", "namespace"]):
            if page[""] == "namespace":
                if page.get("@key") in _FILE_NAMESPACES:
                    namespaces.add(page["#text"].strip().lower())
                continue
            title = page.get("title", "").strip()
            place = f"{self.where}:{title}"
            if page.get("ns", _ARTICLES) != _ARTICLES or "redirect" in page:
                yield None
            elif not title or "revision/text" not in page:
                yield Reject(place, "a page without title or text", _short(page))
            else:
                body = plain_text(page["revision/text"], frozenset(namespaces))
                yield Document(f"{title}\n\n{body}", place) if body else None

    def _zip_findings(self, stream: Any) -> Iterator[Finding]:
        with zipfile.ZipFile(stream) as opened:
            members = [one for one in opened.infolist() if not one.is_dir()]
            wanted = sorted((one for one in members if self._is_wanted(one.filename)), key=lambda one: one.filename)
            if not wanted:
                names = ", ".join(one.filename for one in members[:5])
                raise self._unfit(f"a zip without a member to read that matches {self.reading.members!r} ({names})")
            _log.info("%s: reads %s", self.where, _short(", ".join(one.filename for one in wanted)))
            for member in wanted:
                if member.flag_bits & 1:
                    raise self._unfit(f"an encrypted member {member.filename}")
                with opened.open(member) as raw:
                    source = streams.buffered(raw)
                    yield from _Input(f"{self.where}!{member.filename}", self.reading).findings(source, in_zip=True)

    def _is_wanted(self, name: str) -> bool:
        if name.startswith("__MACOSX/") or not _MEMBERS.search(name):
            return False
        return fnmatch.fnmatchcase(name, self.reading.members)

    def _parquet_findings(self, stream: Any) -> Iterator[Finding]:
        import pyarrow
        from pyarrow import parquet

        self._require("parquet")
        try:
            # by default it reads every row group ahead: the whole file would come to lie in memory
            table = parquet.ParquetFile(stream, pre_buffer=False, buffer_size=CHUNK_BYTES)
            names = table.schema_arrow.names
            layout = self._stated_layout() or self._layout_of(names)
            if layout is None or not set(layout.keys) <= set(names):
                raise self._unfit(f"columns {', '.join(names)}")
            read = [name for name in (*layout.keys, *layout.more_keys, "type", "sample_id") if name in names]
            number = 0
            for batch in table.iter_batches(_PARQUET_ROWS, columns=list(dict.fromkeys(read))):
                for value in batch.to_pylist():
                    number += 1
                    yield self._from_object(f"{self.where}:{number}", value, layout)
        except (pyarrow.ArrowException, OSError) as error:
            raise DamageError(f"not a readable parquet file ({_short(error)})") from error


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= EXCERPT_CHARACTERS else text[: EXCERPT_CHARACTERS - 1] + "…"
