from __future__ import annotations

import ast
import sys
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from liquid_llm.answers import is_right
from liquid_llm.data.manifest import entry_files, read_manifest
from liquid_llm.data.records import read_records
from liquid_llm.data.types import TextRecord
from liquid_llm.demo import data
from liquid_llm.demo.data import DemoData, Library, Sizes, make_demo_data, read_library
from liquid_llm.errors import DataError, StorageError
from liquid_llm.sources import FIRST_TYPES

SIZES = {"train": Sizes(120, 40, 30), "held_out": Sizes(12, 8, 6)}


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


def records(made: DemoData) -> dict[str, list[TextRecord]]:
    return {
        entry.type: [record for file in entry_files(entry) for record in read_records(file, entry.type)]
        for entry in read_manifest(made.manifest)
    }


def held_out(made: DemoData) -> dict[str, list[TextRecord]]:
    return {type: list(read_records(file, type)) for type, file in made.held_out.items()}


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.usefixtures("quick")
def test_three_types_in_shards_with_a_manifest(tmp_path: Path) -> None:
    made = make_demo_data(tmp_path, seed=0, **SIZES)
    assert made.manifest == f"{tmp_path}/manifest.jsonl"
    entries = read_manifest(made.manifest)
    assert tuple(entry.type for entry in entries) == FIRST_TYPES
    assert all(entry.weight > 0 for entry in entries)
    assert all(len(entry_files(entry)) == 2 for entry in entries)
    assert {type: len(rows) for type, rows in records(made).items()} == {"lm": 120, "math_tool": 40, "code": 30}
    assert {type: len(rows) for type, rows in held_out(made).items()} == {"lm": 12, "math_tool": 8, "code": 6}
    for rows in (*records(made).values(), *held_out(made).values()):
        assert len({row.sample_id for row in rows}) == len({row.whole for row in rows}) == len(rows)


@pytest.mark.usefixtures("quick")
def test_nothing_that_is_held_out_is_trained_on(tmp_path: Path) -> None:
    made = make_demo_data(tmp_path, seed=0, train=Sizes(500, 400, 300), held_out=Sizes(40, 60, 40))
    trained, apart = records(made), held_out(made)
    for type in FIRST_TYPES:
        assert not {row.whole for row in trained[type]} & {row.whole for row in apart[type]}
        assert not {row.sample_id for row in trained[type]} & {row.sample_id for row in apart[type]}
    pages = [
        {row.sample_id.rpartition("-")[0] for row in rows["lm"] if "topic" in row.sample_id}
        for rows in (trained, apart)
    ]
    assert len(pages[1]) > 4
    assert not pages[0] & pages[1], "no passage of a page that passages of are trained on"


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("seed", range(3))
def test_no_paragraph_of_a_held_out_text_is_trained_on(tmp_path: Path, seed: int) -> None:
    """Pages hold parts of others, cut elsewhere; docstrings are texts of their own and parts of functions."""

    def paragraphs(rows: list[TextRecord]) -> set[str]:
        found = (" ".join(one.split()) for row in rows for one in row.text.split("\n\n"))
        return {one for one in found if len(one) >= 80}

    made = make_demo_data(tmp_path, seed=seed, train=Sizes(1000, 8, 8), held_out=Sizes(40, 8, 250))
    trained, apart = records(made), held_out(made)
    assert not paragraphs(trained["lm"]) & paragraphs(apart["lm"])
    docstrings = {row.sample_id.removeprefix("lm-doc-") for row in trained["lm"] if "lm-doc-" in row.sample_id}
    functions = {row.sample_id.removeprefix("code-") for row in apart["code"]}
    assert len(docstrings) > 100
    assert not docstrings & functions


@pytest.mark.usefixtures("quick")
def test_questions_are_the_held_out_problems_with_their_results_alone(tmp_path: Path) -> None:
    made = make_demo_data(tmp_path, seed=0, **SIZES)
    questions = list(read_records(made.questions, "math_tool"))
    problems = held_out(made)["math_tool"]
    assert [one.sample_id for one in questions] == [one.sample_id for one in problems]
    for question, problem in zip(questions, problems, strict=True):
        assert problem.messages is not None
        user, assistant = problem.messages
        assert (user["role"], user["content"]) == ("user", question.prompt)
        assert assistant["role"] == "assistant"
        assert is_right(assistant["content"], question.text)
    assert {one.sample_id.rpartition("-")[0] for one in questions} == {"math-new-numbers", "math-new-wording"}


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
    large = records(make_demo_data(tmp_path / "large", seed=0, train=Sizes(240, 80, 60), held_out=SIZES["held_out"]))
    for type in FIRST_TYPES:
        assert {row.sample_id: row.whole for row in small[type]}.items() <= {
            row.sample_id: row.whole for row in large[type]
        }.items()


@pytest.mark.usefixtures("quick")
def test_what_the_records_are(tmp_path: Path) -> None:
    made = records(make_demo_data(tmp_path, seed=0, **SIZES))
    reference = "\n".join(topics.values())
    for row in made["lm"]:
        assert row.text.strip() in reference
        assert 500 < len(row.text) < 6000
    for row in made["code"]:
        (function,) = ast.parse(row.text).body
        assert isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        assert ast.get_docstring(function)
        assert 5 <= row.text.count("\n") <= 40
        assert len(row.text) <= 700
        assert row.sample_id.startswith("code-")
        assert row.sample_id.endswith(f".{function.name}")
    for row in made["math_tool"]:
        assert row.messages is not None
        assert [turn["role"] for turn in row.messages] == ["user", "assistant"]


@pytest.mark.usefixtures("quick")
def test_any_storage(tmp_path: Path) -> None:
    made = make_demo_data(f"memory://demo{tmp_path}", seed=0, **SIZES)
    assert len(records(made)["math_tool"]) == 40
    assert len(held_out(made)["code"]) == 6


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("which", "sizes", "what"),
    [
        ("train", Sizes(10**6, 8, 8), "passages"),
        ("held_out", Sizes(10**6, 8, 8), "passages"),
        ("train", Sizes(8, 8, 10**6), "short functions"),
        ("held_out", Sizes(8, 8, 10**6), "short functions"),
    ],
)
def test_more_than_there_is(tmp_path: Path, which: str, sizes: Sizes, what: str) -> None:
    with pytest.raises(DataError, match=rf"too few {what}; got \d+; expected 1000000"):
        make_demo_data(tmp_path / "out", seed=0, **{**SIZES, which: sizes})
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
