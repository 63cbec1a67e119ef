"""An order in two levels: complete, pure, near in its files and mixed inside a window."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.datasets import token_dataset

from liquid_llm.data.buckets import WindowedPlan
from liquid_llm.data.loader import BlockOrder, SampleOrder, TrainingStream, WeightedDataset
from liquid_llm.data.tokens import TokenDataset
from liquid_llm.data.two_levels import MAX_SHARDS, KnownLengths, Shards, Windows

KEY = (7, 0)


def plan_of(lengths: np.ndarray, shard_of: np.ndarray | None, tokens: int, key: tuple[int, ...] = KEY) -> WindowedPlan:
    shards = Shards.of(lengths, shard_of, tokens)
    return WindowedPlan(KnownLengths(lengths, shards), 8, 64, Windows(shards, key, tokens), key)


@st.composite
def corpora(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray | None, int]:
    """Lengths, the file of each sample (files without samples too) and the tokens of a window."""
    counts = draw(st.lists(st.integers(0, 30), min_size=1, max_size=12).filter(any))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    lengths = rng.integers(2, 65, sum(counts))
    files = np.repeat(np.arange(len(counts), dtype=np.int32), counts) if draw(st.booleans()) else None
    return lengths, files, draw(st.integers(50, 3000))


@given(corpora(), st.integers(0, 2**32))
def test_each_epoch_has_each_sample_once_and_is_a_function_of_its_number(corpus, seed) -> None:
    lengths, files, tokens = corpus
    plan, again = (plan_of(lengths, files, tokens, (seed, 1)) for _ in range(2))
    size, shapes = plan.num_micro_batches, plan.shapes()
    for epoch in (0, 1, 3):
        batches = [plan.samples(epoch * size + number) for number in range(size)]
        assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
        for number in {0, size // 2, size - 1}:  # asked for alone, and in another order
            assert np.array_equal(again.samples(epoch * size + number), batches[number])
        for batch in batches:
            longest = int(lengths[batch].max())
            assert any(len(batch) == rows and longest <= most for rows, most in shapes)
            assert len(batch) * longest <= max(8 * 64, longest)


@given(corpora())
def test_a_micro_batch_and_its_neighbours_are_of_one_window(corpus) -> None:
    lengths, files, tokens = corpus
    parts = Windows(Shards.of(lengths, files, tokens), KEY, tokens)
    of_sample = np.zeros(len(lengths), dtype=np.int64)
    for window in range(len(parts)):
        of_sample[parts.items(window)] = window
    plan = plan_of(lengths, files, tokens)
    for epoch in range(2):
        seen = [
            set(of_sample[plan.samples(epoch * plan.num_micro_batches + number)].tolist())
            for number in range(plan.num_micro_batches)
        ]
        assert all(len(one) == 1 for one in seen)
        runs = [one for number, one in enumerate(seen) if number == 0 or one != seen[number - 1]]
        assert len(runs) == len(parts), "a window is left once and for all"


def many_files() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    lengths = np.minimum(rng.lognormal(3.3, 0.5, 24_000).astype(np.int64) + 2, 64)
    return lengths, np.repeat(np.arange(120, dtype=np.int32), 200)


def test_a_window_mixes_its_files_and_epochs_differ() -> None:
    lengths, files = many_files()
    tokens = int(lengths.sum()) // 12
    plan = plan_of(lengths, files, tokens)
    parts = Windows(Shards.of(lengths, files, tokens), KEY, tokens)
    assert len(parts) == 12
    epochs = []
    padded = 0
    for epoch in range(2):
        batches = [plan.samples(epoch * plan.num_micro_batches + n) for n in range(plan.num_micro_batches)]
        epochs.append([batch.tolist() for batch in batches])
        padded = sum(len(batch) * int(lengths[batch].max()) for batch in batches)
        assert 1 - lengths.sum() / padded < 0.05
        first = np.concatenate(batches[: plan.num_micro_batches // 12 // 2])  # half of the first window
        shares = Counter(files[first].tolist())
        assert len(shares) == 10, "all files of a window, and of no other"
        assert max(shares.values()) < 1.5 * min(shares.values())
    assert epochs[0] != epochs[1]
    assert {tuple(sorted(one)) for one in epochs[0]} != {tuple(sorted(one)) for one in epochs[1]}
    of_window = np.zeros(120, dtype=np.int64)
    for window in range(12):
        of_window[np.unique(files[parts.items(window)])] = window
    orders = [[int(of_window[files[batch[0]]]) for batch in batches] for batches in epochs]
    assert list(dict.fromkeys(orders[0])) != list(dict.fromkeys(orders[1])), "windows come in another order"


def test_a_window_has_few_files_and_neighbours_are_apart() -> None:
    shards = Shards.of(np.full(1000, 5), np.arange(1000, dtype=np.int32), 10**9)
    parts = Windows(shards, KEY, 10**9)
    sizes = [len(parts.items(window)) for window in range(len(parts))]
    assert max(sizes) == MAX_SHARDS
    assert max(sizes) - min(sizes) <= 1
    spread = [np.ptp(parts.items(window)) for window in range(len(parts))]
    assert min(spread) > 500, "files are shuffled before they are gathered"
    with pytest.raises(ValueError, match="order of their shards"):
        Shards.of(np.full(3, 5), np.array([0, 1, 0], dtype=np.int32), 100)


def dataset(layout: str) -> TokenDataset:
    rng = np.random.default_rng(3)
    samples = [[int(n) + 1] * int(rng.integers(2, 40)) for n in range(90)]
    made = token_dataset(samples, "code", layout=layout)
    made.shards, made.shard_of = [f"file {n}" for n in range(9)], np.repeat(np.arange(9, dtype=np.int32), 10)
    return made


def test_blocks_come_once_an_epoch_and_window_by_window() -> None:
    def starts(order: BlockOrder) -> list[int]:
        return [span.start for number in range(order.num_blocks // 2) for span in order._spans(number)]

    order = BlockOrder(dataset("blocks"), 16, 2, KEY, window_tokens=16 * 20)
    whole = BlockOrder(dataset("blocks"), 16, 2, KEY)
    found = starts(order)
    assert len(set(found)) == order.num_blocks // 2 * 2
    assert found != starts(whole)
    assert found == starts(BlockOrder(dataset("blocks"), 16, 2, KEY, window_tokens=16 * 20))


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_take_the_same_micro_batches_between_them(world_size: int) -> None:
    mixture = [WeightedDataset(dataset("samples"), 2.0), WeightedDataset(dataset("blocks"), 1.0)]

    def stream(rank: int = 0, ranks: int = 1) -> TrainingStream:
        sizes = {"block_size": 16, "batch_size": 2, "seed": 5, "window_tokens": {"code": 300}}
        return TrainingStream(mixture, rank=rank, world_size=ranks, group_size=6, **sizes)

    alone = stream()
    for rank in range(world_size):
        one = stream(rank, world_size)
        for position in range(8):
            expected = alone.at(position * world_size + rank)
            assert one.micro_batch(position).input_ids.equal(expected.input_ids)


def test_types_without_a_window_are_shuffled_as_they_were() -> None:
    mixture = [WeightedDataset(dataset("samples"), 1.0)]
    plain = TrainingStream(mixture, block_size=16, batch_size=2, seed=5)
    other = TrainingStream(mixture, block_size=16, batch_size=2, seed=5, window_tokens={"lm": 300})
    assert all(plain.at(number).input_ids.equal(other.at(number).input_ids) for number in range(20))
    assert SampleOrder(dataset("samples"), 16, 2, KEY).num_micro_batches > 10
