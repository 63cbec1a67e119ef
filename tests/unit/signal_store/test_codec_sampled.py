"""Codec ``sampled``: counts of draws, unbiased at the temperature they were drawn at."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.support.teachers import random_logits

from liquid_llm.errors import SignalError
from liquid_llm.signal_store.codecs import Payload
from liquid_llm.signal_store.codecs.base import encode_as_on
from liquid_llm.signal_store.codecs.sampled import SampledCodec
from liquid_llm.signal_store.codecs.tail.draws import uniforms


def stored(codec: SampledCodec, logits: torch.Tensor, seed: int = 1) -> Payload:
    return codec.pack(codec.encode(logits.clone(), seed, 0))


@given(
    rows=st.integers(0, 5),
    vocab=st.integers(1, 300),
    draws=st.sampled_from([1, 2, 50, 255]),
    seed=st.integers(0, 2**40),
    spread=st.floats(0.0, 8.0),
)
def test_all_draws_come_back(rows: int, vocab: int, draws: int, seed: int, spread: float) -> None:
    codec = SampledCodec(draws, 2.0)
    logits = random_logits(rows, vocab, seed=seed % 991, spread=spread)
    encoded = codec.encode(logits.clone(), seed, 0)
    payload = codec.pack(encoded)
    signal = codec.decode(payload, 0, rows, 2.0, vocab)
    counts = torch.zeros(rows, vocab).scatter_add_(1, signal.ids, signal.weights) * draws
    expected = torch.zeros(rows, vocab).scatter_add_(1, encoded["ids"].long(), torch.ones(rows, draws))
    torch.testing.assert_close(counts, expected, rtol=0, atol=1e-3)
    assert signal.tail_mass.eq(0).all()
    used = signal.weights > 0
    torch.testing.assert_close(signal.log_probs[used], signal.weights[used].log())
    for ids, row in zip(signal.ids, used, strict=True):
        assert ids[row].unique().numel() == int(row.sum())


@given(
    rows=st.integers(1, 4),
    vocab=st.integers(1, 300),
    seed=st.integers(0, 2**40),
    spread=st.floats(0.0, 8.0),
    temperature=st.sampled_from([1.0, 2.0]),
    device=st.sampled_from(["cpu", "cuda"]),
)
def test_an_id_is_drawn_where_the_running_sum_passes_its_number(
    rows: int, vocab: int, seed: int, spread: float, temperature: float, device: str
) -> None:
    """As the plain formula has it, however work is cut, and whether or not runs of ids divide the vocabulary."""
    logits = random_logits(rows, vocab, seed=seed % 991, spread=spread)
    with encode_as_on(device):
        found = SampledCodec(50, temperature).encode(logits.clone(), seed, 0)["ids"]
    powers = ((logits - logits.amax(dim=1, keepdim=True)) / temperature).exp().double()
    running = powers.cumsum(dim=1)
    wanted = torch.from_numpy(uniforms(seed, 0, rows, 50)) * running[:, -1:]
    drawn = torch.searchsorted(running, wanted, right=True).clamp(max=vocab - 1)
    assert torch.equal(found.long(), drawn.sort(dim=1).values)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
def test_weights_are_unbiased(temperature: float) -> None:
    logits = random_logits(2, 400, spread=3.0)
    codec = SampledCodec(50, temperature)
    exact = torch.softmax(logits.double() / temperature, dim=1)
    found = torch.zeros(2, 400, dtype=torch.float64)
    for seed in range(400):
        signal = codec.decode(stored(codec, logits, seed), 0, 2, temperature, 400)
        found.scatter_add_(1, signal.ids, signal.weights.double() / 400)
    error = (exact * (1 - exact) / (50 * 400)).sqrt()
    likely = exact > 1e-3
    assert float(((found - exact) / error)[likely].abs().amax()) < 4.5
    assert float((found - exact)[~likely].sum().abs()) < 4.5 * math.sqrt(float(exact[~likely].sum()) / (50 * 400))


@pytest.mark.parametrize(("vocab", "width"), [(49_152, 3), (128_256, 3), (151_936, 3), (300_000, 4)])
def test_bytes_of_an_entry(vocab: int, width: int) -> None:
    logits = torch.zeros(2, vocab)
    logits[:, vocab - 1] = 30.0
    payload = stored(SampledCodec(50), logits)
    assert payload["entries"].shape == (2, width)
    assert SampledCodec(50).decode(payload, 0, 2, 1.0, vocab).ids.tolist() == [[vocab - 1], [vocab - 1]]


@pytest.mark.parametrize("temperature", [0.99, 2.0])
def test_only_the_temperature_of_the_capture_is_read(temperature: float) -> None:
    payload = stored(SampledCodec(50), random_logits(2, 300))
    with pytest.raises(SignalError, match=r"expected 1\. Give such a temperature"):
        SampledCodec(50).decode(payload, 0, 2, temperature, 300)
