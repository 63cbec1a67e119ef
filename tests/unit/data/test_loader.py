from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.datasets import token_dataset

from liquid_llm.data.loader import TrainingStream, WeightedDataset, collate, validation_batches
from liquid_llm.data.prefetch import Prefetcher
from liquid_llm.data.tokens import TokenDataset
from liquid_llm.data.types import IGNORE_INDEX, MicroBatch
from liquid_llm.errors import DataError
from liquid_llm.framing import Framing

EOS = 0


def drawn(type: str, count: int, seed: int, longest: int = 60) -> TokenDataset:
    """Samples whose tokens are all different, so that a token says where it comes from."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, longest, count)
    ends = np.cumsum(lengths)
    samples = [
        list(range(end - length + 1, end + 1)) for length, end in zip(lengths.tolist(), ends.tolist(), strict=True)
    ]
    return token_dataset(samples, type, [f"{type}-{seed}-{n}" for n in range(count)])


MIXTURE = [
    WeightedDataset(drawn("lm", 90, 1), 2.0),
    WeightedDataset(drawn("math_tool", 70, 2), 1.0),
    WeightedDataset(drawn("code", 40, 3), 0.5),
    WeightedDataset(drawn("lm", 30, 4), 0.7),
]


def stream(mixture: Sequence[WeightedDataset] = MIXTURE, **options: Any) -> TrainingStream:
    settings = {"block_size": 24, "batch_size": 3, "seed": 0, **options}
    return TrainingStream(mixture, **settings)


def content(batch: MicroBatch) -> tuple[object, ...]:
    names = tuple((one.sample_id, tuple(one.input_ids.tolist())) for one in batch.samples)
    return batch.type, batch.input_ids.tolist(), batch.labels.tolist(), batch.lengths.tolist(), names


def rows(batch: MicroBatch) -> list[list[int]]:
    return [ids[:length] for ids, length in zip(batch.input_ids.tolist(), batch.lengths.tolist(), strict=True)]


def check(batch: MicroBatch, block_size: int, batch_size: int) -> None:
    """What holds for every micro-batch, worked out position by position."""
    assert batch.input_ids.dtype == batch.labels.dtype == batch.lengths.dtype == torch.int64
    assert batch.input_ids.shape == batch.labels.shape
    assert batch.input_ids.shape[1] == max(batch.lengths)
    assert batch.input_ids.numel() <= block_size * batch_size
    for ids, labels, length in zip(
        batch.input_ids.tolist(), batch.labels.tolist(), batch.lengths.tolist(), strict=True
    ):
        for t in range(len(ids)):
            assert labels[t] == (ids[t + 1] if t + 1 < length else IGNORE_INDEX)
            assert t < length or ids[t] == 0
    assert batch.num_positions == sum(length - 1 for length in batch.lengths.tolist())
    if batch.type == "lm":
        assert batch.samples == ()
    else:
        assert [one.input_ids[:block_size].tolist() for one in batch.samples] == rows(batch)
        assert {one.type for one in batch.samples} == {batch.type}


# --------------------------------------------------------------------------------------------------------------- order


def test_a_stream_begun_at_any_position_gives_what_the_continued_one_gave() -> None:
    continued = stream()
    expected = [content(continued.micro_batch(index)) for index in range(150)]
    for begin in range(150):
        assert content(stream().micro_batch(begin)) == expected[begin]
    fresh = stream()
    assert [content(fresh.micro_batch(index)) for index in reversed(range(150))] == expected[::-1]


@settings(max_examples=25)
@given(st.integers(-5, 2**40), st.integers(0, 10**9), st.integers(2, 40), st.integers(1, 5))
def test_pure_at_any_seed_and_position(seed: int, index: int, block_size: int, batch_size: int) -> None:
    options = {"seed": seed, "block_size": block_size, "batch_size": batch_size}
    one, other = stream(**options), stream(**options)
    for neighbour in (0, 1, index + 1, index // 2):
        other.micro_batch(neighbour)
    assert content(one.micro_batch(index)) == content(other.micro_batch(index))
    check(one.micro_batch(index), block_size, batch_size)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_ranks_share_one_order(world_size: int) -> None:
    alone = stream()
    ranks = [stream(rank=rank, world_size=world_size) for rank in range(world_size)]
    for draw in range(120):
        index, rank = divmod(draw, world_size)
        assert content(ranks[rank].micro_batch(index)) == content(alone.micro_batch(draw))


def test_types_come_by_weight() -> None:
    counts = Counter(stream().micro_batch(index).type for index in range(420))
    for type, weight in (("lm", 2.7), ("math_tool", 1.0), ("code", 0.5)):
        assert abs(counts[type] - 420 * weight / 4.2) <= 3


def test_seeds_give_other_orders() -> None:
    assert len({str(content(stream(MIXTURE[:1], seed=seed).micro_batch(0))) for seed in range(10)}) == 10


def test_one_dataset_drawn_from_twice_goes_two_ways() -> None:
    twice = stream([MIXTURE[1], MIXTURE[1]])
    assert [content(b) for b in first_epoch(twice, 0)] != [content(b) for b in first_epoch(twice, 1)]


def test_prefetching_changes_nothing() -> None:
    plain, ahead = stream(), stream()
    with Prefetcher(ahead.micro_batch, 7, 5, stop=60, workers=3) as batches:
        assert [content(one) for one in batches] == [content(plain.micro_batch(index)) for index in range(7, 60)]


# -------------------------------------------------------------------------------------------------------------- epochs


def first_epoch(training: TrainingStream, number: int, epoch: int = 0) -> list[MicroBatch]:
    order = training.orders[number]
    begin = epoch * order.num_micro_batches
    return [order.micro_batch(index) for index in range(begin, begin + order.num_micro_batches)]


@given(st.integers(2, 50), st.integers(1, 7), st.integers(0, 99), st.integers(0, 3))
def test_an_epoch_of_text_holds_every_token_once(block_size: int, batch_size: int, seed: int, epoch: int) -> None:
    dataset = drawn("lm", 40, seed)
    joined = [token for n in range(len(dataset)) for token in (*dataset.input_ids(n).tolist(), EOS)]
    num_blocks = len(joined) // block_size
    blocks = [joined[n * block_size : (n + 1) * block_size] for n in range(num_blocks)]
    order = stream([WeightedDataset(dataset, 1.0)], block_size=block_size, batch_size=batch_size).orders[0]
    begin, end = epoch * num_blocks, (epoch + 1) * num_blocks
    first = begin // batch_size
    seen = [row for n in range(first, -(-end // batch_size)) for row in rows(order.micro_batch(n))]
    seen = seen[begin - first * batch_size :][:num_blocks]
    assert sorted(seen) == sorted(blocks)


@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_an_epoch_of_samples_holds_each_once(epoch: int) -> None:
    dataset = MIXTURE[1].dataset
    batches = first_epoch(stream(), 1, epoch)
    names = [one.sample_id for batch in batches for one in batch.samples]
    assert sorted(names) == sorted(dataset.sample_id(n) for n in range(len(dataset)))
    for batch in batches:
        check(batch, 24, 3)


def test_epochs_differ() -> None:
    samples = [list(map(content, first_epoch(stream(), 1, epoch))) for epoch in (0, 1)]
    assert not any(batch in samples[1] for batch in samples[0])  # samples meet others, not only at other times
    whole = WeightedDataset(token_dataset([list(range(1, 240))]), 1.0)  # ten blocks
    blocks = [
        [row for batch in first_epoch(stream([whole], batch_size=2), 0, epoch) for row in rows(batch)]
        for epoch in (0, 1)
    ]
    assert sorted(blocks[0]) == sorted(blocks[1])
    assert blocks[0] != blocks[1]


def test_short_and_long_micro_batches_take_turns() -> None:
    longest = [int(max(batch.lengths)) for batch in first_epoch(stream(block_size=60), 1)]
    assert longest not in (sorted(longest), sorted(longest, reverse=True))


def test_fewer_blocks_than_a_micro_batch_holds() -> None:
    training = stream([WeightedDataset(token_dataset([list(range(1, 60))]), 1.0)], block_size=20, batch_size=8)
    batch = training.micro_batch(0)
    assert batch.input_ids.shape == (8, 20)
    assert sorted(Counter(map(tuple, rows(batch))).values()) == [2, 3, 3]  # two epochs of three and a part of the next


def test_long_samples_are_cut_for_the_model_and_kept_whole_beside() -> None:
    sample = list(range(1, 100))
    batch = stream([WeightedDataset(token_dataset([sample], "code"), 1.0)], block_size=24).micro_batch(0)
    assert rows(batch) == [sample[:24]]
    assert batch.samples[0].input_ids.tolist() == sample


@pytest.mark.parametrize("type", ["lm", "code", "chat-2"])
def test_the_layout_of_a_dataset_decides_whatever_its_type(type: str) -> None:
    samples = [list(range(n * 20 + 1, n * 20 + 12 + n % 3)) for n in range(30)]
    blocks, whole = (token_dataset(samples, type, layout=layout) for layout in ("blocks", "samples"))
    for dataset in (blocks, whole):
        training = stream([WeightedDataset(dataset, 1.0)])
        held = validation_batches(dataset, block_size=24, batch_size=3)
        for batch in (*first_epoch(training, 0), *held[:-1]):
            assert batch.type == type
            if dataset is blocks:
                assert batch.input_ids.shape == (3, 24)
                assert not batch.samples
            else:
                assert [len(one.input_ids) for one in batch.samples] == batch.lengths.tolist()
                assert EOS not in [token for row in rows(batch) for token in row]


def test_the_label_of_a_blocks_begin_tokens_is_ignored() -> None:
    begin = 10**6
    dataset = token_dataset([list(range(n * 20 + 1, n * 20 + 8)) for n in range(30)], framing=Framing(begin, EOS))
    training = stream([WeightedDataset(dataset, 1.0)])
    seen: set[int] = set()
    for batch in (*first_epoch(training, 0), *validation_batches(dataset, block_size=24, batch_size=3)):
        for ids, labels, length in zip(
            batch.input_ids.tolist(), batch.labels.tolist(), batch.lengths.tolist(), strict=True
        ):
            after = ids[1:length]
            seen.update(after)
            assert labels[: length - 1] == [IGNORE_INDEX if token == begin else token for token in after]
    assert begin in seen


# ------------------------------------------------------------------------------------------------------------- refusals


def test_too_little_text_for_a_block() -> None:
    with pytest.raises(DataError, match=r"shorter than one block; got 12 tokens to train on; expected at least 24"):
        stream([WeightedDataset(token_dataset([list(range(1, 12))]), 1.0)])


@pytest.mark.parametrize("type", ["lm", "math_tool"])
def test_an_empty_split(type: str) -> None:
    empty = token_dataset([[1, 2]], type).subset(np.array([], dtype=np.int64))
    with pytest.raises(DataError, match="to train on"):
        stream([WeightedDataset(empty, 1.0)])


def test_an_empty_mixture() -> None:
    with pytest.raises(DataError, match="nothing to train on"):
        stream([])


# Three epochs of each order for each example: a few are enough, as blocks of 2 to 70 share what there is to find.
@settings(max_examples=settings.default.max_examples // 5)
@given(st.integers(2, 70), st.integers(1, 5), st.integers(0, 3))
def test_every_micro_batch_has_a_shape_that_was_told_beforehand(block_size: int, batch_size: int, seed: int) -> None:
    for order in stream(block_size=block_size, batch_size=batch_size, seed=seed).orders:
        told = order.shapes()
        met = {tuple(order.micro_batch(n).input_ids.shape) for n in range(3 * order.num_micro_batches)}
        assert all(any(rows == most_rows and time <= most for most_rows, most in told) for rows, time in met)
        # None is told in vain: where a bucket's longest sample is drawn the shape is met.
        assert {rows for rows, _ in told} == {rows for rows, _ in met}
        assert max(time for _, time in told) == max(time for _, time in met)


@pytest.mark.parametrize("options", [{"block_size": 1}, {"batch_size": 0}, {"rank": 2, "world_size": 2}, {"rank": -1}])
def test_impossible_sizes(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="outside"):
        stream(**options)


# ----------------------------------------------------------------------------------------------------------- validation


@given(st.integers(0, 20), st.one_of(st.none(), st.integers(2, 900)), st.integers(1, 6))
def test_every_context_length_sees_the_same_text(seed: int, max_tokens: int | None, batch_size: int) -> None:
    dataset = drawn("lm", 20, seed)
    joined = [token for n in range(len(dataset)) for token in (*dataset.input_ids(n).tolist(), EOS)]
    expected = joined[:max_tokens]
    for block_size in (3, 16, 50, 2000):
        batches = validation_batches(dataset, block_size=block_size, batch_size=batch_size, max_tokens=max_tokens)
        seen = [token for batch in batches for row in rows(batch) for token in row]
        assert seen == expected or (seen == expected[:-1] and len(expected) % block_size == 1)
        assert all(len(batch.lengths) == batch_size for batch in batches[:-1])
        for batch in batches:
            check(batch, block_size, batch_size)


@pytest.mark.parametrize("type", ["math_tool", "code"])
@pytest.mark.parametrize("max_tokens", [None, 1, 100, 700, 10**6])
def test_every_context_length_sees_the_same_samples(type: str, max_tokens: int | None) -> None:
    dataset = drawn(type, 50, 5)
    chosen = None
    for block_size in (8, 30, 100):
        batches = validation_batches(dataset, block_size=block_size, batch_size=4, max_tokens=max_tokens)
        for batch in batches:
            check(batch, block_size, 4)
        names = {one.sample_id for batch in batches for one in batch.samples}
        assert len(names) == sum(len(batch.samples) for batch in batches)
        assert chosen in (None, names)
        chosen = names
        tokens = sum(len(one.input_ids) for batch in batches for one in batch.samples)
        if max_tokens is None or max_tokens == 10**6:
            assert len(names) == 50
        else:
            assert max_tokens <= tokens < max_tokens + 60


def test_a_smaller_choice_of_samples_is_a_part_of_a_larger_one() -> None:
    dataset = MIXTURE[1].dataset

    def names(max_tokens: int) -> set[str]:
        batches = validation_batches(MIXTURE[1].dataset, block_size=24, batch_size=3, max_tokens=max_tokens)
        return {one.sample_id for batch in batches for one in batch.samples}

    assert names(100) < names(500) < names(1000)
    assert names(500) != {dataset.sample_id(n) for n in range(len(names(500)))}  # not just the first ones


@pytest.mark.parametrize("type", ["lm", "math_tool"])
def test_nothing_held_out(type: str) -> None:
    empty = token_dataset([[1, 2]], type).subset(np.array([], dtype=np.int64))
    assert validation_batches(empty, block_size=8, batch_size=2) == []


def test_validation_of_samples_hardly_pads() -> None:
    batches = validation_batches(drawn("code", 300, 9), block_size=60, batch_size=4)
    padded, real = sum(one.input_ids.numel() for one in batches), sum(one.num_tokens for one in batches)
    assert 1 - real / padded < 0.05


def test_collate_pads_on_the_right() -> None:
    batch = collate("code", [np.array([5, 6, 7]), np.array([8, 9])])
    assert batch.input_ids.tolist() == [[5, 6, 7], [8, 9, 0]]
    assert batch.labels.tolist() == [[6, 7, IGNORE_INDEX], [9, IGNORE_INDEX, IGNORE_INDEX]]
    assert (batch.num_tokens, batch.num_positions) == (5, 3)


# ------------------------------------------------------------------------------------------------------ what is learnt


def masked(layout: str, seed: int = 5, begin_id: int | None = None) -> tuple[TokenDataset, set[int]]:
    """Samples of different tokens of which about half are learnt, in runs, and these tokens."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, 60, 80).tolist()
    ends = np.cumsum(lengths).tolist()
    samples = [list(range(end - length + 1, end + 1)) for length, end in zip(lengths, ends, strict=True)]
    learnt = [np.repeat(rng.random(length) < 0.3, 5)[:length].tolist() for length in lengths]
    learnt = [[*mask[:-1], True] for mask in learnt]
    framing = Framing(begin_id, EOS)
    dataset = token_dataset(samples, "code", layout=layout, learnt=learnt, framing=framing)
    return dataset, {
        token for ids, mask in zip(samples, learnt, strict=True) for token, flag in zip(ids, mask, strict=True) if flag
    }


