"""The tail's log-partition: against float64, on and between grid temperatures, and its 16-bit form."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.support.teachers import random_logits

from liquid_llm.errors import SignalError
from liquid_llm.signal_store.codecs import topk


def exact(logits: torch.Tensor, ids: torch.Tensor, edge: torch.Tensor, u: float) -> torch.Tensor:
    gaps = (logits - edge).double().scatter(1, ids, -math.inf)
    return torch.logsumexp(gaps * u, dim=1)


@given(
    rows=st.integers(0, 20),
    vocab=st.integers(2, 3000),
    k=st.integers(1, 30),
    seed=st.integers(0, 2**31),
    spread=st.floats(0.01, 20.0),
)
def test_grid_values(rows: int, vocab: int, k: int, seed: int, spread: float) -> None:
    logits = random_logits(rows, vocab, seed=seed, spread=spread)
    values, ids = logits.topk(min(k, vocab - 1), dim=1)
    found = topk.tail_log_partition(logits, ids, values[:, -1:])
    for place, u in enumerate(topk.GRID):
        expected = exact(logits, ids, values[:, -1:], u)
        torch.testing.assert_close(found[:, place].double(), expected, rtol=1e-4, atol=1e-3)


def test_an_empty_tail_is_minus_infinity() -> None:
    logits = random_logits(2, 5)
    values, ids = logits.topk(5, dim=1)
    assert topk.tail_log_partition(logits, ids, values[:, -1:]).eq(-math.inf).all()


@given(level=st.floats(-19.0, 10.8), vocab=st.sampled_from([49_152, 128_256, 262_144]))
def test_quantised_within_half_a_step(level: float, vocab: int) -> None:
    value = torch.tensor([[level]])
    again = topk.dequantise(topk.quantise(value, vocab), vocab)
    assert abs(float(again) - level) < 2.6e-4


@pytest.mark.parametrize("value", [-math.inf, -40.0])
def test_a_tail_of_nothing_is_stored_as_the_lowest_value(value: float) -> None:
    again = topk.dequantise(topk.quantise(torch.tensor([value]), 1000), 1000)
    assert float(again) == topk.LOWEST


@pytest.mark.parametrize("u", topk.GRID)
def test_interpolation_goes_through_the_grid(u: float) -> None:
    values = torch.randn(4, len(topk.GRID), generator=torch.Generator().manual_seed(0))
    found = topk.interpolate(values, 1 / u)
    torch.testing.assert_close(found, values[:, topk.GRID.index(u)], rtol=1e-4, atol=1e-4)


@given(degree=st.integers(0, 6), temperature=st.floats(2 / 3, 4.0))
def test_interpolation_is_exact_for_polynomials_in_one_over_t(degree: int, temperature: float) -> None:
    values = torch.tensor([[u**degree for u in topk.GRID]], dtype=torch.float64)
    assert float(topk.interpolate(values, temperature)) == pytest.approx(temperature**-degree, rel=1e-9)


@pytest.mark.parametrize("temperature", [0.7, 0.9, 1.2, 1.5, 1.8, 2.3, 3.0, 3.5])
def test_between_grid_temperatures(temperature: float) -> None:
    """A tail shaped like a language model's: a power law of ranks with noise."""
    ranks = torch.arange(1, 20_001, dtype=torch.float64)
    noise = torch.randn(8, 20_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    logits = (-1.1 * ranks.log() + 0.7 * noise).float()
    values, ids = logits.topk(64, dim=1)
    edge = values[:, -1:]
    found = topk.interpolate(topk.tail_log_partition(logits, ids, edge), temperature)
    torch.testing.assert_close(found.double(), exact(logits, ids, edge, 1 / temperature), rtol=0, atol=2e-3)


@given(rows=st.integers(0, 6), vocab=st.integers(1, 400), k=st.integers(1, 30), seed=st.integers(0, 2**31))
def test_told_log_probabilities_are_stored_as_the_logits_would_be(rows: int, vocab: int, k: int, seed: int) -> None:
    logits = random_logits(rows, vocab, seed=seed)
    codec = topk.TopKCodec(k, temperature=1)
    own = codec.pack(codec.encode(logits.clone(), 0, 0))
    logs, ids = torch.log_softmax(logits.double(), dim=1).topk(min(k, vocab), dim=1)
    told = codec.pack(codec.encode_told(ids, logs, vocab))
    one, other = (codec.decode(payload, 0, rows, 1.0, vocab) for payload in (own, told))
    assert {name: part.shape for name, part in own.items()} == {name: part.shape for name, part in told.items()}
    torch.testing.assert_close(one.weights, other.weights, rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(one.tail_mass, other.tail_mass, rtol=2e-3, atol=1e-6)
    torch.testing.assert_close(other.weights.sum(1) + other.tail_mass, torch.ones(rows), rtol=1e-5, atol=1e-5)


@given(temperature=st.sampled_from([1 / u for u in topk.GRID]), seed=st.integers(0, 2**31))
def test_a_store_of_one_temperature_says_at_it_what_a_store_of_all_says(temperature: float, seed: int) -> None:
    logits, every, single = random_logits(4, 300, seed=seed), topk.TopKCodec(8), topk.TopKCodec(8, temperature)
    signals = [
        one.decode(one.pack(one.encode(logits.clone(), 0, 0)), 0, 4, temperature, 300) for one in (every, single)
    ]
    torch.testing.assert_close(signals[0].tail_mass, signals[1].tail_mass, rtol=1e-5, atol=1e-7)
    assert torch.equal(signals[0].ids, signals[1].ids)
    payload = single.pack(single.encode(logits.clone(), 0, 0))
    for other in (temperature * 1.01, temperature * 0.99):
        with pytest.raises(SignalError, match="cannot be read at this temperature"):
            single.decode(payload, 0, 4, other, 300)


def test_an_identity_without_a_temperature_is_what_it_always_was() -> None:
    assert topk.TopKCodec(4).options == {"k": 4}
    assert topk.TopKCodec(4, temperature=1).options == {"k": 4, "temperature": 1.0}


@pytest.mark.parametrize("temperature", [0, 0.9, 5, True, "1", -1.0])
def test_a_temperature_off_the_grid_is_refused(temperature: float) -> None:
    with pytest.raises(SignalError, match="no such temperature"):
        topk.TopKCodec(4, temperature)


def test_log_probabilities_suffice_for_one_temperature_alone() -> None:
    ids, logs = torch.tensor([[1, 2]]), torch.tensor([[-1.0, -2.0]], dtype=torch.float64)
    for codec in (topk.TopKCodec(2), topk.TopKCodec(2, temperature=2)):
        with pytest.raises(SignalError, match="at T = 1 alone"):
            codec.encode_told(ids, logs, 9)
    with pytest.raises(SignalError, match="not the codec's ids"):
        topk.TopKCodec(3, temperature=1).encode_told(ids, logs, 9)
