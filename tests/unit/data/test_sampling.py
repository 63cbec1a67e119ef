from __future__ import annotations

import math
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from liquid_llm.data.sampling import WeightedDraws, floor_sum, keyed_bits, keyed_permutation

WEIGHTS = st.lists(st.floats(0.01, 100), min_size=1, max_size=6)
SEEDS = st.integers(-(2**70), 2**70)


def test_random_bits_are_pinned() -> None:
    # orders of runs under way must not change with a NumPy version or a machine
    assert keyed_bits(3, "x", 1).tolist() == [13822847791075921749, 13250787655786087901, 11989617319121019403]
    assert keyed_permutation(8, "x", 1).tolist() == [7, 6, 5, 2, 1, 0, 4, 3]


@given(st.integers(0, 200), SEEDS)
def test_a_permutation_holds_every_number_once(count: int, seed: int) -> None:
    assert sorted(keyed_permutation(count, seed).tolist()) == list(range(count))


def test_keys_tell_orders_apart() -> None:
    keys = [(), (0,), (1,), ("0",), (0, 1), (1, 0), ("blocks", 0, 1), ("blocks", 0, 11), ("blocks", 1)]
    assert len({tuple(keyed_permutation(50, *key)) for key in keys}) == len(keys)


@given(st.integers(0, 60), st.integers(1, 50), st.integers(0, 200), st.integers(-500, 500))
def test_floor_sum_is_the_sum(count: int, modulus: int, step: int, start: int) -> None:
    assert floor_sum(count, modulus, step, start) == sum((start + i * step) // modulus for i in range(count))


@given(WEIGHTS, SEEDS, st.integers(0, 10**12))
def test_counts_follow_the_draws_from_any_position(weights: list[float], seed: int, begin: int) -> None:
    draws = WeightedDraws(weights, seed)
    counts = [draws.count(source, begin) for source in range(len(weights))]
    assert sum(counts) == begin
    for draw in range(begin, begin + 40):
        counts[draws.source(draw)] += 1
        assert counts == [draws.count(source, draw + 1) for source in range(len(weights))]


@given(WEIGHTS, SEEDS, st.integers(1, 3000))
def test_shares_are_near_exact_even_in_short_runs(weights: list[float], seed: int, num_draws: int) -> None:
    draws = WeightedDraws(weights, seed)
    for source, weight in enumerate(weights):
        expected = num_draws * weight / math.fsum(weights)
        assert abs(draws.count(source, num_draws) - expected) < 2 + 0.5 * math.log2(num_draws + 1)


def test_scale_of_weights_does_not_matter_and_seeds_do() -> None:
    def first(weights: list[float], seed: int) -> list[int]:
        draws = WeightedDraws(weights, seed)
        return [draws.source(draw) for draw in range(100)]

    assert first([1, 2, 1], 5) == first([0.25, 0.5, 0.25], 5)
    assert len({tuple(first([1, 2, 1], seed)) for seed in range(20)}) > 15


def test_a_jump_is_as_quick_as_a_step() -> None:
    draws = WeightedDraws([1.0, 0.5, 0.3], 0)
    began = time.perf_counter()
    for position in range(10**6, 10**6 + 100):
        draws.count(draws.source(position), position)
    assert (time.perf_counter() - began) / 100 < 0.05


@pytest.mark.parametrize("weights", [[], [1.0, 0.0], [-1.0], [math.nan], [math.inf]])
def test_weights_that_are_none(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="positive and finite"):
        WeightedDraws(weights, 0)
