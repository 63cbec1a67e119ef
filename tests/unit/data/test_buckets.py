from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from liquid_llm.data.buckets import MAX_PADDING, BucketPlan, plan_buckets


def micro_batches(plan: BucketPlan, *key: int) -> list[NDArray[np.int64]]:
    samples, order = plan.order(*key)
    return [samples[plan.bounds[number] : plan.bounds[number + 1]] for number in order]


def padding(windows: NDArray[np.int64], batches: list[NDArray[np.int64]]) -> float:
    return 1 - int(windows.sum()) / sum(int(windows[rows].max()) * len(rows) for rows in batches)


def drawn_lengths(kind: str, count: int, longest: int, seed: int) -> NDArray[np.int64]:
    rng = np.random.default_rng(seed)
    lengths = {
        "normal": rng.normal(longest / 3, longest / 8, count),
        "heavy tail": rng.lognormal(np.log(longest / 10), 1.0, count),
        "uniform": rng.uniform(2, longest, count),
        "two humps": np.concatenate((rng.normal(longest / 10, 5, count // 2), rng.normal(longest, 20, -(-count // 2)))),
        "equal": np.full(count, longest / 2),
    }[kind]
    return np.clip(lengths.round().astype(np.int64), 2, longest)


@given(
    st.lists(st.integers(2, 3000), min_size=1, max_size=200), st.integers(1, 9), st.integers(2, 500), st.integers(0, 9)
)
def test_an_epoch_holds_every_sample_once_within_the_budget(
    lengths: list[int], batch_size: int, block_size: int, epoch: int
) -> None:
    windows = np.array(lengths)
    plan = plan_buckets(windows, batch_size, block_size)
    batches = micro_batches(plan, 0, epoch)
    assert len(batches) == plan.num_micro_batches
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(windows)))
    for rows in batches:
        assert len(rows) > 0
        assert windows[rows].max() * len(rows) <= batch_size * block_size or len(rows) == 1
    assert padding(windows, batches) <= plan.padding + 1e-12


@settings(max_examples=60)
@given(
    st.sampled_from(["normal", "heavy tail", "uniform", "two humps", "equal"]),
    st.sampled_from([128, 700, 2048]),
    st.integers(1, 8),
    st.integers(0, 1000),
)
def test_padding_stays_under_five_percent(kind: str, block_size: int, batch_size: int, seed: int) -> None:
    windows = drawn_lengths(kind, 40 * 15 * batch_size, block_size, seed)
    windows = windows[: np.searchsorted(np.cumsum(windows), 40 * batch_size * block_size)]  # forty full micro-batches
    plan = plan_buckets(windows, batch_size, block_size)
    assert padding(windows, micro_batches(plan, seed)) <= plan.padding <= MAX_PADDING
    assert plan.num_micro_batches <= 80


@pytest.mark.parametrize(("count", "most"), [(1, 1), (3, 2), (16, 2), (40, 5), (100, 13)])
def test_few_samples_pad_more_rather_than_fall_apart(count: int, most: int) -> None:
    windows = np.linspace(50, 300, count).round().astype(np.int64)
    plan = plan_buckets(windows, batch_size=8, block_size=1024)
    assert plan.num_micro_batches <= most
    assert plan.padding <= 1 - windows.sum() / (count * 300)  # no worse than all in one


def test_micro_batches_of_a_bucket_are_even() -> None:
    plan = plan_buckets(np.full(21, 100), 10, 100)
    assert sorted(np.diff(plan.bounds).tolist()) == [7, 7, 7]


def test_companions_change_with_the_epoch() -> None:
    windows = drawn_lengths("normal", 600, 300, 0)
    plan = plan_buckets(windows, 6, 300)
    first, second = ({frozenset(rows.tolist()) for rows in micro_batches(plan, epoch)} for epoch in (0, 1))
    assert len(first & second) < len(first) / 4
    assert [len(rows) for rows in micro_batches(plan, 0)] != [len(rows) for rows in micro_batches(plan, 1)]


def test_no_sample_is_always_early() -> None:
    plan = plan_buckets(drawn_lengths("uniform", 300, 200, 1), 5, 200)
    places = np.zeros((300,))
    for epoch in range(40):
        places[np.concatenate(micro_batches(plan, epoch))] += np.arange(300) / 40
    assert places.min() > 75
    assert places.max() < 225


def test_a_window_longer_than_the_budget_goes_alone() -> None:
    plan = plan_buckets(np.array([10, 500, 10]), 2, 50)
    assert sorted(len(rows) for rows in micro_batches(plan)) == [1, 2]


@pytest.mark.parametrize("count", [600, 6000])
def test_many_distinct_lengths_are_coarsened_not_lost(count: int) -> None:
    windows = np.arange(2, 2 + count)
    plan = plan_buckets(windows, 8, 2 + count)
    assert sorted(np.concatenate(micro_batches(plan)).tolist()) == list(range(count))
    assert plan.padding <= MAX_PADDING


# (samples, shortest, longest, batch_size, block_size) -> samples of each bucket, and where the first micro-batches
# begin, as release 0.1.0 cut them: a run under way finds its micro-batches again.
CUT = {
    (3, 50, 300, 2, 300): ([2, 1], [0, 2, 3]),
    (6, 50, 1000, 2, 512): ([1, 2, 2, 1], [0, 1, 3, 5, 6]),
    (12, 20, 400, 4, 512): ([5, 7], [0, 5, 12]),
    (40, 10, 900, 8, 1024): ([10, 10, 9, 7, 4], [0, 10, 20, 29, 36, 40]),
    (60, 5, 60, 4, 64): ([8, 10, 7, 3, 5, 6, 7, 4, 3, 2, 2, 3], [0, 8, 18, 25, 28, 33, 39, 46, 50, 53, 55, 57, 60]),
    (300, 2, 1500, 6, 1024): (
        [16, 20, 24, 22, 25, 22, 17, 13, 14, 12, 11, 10, 10, 9, 7, 7, 7, 7, 6, 6, 6, 5, 8, 5, 4, 3, 4],
        [0, 16, 36, 60, 82, 107, 129, 146, 159, 173, 185, 196],
    ),
}


def test_samples_are_cut_into_the_buckets_they_were_cut_into() -> None:
    for (count, shortest, longest, batch_size, block_size), (sizes, bounds) in CUT.items():
        numbers = np.arange(count)
        windows = shortest + (numbers * 7919 + 13) % (longest - shortest + 1) * (numbers % 5 + 1) // 5
        plan = plan_buckets(windows, batch_size, block_size)
        assert np.bincount(plan.bucket_of).tolist() == sizes
        assert plan.bounds.tolist()[: len(bounds)] == bounds
    samples, order = plan.order(7, 1)
    assert samples[:6].tolist() == [251, 152, 230, 85, 191, 297]
    assert order[:6].tolist() == [12, 3, 26, 21, 17, 18]
