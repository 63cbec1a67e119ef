"""What a study is to run: arms, seeds, and the runs they make.

An arm's options lie over those that all arms share. Arms are named in a list, or made by varying options (``--vary``):
then each value is an arm, and of several options each combination. Both together: each named arm with each combination.
The first arm is the baseline.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from liquid_llm.errors import UsageError

TOKENS, SECONDS = AT = ("tokens", "seconds")
_SAFE = re.compile(r"[^A-Za-z0-9._=+-]+")


@dataclass(frozen=True)
class Arm:
    """One way to train; ``options`` are its own, name -> value."""

    name: str
    options: Mapping[str, object]


@dataclass(frozen=True)
class Unit:
    """One run.

    Attributes:
        arm: its name.
        steps: how many it takes; None: as many as its options say.
    """

    arm: str
    seed: int
    steps: int | None = None

    @property
    def folder(self) -> str:
        """Where it runs, below the study's runs; different for all units."""
        return f"{self.arm_folder}/seed-{self.seed}"

    @property
    def arm_folder(self) -> str:
        return slug(self.arm) + ("" if self.steps is None else f"@{self.steps}")

    @property
    def title(self) -> str:
        """For messages."""
        steps = "" if self.steps is None else f" for {self.steps:,} steps"
        return f"{self.arm}{steps}, seed {self.seed}"


@dataclass(frozen=True)
class Study:
    """What is asked for.

    Attributes:
        face: the training command that is varied.
        arms: the baseline first.
        options: shared by all arms, name -> value.
        captures: options of captures that come before, in order.
        at: ``tokens``, ``seconds`` or both.
        least_gain: a gain of less does not matter.
        processes: how many of them train at once.
        evaluation: options of the evaluation that ends it, name -> value.
        dry_run: whether to say what would be run, and to run nothing.
    """

    face: str
    arms: Sequence[Arm]
    seeds: Sequence[int]
    options: Mapping[str, object]
    captures: Sequence[Mapping[str, object]] = ()
    at: Sequence[str] = AT
    least_gain: float = 0.01
    processes: int = 1
    evaluation: Mapping[str, object] = field(default_factory=dict)
    dry_run: bool = False

    def arm(self, name: str) -> Arm:
        """The arm of that name."""
        return next(one for one in self.arms if one.name == name)

    def units(self) -> list[Unit]:
        """The runs at equal tokens, a seed after the other: arms take turns, so that what disturbs the machine for a
        while disturbs all of them."""
        return [Unit(arm.name, seed) for seed in self.seeds for arm in self.arms]


def slug(name: str) -> str:
    """A folder's name for an arm; different names have different ones."""
    safe = _SAFE.sub("-", name).strip("-.") or "arm"
    return safe if safe == name and len(name) <= 80 else f"{safe[:60]}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"


def make_arms(named: Sequence[Arm], varied: Sequence[Sequence[Arm]]) -> list[Arm]:
    """All arms: each named one with each combination of the varied options.

    Args:
        named: none is one without a name and without options.
        varied: of each varied option an arm for each value.

    Raises:
        UsageError: there are fewer than two, or two of one name.
    """
    arms = [
        Arm(
            " ".join(part.name for part in parts if part.name),
            {k: v for part in parts for k, v in part.options.items()},
        )
        for parts in itertools.product(named or [Arm("", {})], *varied)
    ]
    if len(arms) < 2:
        raise UsageError(
            "a study compares two arms or more",
            got=f"{len(arms)}",
            remedy="vary an option (--vary kd_alpha_start=0,0.7), or list arms: in the configuration file",
        )
    names = [arm.name for arm in arms]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError("two arms have one name", got=repr(twice), remedy="give each arm a name of its own")
    return arms
