"""The demo's own texts, made from what every machine with Python has: some to train on, others held out.

``lm``: passages of the language reference that ``help()`` shows, then docstrings of the standard library; ``code``:
short documented functions of the standard library; ``math_tool``: generated word problems. Sources are parsed, never
imported, so nothing runs. Held-out passages are of pages, functions and problems that training never sees; a passage
that has a paragraph in common with one of them (pages hold parts of others), or is the docstring of such a function, is
not trained on.

The same Python version, seed and sizes give the same bytes.
"""

from __future__ import annotations

import ast
import json
import random
import sys
import sysconfig
import textwrap
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path

from liquid_llm import storage
from liquid_llm.data.records import Body
from liquid_llm.data.types import TextRecord
from liquid_llm.demo.word_problems import Problem, held_out_problems, word_problems
from liquid_llm.errors import DataError

WEIGHTS = {"lm": 0.5, "math_tool": 0.25, "code": 0.25}
_FILES = 2  # of each type
_LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip", "distutils", "pydoc_data", "encodings"}
_CODE_LINES, _CODE_CHARACTERS = range(5, 41), 700  # of a function; 700 characters are about 200 tokens
_PASSAGE = 600  # characters, about 150 tokens
_DOCSTRING_CHARACTERS = range(400, 1200)
_PARAGRAPH = 60  # characters
_HELD_PAGES = 12


@dataclass(frozen=True)
class Sizes:
    """How many texts: passages of plain text (about 170 tokens each), word problems (85), functions (100)."""

    lm: int
    math_tool: int
    code: int


@dataclass(frozen=True)
class DemoData:
    """Where the texts are.

    Attributes:
        manifest: of what is trained on.
        held_out: type -> file of texts that are not.
        questions: file of the held-out word problems whose completion is the result alone, so that an answer in any
            words can be marked by its last number.
    """

    manifest: str
    held_out: dict[str, str]
    questions: str


