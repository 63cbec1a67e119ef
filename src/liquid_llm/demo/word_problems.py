"""Arithmetic word problems from a seeded generator, with calculator traces in their answers.

trace: ``12*7=<<12*7=84>>84``, the notation of GSM8K (Cobbe et al. 2021, arXiv 2110.14168); template: a function that
draws numbers and gives a question and the sentences of its answer, each with one trace.

Values are exact fractions; a draw whose result would need more than two decimals is thrown away.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from fractions import Fraction

# fmt: off
_WOMEN = ("Amara", "Beth", "Chloe", "Dina", "Elif", "Fatima", "Greta", "Hana", "Ivy", "Jia", "Kavya", "Leila", "Mona")
_MEN = ("Alan", "Bruno", "Carlos", "David", "Emil", "Felix", "Goran", "Hugo", "Ivan", "Jonas", "Kofi", "Luis", "Milan")
_PEOPLE = [*((name, "she", "her") for name in _WOMEN), *((name, "he", "his") for name in _MEN)]
_THINGS = ("pencils", "marbles", "stickers", "stamps", "apples", "candles", "buttons", "postcards", "shells", "beads")
_GOODS = {"notebook": 3, "lamp": 18, "scarf": 12, "mug": 6, "backpack": 32, "puzzle": 14, "chair": 45, "kettle": 27}
_FOODS = ("muffins", "rolls", "pancakes", "cookies", "dumplings", "pies", "tarts", "sandwiches")
_CITIES = ("Lisbon", "Oslo", "Kyoto", "Lima", "Cairo", "Prague", "Quito", "Dublin", "Hanoi", "Turin")
# fmt: on


class _Inexact(Exception):
    """A value that would not be written exactly with two decimals."""


def _number(value: Fraction | int) -> str:
    exact = Fraction(value) * 100
    if exact.denominator != 1 or exact < 0:
        raise _Inexact
    whole, hundredths = divmod(int(exact), 100)
    return f"{whole}.{hundredths:02d}" if hundredths else str(whole)


class _Answer:
    """Sentences with traces; each ``step`` gives its value for the next one to use."""

    def __init__(self) -> None:
        self.sentences: list[str] = []
        self.value = Fraction(0)

    def step(self, sentence: str, left: Fraction | int, sign: str, right: Fraction | int) -> Fraction:
        """Add ``sentence`` with ``{}``, or ``${}`` for money, replaced by the trace of ``left sign right``."""
        left, right = Fraction(left), Fraction(right)
        self.value = {
            "+": lambda: left + right,
            "-": lambda: left - right,
            "*": lambda: left * right,
            "/": lambda: left / right,
        }[sign]()
        expression = f"{_number(left)}{sign}{_number(right)}"
        result = _number(self.value)
        trace = f"<<{expression}={result}>>{result}"
        self.sentences.append(sentence.replace("${}", f"{expression}=${trace}").replace("{}", f"{expression}={trace}"))
        return self.value


Template = Callable[[random.Random, _Answer], str]


def word_problems(count: int, seed: int) -> Iterator[str]:
    """``count`` different problems, the same for the same seed: ``Question: …``, ``Answer: …``, ``#### result``."""
    rng = random.Random(f"word problems {seed}")
    seen: set[str] = set()
    while len(seen) < count:
        template = TEMPLATES[rng.randrange(len(TEMPLATES))]
        answer = _Answer()
        try:
            question = template(rng, answer)
        except _Inexact:
            continue
        text = f"Question: {question}\nAnswer: {' '.join(answer.sentences)}\n#### {_number(answer.value)}"
        if text not in seen:
            seen.add(text)
            yield text


def _person(rng: random.Random) -> tuple[str, str, str]:
    """A name with its pronouns."""
    return rng.choice(_PEOPLE)


def _boxes(rng: random.Random, answer: _Answer) -> str:
    (name, he, _), thing = _person(rng), rng.choice(_THINGS)
    boxes, each, given = rng.randint(3, 15), rng.randint(4, 24), rng.randint(2, 11)
    total = answer.step(f"{name} starts with {{}} {thing}.", boxes, "*", each)
    answer.step(f"After giving some away {he} has {{}} {thing}.", total, "-", given)
    return (
        f"{name} has {boxes} boxes of {thing} with {each} in each box. "
        f"If {he} gives {given} {thing} to a friend, how many are left?"
    )


