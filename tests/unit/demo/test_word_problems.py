from __future__ import annotations

import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from liquid_llm.answers import is_right
from liquid_llm.demo.word_problems import HELD_OUT, TRAINED, Problem, held_out_problems, word_problems

SIGNS = {"+": int.__add__, "-": int.__sub__, "x": int.__mul__}
STEP = re.compile(r"(\d+) ([-+x]) (\d+) = (\d+)")


def asked(problem: Problem) -> tuple[str, frozenset[int]]:
    """The operation and the two numbers of a problem; none of its words has another number."""
    numbers = re.findall(r"\d+", problem.question)
    assert len(numbers) == 2, problem.question
    (step,) = STEP.findall(problem.answer)
    return step[1], frozenset(map(int, numbers))


def wording(problem: Problem) -> str:
    """A question without its names, things, places and numbers."""
    words = re.sub(r"\b[A-Z][a-z]+\b|\d+", "_", problem.question)
    return re.sub(
        r"\b(apples|books|buttons|candles|cards|marbles|pencils|shells|stamps|stickers|bag|basket|box|drawer|jar)\b",
        "_",
        words,
    )


@given(st.integers(0, 10**9))
def test_every_answer_works_out_what_the_question_tells(seed: int) -> None:
    held_out = held_out_problems(4, seed)
    for problem in [*word_problems(8, seed), *held_out["new numbers"], *held_out["new wording"]]:
        ((left, sign, right, value),) = STEP.findall(problem.answer)
        assert SIGNS[sign](int(left), int(right)) == int(value) == problem.result > 0
        assert {int(left), int(right)} == set(asked(problem)[1])
        assert is_right(problem.answer, str(problem.result)), "an answer in words is marked by its last number"
        assert not set("{}_") & set(problem.question + problem.answer)


@pytest.mark.parametrize("seed", [0, 1234])
def test_nothing_that_is_held_out_is_trained_on(seed: int) -> None:
    trained = list(word_problems(2000, seed))
    held_out = held_out_problems(200, seed)
    numbers = {asked(problem) for problem in trained}
    for kind, problems in held_out.items():
        assert not numbers & {asked(problem) for problem in problems}, kind
    wordings = {wording(problem) for problem in trained}
    assert {wording(problem) for problem in held_out["new numbers"]} <= wordings
    assert not {wording(problem) for problem in held_out["new wording"]} & wordings


def test_the_same_seed_gives_the_same_problems_and_fewer_are_the_first_of_more() -> None:
    assert list(word_problems(50, 3)) == list(word_problems(80, 3))[:50]
    assert list(word_problems(50, 3)) != list(word_problems(50, 4))
    assert held_out_problems(20, 3) == held_out_problems(20, 3)
    assert held_out_problems(20, 3) != held_out_problems(20, 4)


def test_problems_are_different_and_every_wording_comes_about_as_often() -> None:
    problems = list(word_problems(700, 0))
    assert len({problem.question for problem in problems}) == 700
    counts = Counter(map(wording, problems))
    assert len(counts) == len(TRAINED)
    assert all(90 <= count <= 110 for count in counts.values())
    assert {template.operation for template in TRAINED} == {template.operation for template in HELD_OUT} == set(SIGNS)
