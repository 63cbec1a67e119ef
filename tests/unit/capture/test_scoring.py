"""Logits that are captured: float32 out of the product, in chunks that suit the device."""

from __future__ import annotations

import pytest
import torch
from tests.support.products import MixedProducts
from tests.support.teachers import VOCAB, ListSource, make_samples

from liquid_llm.capture.plan import Window
from liquid_llm.capture.scoring import Scratch, chunk_rows, chunks, score
from liquid_llm.losses.signals import OutputHead
from liquid_llm.signal_store.codecs.topk import TopKCodec


@pytest.mark.parametrize(
    ("device", "vocab_size", "expected"),
    [
        ("cpu", 128_256, 130),
        ("cpu", 500, 33_554),
        ("cuda", 128_256, 1024),
        ("cuda:1", 262_144, 512),
        ("cuda", 500, 1024),
        ("cuda", 10**9, 1),
    ],
)
def test_positions_of_a_chunk(device: str, vocab_size: int, expected: int) -> None:
    assert chunk_rows(vocab_size, device) == expected
    assert Scratch(device).rows(vocab_size, "cpu") == expected
    assert next(chunks([10**6], expected)) == [(0, 0, expected)]


def test_a_chunk_is_halved_down_to_a_few_positions_and_gives_its_memory_back() -> None:
    head, device = OutputHead(torch.zeros(128_256, 4)), torch.device("cpu")
    scratch, sizes = Scratch("cuda"), []
    hidden = torch.zeros(8, 4)
    while True:
        sizes.append(scratch.rows(head.vocab_size, device))
        assert scratch.logits(head, hidden).shape == (8, 128_256)
        assert scratch._memory.shape[0] == sizes[-1]
        if not scratch.halve(head, device):
            break
        assert scratch._memory.numel() == 0
    assert sizes == [1024, 512, 256, 128, 64]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_logits_are_not_rounded_to_the_teachers_dtype(device: str, dtype: torch.dtype) -> None:
    """Against float64 of the same numbers: rounded to bfloat16 they would be 2e-3 off."""
    random = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(301, 64, generator=random), torch.randn(301, generator=random)
    head = OutputHead(weight.to(dtype), bias.to(dtype), 0.5, 30.0)
    hidden = torch.randn(50, 64, generator=random).to(dtype)
    scratch = Scratch(device)
    with MixedProducts() as mixed:
        logits = scratch.logits(head, hidden)
    assert bool(mixed.calls) == (device == "cuda" and dtype == torch.bfloat16)
    exact = OutputHead(head.weight.double(), bias.to(dtype).double(), 0.5, 30.0).logits(hidden.double())
    assert logits.dtype == torch.float32
    assert (logits.double() - exact).norm() < 1e-6 * exact.norm()


def test_another_head_or_dtype_is_another_product() -> None:
    """The head is prepared once, for as long as it is the same."""
    scratch, hidden = Scratch(), torch.randn(5, 8)
    heads = [OutputHead(torch.randn(30, 8)), OutputHead(torch.randn(30, 8))]
    for head in (*heads, heads[0]):
        torch.testing.assert_close(scratch.logits(head, hidden), head.logits(hidden))
    on_a_card, narrow = Scratch("cuda"), OutputHead(heads[0].weight.bfloat16())
    with MixedProducts():
        for states in (hidden.bfloat16(), hidden):
            expected = states.float() @ narrow.weight.float().t()
            torch.testing.assert_close(on_a_card.logits(narrow, states), expected)


class Told:
    """A teacher whose states were told of a batch beforehand, sample by sample, as a server's are."""

    device = torch.device("cpu")

    def __init__(self, states: list[torch.Tensor]) -> None:
        self.states, self.head = states, OutputHead(torch.eye(VOCAB))

    def hidden(self, input_ids: torch.Tensor) -> torch.Tensor:
        assert len(input_ids) == len(self.states)
        return torch.nn.utils.rnn.pad_sequence(self.states, batch_first=True)


def test_states_are_those_of_their_sample_whatever_codecs_a_batch_has() -> None:
    """Samples of one codec are encoded together, after the teacher has been asked about them in their own order."""
    samples = [make_samples(1, type=type, low=9, high=9, seed=n)[0] for n, type in enumerate("abab")]
    batch = [Window(ListSource(samples), n, f"s/{n}", one.type, 9) for n, one in enumerate(samples)]
    states = [100.0 * torch.nn.functional.one_hot(torch.full((9,), 7 * n), VOCAB).float() for n in range(4)]
    codecs = {"a": TopKCodec(8), "b": TopKCodec(4)}  # the second comes first
    found = {one.sample_id: rows for one, rows, _ in score(Told(states), batch, codecs, Scratch())}
    for number, sample in enumerate(samples):
        codec = codecs[sample.type]
        signal = codec.decode(codec.pack(found[f"s/{number}"]), 0, 8, 2.0, VOCAB)
        assert set(signal.ids[:, 0].tolist()) == {7 * number}