def labels_are_right(batch: MicroBatch, wanted: set[int]) -> None:
    """Each label is the next token, where that is learnt, and is there where it is."""
    for ids, labels, length in zip(
        batch.input_ids.tolist(), batch.labels.tolist(), batch.lengths.tolist(), strict=True
    ):
        for t, label in enumerate(labels):
            following = ids[t + 1] if t + 1 < length else None
            assert label == (following if following in wanted else IGNORE_INDEX)
    assert batch.num_positions == int((batch.labels != IGNORE_INDEX).sum())
    assert batch.num_learnt == batch.num_positions + sum(
        n - 1 == rows for n, rows in zip(batch.lengths.tolist(), batch.row_positions.tolist(), strict=True)
    )


@pytest.mark.parametrize("layout", ["samples", "blocks"])
def test_only_what_is_learnt_has_a_label(layout: str) -> None:
    dataset, wanted = masked(layout)
    wanted |= {EOS}  # each document's last token is learnt, so the one behind it is
    one = stream([WeightedDataset(dataset, 1.0)])
    for index in range(40):
        batch = one.micro_batch(index)
        labels_are_right(batch, wanted)
        assert batch.row_positions.min() > 0, "a row teaches something"
    for batch in validation_batches(dataset, block_size=24, batch_size=3):
        labels_are_right(batch, wanted)
        assert batch.row_positions.min() > 0
    seen = {label for n in range(one.orders[0].num_micro_batches) for label in one.micro_batch(n).targets.tolist()}
    assert seen <= wanted


