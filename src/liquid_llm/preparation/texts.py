"""Documents out of plain text.

A plain text has no records: it is cut at empty lines into documents of about ``DOCUMENT_CHARACTERS``. WikiText (the
dataset) is cut into articles, each beginning with a line `` = Title = `` after an empty one; its words stay as they
are, tokenisation marks included, so that perplexities stay comparable with the dataset's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator

DOCUMENT_CHARACTERS = 8_192
MAX_DOCUMENT_CHARACTERS = 1_048_576  # where no empty line or heading comes, a document ends here

_TITLE = re.compile(r" ?= (?!=)[^\n]*(?<! =) = *")
_TITLE_LINE = re.compile(rb"(?:\A|\n) ?\r?\n ?= (?!=)[^\n]*(?<! =) = *\r?\n|\A ?= (?!=)[^\n]*(?<! =) = *\r?\n")

Numbered = tuple[int, str | None]


def looks_like_wikitext(head: bytes) -> bool:
    """Whether a text begins like the WikiText datasets do, with a title in single equal signs."""
    return _TITLE_LINE.search(head[:4096]) is not None


def text_documents(lines: Iterable[bytes | None]) -> Iterator[Numbered]:
    """(line it begins at, document) in order; None for a line that cannot be read."""
    return _documents(lines, lambda line, size, _: not line and size >= DOCUMENT_CHARACTERS)


def wikitext_articles(lines: Iterable[bytes | None]) -> Iterator[Numbered]:
    """The same for WikiText: an article, its lines without the empty ones between them."""
    for number, text in _documents(lines, lambda line, _, after_blank: after_blank and bool(_TITLE.fullmatch(line))):
        yield number, None if text is None else "\n".join(line.strip() for line in text.split("\n") if line.strip())


def _documents(lines: Iterable[bytes | None], begins: Callable[[str, int, bool], bool]) -> Iterator[Numbered]:
    kept: list[str] = []
    size, first, after_blank = 0, 1, True
    for number, raw in enumerate(lines, start=1):
        line = _decoded(raw, number)
        if line is None:
            yield number, None
            continue
        stripped = line.rstrip()
        if kept and (begins(stripped, size, after_blank) or size >= MAX_DOCUMENT_CHARACTERS):
            yield first, "\n".join(kept).strip("\n")
            kept, size = [], 0
        after_blank = not stripped
        if stripped or kept:
            first = first if kept else number
            kept.append(stripped)
            size += len(stripped) + 1
    if any(kept):
        yield first, "\n".join(kept).strip("\n")


def _decoded(raw: bytes | None, number: int) -> str | None:
    if raw is None:
        return None
    try:
        return raw.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError:
        return None
