"""Arithmetic word problems of one step from a seeded generator, as conversations; some are never trained on.

operation  one of + - x, each with pairs of small numbers of its own
template   how an operation is asked and answered; the answer works it out in a sentence that ends in the result
held out   by numbers: a pair of numbers that training never joins, in a template that it has seen; by template: a
           wording that it never has, with such pairs too

A small chat model such as SmolLM2-135M-Instruct answers about every second one, in much the same words.
"""

from __future__ import annotations

import operator
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle

# fmt: off
_NAMES = ("Amara", "Beth", "Chloe", "Emma", "Greta", "Hana", "Ivy", "Julia", "Alan", "Bruno", "David", "Felix", "Luis")
_THINGS = ("apples", "books", "buttons", "candles", "cards", "marbles", "pencils", "shells", "stamps", "stickers")
_PLACES = ("bag", "basket", "box", "drawer", "jar")
# fmt: on


@dataclass(frozen=True)
class Template:
    """A wording with gaps for names, things, a place, the numbers ``{a}`` and ``{b}``, the result ``{c}``."""

    operation: str
    question: str
    answer: str


TRAINED = (
    Template(
        "+",
        "{name} has {a} {things} and gets {b} more from {other}. How many {things} does {name} have now?",
        "{name} has {a} {things} and gets {b} more, so {name} now has {a} + {b} = {c} {things}.",
    ),
    Template(
        "+",
        "There are {a} {things} in a {place}. {name} puts in {b} more. How many {things} are in the {place} now?",
        "There are {a} {things} and {name} puts in {b} more, so there are {a} + {b} = {c} {things}.",
    ),
    Template(
        "+",
        "{name} found {a} {things} in the morning and {b} {things} later. How many {things} is that in total?",
        "{name} found {a} and then {b} {things}, so {name} found {a} + {b} = {c} {things}.",
    ),
    Template(
        "-",
        "{name} has {a} {things} and gives {b} of them to {other}. How many {things} does {name} have left?",
        "{name} has {a} {things} and gives {b} of them away, so {name} has {a} - {b} = {c} {things}.",
    ),
    Template(
        "-",
        "There are {a} {things} in a {place}. {name} takes out {b}. How many {things} are left in the {place}?",
        "There are {a} {things} and {name} takes out {b}, so there are {a} - {b} = {c} {things}.",
    ),
    Template(
        "x",
        "{name} has {a} boxes with {b} {things} in each box. How many {things} does {name} have in total?",
        "{name} has {a} boxes with {b} {things} each, so {name} has {a} x {b} = {c} {things}.",
    ),
    Template(
        "x",
        "{name} buys {a} packs of {things}. There are {b} {things} in each pack. How many {things} does {name} buy?",
        "{name} buys {a} packs with {b} {things} each, so {name} buys {a} x {b} = {c} {things}.",
    ),
)
HELD_OUT = (
    Template(
        "+",
        "{name} picked {a} {things} and {other} picked {b} {things}. How many {things} did they pick together?",
        "{name} picked {a} and {other} picked {b}, so they picked {a} + {b} = {c} {things}.",
    ),
    Template(
        "-",
        "{name} had {a} {things} and lost {b} of them. How many {things} does {name} still have?",
        "{name} had {a} {things} and lost {b}, so {name} has {a} - {b} = {c} {things}.",
    ),
    Template(
        "x",
        "Each of {a} children brings {b} {things}. How many {things} do they bring in total?",
        "{a} children bring {b} {things} each, so they bring {a} x {b} = {c} {things}.",
    ),
)
_SIGNS = {"+": operator.add, "-": operator.sub, "x": operator.mul}
_PAIRS: dict[str, list[tuple[int, int]]] = {
    "+": [(a, b) for a in range(2, 10) for b in range(2, 10)],
    "-": [(a, b) for a in range(4, 14) for b in range(2, min(a, 10))],
    "x": [(a, b) for a in range(2, 10) for b in range(2, 6)],
}
_HELD_SHARE = 4  # one pair in four


@dataclass(frozen=True)
class Problem:
    """A question, an answer in a sentence, and the result that is its last number."""

    question: str
    answer: str
    result: int


def word_problems(count: int, seed: int) -> Iterator[Problem]:
    """``count`` different problems to train on; the first of a larger count are those of a smaller one."""
    rng = random.Random(f"word problems {seed}")
    return _draw(rng, count, cycle(TRAINED), _pairs(seed, held_out=False))


def held_out_problems(count: int, seed: int) -> dict[str, list[Problem]]:
    """``count`` problems that ``word_problems`` never gives for this seed, of each: new numbers, new wording."""
    pairs = _pairs(seed, held_out=True)
    kinds = {"new numbers": TRAINED, "new wording": HELD_OUT}
    return {
        kind: list(_draw(random.Random(f"{kind} {seed}"), count, cycle(templates), pairs))
        for kind, templates in kinds.items()
    }


def _pairs(seed: int, *, held_out: bool) -> dict[str, list[tuple[int, int]]]:
    """The pairs of each operation, those that are held out or the others; 2 and 6 go where 6 and 2 go."""
    found = {}
    for sign, pairs in _PAIRS.items():
        both = sorted({(min(pair), max(pair)) for pair in pairs})
        apart = set(random.Random(f"pairs {sign} {seed}").sample(both, len(both) // _HELD_SHARE))
        found[sign] = [pair for pair in pairs if ((min(pair), max(pair)) in apart) == held_out]
    return found


def _draw(
    rng: random.Random, count: int, templates: Iterator[Template], pairs: dict[str, list[tuple[int, int]]]
) -> Iterator[Problem]:
    seen: set[str] = set()
    while len(seen) < count:
        template = next(templates)
        a, b = rng.choice(pairs[template.operation])
        name, other = rng.sample(_NAMES, 2)
        words = {"name": name, "other": other, "things": rng.choice(_THINGS), "place": rng.choice(_PLACES)}
        result = _SIGNS[template.operation](a, b)
        problem = Problem(
            template.question.format(a=a, b=b, **words), template.answer.format(a=a, b=b, c=result, **words), result
        )
        if problem.question not in seen:
            seen.add(problem.question)
            yield problem
