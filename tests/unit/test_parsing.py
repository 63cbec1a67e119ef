"""What others have written is parsed in one place, and reading it ends, whatever it is."""

from __future__ import annotations

import json
import re

import pytest
import yaml
from tests.support.sources import module_files

from liquid_llm.parsing import MAX_DEPTH, ParseError, parse_json, parse_yaml

# Values that a module has itself made into text a moment before.
OWN = {
    "liquid_llm.parsing",
    "liquid_llm.checkpoint.metadata",
    "liquid_llm.checkpoint.pieces",
    "liquid_llm.demo.pipeline",
    "liquid_llm.jobs.study",
    "liquid_llm.models.student",
    "liquid_llm.models.token_bytes",
    "liquid_llm.wiring.siblings",
    "liquid_llm.wiring.start",
}


def test_nobody_else_parses_what_others_have_written():
    found = {name: path.read_text(encoding="utf-8") for name, path in module_files().items()}
    assert {name for name, text in found.items() if "json.load" in text} <= OWN
    assert [name for name, text in found.items() if re.search(r"yaml\.(safe_|full_|unsafe_)?load", text)] == []


VALUES = [{"a": [1, 2.5, None, True, "\u00e9[{"]}, [], "x", 10**300, [["[" * 300]]]


@pytest.mark.parametrize("value", VALUES)
def test_what_is_written_is_read(value):
    for text in (json.dumps(value), json.dumps(value).encode(), b"\xef\xbb\xbf" + json.dumps(value).encode()):
        assert parse_json(text) == value
    assert parse_yaml(yaml.safe_dump(value, allow_unicode=True).encode()) == value
    assert parse_yaml("") is None


@pytest.mark.parametrize("read", [parse_json, parse_yaml])
@pytest.mark.parametrize(("begin", "end"), [("[", "]"), ('{"a":', "}")])
def test_depth_is_bounded_and_just_below_it_is_read(read, begin, end):
    def nested(depth: int) -> str:
        return begin * (depth - 1) + ('{"a":1}' if "a" in begin else "[1]") + end * (depth - 1)

    assert read(nested(MAX_DEPTH)) is not None
    for depth in (MAX_DEPTH + 1, 900, 100_000):
        with pytest.raises(ParseError, match="deep"):
            read(nested(depth))
    with pytest.raises(ParseError):
        read(begin * 100_000)


def test_many_brackets_are_not_depth():
    assert len(parse_json("[" + "[]," * 5000 + "[]]")) == 5001


@pytest.mark.parametrize(
    ("read", "text"),
    [
        (parse_json, "1" * 5000),
        (parse_json, b"\xff"),
        (parse_json, "{1"),
        (parse_json, ""),
        (parse_yaml, "a: " + "1" * 5000),
        (parse_yaml, "a: 2026-99-99"),
        (parse_yaml, b"\xff"),
        (parse_yaml, "a: [1"),
        (parse_yaml, "a: &a [*a]"),
        (parse_yaml, "\0"),
        (parse_yaml, "a: !!python/object:os.system []"),
        (parse_yaml, "x" * 2**25),
    ],
)
def test_everything_else_is_one_kind_of_error(read, text):
    with pytest.raises(ParseError):
        read(text)


def test_aliases_that_stand_for_millions_are_refused_and_a_few_are_not():
    assert parse_yaml("a: &a [1, 2]\nb: [*a, *a]\n") == {"a": [1, 2], "b": [[1, 2], [1, 2]]}
    lines = ["a0: &a0 [x, x]"] + [f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 30)]
    with pytest.raises(ParseError, match="millions"):
        parse_yaml("\n".join(lines))