def test_a_begin_before_a_document_is_not_learnt() -> None:
    dataset, wanted = masked("blocks", begin_id=10**6)
    for index in range(20):
        labels_are_right(stream([WeightedDataset(dataset, 1.0)]).micro_batch(index), wanted | {EOS})


def test_blocks_and_windows_without_anything_to_learn_are_left_out() -> None:
    prompt = token_dataset([list(range(1, 61))], "lm", learnt=[[False] * 50 + [True] * 10])
    one = stream([WeightedDataset(prompt, 1.0)], block_size=10, batch_size=1)
    assert one.orders[0].num_micro_batches == 1  # of six blocks
    assert one.micro_batch(3).input_ids.tolist() == [list(range(51, 61))]
    with pytest.raises(DataError, match="nothing is learnt in any full block"):
        stream([WeightedDataset(prompt, 1.0)], block_size=50)
    samples = token_dataset(
        [[1, 2, 3, 4], list(range(10, 50))], "code", learnt=[[False, True, True, True], [False] * 30 + [True] * 10]
    )
    assert stream([WeightedDataset(samples, 1.0)], block_size=20).micro_batch(0).input_ids.tolist() == [[1, 2, 3, 4]]
    (batch,) = validation_batches(samples, block_size=20, batch_size=2)
    assert batch.labels.tolist() == [[2, 3, 4, IGNORE_INDEX]]
    with pytest.raises(DataError, match="nothing is learnt in the first 20 tokens of any code sample"):
        stream([WeightedDataset(samples.subset(np.array([1])), 1.0)], block_size=20)


