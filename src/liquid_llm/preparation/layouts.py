"""Where the text lies in an object, and how maths and code are written out.

layout: how objects with certain keys become a text, a prompt with its completion, or a conversation; format: what a
catalog may state: a layout, and how the files are cut that it comes in.

A word problem becomes ``Question: …`` and ``Answer: …`` on two lines, then ``#### RESULT``; arithmetic is written as a
calculator trace, ``12*7=<<12*7=84>>84``, as GSM8K has it, so that one student sees one notation. The prompt ends with
``Answer:``, and that of HumanEval where the solution begins; put together they are the text that they always were.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from liquid_llm.data.records import Body, read_body

_ARITHMETIC = re.compile(r"[\d+\-*/().%]+")
_NUMBER = re.compile(r"[+-]?[\d,]*\.?\d+(?:/\d+)?")
_OUTER_BRACKETS = re.compile(r"\((?:[^()]|\([^()]*\))*\)")  # SVAMP nests them twice at most
_POINT_ZERO = re.compile(r"(?<![\d.])(\d+)\.0+(?!\d)")


class UnusableError(ValueError):
    """An object has no usable text; the message says why."""


@dataclass(frozen=True)
class Layout:
    """How objects with certain keys become text.

    Attributes:
        keys: an object with all of these has this layout.
        more_keys: others it reads where they are there.
        body: object -> what it says, raising ``UnusableError`` or ``BodyError``.
    """

    keys: tuple[str, ...]
    body: Callable[[Mapping[str, Any]], Body]
    more_keys: tuple[str, ...] = ()


def field_layout(key: str) -> Layout:
    """The text is what lies under ``key``, untouched."""
    return Layout((key,), lambda value: Body(_string(value, key)))


def find_layout(keys: Collection[str]) -> Layout | None:
    """The layout of objects with these keys; the one that asks for most of them."""
    fitting = [layout for layout in _LAYOUTS if set(layout.keys) <= set(keys)]
    return fitting[0] if fitting else None


def _string(value: Mapping[str, Any], key: str) -> str:
    text = value.get(key)
    if not isinstance(text, str):
        raise UnusableError(f"{key} is missing" if text is None else f"{key} is no string but {type(text).__name__}")
    return text


def _plain(value: Mapping[str, Any], key: str) -> str:
    """A string or a number as text, ``51.0`` as ``51``."""
    found = value.get(key)
    if isinstance(found, (int, float)) and not isinstance(found, bool):
        return _POINT_ZERO.sub(r"\1", str(found))
    return _POINT_ZERO.sub(r"\1", _string(value, key).strip())


def _problem(question: str, answer: str) -> Body:
    if not question.strip() or not answer.strip():
        raise UnusableError("question or answer is empty")
    return Body(f" {answer.strip()}", f"Question: {question.strip()}\nAnswer:")


def _humaneval(value: Mapping[str, Any]) -> Body:
    prompt, solution = _string(value, "prompt"), _string(value, "canonical_solution")
    if not solution.strip():
        raise UnusableError("the solution is empty")
    return Body(solution, prompt)


def _svamp(value: Mapping[str, Any]) -> Body:
    result = _plain(value, "Answer")
    equation = _plain(value, "Equation").replace(" ", "")
    if _OUTER_BRACKETS.fullmatch(equation):
        equation = equation[1:-1]
    return _problem(f"{_plain(value, 'Body')} {_plain(value, 'Question')}", _write_out(f"{equation}={result}", result))


def _asdiv(value: Mapping[str, Any]) -> Body:
    result, _, unit = _plain(value, "Answer").partition(" (")
    formula = _plain(value, "Formula").replace(" ", "")
    question = f"{_plain(value, 'Body')} {_plain(value, 'Question')}"
    return _problem(question, _write_out(formula, result, unit.rstrip(") ")))


def _write_out(formula: str, result: str, unit: str = "") -> str:
    """A formula as a trace where it is plain arithmetic that ends in the result, else as it stands."""
    left, _, right = formula.rpartition("=")
    words = f" {unit}" if unit else ""
    if _ARITHMETIC.fullmatch(left) and _NUMBER.fullmatch(right) and right == result:
        return f"{left}=<<{left}={right}>>{right}{words}\n#### {result}"
    return f"{formula}{words}\n#### {result}"


# CodeSearchNet as published, and as it was republished; the whole function comes first, its comment included.
_CODE_KEYS = ("original_string", "whole_func_string", "func_code_string", "code")


def _code(value: Mapping[str, Any]) -> Body:
    return Body(_string(value, next((key for key in _CODE_KEYS if value.get(key) is not None), _CODE_KEYS[0])))


_TEXT = field_layout("text")
_GSM8K = Layout(("question", "answer"), lambda row: _problem(_string(row, "question"), _string(row, "answer")))
_SVAMP = Layout(("Body", "Question", "Equation", "Answer"), _svamp)
_ASDIV = Layout(("Body", "Question", "Formula", "Answer"), _asdiv)
_HUMANEVAL = Layout(("prompt", "canonical_solution"), _humaneval)
_CODE = Layout((), _code, _CODE_KEYS)

_LAYOUTS = (
    _SVAMP,
    _ASDIV,
    _HUMANEVAL,
    _GSM8K,
    *(Layout((key,), _code, _CODE_KEYS) for key in _CODE_KEYS[:3]),
    _TEXT,
    Layout(("messages",), read_body),
    Layout(("prompt", "completion"), read_body),
)


@dataclass(frozen=True)
class Format:
    """What a catalog may state: how the files are cut that it comes in (``formats``), and the layout of their objects,
    None where it is found from their keys or there are no objects."""

    cuts: tuple[str, ...]
    layout: Layout | None = None


_OBJECTS = ("lines", "array", "parquet")
FORMATS = {
    "wikitext": Format(("text",)),
    "wikipedia": Format(()),  # MediaWiki dumps: what an earlier release made of them is still used
    "c4": Format(_OBJECTS, _TEXT),
    "dolma": Format(_OBJECTS, _TEXT),
    "fineweb-edu": Format(_OBJECTS, _TEXT),
    "gsm8k": Format(_OBJECTS, _GSM8K),
    "svamp": Format(_OBJECTS, _SVAMP),
    "asdiv": Format((*_OBJECTS, "problems"), _ASDIV),
    "codesearchnet": Format(_OBJECTS, _CODE),
    "humaneval": Format(_OBJECTS, _HUMANEVAL),
    "jsonl": Format(("lines",)),
    "json": Format(("array",)),
    "parquet": Format(("parquet",)),
    "txt": Format(("text",)),
}
