"""MediaWiki's page source -> plain paragraphs: a light clean-up in one pass, not a renderer.

Gone: templates, tables, references, comments, images, categories, galleries, formulas, tags, magic words.
Kept: the words of links, headings (a line of their own), list items (without their marks).
"""

from __future__ import annotations

import html
import re

# What only a program could show; the content goes with the tag. An opening tag without its end is left to _TAG.
_DROPPED_TAGS = "ref|math|gallery|timeline|score|imagemap|syntaxhighlight|source|templatestyles|chem|mapframe|graph"
_COMMENT = re.compile(r"<!--.*?(?:-->|\Z)", re.DOTALL)
_SELF_CLOSED = re.compile(rf"<(?:{_DROPPED_TAGS})\b[^<>]*/>", re.IGNORECASE)
_DROPPED = re.compile(rf"<({_DROPPED_TAGS})\b[^<>]*>(?:(?!<\1\b).)*?</\1\s*>", re.IGNORECASE | re.DOTALL)
_BREAK = re.compile(r"<br\b[^<>]*>", re.IGNORECASE)
_TAG = re.compile(r"</?[A-Za-z][^<>]*>")
_BRACKETS = re.compile(r"\{\{|\}\}|\[\[|\]\]|^[ :]*\{\||^[ ]*\|\}(?!\})", re.MULTILINE)
_CLOSES = {"}}": "{{", "]]": "[[", "|}": "{|"}
_EXTERNAL = re.compile(r"\[(?:https?:|ftp:|//)[^\s\[\]]*(?:\s+([^\[\]]*))?\]")
_QUOTES = re.compile(r"'{2,5}")
_HEADING = re.compile(r"^(={2,6})[ \t]*(.*?)[ \t]*\1[ \t]*$", re.MULTILINE)
_MAGIC_WORD = re.compile(r"__[A-Z]{3,}__")
_LIST_MARK = re.compile(r"^[*#:;]+[ \t]*", re.MULTILINE)
_SPACES = re.compile(r"[ \t\u00a0]{2,}|[\t\u00a0]")
_EMPTY_LINES = re.compile(r"\n{3,}")
_NAMESPACES = frozenset({"file", "image", "category", "media"})


def plain_text(source: str, namespaces: frozenset[str] = frozenset()) -> str:
    """The words of a page.

    Args:
        source: wikitext.
        namespaces: this wiki's own names, in lower case, of the namespaces of files and categories.
    """
    text = _COMMENT.sub("", source)
    text = _DROPPED.sub("", _SELF_CLOSED.sub("", text))
    text = _without_brackets(text, namespaces | _NAMESPACES)
    text = _EXTERNAL.sub(lambda found: found[1] or "", text)
    text = _HEADING.sub(r"\n\2\n", _QUOTES.sub("", _MAGIC_WORD.sub("", text)))
    text = html.unescape(_TAG.sub("", _BREAK.sub("\n", _LIST_MARK.sub("", text))))
    text = "\n".join(_SPACES.sub(" ", line).strip() for line in text.split("\n"))
    return _EMPTY_LINES.sub("\n\n", text).strip()


def _without_brackets(text: str, namespaces: frozenset[str]) -> str:
    """Templates and tables taken out and links replaced by their words, however they are nested.

    A bracket that is never closed stays as it stands, and so does everything after it.
    """
    parts: list[str] = []
    open_brackets: list[tuple[str, int]] = []  # which, and where in ``parts`` it stands
    position = 0
    for found in _BRACKETS.finditer(text):
        parts.append(text[position : found.start()])
        position = found.end()
        mark = found[0].strip(" :")
        opening = _CLOSES.get(mark)
        if opening is None:
            open_brackets.append((mark, len(parts)))
            parts.append(found[0])
        elif open_brackets and open_brackets[-1][0] == opening:
            begin = open_brackets.pop()[1]
            inside = "".join(parts[begin + 1 :])
            parts[begin:] = [_link_words(inside, namespaces) if opening == "[[" else ""]
        else:
            parts.append(found[0])
    return "".join([*parts, text[position:]])


def _link_words(inside: str, namespaces: frozenset[str]) -> str:
    target, bar, words = inside.partition("|")
    prefix = target.partition(":")[0].strip().lower()
    if ":" in target and not target.startswith(":") and prefix in namespaces:
        return ""
    return words if bar else target.lstrip(":")