def _shopping(rng: random.Random, answer: _Answer) -> str:
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


def _wages(rng: random.Random, answer: _Answer) -> str:
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


def _overtime(rng: random.Random, answer: _Answer) -> str:
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


def _journey(rng: random.Random, answer: _Answer) -> str:
    name, he, _ = _person(rng)
    start, end = rng.sample(_CITIES, 2)
    slow, fast = 5 * rng.randint(8, 14), 5 * rng.randint(15, 24)
    first, second = rng.randint(2, 5), rng.randint(2, 4)
    one = answer.step("The first part is {} km long.", slow, "*", first)
    two = answer.step("The second part is {} km long.", fast, "*", second)
    answer.step(f"Altogether {he} drives {{}} km.", one, "+", two)
    return (
        f"On the way from {start} to {end} {name} drives {first} hours at {slow} km per hour and then {second} "
        f"hours at {fast} km per hour. How many kilometres does {he} drive?"
    )


def _fuel(rng: random.Random, answer: _Answer) -> str:
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


def _discount(rng: random.Random, answer: _Answer) -> str:
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


def _sharing(rng: random.Random, answer: _Answer) -> str:
    (name, he, _), thing = _person(rng), rng.choice(_THINGS)
    friends, each, kept = rng.randint(3, 9), rng.randint(3, 15), rng.randint(2, 12)
    left = answer.step(f"{name} gives away {{}} {thing}.", friends * each + kept, "-", kept)
    answer.step(f"Each friend gets {{}} {thing}.", left, "/", friends)
    return (
        f"{name} has {friends * each + kept} {thing}. {he.capitalize()} keeps {kept} and shares the rest equally among "
        f"{friends} friends. How many {thing} does each friend get?"
    )


def _reading(rng: random.Random, answer: _Answer) -> str:
    name, he, _ = _person(rng)
    daily, days, rest = rng.randint(12, 35), rng.randint(4, 9), rng.randint(3, 8)
    per = rng.randint(10, 30)
    read = answer.step(f"In the first days {he} reads {{}} pages.", daily, "*", days)
    left = answer.step("There remain {} pages.", daily * days + rest * per, "-", read)
    answer.step(f"So {he} needs {{}} pages a day.", left, "/", rest)
    return (
        f"{name} reads {daily} pages a day of a book of {daily * days + rest * per} pages. After {days} days {he} "
        f"wants to finish it in {rest} more days. How many pages must {he} read on each of them?"
    )


def _garden(rng: random.Random, answer: _Answer) -> str:
    name, he, _ = _person(rng)
    plant = rng.choice(("tomato", "bean", "lettuce", "pepper", "tulip"))
    rows, per, lost, price = rng.randint(4, 14), rng.randint(6, 18), rng.randint(2, 15), rng.randint(2, 5)
    planted = answer.step(f"{name} plants {{}} {plant} plants.", rows, "*", per)
    alive = answer.step("Of these {} survive.", planted, "-", lost)
    answer.step("They sell for ${}.", alive, "*", price)
    return (
        f"{name} plants {rows} rows of {per} {plant} plants. A frost kills {lost} of them and {he} sells the "
        f"others for ${price} each. How many dollars does {he} make?"
    )


def _recipe(rng: random.Random, answer: _Answer) -> str:
    (name, he, _), food = _person(rng), rng.choice(_FOODS)
    batch, times, flour = rng.choice((6, 8, 10, 12)), rng.randint(3, 9), Fraction(rng.randint(2, 9), 4)
    batches = answer.step(f"{name} needs {{}} batches.", batch * times, "/", batch)
    answer.step("That takes {} cups of flour.", batches, "*", flour)
    return (
        f"A recipe for {batch} {food} takes {_number(flour)} cups of flour. "
        f"How many cups does {name} need if {he} wants to make {batch * times} {food}?"
    )