@pytest.mark.parametrize("begin", [None, 0, 2])
def test_every_position_of_validation_names_the_text_that_its_label_is_of(begin):
    """Each document is runs of one token of its own; a token between two is of the one before."""
    framing = Framing(begin, 0)
    texts = [[10 + number] * size for number, size in enumerate((5, 40, 2, 17, 3, 9))]
    names = [f"d{number}" for number in range(len(texts))]
    blocks = token_dataset(texts, sample_ids=names, layout="blocks", framing=framing)
    framed = [framing.wrap(ids) for ids in texts]
    samples = token_dataset(framed, "code", names, layout="samples", framing=framing)
    for dataset in (blocks, samples, samples.windows(8)):
        found = validation_batches(dataset, block_size=16, batch_size=2)
        assert found
        for batch in found:
            parts = [batch.rows(row, row + 1) for row in range(len(batch.lengths))]
            assert [n for part, _ in parts for n in part.documents.numbers.tolist()] == batch.documents.numbers.tolist()
            before = None
            for target, number in zip(batch.targets.tolist(), batch.documents.numbers.tolist(), strict=True):
                name = batch.documents.names[number]
                if target >= 10:
                    assert name == f"d{target - 10}"
                elif dataset is blocks and before is not None:
                    assert name == before
                before = name
    of_windows = [
        name
        for batch in validation_batches(samples.windows(8), block_size=8, batch_size=2)
        for name in batch.documents.names
    ]
    assert of_windows.count("d1") == 6


