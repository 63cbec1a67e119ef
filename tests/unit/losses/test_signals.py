"""What all signals have in common: counts, masks, moving, parts; those of samples are joined into a batch's."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.support.distillation import SIGNALS, make_dense, make_signal
from tests.support.teachers import random_logits

from liquid_llm.losses import signals
from liquid_llm.losses.signals import DRAWS, HEAD_AND_DRAWS, DenseSignal, LogitsSignal, OutputHead, Signal, SparseSignal
from liquid_llm.signal_store.codecs import StoredSignal
from liquid_llm.signal_store.codecs.full import FullCodec
from liquid_llm.signal_store.codecs.tail import TailCodec
from liquid_llm.signal_store.codecs.topk import TopKCodec

KINDS = SIGNALS[1:]


def sparse(rows: int, k: int, seed: int = 0, temperature: float = 2.0) -> SparseSignal:
    codec = TopKCodec(k)
    payload = codec.pack(codec.encode(random_logits(rows, 50, seed=seed), 1, 0))
    return codec.decode(payload, 0, rows, temperature, 50)


def full(rows: int, vocab_size: int = 50, seed: int = 0) -> LogitsSignal:
    payload = FullCodec().pack(FullCodec().encode(random_logits(rows, vocab_size, seed=seed), 1, 0))
    return FullCodec().decode(payload, 0, rows, 2.0, vocab_size)


def tensors(signal: Signal) -> dict[str, torch.Tensor]:
    """What has a row for each position."""
    names = ("hidden", "rows", "ids", "weights", "log_probs", "tail_mass")
    found = {name: getattr(signal, name) for name in names if hasattr(signal, name)}
    return found if signal.mask is None else {**found, "mask": signal.mask}


@given(kind=st.sampled_from(KINDS), cuts=st.lists(st.integers(0, 13), max_size=4))
def test_the_parts_of_a_signal_are_its_rows_and_count_their_own(kind: str, cuts: list[int]) -> None:
    signal = make_signal(kind, 13, 29, 2.0)
    bounds = [0, *sorted(cuts), 13]
    parts = [signal.part(slice(start, stop)) for start, stop in pairwise(bounds)]
    assert [part.num_positions for part in parts] == [stop - start for start, stop in pairwise(bounds)]
    for name, whole in tensors(signal).items():
        joined = torch.cat([tensors(part)[name] for part in parts])
        torch.testing.assert_close(joined, whole, rtol=0, atol=0, equal_nan=True)
    for part in parts:
        assert part.num_signal == (part.num_positions if part.mask is None else int(part.mask.sum()))
        if isinstance(part, SparseSignal):
            assert part.any_tail == bool((part.tail_mass > 0).any())
            assert part.temperature == signal.temperature


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_counted_on_the_cpu_moves_along(kind: str) -> None:
    signal = make_signal(kind, 13, 29, 2.0)
    assert signal.to(torch.device("cpu")) is signal
    moved = signal.to(torch.device("meta"))
    assert {tensor.device.type for tensor in tensors(moved).values()} == {"meta"}
    for name in ("num_positions", "num_signal", "any_tail", "temperature"):
        assert getattr(moved, name, None) == getattr(signal, name, None)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_pinned(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is on a machine without an accelerator; the wish is seen."""
    signal, asked = make_signal(kind, 13, 29, 2.0), []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: asked.append(tensor) or tensor)
    signal.pinned()
    assert len(asked) == len(tensors(signal))
    assert signal.nbytes == sum(tensor.nbytes for tensor in tensors(signal).values())
    monkeypatch.setattr(signals, "_MOST_PINNED_BYTES", signal.nbytes - 1)
    assert signal.pinned() is signal
    assert len(asked) == len(tensors(signal))


def test_a_hidden_state_for_another_head_is_refused() -> None:
    dense = make_dense(13, 29)
    for hidden in (torch.zeros(13, 4), torch.zeros(5)):
        with pytest.raises(ValueError, match="do not fit"):
            DenseSignal(hidden, dense.head)


def test_a_head_is_finished_in_place_or_not() -> None:
    head = OutputHead(torch.zeros(3, 2), scale=0.5, soft_cap=2.0)
    raw = torch.tensor([[1.0, -4.0, 100.0]])
    expected = 2.0 * torch.tanh(0.5 * raw / 2.0)
    torch.testing.assert_close(head.finish(raw), expected)
    assert raw[0, 1] == -4.0
    assert head.finish(raw, in_place=True) is raw
    torch.testing.assert_close(raw, expected)


