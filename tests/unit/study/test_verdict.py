"""Intervals hold what they promise, verdicts are seldom wrong, and what more seeds would tell is right: simulated."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from liquid_llm.study.verdict import BETTER, MEASURES, NOT_BETTER, UNKNOWN, Measure, Verdict, compare, quantile

Floats = NDArray[np.float64]
CE, ANSWERS = MEASURES["ce"], MEASURES["answers"]
REPEATS = 1200
BY_CHANCE = 3 * math.sqrt(0.05 * 0.95 / REPEATS)  # three standard errors of a share of 5 %


def draw(
    rng: np.random.Generator, seeds: int, texts: int, seed: float, text: float, both: float, difference: float = 0.0
) -> tuple[Floats, Floats]:
    """Differences [seeds, texts] whose true mean is ``difference``, and positions; single texts have heavy tails."""
    weights = rng.integers(20, 400, texts).astype(np.float64)
    per_token = (
        difference
        + rng.normal(0, seed, (seeds, 1))
        + text * rng.standard_t(5, texts) / math.sqrt(5 / 3)
        + rng.normal(0, both, (seeds, texts))
    )
    return per_token * weights, weights


def judge(differences: Floats, weights: Floats, measure: Measure = CE) -> Verdict:
    return compare(differences, np.zeros_like(differences), weights, measure)


# seeds, texts, and the spread that seed, text and both bring in: nats a token, as of runs of minutes
SPREADS = [
    (2, 200, 0.010, 0.05, 0.02),
    (3, 60, 0.000, 0.10, 0.03),
    (3, 300, 0.006, 0.10, 0.03),
    (3, 300, 0.050, 0.05, 0.02),
    (3, 100, 0.000, 0.00, 0.10),
    (5, 300, 0.010, 0.05, 0.10),
]


@pytest.mark.parametrize(("seeds", "texts", "seed", "text", "both"), SPREADS)
def test_the_interval_holds_the_truth_and_a_null_effect_is_seldom_called_better(
    seeds: int, texts: int, seed: float, text: float, both: float
) -> None:
    rng = np.random.default_rng(7)
    found = [judge(*draw(rng, seeds, texts, seed, text, both)) for _ in range(REPEATS)]
    assert np.mean([one.low <= 0 <= one.high for one in found]) >= 0.95 - BY_CHANCE
    assert np.mean([one.word == BETTER for one in found]) <= 0.05


def test_the_interval_is_no_wider_than_it_must_be() -> None:
    """Where texts alone, or seeds alone, are drawn by chance, it holds the truth in 95 % and not in nearly all."""
    rng = np.random.default_rng(8)
    for seeds, seed, text in ((3, 0.0, 0.1), (4, 0.05, 0.0), (1, 0.0, 0.1)):
        found = [judge(*draw(rng, seeds, 200, seed, text, 0.0)) for _ in range(REPEATS)]
        assert abs(np.mean([one.low <= 0 <= one.high for one in found]) - 0.95) <= BY_CHANCE


@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize(("before", "after"), [(0.0, 0.0), (0.01, 0.02), (0.3, 0.3), (0.3, 0.45), (0.97, 0.97)])
def test_the_interval_of_marked_answers_holds_the_truth_even_where_hardly_any_is_right(
    seeds: int, before: float, after: float
) -> None:
    rng, prompts = np.random.default_rng(9), 150
    held = []
    for _ in range(600):
        # A prompt is as hard for both arms and all seeds; more or less of the chance is the run's own.
        ability = 0.5 * rng.random(prompts) + 0.5 * rng.random((2, seeds, prompts))
        rights = [(ability[arm] < _below(share)).astype(float) for arm, share in enumerate((before, after))]
        verdict = compare(rights[1], rights[0], np.ones(prompts), ANSWERS)
        held.append(verdict.low <= after - before <= verdict.high)
    assert np.mean(held) >= 0.95 - 3 * math.sqrt(0.05 * 0.95 / 600)


def _below(share: float) -> float:
    """Below which value the mean of two uniform numbers lies with the probability ``share``."""
    return math.sqrt(share / 2) if share < 0.5 else 1 - math.sqrt((1 - share) / 2)


def test_none_right_does_not_mean_that_none_can_be() -> None:
    none = np.zeros((1, 100))
    verdict = compare(none, none, np.ones(100), ANSWERS)
    assert verdict.high == pytest.approx(3.7 / 100, rel=0.02), "what Wilson's interval says of 0 of 100"
    assert verdict.word == UNKNOWN


@pytest.mark.parametrize("texts", [2, 3])
def test_shares_differ_by_no_more_than_all_of_them(texts: int) -> None:
    none = np.zeros((1, texts))
    of_students = compare(none, none, np.ones(texts), ANSWERS, of_students=True)
    assert -1 <= of_students.low < 0 < of_students.high <= 1
    assert of_students.word == UNKNOWN


def test_so_many_seeds_would_tell_and_half_as_many_would_not() -> None:
    rng = np.random.default_rng(10)
    truth = {"texts": 200, "seed": 0.03, "text": 0.02, "both": 0.02}
    pilot = judge(*draw(rng, 60, difference=0.0, **truth))  # the spread as it is, from many seeds
    assert pilot.seed_error is not None
    # A difference that three seeds cannot tell, on a pilot whose own spread is the true one.
    differences, weights = draw(rng, 3, difference=0.0, **truth)
    by_seed = differences.sum(1) / weights.sum()
    wanted = -0.04 + np.array([-1.0, 0.0, 1.0]) * pilot.seed_error * math.sqrt(60)
    verdict = judge(differences + np.outer(wanted - by_seed, weights), weights)
    assert verdict.word == UNKNOWN
    assert verdict.seeds_needed is not None
    assert verdict.seeds_needed > 3
    assert f"about {verdict.seeds_needed} seeds would tell" in verdict.sentence

    def told(seeds: int) -> float:
        found = [judge(*draw(rng, seeds, difference=-0.04, **truth)) for _ in range(REPEATS)]
        return float(np.mean([one.word == BETTER for one in found]))

    assert 0.72 < told(verdict.seeds_needed) < 0.9
    assert told(max(2, verdict.seeds_needed // 2)) < 0.6


def test_where_texts_are_what_is_lacking_it_is_said() -> None:
    rng = np.random.default_rng(11)
    differences, weights = draw(rng, 6, 50, 0.0005, 0.3, 0.0005, difference=0.0)
    differences -= (differences.mean(0).sum() / weights.sum() + 0.05) * weights
    verdict = judge(differences, weights)
    assert (verdict.word, verdict.seeds_needed) == (UNKNOWN, None)
    assert verdict.texts_needed is not None
    assert verdict.texts_needed > 50
    assert f"about {verdict.texts_needed:,} held-out texts" in verdict.sentence


def test_the_figures_are_those_of_the_definition() -> None:
    rng = np.random.default_rng(12)
    differences, weights = draw(rng, 4, 9, 0.02, 0.1, 0.05, difference=-0.3)
    verdict, total = judge(differences, weights), sum(weights)
    of_seeds = [sum(row) / total for row in differences]
    mean = sum(of_seeds) / 4
    seed = sum((one - mean) ** 2 for one in of_seeds) / 3 / 4
    of_texts = [sum(differences[s, t] for s in range(4)) / 4 for t in range(9)]
    every = sum(((of_texts[t] - mean * weights[t]) / total) ** 2 for t in range(9)) * 9 / 8
    rest = [
        (differences[s, t] - of_texts[t] - (of_seeds[s] - mean) * weights[t]) / total
        for s in range(4)
        for t in range(9)
    ]
    text = every - sum(one**2 for one in rest) / (4 * 3)
    half = math.sqrt(3.1824**2 * seed + 2.3060**2 * text)
    assert verdict.difference == pytest.approx(mean)
    assert verdict.high - verdict.low == pytest.approx(2 * half, rel=2e-3)
    assert (verdict.seed_error, verdict.text_error) == pytest.approx((math.sqrt(seed), math.sqrt(text)))


@given(st.integers(1, 5), st.integers(2, 20), st.integers(0, 1000))
def test_both_ways_round_the_difference_is_the_same(seeds: int, texts: int, number: int) -> None:
    rng = np.random.default_rng(number)
    one, other = rng.normal(size=(2, seeds, texts))
    weights = rng.integers(1, 9, texts)
    there, back = compare(one, other, weights, CE), compare(other, one, weights, CE)
    assert there.difference == pytest.approx(-back.difference)
    assert (there.low, there.high) == pytest.approx((-back.high, -back.low))
    assert not (there.word == back.word == BETTER)
    assert not (there.is_worse and there.word == BETTER)


def test_words() -> None:
    rng = np.random.default_rng(13)
    differences, weights = draw(rng, 3, 100, 0.0005, 0.005, 0.005)
    assert judge(differences - 0.1 * weights, weights).word == BETTER
    worse = judge(differences + 0.1 * weights, weights)
    assert (worse.word, worse.is_worse) == (NOT_BETTER, True)
    assert worse.sentence.startswith("not better, but worse: held-out cross-entropy 0.1")
    nothing = judge(differences, weights)
    assert (nothing.word, nothing.is_worse) == (NOT_BETTER, False)
    assert "a gain of 0.0100 nats a token is ruled out" in nothing.sentence
    more = compare(np.ones((2, 50)), np.zeros((2, 50)), np.ones(50), MEASURES["agreement"])
    assert (more.word, more.difference, more.arm) == (BETTER, 1.0, 1.0)
    assert "100.0 points higher" in more.sentence


def test_one_seed_is_said() -> None:
    rng = np.random.default_rng(14)
    unsure = judge(*draw(rng, 1, 40, 0.0, 0.3, 0.0))
    assert unsure.seed_error is None
    assert "the interval holds texts only" in unsure.sentence
    assert unsure.sentence.endswith("run three seeds or more.")
    differences, weights = draw(rng, 1, 40, 0.0, 0.01, 0.0, difference=-1.0)
    assert judge(differences, weights).sentence.startswith("better: ")
    assert "the interval holds texts only" in judge(differences, weights).sentence


def test_it_is_plain_data() -> None:
    rng = np.random.default_rng(15)
    for texts in (1, 30):
        plain = judge(*draw(rng, 2, texts, 0.1, 0.1, 0.1)).as_dict()
        assert json.loads(json.dumps(plain, allow_nan=False)) == plain
        assert plain["measure"] == "ce"


def test_what_is_no_pair_is_refused() -> None:
    for shapes in (((2, 3), (3, 3), 3), ((2, 3), (2, 3), 2), ((0, 3), (0, 3), 3)):
        with pytest.raises(ValueError, match="no pairs"):
            compare(np.zeros(shapes[0]), np.zeros(shapes[1]), np.ones(shapes[2]), CE)
    with pytest.raises(ValueError, match="not finite"):
        compare(np.full((1, 2), math.nan), np.zeros((1, 2)), np.ones(2), CE)
    with pytest.raises(ValueError, match="no text has a position"):
        compare(np.zeros((1, 2)), np.zeros((1, 2)), np.zeros(2), CE)


def test_quantiles_are_those_of_the_tables() -> None:
    table = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 10: 2.228, 30: 2.042, 120: 1.980}
    assert {n: quantile(n) for n in table} == pytest.approx(table, rel=2e-3)
    assert quantile(0) == math.inf


def test_a_verdict_in_few_words() -> None:
    texts = np.array([1.0, 2.0, 3.0, 4.0])
    found = compare([texts * 2 - 0.3], [texts * 2], np.ones(4), MEASURES["ce"])
    assert found.brief == "held-out cross-entropy better, −0.3000 (−0.3000 to −0.3000) nats a token"
    worse = compare([texts * 0.1], [texts * 0.1 + 0.02], np.ones(4), MEASURES["agreement"])
    assert worse.brief == "agreement with the teacher's first choice worse, −2.0 (−2.0 to −2.0) points"


def test_two_students_as_they_are_have_an_interval_over_texts_and_no_word_of_seeds() -> None:
    """The numbers are those of one seed; what would tell are texts, and about as many as say so do."""
    rng = np.random.default_rng(3)
    differences, weights = draw(rng, 1, 200, 0.0, 0.1, 0.0, difference=-0.012)
    zeros = np.zeros_like(differences)
    seeds, students = (compare(differences, zeros, weights, CE, of_students=one) for one in (False, True))
    assert (students.difference, students.low, students.high) == (seeds.difference, seeds.low, seeds.high)
    assert students.word == seeds.word == UNKNOWN
    assert "one seed" in seeds.sentence
    assert "run three seeds" in seeds.sentence
    assert "seed" not in students.sentence
    needed = students.texts_needed
    assert needed is not None
    assert f"; 200 texts); about {needed:,} held-out texts would tell." in students.sentence
    told = 0
    for _ in range(200):
        more, heavy = draw(rng, 1, needed, 0.0, 0.1, 0.0, difference=students.difference)
        told += compare(more, np.zeros_like(more), heavy, CE, of_students=True).word != UNKNOWN
    assert told / 200 == pytest.approx(0.8, abs=0.15)


def test_one_text_of_two_students_tells_nothing() -> None:
    found = compare([[1.0]], [[2.0]], [10.0], CE, of_students=True)
    assert found.word == UNKNOWN
    assert "a single text has no interval" in found.sentence
    assert found.as_dict()["low"] is None


def test_a_tiny_difference_of_two_students_is_told_by_no_number_of_texts() -> None:
    differences, weights = draw(np.random.default_rng(5), 1, 20, 0.0, 5.0, 0.0)
    tiny = differences - weights * (differences.sum() / weights.sum() + 1e-4)
    found = compare(tiny, np.zeros_like(tiny), weights, CE, of_students=True)
    assert "not even a hundred times as many texts would tell" in found.sentence
