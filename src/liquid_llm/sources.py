"""What gives each type of text its teacher signal, and what of layout and objective is its own.

A teacher is named by a *spec*:

    online:MODEL   a model that is asked while training
    store:URI      a store of signal that was captured beforehand; a URI alone means this too
    none           no teacher: plain cross-entropy
    KIND:REST      any other teacher of ``registry.TEACHERS``

``--signal TYPE=SPEC`` names one on the command line, ``--alpha_by_type TYPE=NUMBER`` and its like what of the objective
is a type's own; ``sources:`` in a configuration file has a type's teacher, layout and objective together. The reference
options are spellings of the same.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from liquid_llm.registry import DIVERGENCES, TEACHERS

BLOCKS, SAMPLES, WINDOWS = LAYOUTS = ("blocks", "samples", "windows")
NONE = "none"
SPELLINGS = {"math_logits_dir": "math_tool", "code_logits_dir": "code"}
"""The reference options that name a type's store, and that type."""

FIRST_TYPES = ("lm", "math_tool", "code")
"""The types that come before others in metrics and provenance."""

_TYPE = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True)
class SourceConfig:
    """How texts of one type are taught.

    Attributes:
        teacher: a spec as above; None where nothing names one.
        layout: ``blocks`` (documents joined into full blocks), ``samples`` (whole samples of near-equal length, what
            is too long cut off) or ``windows`` (the same, with what is too long cut into several).
        alpha, temperature, divergence: in place of the run's own, or None.
    """

    teacher: str | None = None
    layout: str = "samples"
    alpha: float | None = None
    temperature: float | None = None
    divergence: str | None = None

    @property
    def store(self) -> str | None:
        """The URI of the store it names."""
        return self._after("store")

    @property
    def online(self) -> str | None:
        """The model that it names to be asked while training."""
        return self._after("online")

    @property
    def objective(self) -> dict[str, float | str]:
        """What of the objective is its own."""
        values = {"alpha": self.alpha, "temperature": self.temperature, "divergence": self.divergence}
        return {name: value for name, value in values.items() if value is not None}

    def _after(self, kind: str) -> str | None:
        found, _, rest = (self.teacher or "").partition(":")
        return rest if found == kind else None


def is_type(name: object) -> bool:
    """Whether a manifest may give a type this name."""
    return isinstance(name, str) and _TYPE.fullmatch(name) is not None


def order_types(types: Iterable[str]) -> list[str]:
    """Each type once: ``FIRST_TYPES``, then the others as they first come."""
    found = dict.fromkeys(types)
    return [type for type in FIRST_TYPES if type in found] + [type for type in found if type not in FIRST_TYPES]


def default_layout(type: str, teacher: str | None = None) -> str:
    """The layout of a type that names none: plain text is joined into blocks, or cut into windows for a store."""
    if type != "lm":
        return "samples"
    return "windows" if SourceConfig(teacher).store is not None else "blocks"


def read_spec(text: str) -> str:
    """A teacher's spec in full: what has no known kind before a colon is the URI of a store.

    Raises:
        ValueError: nothing follows the kind.
    """
    kind, colon, rest = text.partition(":")
    if text == NONE or (colon and rest and kind in TEACHERS):
        return text
    if not text or (colon and kind in TEACHERS):
        raise ValueError(f"got {text!r}, expected a URI, none, or one of {', '.join(f'{one}:...' for one in TEACHERS)}")
    return f"store:{text}"


def read_by_type(field: str, texts: Iterable[str]) -> dict[str, dict[str, Any]]:
    """``TYPE=VALUE`` of each text, as sources in which that one field is given.

    Raises:
        ValueError: one is not of that form, or a type is named twice.
    """
    found: dict[str, dict[str, Any]] = {}
    for text in texts:
        type, equals, value = (part.strip() for part in text.partition("="))
        if not equals or not _TYPE.fullmatch(type):
            forms = "TYPE=URI, TYPE=online:MODEL or TYPE=none" if field == "teacher" else "TYPE=VALUE"
            raise ValueError(f"got {text!r}, expected {forms}")
        if type in found:
            raise ValueError(f"the type {type!r} is named twice")
        found[type] = {field: _FIELDS[field](value)}
    return found


