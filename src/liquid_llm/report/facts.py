"""What a run was, by the names people know it by: its student, its teachers, and what its divergences measure.

identity   of a type's signal: which teacher, in which content, stored by which codec. Divergences of two runs compare
           where it is the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from liquid_llm.report.data import RunData, Series
from liquid_llm.report.private import shorten


@dataclass(frozen=True)
class Taught:
    """What teaches a type.

    Attributes:
        teacher: the model's name.
        codec: of what is stored, with its options; None of a model that is asked while training.
        identity: as the module says.
    """

    teacher: str | None
    codec: str | None
    identity: tuple[Any, ...]


def dig(value: Any, *names: str) -> Any:
    """A nested value, or None where any level is missing or no mapping."""
    for name in names:
        if not isinstance(value, Mapping):
            return None
        value = value.get(name)
    return value


def model_name(spec: Any) -> str | None:
    """A model by its name: of a local folder the last part."""
    return shorten(str(spec)).removeprefix("…/") if spec else None


def student_name(run: RunData) -> str | None:
    """The preset, hub id, or last part of the folder that the student was made from."""
    return model_name(dig(run.config, "student", "spec"))


def taught_by(run: RunData) -> dict[str, Taught]:
    """Type -> what taught it, as far as the run's files tell."""
    found = dig(run.environment, "teachers")
    taught: dict[str, Taught] = {}
    for key, one in found.items() if isinstance(found, Mapping) else ():
        if not isinstance(one, Mapping):
            continue
        teacher, revision = one.get("id") or one.get("teacher_id"), one.get("revision") or one.get("teacher_revision")
        revision = f"{revision}+{one['quantisation']}" if one.get("quantisation") else revision  # another teacher
        codec, options = one.get("codec"), one.get("codec_options")
        types = one.get("types")
        said = None if codec is None else _with_options(str(codec), options)
        name = None if teacher is None else model_name(teacher)
        for type in types if isinstance(types, list) else [key]:
            taught[str(type)] = Taught(name, said, (name, str(revision), said))
    return taught


def _with_options(codec: str, options: Any) -> str:
    if not isinstance(options, Mapping) or not options:
        return codec
    return f"{codec} ({', '.join(f'{name} {value}' for name, value in options.items())})"


def say_teachers(run: RunData) -> list[tuple[str, str]]:
    """Each teacher's name, and of which types in which way; without more than names where the run tells no more."""
    by_name: dict[str, dict[str | None, list[str]]] = {}
    for type, one in taught_by(run).items():
        if one.teacher is not None:
            by_name.setdefault(one.teacher, {}).setdefault(one.codec, []).append(type)
    if not by_name:
        names = [model_name(dig(run.config, "teacher", key)) for key in ("online_id", "stored_id")]
        return [(name, "") for name in dict.fromkeys(names) if name is not None]
    said = []
    for name, ways in by_name.items():
        parts = [
            f"{', '.join(types)}{'' if codec is None else f', stored as {codec}'}" for codec, types in ways.items()
        ]
        said.append((name, "; ".join(parts)))
    return said


def say_codecs(run: RunData) -> str | None:
    """A sentence on what the divergence of validation measures where signal is stored; None where none is."""
    stored: dict[str, list[str]] = {}
    for type, one in taught_by(run).items():
        if one.codec is not None:
            stored.setdefault(one.codec, []).append(type)
    if not stored:
        return None
    words = "; ".join(f"{', '.join(types)}: {codec}" for codec, types in stored.items())
    return f"What is stored decides what is measured ({words}): with another codec it is another quantity."


def is_finished(run: RunData) -> bool:
    """Whether its last step is taken and saved."""
    return any(one["name"] == "final.pt" for one in run.checkpoints)


def total_steps(run: RunData) -> int | None:
    """How many steps were asked for."""
    total = dig(run.config, "optimizer", "steps")
    return total if isinstance(total, int) and not isinstance(total, bool) else None


def span_of(run: RunData) -> tuple[float, float]:
    """The first and the last step of any row."""
    every = [one.steps for columns in (run.train, run.evaluation) for one in columns.series.values()]
    return float(min((one[0] for one in every), default=0)), float(max((one[-1] for one in every), default=0))


def tokens_seen(run: RunData) -> Series | None:
    """Tokens trained on by each step, from nothing at step 0; None where the rows do not tell."""
    seen = run.train.get("tokens_seen")
    if seen is None:
        return None
    kept = seen.finite
    return kept if kept.steps[0] <= 0 else Series(np.append(0.0, kept.steps), np.append(0.0, kept.values))


def value_at(series: Series | None, step: float, *, exactly: bool = False) -> float | None:
    """A series' value at a step, or else at the last one before it; None before the first."""
    if series is None:
        return None
    kept = series.finite
    place = int(np.searchsorted(kept.steps, step, side="right")) - 1
    if place < 0 or (exactly and kept.steps[place] != step):
        return None
    return float(kept.values[place])