def make_demo_data(out_dir: str | Path, *, seed: int, train: Sizes, held_out: Sizes) -> DemoData:
    """Write JSONL files of all three types, their manifest, and files of held-out texts.

    Args:
        out_dir: a folder or URL; files go to ``lm/``, ``math_tool/``, ``code/`` and ``held_out/`` in it.
        seed: which problems, functions and passages are taken.
        held_out: half of its word problems have new numbers, half new wordings.

    Raises:
        DataError: this Python has no sources of its standard library, or fewer functions or passages than asked.
        StorageError: the folder cannot be written.
    """
    library = read_library()
    held_code, train_code = _code_records(library, seed, held_out.code, train.code)
    apart = {one.sample_id.removeprefix("code-") for one in held_code}
    held_lm, train_lm = _lm_records(library, seed, held_out.lm, train.lm, apart)
    problems = held_out_problems((held_out.math_tool + 1) // 2, seed)
    asked = [
        (f"math-{kind.replace(' ', '-')}-{n}", one) for kind, those in problems.items() for n, one in enumerate(those)
    ]
    records = {
        "lm": train_lm,
        "math_tool": [
            _conversation(one, f"math-{n:06d}") for n, one in enumerate(word_problems(train.math_tool, seed))
        ],
        "code": train_code,
    }
    held = {
        "lm": held_lm,
        "math_tool": [_conversation(one, name) for name, one in asked],
        "code": held_code,
    }
    lines = []
    for type, rows in records.items():
        for number in range(_FILES):
            name = f"part-{number:05d}-of-{_FILES:05d}.jsonl"
            storage.write_bytes(storage.join(str(out_dir), type, name), _jsonl(rows[number::_FILES]))
        lines.append({"path": f"{type}/part-*-of-{_FILES:05d}.jsonl", "type": type, "weight": WEIGHTS[type]})
    held_files = {type: storage.join(str(out_dir), "held_out", f"{type}.jsonl") for type in held}
    for type, rows in held.items():
        storage.write_bytes(held_files[type], _jsonl(rows))
    questions = storage.join(str(out_dir), "held_out", "questions.jsonl")
    storage.write_bytes(questions, _jsonl([_question(one, name) for name, one in asked]))
    manifest = storage.join(str(out_dir), "manifest.jsonl")
    storage.write_bytes(manifest, "".join(json.dumps(line) + "\n" for line in lines).encode())
    return DemoData(manifest, held_files, questions)


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


def _lm_records(
    library: Library, seed: int, held: int, count: int, functions: Collection[str]
) -> tuple[list[TextRecord], list[TextRecord]]:
    """Held-out passages of some pages; passages of the others and docstrings behind them but those of ``functions``."""
    from pydoc_data.topics import topics

    pages = dict(_shuffle(_pages(topics), f"pages {seed}"))
    apart = _cut(dict(islice(pages.items(), _HELD_PAGES)))
    known = {paragraph for text in apart.values() for paragraph in _paragraphs(text)}
    rest = {name: text for name, text in _cut(pages).items() if name not in apart and not known & _paragraphs(text)}
    docstrings = {
        f"doc-{name}": f"{name}\n\n{text.strip()}"
        for name, text in library.docstrings.items()
        if len(text) in _DOCSTRING_CHARACTERS and name not in functions
    }
    rows = chain(_shuffle(rest, f"topics {seed}"), _shuffle(docstrings, f"docstrings {seed}"))
    return (
        _enough(list(map(_passage, islice(_shuffle(apart, f"held out {seed}"), held))), held, "passages"),
        _enough(list(map(_passage, islice(rows, count))), count, "passages"),
    )


def _passage(row: tuple[str, str]) -> TextRecord:
    name, text = row
    return TextRecord(f"{text}\n", "lm", f"lm-{name}")


def _cut(pages: Mapping[str, str]) -> dict[str, str]:
    """The passages of pages, each once: some pages hold others, and a passage goes with the first page that has it."""
    texts: dict[str, str] = {}
    for name, page in pages.items():
        for place, text in _passages(page):
            texts.setdefault(text.strip(), f"topic-{name}-{place:03d}")
    return {name: text for text, name in texts.items()}


def _paragraphs(text: str) -> set[str]:
    """Those long enough to be told from others; white space aside, as pages are indented differently."""
    paragraphs = (" ".join(one.split()) for one in text.split("\n\n"))
    return {one for one in paragraphs if len(one) >= _PARAGRAPH}


def _pages(topics: Mapping[str, str]) -> dict[str, str]:
    """Each page once, though some go by two names."""
    names = {text.strip(): name for name, text in sorted(topics.items(), reverse=True)}
    return {name: text for text, name in names.items()}


def _passages(page: str) -> Iterator[tuple[int, str]]:
    """A page cut at empty lines into passages of about ``_PASSAGE`` characters."""
    passage, place = "", 0
    for paragraph in page.split("\n\n"):
        passage += f"{paragraph}\n\n"
        if len(passage) >= _PASSAGE:
            yield place, passage
            passage, place = "", place + 1


def _code_records(library: Library, seed: int, held: int, count: int) -> tuple[list[TextRecord], list[TextRecord]]:
    short: dict[str, str] = {}
    for name, text in _shuffle(library.functions, f"functions {seed}"):
        if len(text) <= _CODE_CHARACTERS and text.count("\n") in _CODE_LINES:
            short.setdefault(text, name)  # some stand in several modules
    records = [TextRecord(text, "code", f"code-{name}") for text, name in islice(short.items(), held + count)]
    return _enough(records[:held], held, "short functions"), _enough(records[held:], count, "short functions")


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


def _conversation(problem: Problem, sample_id: str) -> TextRecord:
    turns = ({"role": "user", "content": problem.question}, {"role": "assistant", "content": problem.answer})
    return TextRecord("", "math_tool", sample_id, messages=turns)


def _question(problem: Problem, sample_id: str) -> TextRecord:
    return TextRecord(str(problem.result), "math_tool", sample_id, prompt=problem.question)


def _jsonl(records: Sequence[TextRecord]) -> bytes:
    bodies = ((Body(one.text, one.prompt, one.messages), one) for one in records)
    rows = (body.as_record(one.type, one.sample_id) for body, one in bodies)
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
