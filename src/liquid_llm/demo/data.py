"""The demo's own training data, made from what every machine with Python has.

``lm``: the language reference that ``help()`` shows, then long docstrings of the standard library; ``code``: short
documented functions of the standard library; ``math_tool``: generated word problems. Sources are parsed, never
imported, so nothing runs.

The same Python version, seed and sizes give the same bytes.
"""

from __future__ import annotations

import ast
import json
import random
import sys
import sysconfig
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path

from liquid_llm import storage
from liquid_llm.data.types import TextRecord
from liquid_llm.demo.word_problems import word_problems
from liquid_llm.errors import DataError

WEIGHTS = {"lm": 0.5, "math_tool": 0.25, "code": 0.25}
_FILES = 2  # of each type
_LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip", "distutils", "pydoc_data", "encodings"}
_CODE_LINES, _CODE_CHARACTERS = range(5, 41), 700  # of a function; 700 characters are about 200 tokens
_LONG_DOCSTRING = 400


def make_demo_data(out_dir: str | Path, *, seed: int, num_lm: int, num_math: int, num_code: int) -> str:
    """Write JSONL files of all three types and their manifest; gives the manifest's URI.

    Args:
        out_dir: a folder or URL; files go to ``lm/``, ``math_tool/`` and ``code/`` in it.
        seed: which problems, functions and docstrings are taken.
        num_lm: documents of plain text, about 400 tokens each; the 80 or so pages of the language reference come first.
        num_math: word problems, about 100 tokens each.
        num_code: functions, about 130 tokens each.

    Raises:
        DataError: this Python has no sources of its standard library, or fewer functions or docstrings than asked.
        StorageError: the folder cannot be written.
    """
    library = read_library()
    problems = enumerate(word_problems(num_math, seed))
    records = {
        "lm": _lm_records(library, seed, num_lm),
        "math_tool": [TextRecord(text, "math_tool", f"math-{number:06d}") for number, text in problems],
        "code": _code_records(library, seed, num_code),
    }
    lines = []
    for type, rows in records.items():
        for number in range(_FILES):
            name = f"part-{number:05d}-of-{_FILES:05d}.jsonl"
            storage.write_bytes(storage.join(str(out_dir), type, name), _jsonl(rows[number::_FILES]))
        lines.append({"path": f"{type}/part-*-of-{_FILES:05d}.jsonl", "type": type, "weight": WEIGHTS[type]})
    manifest = storage.join(str(out_dir), "manifest.jsonl")
    storage.write_bytes(manifest, "".join(json.dumps(line) + "\n" for line in lines).encode())
    return manifest


@dataclass
class Library:
    """What the sources of the standard library hold, by qualified name, in a fixed order."""

    docstrings: dict[str, str] = field(default_factory=dict)
    functions: dict[str, str] = field(default_factory=dict)


def read_library(root: Path | None = None) -> Library:
    """Docstrings and documented functions below ``root``, by default this Python's standard library."""
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    library = Library()
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if parts[0] not in sys.stdlib_module_names or _LEFT_OUT & set(parts):
            continue
        try:
            source = path.read_text(encoding="utf-8")
            tree = ast.parse(source)
        except (UnicodeDecodeError, SyntaxError):  # data for other tools, not modules of this Python
            continue
        module = ".".join(part for part in parts if part != "__init__")
        _collect(tree, module, source.splitlines(), library)
    if not library.functions:
        raise DataError(
            "the standard library's sources are not there",
            where=root,
            remedy="use a Python that was installed with its sources",
        )
    return library


def _collect(node: ast.Module | ast.ClassDef, name: str, lines: Sequence[str], library: Library) -> None:
    _put(library.docstrings, name, ast.get_docstring(node))
    for child in node.body:
        child_name = f"{name}.{getattr(child, 'name', '')}"
        if isinstance(child, ast.ClassDef):
            _collect(child, child_name, lines, library)
        elif isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)) and ast.get_docstring(child):
            _put(library.docstrings, child_name, ast.get_docstring(child))
            first = min([child.lineno, *(decorator.lineno for decorator in child.decorator_list)])
            _put(library.functions, child_name, textwrap.dedent("\n".join(lines[first - 1 : child.end_lineno])) + "\n")


def _put(table: dict[str, str], name: str, text: str | None) -> None:
    """The first of several definitions of one name (for different platforms, say) is taken."""
    if text:
        table.setdefault(name, text)


def _lm_records(library: Library, seed: int, count: int) -> list[TextRecord]:
    from pydoc_data.topics import topics

    names = {text.strip(): name for name, text in sorted(topics.items(), reverse=True)}  # some pages go by two
    once = {name: text for text, name in names.items()}
    pages = (TextRecord(f"{text}\n", "lm", f"lm-topic-{name}") for name, text in _shuffle(once, f"topics {seed}"))
    long = {name: text for name, text in library.docstrings.items() if len(text) >= _LONG_DOCSTRING}
    documents = (
        TextRecord(f"{name}\n\n{text.strip()}\n", "lm", f"lm-doc-{name}")
        for name, text in _shuffle(long, f"docstrings {seed}")
    )
    records = list(islice(chain(pages, documents), count))
    random.Random(f"order {seed}").shuffle(records)
    return _enough(records, count, "documents")


def _code_records(library: Library, seed: int, count: int) -> list[TextRecord]:
    short: dict[str, str] = {}
    for name, text in _shuffle(library.functions, f"functions {seed}"):
        if len(text) <= _CODE_CHARACTERS and text.count("\n") in _CODE_LINES:
            short.setdefault(text, name)  # some stand in several modules
    records = [TextRecord(text, "code", f"code-{name}") for text, name in islice(short.items(), count)]
    return _enough(records, count, "short functions")


def _enough(records: list[TextRecord], count: int, what: str) -> list[TextRecord]:
    if len(records) < count:
        raise DataError(
            f"this Python's standard library has too few {what}",
            got=len(records),
            expected=count,
            remedy="ask for fewer",
        )
    return records


def _shuffle(table: Mapping[str, str], key: str) -> Iterator[tuple[str, str]]:
    names = sorted(table)
    random.Random(key).shuffle(names)
    return ((name, table[name]) for name in names)


def _jsonl(records: Sequence[TextRecord]) -> bytes:
    rows = ({"text": one.text, "type": one.type, "sample_id": one.sample_id} for one in records)
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
