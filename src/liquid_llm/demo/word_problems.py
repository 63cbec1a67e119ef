"""Arithmetic word problems from a seeded generator, with calculator traces in their answers.

trace: ``12*7=<<12*7=84>>84``, the notation of GSM8K (Cobbe et al. 2021, arXiv 2110.14168); template: a function that
draws numbers and gives a question and the sentences of its answer, each with one trace. Values are exact fractions.
"""

from __future__ import annotations

import operator
import random
from collections.abc import Callable, Iterator
from fractions import Fraction

# fmt: off
_WOMEN = ("Amara", "Beth", "Chloe", "Dina", "Elif", "Fatima", "Greta", "Hana", "Ivy", "Jia", "Kavya", "Leila", "Mona")
_MEN = ("Alan", "Bruno", "Carlos", "David", "Emil", "Felix", "Goran", "Hugo", "Ivan", "Jonas", "Kofi", "Luis", "Milan")
_THINGS = ("pencils", "marbles", "stickers", "stamps", "apples", "candles", "buttons", "postcards", "shells", "beads")
_GOODS = {"notebook": 3, "lamp": 18, "scarf": 12, "mug": 6, "backpack": 32, "puzzle": 14, "chair": 45, "kettle": 27}
_SIGNS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
# fmt: on


class Answer:
    """Sentences with traces; each ``step`` gives its value for the next one to use."""

    def __init__(self) -> None:
        self.sentences: list[str] = []
        self.value = Fraction(0)

    def step(self, sentence: str, left: Fraction | int, sign: str, right: Fraction | int) -> Fraction:
        """Add ``sentence`` with ``{}``, or ``${}`` for money, replaced by the trace of ``left sign right``.

        Raises:
            ValueError: a number is negative or has more than two decimals; a template draws none such.
        """
        self.value = _SIGNS[sign](Fraction(left), Fraction(right))
        expression, result = f"{_number(left)}{sign}{_number(right)}", _number(self.value)
        trace = f"<<{expression}={result}>>{result}"
        self.sentences.append(sentence.replace("${}", f"{expression}=${trace}").replace("{}", f"{expression}={trace}"))
        return self.value


def _number(value: Fraction | int) -> str:
    exact = Fraction(value) * 100
    if exact.denominator != 1 or exact < 0:
        raise ValueError(f"{value} is negative or needs more than two decimals")
    whole, hundredths = divmod(int(exact), 100)
    return f"{whole}.{hundredths:02d}" if hundredths else str(whole)


Template = Callable[[random.Random, Answer], str]


def word_problems(count: int, seed: int) -> Iterator[str]:
    """``count`` different problems, the same for the same seed: ``Question: …``, ``Answer: …``, ``#### result``."""
    rng = random.Random(f"word problems {seed}")
    seen: set[str] = set()
    while len(seen) < count:
        answer = Answer()
        question = rng.choice(TEMPLATES)(rng, answer)
        text = f"Question: {question}\nAnswer: {' '.join(answer.sentences)}\n#### {_number(answer.value)}"
        if text not in seen:
            seen.add(text)
            yield text


def _person(rng: random.Random) -> tuple[str, str, str]:
    """A name with its pronouns."""
    return rng.choice([*((name, "she", "her") for name in _WOMEN), *((name, "he", "his") for name in _MEN)])


