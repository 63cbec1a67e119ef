"""Seeded makers of small texts for tests: prose, word problems and Python functions, all made here from word lists.

The texts have structure a small model can learn (a grammar, arithmetic that is right, code that runs), so that losses
fall in tests for the reason they fall in use.
"""

from __future__ import annotations

import random


def _words(line: str) -> list[str]:
    return line.split()


_PLACES = _words("harbour valley mill bridge orchard quarry station island market library tower garden")
_PEOPLE = _words("Ada Boris Chen Dalia Emeka Farah Goran Hana Ines Jonas Kofi Lena")
_THINGS = _words("apples ropes lamps letters boxes tiles maps bricks seeds candles drums coats")
_ADJECTIVES = _words("old narrow quiet northern wooden crowded steep early painted distant broad salted")
_VERBS = _words("repaired measured opened crossed sold described rebuilt flooded guarded painted joined divided")
_TIMES = ("in spring", "after the storm", "before noon", "during the long winter", "at the end of the century")


def paragraph(rng: random.Random, sentences: int = 6) -> str:
    """A few plain sentences about one place."""
    place = rng.choice(_PLACES)
    parts = []
    for _ in range(sentences):
        person, verb, other = rng.choice(_PEOPLE), rng.choice(_VERBS), rng.choice(_PLACES)
        first, second = rng.sample(_ADJECTIVES, 2)
        when, count, thing = rng.choice(_TIMES), rng.randrange(2, 90), rng.choice(_THINGS)
        parts.append(
            rng.choice(
                (
                    f"The {first} {place} was {verb} by {person} {when}, and the {second} {other} kept its {thing}.",
                    f"{when.capitalize()}, {person} {verb} {count} {thing} near the {first} {other}.",
                    f"{person} {verb} the {second} {place}; it held {count} {thing} and one {first} {other}.",
                )
            )
        )
    return " ".join(parts)


def article(rng: random.Random) -> list[str]:
    """Lines of one article as WikiText has them: an empty line, a heading between equal signs, paragraphs."""
    title = f"{rng.choice(_ADJECTIVES).capitalize()} {rng.choice(_PLACES)}"
    lines = ["", f" = {title} = \n", ""]
    lines += [f" {paragraph(rng, rng.randrange(4, 9))} \n" for _ in range(rng.randrange(2, 5))]
    return lines


def word_problem(rng: random.Random) -> str:
    """A question of one to four steps whose answer shows them as calculator traces, ``<<12*7=84>>84``."""
    person, thing = rng.choice(_PEOPLE), rng.choice(_THINGS)
    bags, each = rng.randrange(3, 20), rng.randrange(3, 20)
    held = bags * each
    question = [f"{person} fills {bags} bags with {each} {thing} each"]
    answer = [f"{person} has {bags}*{each}=<<{bags}*{each}={held}>>{held} {thing}."]
    for _ in range(rng.randrange(4)):
        count, other = rng.randrange(1, max(2, held // 2)), rng.choice(_PEOPLE)  # half at most: some are always left
        sign, told = rng.choice((("-", f"gives {count} to {other}"), ("+", f"gets {count} more from {other}")))
        after = held - count if sign == "-" else held + count
        question.append(told)
        answer.append(f"Then {held}{sign}{count}=<<{held}{sign}{count}={after}>>{after} {thing}.")
        held = after
    return f"Question: {', '.join(question)}. How many {thing} are there?\nAnswer: {' '.join(answer)}\n#### {held}"


def function(rng: random.Random, extra_steps: int = 0) -> str:
    """A small Python function that compiles; ``extra_steps`` lengthens its body."""
    noun, name = rng.choice(_THINGS), rng.choice(("count", "total", "shift", "scale", "limit"))
    factor, bound = rng.randrange(2, 12), rng.randrange(20, 200)
    body = [
        f"def {name}_{noun}(values, limit={bound}):",
        f'    """Sum {factor} times every value below limit."""',
        "    result = 0",
        "    for value in values:",
        "        if value < limit:",
        f"            result += {factor} * value",
    ]
    body += [f"    result = (result * {rng.randrange(2, 9)} + {step}) % {bound}" for step in range(extra_steps)]
    return "\n".join([*body, "    return result", ""])