def read_sources(value: object) -> dict[str, dict[str, Any]]:
    """The mapping ``sources:`` of a configuration file, checked; what is null is left out.

    Raises:
        ValueError: it, or a value in it, is not what it should be; the message says which.
    """
    if not isinstance(value, Mapping):
        raise ValueError(f"got {value!r:.80}, expected a mapping of types")
    found: dict[str, dict[str, Any]] = {}
    for type, fields in value.items():
        if not _TYPE.fullmatch(str(type)):
            raise ValueError(f"got {type!r}, expected a type's name: letters, digits, _ and -")
        if is_blank(fields):
            continue
        if not isinstance(fields, Mapping):
            raise ValueError(f"{type}: got {fields!r:.80}, expected a mapping of {', '.join(_FIELDS)}")
        unknown = [str(name) for name in fields if name not in _FIELDS]
        if unknown:
            raise ValueError(f"{type}: unknown key {unknown[0]!r}, expected {', '.join(_FIELDS)}")
        try:
            found[str(type)] = {name: _FIELDS[name](one) for name, one in fields.items() if not is_blank(one)}
        except (TypeError, ValueError) as error:
            raise ValueError(f"{type}: {error}") from None
    return found


def is_blank(value: object) -> bool:
    """Whether a value of a configuration file means that nothing is given."""
    return value is None or (isinstance(value, str) and not value.strip())


def _word(name: str, choices: tuple[str, ...], end: str | None = None) -> Callable[[object], str]:
    """A reader of one of ``choices``, after which anything may follow that begins with ``end``."""

    def read(value: object) -> str:
        if (value if end is None else str(value).partition(end)[0]) not in choices:
            raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(choices)}")
        return str(value)

    return read


def _number(name: str, fits: Callable[[float], bool], expected: str) -> Callable[[object], float]:
    def read(value: object) -> float:
        try:
            number = float(str(value))
        except ValueError:
            number = math.nan
        if not fits(number):
            raise ValueError(f"{name}: got {value}, expected {expected}")
        return number

    return read


_FIELDS: dict[str, Callable[[Any], object]] = {
    "teacher": lambda value: read_spec(str(value).strip()),
    "layout": _word("layout", LAYOUTS),
    "alpha": _number("alpha", lambda value: 0 <= value <= 1, "a number from 0 to 1"),
    "temperature": _number("temperature", lambda value: 0 < value < math.inf, "a number above 0"),
    "divergence": _word("divergence", tuple(DIVERGENCES), end=":"),
}


def overlay(lower: Mapping[str, object], upper: Mapping[str, object]) -> dict[str, object]:
    """Options of two layers (a file's, the command line's), name -> value; the upper layer's count where both have one,
    and where both name a type's teacher, in whatever spelling."""
    merged = {**lower, **upper}
    below, above = (read_given(layer) for layer in (lower, upper))
    for option, type in spellings(merged).items():
        if "teacher" in above.get(type, {}) and option not in upper:
            merged.pop(option, None)
        if upper.get(option) is not None:
            below.get(type, {}).pop("teacher", None)
    for type, fields in above.items():
        below[type] = {**below.get(type, {}), **fields}
    sources = {type: fields for type, fields in below.items() if fields}
    return {**merged, "sources": sources} if sources else {k: v for k, v in merged.items() if k != "sources"}


def spellings(options: Mapping[str, object]) -> dict[str, str]:
    """The options that name one type's teacher, and that type; ``lm_teacher_id`` is of lm alone in a hybrid run."""
    return {**SPELLINGS, "lm_teacher_id": "lm"} if options.get("hybrid", True) else SPELLINGS


def read_given(options: Mapping[str, object]) -> dict[str, dict[str, Any]]:
    """The sources among options: type -> what is given of it."""
    sources = options.get("sources") or {}
    assert isinstance(sources, Mapping)
    return {type: dict(fields) for type, fields in sources.items()}