# ------------------------------------------------------------------------------------------------------------- joining


def join(parts: list[StoredSignal | None], num_rows: list[int]) -> StoredSignal:
    return next(type(part) for part in parts if part is not None).join(parts, num_rows)


def test_sparse_in_order_with_missing_samples_and_different_k() -> None:
    first, last = sparse(3, 4, seed=1), sparse(5, 7, seed=2)
    found = join([None, first, None, last], [2, 3, 1, 5])
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
    found = join([first, None, last], [3, 2, 5])
    assert isinstance(found, LogitsSignal)
    assert found.rows.dtype == torch.float16
    assert torch.equal(found.rows[:3], first.rows)
    assert torch.equal(found.rows[5:], last.rows)
    assert found.mask.tolist() == [True] * 3 + [False] * 2 + [True] * 5


def test_samples_without_positions() -> None:
    found = join([sparse(0, 4), sparse(2, 4), None], [0, 2, 0])
    assert found.num_positions == 2
    assert found.mask.all()


@pytest.mark.parametrize(
    ("signals", "rows"),
    [
        ([sparse(2, 4), full(2)], [2, 2]),
        ([full(2), sparse(2, 4)], [2, 2]),
        ([sparse(2, 4)], [3]),
        ([full(2)], [1]),
        ([sparse(2, 4), sparse(2, 4)], [2]),
        ([sparse(2, 4), sparse(2, 4, temperature=1.0)], [2, 2]),
        ([full(2), full(2, vocab_size=51)], [2, 2]),
    ],
    ids=["classes", "turned", "too few", "too many", "counts", "temperatures", "vocabularies"],
)
def test_signals_that_do_not_fit(signals: list[StoredSignal | None], rows: list[int]) -> None:
    with pytest.raises(ValueError, match=r"signals|signal of|zip"):
        join(signals, rows)


@pytest.mark.parametrize("kind", [LogitsSignal, SparseSignal])
@pytest.mark.parametrize("parts", [[], [None, None]])
def test_nothing_to_join(kind: type[StoredSignal], parts: list[None]) -> None:
    with pytest.raises(ValueError, match="need some"):
        kind.join(parts, [1] * len(parts))


def test_repeated_ids_are_summed_into_one_slot_and_mean_the_same() -> None:
    codec, vocab = TailCodec(), 4000
    logits = random_logits(40, vocab, spread=2.0)
    drawn = codec.decode(codec.pack(codec.encode(logits, 1, 0)), 0, 40, 2.0, vocab)
    merged = drawn.merge_repeats()
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


def test_a_head_stays_first_and_in_its_order_where_repeats_are_merged() -> None:
    """Likeliest first is no order of ids; what is drawn twice is one slot behind it."""
    ids = torch.tensor([[9, 2, 7, 4, 7, 4], [5, 8, 1, 1, 0, 0]])
    weights = torch.tensor([[0.4, 0.3, 0.1, 0.1, 0.1, 0.1], [0.5, 0.1, 0.2, 0.2, 0.0, 0.0]])
    counts, mask = torch.tensor([2, 1]), torch.ones(2, dtype=torch.bool)
    made = SparseSignal(
        ids, weights, weights.log(), torch.zeros(2), mask, 1.0, form=HEAD_AND_DRAWS, num_exact=counts
    ).merge_repeats()
    assert made.num_exact is counts
    assert made.ids[0, :4].tolist() == [9, 2, 4, 7]
    assert made.ids[1].tolist() == [5, 0, 1, 8, 0, 0]  # unused slots have the id 0, wherever they are
    torch.testing.assert_close(made.weights[0], torch.tensor([0.4, 0.3, 0.2, 0.2, 0.0, 0.0]))
    torch.testing.assert_close(made.weights[1], torch.tensor([0.5, 0.0, 0.4, 0.1, 0.0, 0.0]))


def test_a_form_that_does_not_fit_is_refused() -> None:
    nothing, mask = torch.zeros(2, 1), torch.ones(2, dtype=torch.bool)
    for form, counts in ((HEAD_AND_DRAWS, None), (DRAWS, torch.zeros(2)), (HEAD_AND_DRAWS, torch.zeros(3))):
        with pytest.raises(ValueError, match=r"signal\.num_exact"):
            SparseSignal(nothing.long(), nothing, nothing, torch.zeros(2), mask, 1.0, form=form, num_exact=counts)
