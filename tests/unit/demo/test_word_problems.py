from __future__ import annotations

import random
import re
from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from liquid_llm.demo.word_problems import TEMPLATES, Answer, Template, word_problems

TRACE = re.compile(r"(\d+(?:\.\d\d)?)([-+*/])(\d+(?:\.\d\d)?)=(\$?)<<\1\2\3=(\d+(?:\.\d\d)?)>>\5(?!\d)")
SIGNS = {"+": Fraction.__add__, "-": Fraction.__sub__, "*": Fraction.__mul__, "/": Fraction.__truediv__}


def parts(text: str) -> tuple[str, str, str]:
    match = re.fullmatch(r"Question: (.+)\nAnswer: (.+)\n#### (\d+(?:\.\d\d)?)", text)
    assert match, text
    question, answer, result = match.groups()
    return question, answer, result


@given(st.integers(0, 10**9))
def test_every_trace_is_right_and_leads_to_the_answer(seed: int) -> None:
    for text in word_problems(5, seed):
        question, answer, result = parts(text)
        traces = TRACE.findall(answer)
        assert 2 <= len(traces) == answer.count("<<") == answer.count(">>") <= 5
        known = {Fraction(number) for number in re.findall(r"\d+(?:\.\d+)?", question)}
        for left, sign, right, _, value in traces:
            assert SIGNS[sign](Fraction(left), Fraction(right)) == Fraction(value)
            known.add(Fraction(value))
        assert traces[-1][4] == result
        assert "{" not in text
        assert "_" not in text


# What a question asks for, worked out anew from the numbers in it, in the order in which they stand.
ASKED = {
    "shopping": lambda price, other, many, few, paid: paid - many * price - few * other,
    "wages": lambda rate, hours, days, spent: rate * hours * days - spent,
    "overtime": lambda rate, hours, higher, worked: rate * (hours + higher * (worked - hours)),
    "fuel": lambda per, price, distance: 2 * distance / per * price,
    "discount": lambda price, percent, count: price * (1 - percent / 100) * count,
    "sharing": lambda total, kept, friends: (total - kept) / friends,
    "tiles": lambda side, _, long, wide, metre: long * wide * (metre / side) ** 2,
    "tank": lambda into, out, litres: litres / (into - out),
}


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda template: template.__name__.strip("_"))
def test_the_answer_is_what_the_question_asks_for(template: Template) -> None:
    rng = random.Random(2)
    for _ in range(50):
        answer = Answer()
        question = template(rng, answer)
        numbers = [Fraction(number) for number in re.findall(r"\d+(?:\.\d+)?", question)]
        assert answer.value == ASKED[template.__name__.strip("_")](*numbers), question


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda template: template.__name__.strip("_"))
def test_steps_use_what_is_told_or_worked_out(template: Template) -> None:
    """Every number in a step is in the question, comes from an earlier step, or is implied."""
    implied = {2, 100} | {Fraction(n, 100) for n in range(101)}
    rng = random.Random(1)
    for _ in range(200):
        answer = Answer()
        question = template(rng, answer)
        known = {Fraction(number) for number in re.findall(r"\d+(?:\.\d+)?", question)} | implied
        for left, _, right, _, value in TRACE.findall(" ".join(answer.sentences)):
            assert {Fraction(left), Fraction(right)} <= known, question
            known.add(Fraction(value))
        assert answer.value >= 0


def test_the_same_seed_gives_the_same_problems() -> None:
    assert list(word_problems(50, 3)) == list(word_problems(80, 3))[:50]
    assert list(word_problems(50, 3)) != list(word_problems(50, 4))


def test_problems_are_many_and_varied() -> None:
    texts = list(word_problems(3000, 0))
    assert len(set(texts)) == 3000
    openings = Counter(re.sub(r"[A-Z]\w+|\d+(\.\d\d)?", "_", parts(text)[1]) for text in texts)
    assert len(openings) > 50  # sentence shapes with names and numbers taken out
    assert {sign for text in texts for _, sign, *_ in TRACE.findall(text)} == set("+-*/")
    assert Counter(len(TRACE.findall(text)) for text in texts).keys() == {2, 3, 4, 5}


def test_values_that_two_decimals_cannot_hold_are_no_answer() -> None:
    for left, sign, right in ((1, "/", 3), (2, "-", 3), (Fraction(1, 8), "*", 1)):
        with pytest.raises(ValueError, match="decimals"):
            Answer().step("{}", left, sign, right)


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        ("It is {} km.", "It is 3*1.50=<<3*1.50=4.50>>4.50 km."),
        ("It is ${}.", "It is 3*1.50=$<<3*1.50=4.50>>4.50."),
    ],
)
def test_how_a_step_is_written(sentence: str, expected: str) -> None:
    answer = Answer()
    assert answer.step(sentence, 3, "*", Fraction(3, 2)) == Fraction(9, 2)
    assert answer.sentences == [expected]