def _savings(rng: random.Random, answer: _Answer) -> str:
    name, he, his = _person(rng)
    have, weekly, weeks = rng.randint(15, 80), rng.randint(6, 25), rng.randint(3, 12)
    left = answer.step(f"{name} still needs ${{}}.", have + weekly * weeks, "-", have)
    answer.step("It takes {} weeks.", left, "/", weekly)
    return (
        f"{name} wants a bicycle for ${have + weekly * weeks}. {he.capitalize()} has ${have} and puts ${weekly} of "
        f"{his} pocket money aside every week. After how many weeks can {he} buy it?"
    )


def _fence(rng: random.Random, answer: _Answer) -> str:
    long, wide, price = rng.randint(10, 40), rng.randint(5, 20), rng.randint(4, 15)
    half = answer.step("One long and one short side measure {} metres.", long, "+", wide)
    around = answer.step("All the way around it is {} metres.", half, "*", 2)
    answer.step("The fence costs ${}.", around, "*", price)
    place = rng.choice(("field", "school yard", "vegetable garden", "paddock"))
    return (
        f"A {place} is {long} metres long and {wide} metres wide. What does a fence around it cost at ${price} a metre?"
    )


def _tiles(rng: random.Random, answer: _Answer) -> str:
    long, wide, side = rng.randint(3, 9), rng.randint(3, 8), rng.choice((20, 25, 50))
    area = answer.step("The floor measures {} square metres.", long, "*", wide)
    row = answer.step("Along one metre lie {} tiles.", 100, "/", side)
    square = answer.step("A square metre takes {} tiles.", row, "*", row)
    answer.step("The whole floor takes {} tiles.", area, "*", square)
    return (
        f"How many square tiles of {side} cm by {side} cm cover a floor of {long} metres by {wide} metres? "
        "(One metre is 100 cm.)"
    )


def _tank(rng: random.Random, answer: _Answer) -> str:
    into, out, minutes = rng.randint(9, 25), rng.randint(2, 8), rng.randint(5, 40)
    gain = answer.step("Every minute the tank gains {} litres.", into, "-", out)
    answer.step("It is full after {} minutes.", gain * minutes, "/", gain)
    what = rng.choice(("tank", "pool", "barrel", "basin"))
    return (
        f"A pipe fills an empty {what} with {into} litres of water a minute while {out} litres a minute leak out. "
        f"The {what} holds {(into - out) * minutes} litres. After how many minutes is it full?"
    )


def _ages(rng: random.Random, answer: _Answer) -> str:
    (one, _, his), (two, *_) = rng.sample(_PEOPLE, 2)
    age, factor, later = rng.randint(4, 14), rng.randint(2, 4), rng.randint(2, 12)
    older = answer.step(f"{two} is {{}} years old now.", age, "*", factor)
    answer.step(f"In {later} years that will be {{}}.", older, "+", later)
    return (
        f"{one} is {age} years old and {his} cousin {two} is {factor} times as old. "
        f"How old will {two} be in {later} years?"
    )


def _compare(rng: random.Random, answer: _Answer) -> str:
    (one, *_), (two, *_) = rng.sample(_PEOPLE, 2)
    thing = rng.choice(_THINGS)
    less, factor, more = rng.randint(5, 30), rng.randint(2, 5), rng.randint(3, 20)
    many = answer.step(f"{two} has {{}} {thing}.", less, "*", factor)
    many = answer.step(f"With the new ones {two} has {{}}.", many, "+", more)
    answer.step(f"Together they have {{}} {thing}.", many, "+", less)
    return (
        f"{one} has {less} {thing}. {two} had {factor} times as many and then found {more} more. "
        f"How many {thing} do {one} and {two} have together?"
    )


def _average(rng: random.Random, answer: _Answer) -> str:
    name, he, his = _person(rng)
    subject = rng.choice(("history", "chemistry", "Latin", "geography"))
    first, second, third = (rng.randint(55, 98) for _ in range(3))
    total = answer.step("The first two tests give {} points.", first, "+", second)
    total = answer.step("With the third it is {} points.", total, "+", third)
    answer.step("The average is {}.", total, "/", 3)
    if total % 3:
        raise _Inexact
    return (
        f"In {his} three {subject} tests {name} scores {first}, {second} and {third} points. What is {his} average, "
        f"if {he} has no other test?"
    )


