"""What ``--student`` may say, taken apart in one place.

    NAME                                  a preset, a ``config.json`` file or a model, as it stands
    from:MODEL[,KEY=VALUE...]             a *cut*: a student made of the weights of MODEL
        layers=N                          that many of its blocks
        layers=I+J+K                      these blocks, counted from 0
        choose=importance|evenly          how N are chosen
        width=W                           hidden channels that stay
        mlp=M, kv_heads=K                 MLP neurons and groups of attention heads that stay; where they are not given
                                          in proportion to the width
    NAME,embedding=MODEL                  a preset or ``config.json`` whose embedding and output head are MODEL's,
                                          projected to its width

A comma belongs to a name unless ``word=`` follows it; one that does so in a name is written ``\\,``. A folder that is
called ``from:something`` is written ``./from:something``. Of the first form, a folder or file that is there under the
whole name is meant as it stands.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from liquid_llm.errors import UsageError

FROM = "from:"
IMPORTANCE, EVENLY = CHOICES = ("importance", "evenly")

_COMMA = re.compile(r"(?<!\\),(?=\w+=)")
_COMMA_IN_NAME = re.compile(r",(?=\w+=)")
_CUT_KEYS = ("layers", "choose", "width", "mlp", "kv_heads")
_EMBEDDING = "embedding"


@dataclass(frozen=True)
class Cut:
    """What stays of a model.

    Attributes:
        layers: how many of its blocks, or which; None for all.
        choose: how they are chosen where their number is given.
        width: hidden channels; None for all.
        mlp: neurons of each MLP; None: in proportion to the width.
        kv_heads: key-value heads, each with its query heads; None: in proportion to the width.
    """

    layers: int | tuple[int, ...] | None = None
    choose: str = IMPORTANCE
    width: int | None = None
    mlp: int | None = None
    kv_heads: int | None = None


@dataclass(frozen=True)
class StudentSpec:
    """A student as it was asked for.

    Attributes:
        base: the preset, ``config.json`` file or model that it is built as; "" for a cut.
        teacher: the model whose weights it takes, beside those of ``base``; None without one.
        cut: what it takes of ``teacher``; None for its embedding and head.
        options: the words behind the model of a cut, as they were written.
    """

    base: str
    teacher: str | None = None
    cut: Cut | None = None
    options: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.teacher is None:
            return self.base
        name = _COMMA_IN_NAME.sub(r"\\,", self.teacher)
        if self.cut is None:
            base = _COMMA_IN_NAME.sub(r"\\,", self.base)
            return f"{base},{_EMBEDDING}={name}"
        return ",".join((FROM + name, *self.options))

    def with_names(self, change: Callable[[str], str]) -> StudentSpec:
        """The same with ``change`` made to each name of a model or file in it."""
        teacher = None if self.teacher is None else change(self.teacher)
        return replace(self, base=change(self.base) if self.base else "", teacher=teacher)


def parse_student(text: str) -> StudentSpec:
    """``--student`` taken apart.

    Raises:
        UsageError: an unknown key, naming the nearest known one; a value that its key cannot have; no model.
    """
    if not text.startswith(FROM) and (not _COMMA.search(text) or Path(text).expanduser().exists()):
        return StudentSpec(text)
    name, *words = _COMMA.split(text)
    name = name.replace("\\,", ",")
    known = _CUT_KEYS if text.startswith(FROM) else (_EMBEDDING,)
    of_cut = [word for word in words if word.partition("=")[0] in _CUT_KEYS]
    if of_cut and not text.startswith(FROM):
        raise _refuse(text, "only a cut has these", got=",".join(of_cut), expected=f"{FROM}MODEL,{','.join(of_cut)}")
    values = _read_words(text, words, known)
    if not text.startswith(FROM):
        teacher = values[_EMBEDDING].replace("\\,", ",")
        return StudentSpec(name, teacher)
    teacher = name.removeprefix(FROM)
    if not teacher:
        raise _refuse(text, "no model is named", expected=f"{FROM}MODEL,layers=N")
    cut = Cut(
        layers=_read_layers(text, values["layers"]) if "layers" in values else None,
        choose=values.get("choose", IMPORTANCE),
        **{key: _read_number(text, key, values[key]) for key in ("width", "mlp", "kv_heads") if key in values},
    )
    if cut.choose not in CHOICES:
        raise _refuse(text, "layers are chosen in no such way", got=cut.choose, expected=" or ".join(CHOICES))
    if "choose" in values and not isinstance(cut.layers, int):
        raise _refuse(text, "there is nothing to choose", got=f"choose={cut.choose}", expected="layers=N beside it")
    return StudentSpec("", teacher, cut, tuple(words))


def _read_words(text: str, words: list[str], known: tuple[str, ...]) -> dict[str, str]:
    values: dict[str, str] = {}
    for word in words:
        key, _, value = word.partition("=")
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
            raise _refuse(
                text,
                "no such key",
                got=key,
                expected=f"one of {', '.join(known)}",
                remedy=f"did you mean {near[0]}=? A comma that is part of a name is written \\,",
            )
        if key in values:
            raise _refuse(text, "a key is given twice", got=key)
        if not value:
            raise _refuse(text, "a key has no value", got=f"{key}=")
        values[key] = value
    return values


def _read_number(text: str, key: str, value: str) -> int:
    if not value.isdecimal() or int(value) < 1:
        raise _refuse(text, f"{key} takes a whole number from 1", got=value)
    return int(value)


def _read_layers(text: str, value: str) -> int | tuple[int, ...]:
    if "+" not in value:
        return _read_number(text, "layers", value)
    parts = value.removesuffix("+").split("+")
    if not all(part.isdecimal() for part in parts):
        raise _refuse(text, "layers takes a number, or layers joined by +", got=value, expected="15, or 0+3+7")
    layers = tuple(int(part) for part in parts)
    if list(layers) != sorted(set(layers)):
        raise _refuse(text, "layers are named in their order and once", got=value)
    return layers


def _refuse(text: str, problem: str, **more: str) -> UsageError:
    return UsageError(problem, where=f"--student={text}", **more)
