"""Step -> value: everything a run changes while it trains. Pure functions of the step about to be taken.

A *step* is one optimizer step, counted from 0. A schedule's value at step ``s`` is applied before step ``s`` is taken.
The *pending* entry of a piecewise schedule is the index of the first entry whose step has not been reached yet.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from liquid_llm.errors import UsageError
from liquid_llm.losses.objective import Objective


class Schedule(Protocol):
    """Anything that gives a value for a step."""

    def value(self, step: int) -> float: ...


@dataclass(frozen=True)
class Constant:
    """The same value at every step."""

    level: float

    def value(self, step: int) -> float:
        return self.level


@dataclass(frozen=True)
class Piecewise:
    """Piecewise constant: ``entries[i].value`` holds from ``entries[i].step`` until the next entry's step.

    Before the first entry's step the value is ``initial``.
    """

    initial: float
    entries: tuple[tuple[int, float], ...]

    def pending(self, step: int) -> int:
        """Index of the first entry with a step greater than ``step``; ``len(entries)`` when all have been applied."""
        return bisect_right([at for at, _ in self.entries], step)

    def value(self, step: int) -> float:
        applied = self.pending(step)
        return self.entries[applied - 1][1] if applied else self.initial


@dataclass(frozen=True)
class Ramp:
    """Linear from ``start`` at step 0 to ``end`` at step ``over_steps``, then ``end``."""

    start: float
    end: float
    over_steps: int

    def value(self, step: int) -> float:
        if step >= self.over_steps:
            return self.end
        return self.start + (self.end - self.start) * (step / self.over_steps)


@dataclass(frozen=True)
class WarmupCosine:
    """Learning rate: linear warm-up to ``peak``, then a cosine down to ``floor_ratio * peak`` at ``total_steps``.

    Step 0 takes ``peak / warmup_steps`` so that the first step learns too; step ``warmup_steps - 1`` takes the peak.
    Source of the cosine: Loshchilov and Hutter, arXiv 1608.03983, eq. 5 without restarts.
    """

    peak: float
    warmup_steps: int
    total_steps: int
    floor_ratio: float = 0.1

    def value(self, step: int) -> float:
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        span = self.total_steps - self.warmup_steps
        if span <= 0:
            return self.peak
        progress = min(1.0, (step - self.warmup_steps) / span)
        return self.peak * (self.floor_ratio + (1 - self.floor_ratio) * 0.5 * (1 + math.cos(math.pi * progress)))


@dataclass(frozen=True)
class StepValues:
    """What is in force at one step.

    Attributes:
        lr: learning rate.
        default: the objective of the run, for every type without one of its own.
        objectives: type -> its own.
        min_entropies: type -> where its positions are distilled from; None where all are. See ``selection``.
    """

    lr: float
    default: Objective
    objectives: Mapping[str, Objective] = field(default_factory=dict)
    min_entropies: Mapping[str, float] | None = None

    def objective(self, type: str | None = None) -> Objective:
        """The objective for texts of ``type``; the run's own for None."""
        if type is None:
            return self.default
        found = self.objectives.get(type, self.default)
        return found if self.min_entropies is None else replace(found, min_entropy=self.min_entropies[type])

    def as_row(self) -> dict[str, Any]:
        """By the names that rows of metrics have for them."""
        default = self.default
        names: dict[str, Any] = {
            "kd_alpha": default.alpha,
            "kd_temperature": default.temperature,
            "l2_gamma": default.gamma,
        }
        if self.min_entropies is not None:
            names["kd_min_entropy"] = {type: one for type, one in self.min_entropies.items() if math.isfinite(one)}
        return {**names, "lr": self.lr}


@dataclass(frozen=True)
class StepSchedules:
    """All that changes from step to step, and what of it types have for themselves.

    Attributes:
        alpha, temperature, gamma: of the objective.
        lr: learning rate.
        divergence: of the objective, the same at every step.
        overrides: type -> fields of ``Objective`` that have one value for it at every step.
    """

    alpha: Schedule
    temperature: Schedule
    gamma: Schedule
    lr: Schedule
    divergence: str = "forward_kl"
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def at(self, step: int) -> StepValues:
        """The values to be applied before ``step`` is taken."""
        default = Objective(
            self.alpha.value(step), self.temperature.value(step), self.gamma.value(step), self.divergence
        )
        own = {type: replace(default, **fields) for type, fields in self.overrides.items()}
        return StepValues(self.lr.value(step), default, own)


def parse_piecewise(text: str, *, option: str, maximum: float | None = None) -> tuple[tuple[int, float], ...]:
    """Parse ``step:value,step:value`` into ``((step, value), …)``.

    Args:
        text: the option's value, such as ``0:0.7,400:0.5``.
        option: its name, for messages.
        maximum: largest value accepted (1 for alpha), or None. Values must be positive for a temperature and
            non-negative for alpha: with a maximum zero is accepted, without one it is not.

    Raises:
        UsageError: an entry is empty, malformed, not a finite number, negative, a duplicate or out of order; the
            message names it.
    """
    entries: list[tuple[int, float]] = []
    for part in text.split(","):
        step, value = _parse_entry(part, option)
        if maximum is not None and value > maximum:
            raise UsageError(
                "value too large", where=f"{option} entry {part!r}", got=value, expected=f"at most {maximum:g}"
            )
        if maximum is None and value == 0:
            raise UsageError("value must be positive", where=f"{option} entry {part!r}", got=value)
        if entries and step == entries[-1][0]:
            raise UsageError(
                "duplicate step", where=f"{option} entry {part!r}", got=step, remedy="keep one entry a step"
            )
        if entries and step < entries[-1][0]:
            raise UsageError(
                "out of order",
                where=f"{option} entry {part!r}",
                got=f"step {step} after step {entries[-1][0]}",
                expected="rising steps",
                remedy="sort the entries",
            )
        entries.append((step, value))
    return tuple(entries)


def level_from(text: str, step: int, value: float) -> str:
    """A schedule's text with everything up to ``step`` replaced by one entry ``step:value``."""
    later = [part for part in text.split(",") if int(part.strip().partition(":")[0]) > step]
    return ",".join([f"{step}:{value!r}", *later])


def _parse_entry(part: str, option: str) -> tuple[int, float]:
    where = f"{option} entry {part!r}"
    form = "step:value, such as 400:0.5"
    step_text, colon, value_text = part.strip().partition(":")
    if not colon:
        raise UsageError("not a step:value pair" if part.strip() else "empty entry", where=where, expected=form)
    try:
        step, value = int(step_text), float(value_text)
    except ValueError:
        raise UsageError("not a number", where=where, expected=form) from None
    if step < 0 or value < 0 or not math.isfinite(value):
        raise UsageError("must not be negative or infinite", where=where, expected=form)
    return step, value
