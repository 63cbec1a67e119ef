"""Signals of samples put together: order, padding of slots, masks of what is missing."""

from __future__ import annotations

import pytest
import torch
from tests.support.teachers import random_logits

from liquid_llm.losses.signals import LogitsSignal, SparseSignal
from liquid_llm.signal_store.codecs import FullCodec, StoredSignal, TailCodec, TopKCodec
from liquid_llm.teachers.assembly import assemble, merge_repeats


def sparse(rows: int, k: int, seed: int = 0, temperature: float = 2.0) -> SparseSignal:
    codec = TopKCodec(k)
    payload = codec.pack(codec.encode(random_logits(rows, 50, seed=seed), 1, 0))
    return codec.decode(payload, 0, rows, temperature, 50)


def full(rows: int, seed: int = 0) -> LogitsSignal:
    payload = FullCodec().pack(FullCodec().encode(random_logits(rows, 50, seed=seed), 1, 0))
    return FullCodec().decode(payload, 0, rows, 2.0, 50)


def test_sparse_in_order_with_missing_samples_and_different_k() -> None:
    first, last = sparse(3, 4, seed=1), sparse(5, 7, seed=2)
    found = assemble([None, first, None, last], [2, 3, 1, 5])
    assert isinstance(found, SparseSignal)
    assert found.num_positions == 11
    assert found.mask.tolist() == [False] * 2 + [True] * 3 + [False] + [True] * 5
    assert found.ids.shape == (11, 7)
    assert torch.equal(found.ids[2:5, :4], first.ids)
    assert torch.equal(found.weights[2:5, :4], first.weights)
    assert torch.equal(found.log_probs[6:], last.log_probs)
    assert torch.equal(found.tail_mass[2:5], first.tail_mass)
    unused = torch.ones(11, 7, dtype=torch.bool)
    unused[2:5, :4] = False
    unused[6:] = False
    for tensor in (found.ids, found.weights, found.log_probs):
        assert tensor[unused].eq(0).all()
    assert found.tail_mass[[0, 1, 5]].eq(0).all()
    assert found.temperature == 2.0


def test_logits_in_order_with_a_missing_sample() -> None:
    first, last = full(3, seed=1), full(5, seed=2)
    found = assemble([first, None, last], [3, 2, 5])
    assert isinstance(found, LogitsSignal)
    assert found.rows.dtype == torch.float16
    assert torch.equal(found.rows[:3], first.rows)
    assert torch.equal(found.rows[5:], last.rows)
    assert found.mask.tolist() == [True] * 3 + [False] * 2 + [True] * 5


def test_samples_without_positions() -> None:
    found = assemble([sparse(0, 4), sparse(2, 4), None], [0, 2, 0])
    assert found.num_positions == 2
    assert found.mask.all()


@pytest.mark.parametrize(
    ("signals", "rows"),
    [
        ([None, None], [1, 2]),
        ([], []),
        ([sparse(2, 4), full(2)], [2, 2]),
        ([sparse(2, 4)], [3]),
        ([full(2)], [1]),
        ([sparse(2, 4), sparse(2, 4)], [2]),
        ([sparse(2, 4), sparse(2, 4, temperature=1.0)], [2, 2]),
    ],
    ids=["all missing", "none", "kinds", "too few", "too many", "counts", "temperatures"],
)
def test_signals_that_do_not_fit(signals: list[StoredSignal | None], rows: list[int]) -> None:
    with pytest.raises(ValueError, match=r"signals|signal of|zip"):
        assemble(signals, rows)


def test_repeated_ids_are_summed_into_one_slot_and_mean_the_same() -> None:
    codec, vocab = TailCodec(), 4000
    logits = random_logits(40, vocab, spread=2.0)
    drawn = codec.decode(codec.pack(codec.encode(logits, 1, 0)), 0, 40, 2.0, vocab)
    assert isinstance(drawn, SparseSignal)
    merged = merge_repeats(drawn)
    assert _repeats(drawn) > 0  # else this shows nothing
    assert _repeats(merged) == 0
    for name in ("mask", "tail_mass", "temperature"):
        assert getattr(merged, name) is getattr(drawn, name)
    zeros = torch.zeros(40, vocab, dtype=torch.float64)
    for weigh in (lambda one: one.weights, lambda one: one.weights * one.log_probs):
        before, after = (zeros.scatter_add(1, one.ids, weigh(one).double()) for one in (drawn, merged))
        torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-7)
    assert merged.ids[merged.weights == 0].eq(0).all()
    assert merged.log_probs[merged.weights == 0].eq(0).all()


def _repeats(signal: SparseSignal) -> int:
    return sum(
        len(used) - len(set(used))
        for used in (ids[weights > 0].tolist() for ids, weights in zip(signal.ids, signal.weights, strict=True))
    )
