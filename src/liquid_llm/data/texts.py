"""Documents put together from the lines of running text.

WikiText is kept as it was published, marks and blank lines and all, so that perplexities can be compared with those of
others: an article begins at its heading (`` = Title = ``), or after about 32,000 characters where none comes. Any other
text is cut at empty lines. Both take lines in order, None for one that cannot be read, and give (number of the line a
document begins with, from 0; document), None for a line that was None.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

ARTICLE_CHARACTERS = 32_768
DOCUMENT_CHARACTERS = 8_192
MAX_DOCUMENT_CHARACTERS = 1_048_576  # where no empty line comes, a document ends here

_HEADING = re.compile(r"^ ?= [^=].* = ?\n$")

Numbered = tuple[int, str | None]


def wikitext_articles(lines: Iterable[str | None]) -> Iterator[Numbered]:
    """Articles, verbatim. ``lines`` end in their newline; a blank one is ``""``, as the published dataset has it."""
    begun: list[str] = []
    start = characters = 0
    for number, line in enumerate(lines):
        if line is None:
            yield number, None
            continue
        if begun and (characters >= ARTICLE_CHARACTERS or _HEADING.match(line)):
            yield start, "".join(begun)
            begun, characters = [], 0
        if begun or line.strip():
            start = start if begun else number
            begun.append(line or "\n")
            characters += len(line)
    if begun:
        yield start, "".join(begun)


def text_documents(lines: Iterable[str | None]) -> Iterator[Numbered]:
    """Documents of about ``DOCUMENT_CHARACTERS``, without blanks at the ends of lines and empty lines around them."""
    begun: list[str] = []
    start = characters = 0
    for number, line in enumerate(lines):
        if line is None:
            yield number, None
            continue
        line = line.rstrip()
        at_gap = not line and characters >= DOCUMENT_CHARACTERS
        if begun and (at_gap or characters >= MAX_DOCUMENT_CHARACTERS):
            yield start, "\n".join(begun).rstrip("\n")
            begun, characters = [], 0
        if begun or line:
            start = start if begun else number
            begun.append(line)
            characters += len(line) + 1
    if begun:
        yield start, "\n".join(begun).rstrip("\n")