def _shopping(rng: random.Random, answer: Answer) -> str:
    name, he, _ = _person(rng)
    (first, price), (second, other) = rng.sample(sorted(_GOODS.items()), 2)
    many, few = rng.randint(2, 6), rng.randint(2, 5)
    paid = 50 * ((many * price + few * other) // 50 + 1)
    one = answer.step(f"The {first}s cost ${{}}.", many, "*", price)
    two = answer.step(f"The {second}s cost ${{}}.", few, "*", other)
    total = answer.step("Together that is ${}.", one, "+", two)
    answer.step(f"{name} gets back ${{}}.", paid, "-", total)
    return (
        f"A {first} costs ${price} and a {second} costs ${other}. {name} buys {many} {first}s and {few} {second}s "
        f"and pays with ${paid}. How much change does {he} get?"
    )


def _wages(rng: random.Random, answer: Answer) -> str:
    name, he, _ = _person(rng)
    rate, hours, days = rng.randint(11, 28), rng.randint(3, 8), rng.randint(3, 6)
    spent = rng.randint(20, 90)
    daily = answer.step(f"In a day {name} earns ${{}}.", rate, "*", hours)
    weekly = answer.step(f"In a week {he} earns ${{}}.", daily, "*", days)
    answer.step(f"After the bills {he} keeps ${{}}.", weekly, "-", spent)
    return (
        f"{name} earns ${rate} an hour and works {hours} hours a day, {days} days a week. "
        f"{he.capitalize()} spends ${spent} a week on bills. How many dollars does {he} keep each week?"
    )


def _overtime(rng: random.Random, answer: Answer) -> str:
    name, he, _ = _person(rng)
    rate, hours, extra = 2 * rng.randint(6, 14), rng.choice((35, 38, 40)), rng.randint(2, 9)
    over = answer.step("Of these hours {} are overtime.", hours + extra, "-", hours)
    higher = answer.step("An hour of overtime is paid ${}.", rate, "*", Fraction(3, 2))
    over = answer.step("The overtime brings ${}.", over, "*", higher)
    normal = answer.step("The other hours bring ${}.", hours, "*", rate)
    answer.step(f"In total {he} earns ${{}}.", normal, "+", over)
    return (
        f"{name} is paid ${rate} an hour for the first {hours} hours of a week and 1.5 times as much after that. "
        f"How much does {he} earn in a week of {hours + extra} hours?"
    )


def _fuel(rng: random.Random, answer: Answer) -> str:
    name, he, his = _person(rng)
    per, price = rng.choice((8, 10, 12, 15, 20)), Fraction(rng.randint(12, 21), 10)
    litres = rng.randint(8, 40)
    needed = answer.step("The trip takes {} litres.", per * litres, "/", per)
    cost = answer.step("They cost ${}.", needed, "*", price)
    answer.step("There and back it is ${}.", cost, "*", 2)
    return (
        f"{name}'s car goes {per} km on a litre of petrol, which costs ${_number(price)}. How much does {he} pay "
        f"for petrol to visit {his} aunt, who lives {per * litres} km away, and come back?"
    )


def _discount(rng: random.Random, answer: Answer) -> str:
    name, he, _ = _person(rng)
    item = rng.choice(("coat", "bicycle", "guitar", "printer", "desk", "tent"))
    price, percent, count = 20 * rng.randint(3, 18), 5 * rng.randint(1, 8), rng.randint(2, 4)
    off = answer.step("The discount on one is ${}.", Fraction(price), "*", Fraction(percent, 100))
    one = answer.step("Each then costs ${}.", price, "-", off)
    answer.step(f"{name} pays ${{}}.", one, "*", count)
    return (
        f"A {item} that usually costs ${price} is sold with {percent}% off. "
        f"How much does {name} pay if {he} buys {count} of them?"
    )


def _sharing(rng: random.Random, answer: Answer) -> str:
    (name, he, _), thing = _person(rng), rng.choice(_THINGS)
    friends, each, kept = rng.randint(3, 9), rng.randint(3, 15), rng.randint(2, 12)
    left = answer.step(f"{name} gives away {{}} {thing}.", friends * each + kept, "-", kept)
    answer.step(f"Each friend gets {{}} {thing}.", left, "/", friends)
    return (
        f"{name} has {friends * each + kept} {thing}. {he.capitalize()} keeps {kept} and shares the rest equally among "
        f"{friends} friends. How many {thing} does each friend get?"
    )


def _tiles(rng: random.Random, answer: Answer) -> str:
    long, wide, side = rng.randint(3, 9), rng.randint(3, 8), rng.choice((20, 25, 50))
    area = answer.step("The floor measures {} square metres.", long, "*", wide)
    row = answer.step("Along one metre lie {} tiles.", 100, "/", side)
    square = answer.step("A square metre takes {} tiles.", row, "*", row)
    answer.step("The whole floor takes {} tiles.", area, "*", square)
    return (
        f"How many square tiles of {side} cm by {side} cm cover a floor of {long} metres by {wide} metres? "
        "(One metre is 100 cm.)"
    )


def _tank(rng: random.Random, answer: Answer) -> str:
    into, out, minutes = rng.randint(9, 25), rng.randint(2, 8), rng.randint(5, 40)
    gain = answer.step("Every minute it gains {} litres.", into, "-", out)
    answer.step("It is full after {} minutes.", gain * minutes, "/", gain)
    what = rng.choice(("tank", "pool", "barrel", "basin"))
    return (
        f"A pipe fills an empty {what} with {into} litres of water a minute while {out} litres a minute leak out. "
        f"The {what} holds {(into - out) * minutes} litres. After how many minutes is it full?"
    )


TEMPLATES: tuple[Template, ...] = (_shopping, _wages, _overtime, _fuel, _discount, _sharing, _tiles, _tank)