@pytest.mark.parametrize("size", [2, 3])
def test_a_group_is_of_one_dataset_and_nothing_of_an_epoch_is_left_out_or_seen_twice(size: int) -> None:
    grouped, one_by_one = stream(group_size=size), stream()
    taken: dict[str, list[object]] = {}
    for group in range(60):
        batches = [grouped.at(group * size + within) for within in range(size)]
        assert len({batch.type for batch in batches}) == 1
        assert batches[0].type == one_by_one.at(group).type, "types are drawn as before, for groups"
        taken.setdefault(batches[0].type, []).extend(map(content, batches))
    (only,) = [part for part in MIXTURE if part.dataset.type == "code"]
    alone = stream([only], group_size=size)
    assert alone.at(7) is not None
    order = grouped.orders[MIXTURE.index(only)]
    assert taken["code"] == [content(order.micro_batch(n)) for n in range(len(taken["code"]))]


@given(st.integers(1, 4), st.integers(0, 40))
def test_ranks_share_one_order_whatever_their_number(world_size: int, position: int) -> None:
    for rank in range(world_size):
        own = stream(rank=rank, world_size=world_size, group_size=2).micro_batch(position)
        assert content(own) == content(stream(group_size=2).at(position * world_size + rank))


@pytest.mark.parametrize("layout", ["blocks", "samples"])
def test_the_texts_of_a_micro_batch_have_their_names(layout: str) -> None:
    dataset = token_dataset(
        [list(range(n * 40 + 1, n * 40 + 2 + n % 30 + 1)) for n in range(50)],
        layout=layout,
        sample_ids=[f"t{n}" for n in range(50)],
    )
    order = stream([WeightedDataset(dataset, 1.0)], group_size=2)
    for number in range(40):
        batch = order.at(number)
        held = {f"t{(token - 1) // 40}" for row in rows(batch) for token in row if token != EOS}
        names = order.names(number)
        assert len(names) == len(set(names))
        # the end token of a document may be all that a block has of it
        assert held <= set(names)
        assert len(set(names) - held) <= len(batch.lengths) if layout == "blocks" else set(names) == held