def _tickets(rng: random.Random, answer: _Answer) -> str:
    adults, children = rng.randint(2, 9), rng.randint(3, 20)
    price, less = rng.randint(8, 20), rng.randint(2, 6)
    event = rng.choice(("museum", "zoo", "cinema", "circus", "planetarium"))
    child = answer.step("A child pays ${}.", price, "-", less)
    one = answer.step("The adults pay ${}.", adults, "*", price)
    two = answer.step("The children pay ${}.", children, "*", child)
    answer.step("The group pays ${}.", one, "+", two)
    return (
        f"At the {event} a ticket costs ${price}, and ${less} less for children. "
        f"How much do {adults} adults and {children} children pay together?"
    )


def _bus(rng: random.Random, answer: _Answer) -> str:
    start, off, on = rng.randint(15, 45), rng.randint(3, 12), rng.randint(2, 18)
    seats = start - off + on + rng.randint(3, 20)
    city = rng.choice(_CITIES)
    one = answer.step("After people get off there are {} passengers.", start, "-", off)
    two = answer.step("After others get on there are {}.", one, "+", on)
    answer.step("So {} seats are free.", seats, "-", two)
    return (
        f"A bus with {seats} seats leaves {city} with {start} passengers. At the first stop {off} get off and {on} "
        f"get on. How many seats are free then, if everybody sits?"
    )


def _machines(rng: random.Random, answer: _Answer) -> str:
    machines, each, hours = rng.randint(2, 9), rng.randint(12, 60), rng.randint(3, 9)
    good = rng.choice((80, 90, 95))
    hourly = answer.step("All machines together make {} parts an hour.", machines, "*", each)
    total = answer.step(f"In {hours} hours they make {{}} parts.", hourly, "*", hours)
    answer.step("Of these {} pass.", total, "*", Fraction(good, 100))
    if answer.value.denominator != 1:
        raise _Inexact
    return (
        f"A workshop has {machines} machines that each make {each} parts an hour, and {good}% of the parts pass "
        f"inspection. How many good parts are made in {hours} hours?"
    )


def _fraction(rng: random.Random, answer: _Answer) -> str:
    (name, he, _), thing = _person(rng), rng.choice(_THINGS)
    parts, word = rng.choice(((2, "half"), (3, "a third"), (4, "a quarter"), (5, "a fifth")))
    total, found = parts * rng.randint(5, 30), rng.randint(2, 14)
    lost = answer.step(f"{name} loses {{}} {thing}.", total, "/", parts)
    left = answer.step(f"Then {he} has {{}}.", total, "-", lost)
    answer.step(f"In the end {he} has {{}} {thing}.", left, "+", found)
    return (
        f"{name} loses {word} of {total} {thing} and later finds {found} of them again. "
        f"How many {thing} does {he} have in the end?"
    )


def _time(rng: random.Random, answer: _Answer) -> str:
    name, he, _ = _person(rng)
    task = rng.choice(("practises the piano", "walks the dog", "studies Spanish", "draws", "trains for a race"))
    minutes, days, weeks = 5 * rng.randint(3, 12), rng.randint(3, 6), rng.choice((2, 3, 4, 6, 8))
    week = answer.step("In a week that is {} minutes.", minutes, "*", days)
    total = answer.step(f"In {weeks} weeks it is {{}} minutes.", week, "*", weeks)
    answer.step("That makes {} hours.", total, "/", 60)
    return (
        f"{name} {task} for {minutes} minutes on {days} days of each week. How many hours does {he} spend on it in "
        f"{weeks} weeks?"
    )


TEMPLATES: tuple[Template, ...] = (
    _boxes, _shopping, _wages, _overtime, _journey, _fuel, _discount, _sharing, _reading, _garden, _recipe, _savings,
    _fence, _tiles, _tank, _ages, _compare, _average, _tickets, _bus, _machines, _fraction, _time,
)  # fmt: skip
