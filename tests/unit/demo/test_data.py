from __future__ import annotations

import ast
import sys
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest

from liquid_llm.data.manifest import entry_files, read_manifest
from liquid_llm.data.records import read_records
from liquid_llm.data.types import TextRecord
from liquid_llm.demo import data
from liquid_llm.demo.data import Library, make_demo_data, read_library
from liquid_llm.errors import DataError, StorageError
from liquid_llm.sources import FIRST_TYPES

SIZES = {"num_lm": 120, "num_math": 40, "num_code": 30}


@pytest.fixture(scope="module")
def reading() -> tuple[Library, set[str]]:
    """The standard library's texts, and which modules came in while they were read."""
    before = set(sys.modules)
    return read_library(), set(sys.modules) - before


@pytest.fixture(scope="module")
def library(reading: tuple[Library, set[str]]) -> Library:
    return reading[0]


@pytest.fixture
def quick(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parse the standard library once for the module, not once a test."""
    monkeypatch.setattr(data, "read_library", lambda: library)


def records(manifest: str) -> dict[str, list[TextRecord]]:
    return {
        entry.type: [record for file in entry_files(entry) for record in read_records(file, entry.type)]
        for entry in read_manifest(manifest)
    }


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.usefixtures("quick")
def test_three_types_in_shards_with_a_manifest(tmp_path: Path) -> None:
    manifest = make_demo_data(tmp_path, seed=0, **SIZES)
    assert manifest == f"{tmp_path}/manifest.jsonl"
    entries = read_manifest(manifest)
    assert tuple(entry.type for entry in entries) == FIRST_TYPES
    assert all(entry.weight > 0 for entry in entries)
    assert all(len(entry_files(entry)) == 2 for entry in entries)
    made = records(manifest)
    assert {type: len(rows) for type, rows in made.items()} == {"lm": 120, "math_tool": 40, "code": 30}
    for rows in made.values():
        assert len({row.sample_id for row in rows}) == len({row.text for row in rows}) == len(rows)


@pytest.mark.usefixtures("quick")
def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        make_demo_data(tmp_path / name, seed=seed, **SIZES)
    first, again, other = (files(tmp_path / name) for name in "abc")
    assert first == again
    assert all(first[name] != other[name] for name in first if name != "manifest.jsonl")


@pytest.mark.usefixtures("quick")
def test_a_larger_size_keeps_the_smaller_choice(tmp_path: Path) -> None:
    small = records(make_demo_data(tmp_path / "small", seed=0, **SIZES))
    large = records(make_demo_data(tmp_path / "large", seed=0, **{name: 2 * size for name, size in SIZES.items()}))
    for type in FIRST_TYPES:
        assert {row.sample_id: row.text for row in small[type]}.items() <= {
            row.sample_id: row.text for row in large[type]
        }.items()


@pytest.mark.usefixtures("quick")
def test_what_the_records_are(tmp_path: Path) -> None:
    made = records(make_demo_data(tmp_path, seed=0, **SIZES))
    assert {text.strip() for text in topics.values()} < {row.text.strip() for row in made["lm"]}  # every page
    for row in made["code"]:
        (function,) = ast.parse(row.text).body
        assert isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        assert ast.get_docstring(function)
        assert 5 <= row.text.count("\n") <= 40
        assert len(row.text) <= 700
        assert row.sample_id.startswith("code-")
        assert row.sample_id.endswith(f".{function.name}")
    assert all(row.text.startswith("Question: ") for row in made["math_tool"])


@pytest.mark.usefixtures("quick")
def test_any_storage(tmp_path: Path) -> None:
    manifest = make_demo_data(f"memory://demo{tmp_path}", seed=0, **SIZES)
    assert len(records(manifest)["math_tool"]) == 40


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("size", "what"), [("num_lm", "documents"), ("num_code", "short functions")])
def test_more_than_there_is(tmp_path: Path, size: str, what: str) -> None:
    options: dict[str, Any] = {**SIZES, size: 10**6}
    with pytest.raises(DataError, match=rf"too few {what}; got \d+; expected 1000000"):
        make_demo_data(tmp_path / "out", seed=0, **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("quick")
def test_an_unwritable_place(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(StorageError):
        make_demo_data(tmp_path / "out", seed=0, **SIZES)


def test_a_python_without_sources(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"the standard library's sources are not there\. Use a Python"):
        read_library(tmp_path)


def test_what_is_read_and_what_is_not(tmp_path: Path) -> None:
    source = '''
"""About the module."""
import sys
sys.exit("this must not run")

def top(x):
    """Twice."""
    def inner():
        """Not by itself."""
    return 2 * x

def bare():
    pass

if sys.platform == "win32":
    def only_there():
        """Elsewhere."""

class A:
    """About A."""

    @property
    def value(self):
        """The value,
            indented."""
        return 1

    @value.setter
    def value(self, new):
        """Set it."""
'''
    for name in ("json/__init__.py", "json/test/x.py", "idlelib/x.py", "unknown_module.py", "ast.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(source)
    (tmp_path / "abc.py").write_bytes(b"# \xff\xfe")
    (tmp_path / "bisect.py").write_text("def broken(:")
    library = read_library(tmp_path)
    names = [f"{module}{rest}" for module in ("ast", "json") for rest in ("", ".top", ".A", ".A.value")]
    assert list(library.docstrings) == names
    assert list(library.functions) == [name for name in names if name.endswith((".top", ".value"))]
    assert library.docstrings["json.A.value"] == "The value,\nindented."
    assert library.functions["json.A.value"] == (
        '@property\ndef value(self):\n    """The value,\n        indented."""\n    return 1\n'
    )


def test_nothing_of_the_standard_library_is_run(reading: tuple[Library, set[str]]) -> None:
    library, imported = reading
    assert len(library.functions) > 1000
    assert not {name for name in imported if not name.startswith("_sysconfigdata")}
