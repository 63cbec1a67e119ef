"""Codecs: decode(encode(logits)) is the teacher's distribution, within what each codec promises."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.support.teachers import random_logits

from liquid_llm import registry
from liquid_llm.errors import SignalError
from liquid_llm.losses.largest import largest
from liquid_llm.losses.signals import LogitsSignal, SparseSignal
from liquid_llm.signal_store.codecs import Codec, PayloadError, get_codec
from liquid_llm.signal_store.codecs.full import FullCodec
from liquid_llm.signal_store.codecs.sampled import SampledCodec
from liquid_llm.signal_store.codecs.tail import TailCodec
from liquid_llm.signal_store.codecs.topk import TopKCodec

TEMPERATURES = st.floats(0.67, 4.0)


def stored(codec: Codec, logits: torch.Tensor) -> dict[str, torch.Tensor]:
    return codec.pack(codec.encode(logits.clone(), 1, 0))


def probabilities(signal: LogitsSignal | SparseSignal, temperature: float, vocab: int) -> torch.Tensor:
    """What a signal says of each id, [rows, vocab], without the tail bucket."""
    if isinstance(signal, LogitsSignal):
        return torch.softmax(signal.rows.double() / temperature, dim=1)
    return torch.zeros(signal.num_positions, vocab, dtype=torch.float64).scatter_(
        1, signal.ids, signal.weights.double()
    )


@given(
    rows=st.integers(0, 5),
    vocab=st.integers(1, 400),
    seed=st.integers(0, 2**31),
    spread=st.floats(0.0, 12.0),
    temperature=st.floats(0.3, 8.0),
)
def test_full_keeps_the_distribution(rows: int, vocab: int, seed: int, spread: float, temperature: float) -> None:
    logits = random_logits(rows, vocab, seed=seed, spread=spread)
    signal = FullCodec().decode(stored(FullCodec(), logits), 0, rows, temperature, vocab)
    exact = torch.softmax(logits.double() / temperature, dim=1)
    # float16 rounds z - max relatively by 2**-11, so an odds ratio by at most that share of the gap over T
    gaps = (logits.amax(1, keepdim=True) - logits).double() if vocab else logits.double()
    bound = exact * (2 * gaps.amax() * 2**-11 / temperature + 1e-5) if rows else exact
    got = probabilities(signal, temperature, vocab)
    assert signal.num_positions == rows
    assert signal.mask.all()
    assert bool(((got - exact).abs() <= bound.expm1() + 1e-7).all())


@given(
    rows=st.integers(0, 5),
    vocab=st.integers(1, 400),
    k=st.integers(1, 64),
    seed=st.integers(0, 2**31),
    spread=st.floats(0.0, 6.0),
    temperature=st.sampled_from([2 / 3, 0.8, 1.0, 4 / 3, 2.0, 8 / 3, 4.0]),
)
def test_topk_at_a_grid_temperature_is_exact_for_head_and_tail(
    rows: int, vocab: int, k: int, seed: int, spread: float, temperature: float
) -> None:
    logits = random_logits(rows, vocab, seed=seed, spread=spread)
    codec = TopKCodec(k)
    signal = codec.decode(stored(codec, logits), 0, rows, temperature, vocab)
    exact = torch.softmax(logits.double() / temperature, dim=1)
    kept = exact.gather(1, signal.ids)
    assert signal.ids.shape == (rows, min(k, vocab))
    torch.testing.assert_close(signal.weights.double(), kept, rtol=2e-3, atol=1e-6)
    torch.testing.assert_close(signal.weights.log(), signal.log_probs, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(signal.tail_mass.double(), 1 - kept.sum(1), rtol=5e-3, atol=1e-6)


@given(seed=st.integers(0, 2**31), temperature=TEMPERATURES, k=st.sampled_from([16, 64]))
def test_topk_between_grid_temperatures(seed: int, temperature: float, k: int) -> None:
    """Tails far rougher than a language model's: a few percent of the tail's share, and the sum is still one."""
    logits = random_logits(4, 2000, seed=seed, spread=2.0)
    codec = TopKCodec(k)
    signal = codec.decode(stored(codec, logits), 0, 4, temperature, 2000)
    exact = torch.softmax(logits.double() / temperature, dim=1).gather(1, signal.ids)
    torch.testing.assert_close(signal.tail_mass.double(), 1 - exact.sum(1), rtol=2e-2, atol=1e-4)
    torch.testing.assert_close(signal.weights.sum(1) + signal.tail_mass, torch.ones(4), rtol=1e-5, atol=1e-5)


@given(
    rows=st.integers(0, 4),
    vocab=st.integers(1, 900),
    k=st.integers(1, 40),
    seed=st.integers(0, 2**31),
    levels=st.sampled_from([2, 7, 10_000]),
)
def test_ids_are_distinct_and_the_largest(rows: int, vocab: int, k: int, seed: int, levels: int) -> None:
    """Ties included: few levels make many equal logits."""
    logits = torch.randint(0, levels, (rows, vocab), generator=torch.Generator().manual_seed(seed)).float()
    k = min(k, vocab)
    values, ids = largest(logits, k)
    assert all(len(set(row)) == k for row in ids.tolist())
    torch.testing.assert_close(values, logits.topk(k, dim=1).values, rtol=0, atol=0)
    torch.testing.assert_close(logits.gather(1, ids), values, rtol=0, atol=0)


@pytest.mark.parametrize("vocab", [65_536, 65_537, 128_256])
def test_large_ids_survive(vocab: int) -> None:
    logits = torch.zeros(3, vocab)
    wanted = torch.tensor([0, 65_535, vocab - 1])
    logits[torch.arange(3), wanted] = 20.0
    signal = TopKCodec(2).decode(stored(TopKCodec(2), logits), 0, 3, 1.0, vocab)
    assert signal.ids[:, 0].tolist() == wanted.tolist()


@pytest.mark.parametrize("vocab", [65_536, 128_256])
def test_topk_bytes_a_position(vocab: int) -> None:
    payload = stored(TopKCodec(), random_logits(10, vocab))
    assert sum(tensor.nbytes for tensor in payload.values()) / 10 == (274 if vocab == 65_536 else 338)


@pytest.mark.parametrize(
    "codec",
    [FullCodec(), TopKCodec(8), TopKCodec(8, 2.0), TailCodec(), SampledCodec(20, 2.0)],
    ids=lambda codec: codec.name,
)
class TestEveryCodec:
    def test_chunks_do_not_matter(self, codec: Codec) -> None:
        logits = random_logits(7, 200)
        parts = [codec.encode(logits[begin:end].clone(), 1, begin) for begin, end in ((0, 3), (3, 3), (3, 7))]
        joined = codec.pack({name: torch.cat([part[name] for part in parts]) for name in parts[0]})
        whole = stored(codec, logits)
        assert joined.keys() == whole.keys()
        assert all(torch.equal(joined[name], whole[name]) for name in whole)

    @pytest.mark.parametrize(("start", "stop"), [(0, 7), (0, 3), (2, 6), (4, 4)])
    def test_a_window_is_a_slice(self, codec: Codec, start: int, stop: int) -> None:
        payload = stored(codec, random_logits(7, 200))
        whole, window = codec.decode(payload, 0, 7, 2.0, 200), codec.decode(payload, start, stop, 2.0, 200)
        for name in (
            ("rows", "mask") if isinstance(whole, LogitsSignal) else ("ids", "weights", "log_probs", "tail_mass")
        ):
            assert torch.equal(getattr(whole, name)[start:stop], getattr(window, name))

    def test_more_positions_than_stored(self, codec: Codec) -> None:
        with pytest.raises(PayloadError, match="7 positions, 8 wanted"):
            codec.decode(stored(codec, random_logits(7, 200)), 0, 8, 2.0, 200)

    @pytest.mark.parametrize("damage", ["missing", "dtype", "shape"])
    def test_a_payload_of_another_form_is_refused(self, codec: Codec, damage: str) -> None:
        for name in stored(codec, random_logits(3, 200)):
            payload = stored(codec, random_logits(3, 200))
            if damage == "missing":
                del payload[name]
            elif damage == "dtype":
                payload[name] = payload[name].to(torch.float64)
            else:
                payload[name] = payload[name].unsqueeze(0)
            with pytest.raises(PayloadError, match=name):
                codec.decode(payload, 0, 3, 2.0, 200)

    def test_another_vocabulary_is_refused(self, codec: Codec) -> None:
        logits = random_logits(3, 200)
        logits[:, 199] = 100.0  # certainly stored
        with pytest.raises(PayloadError):
            codec.decode(stored(codec, logits), 0, 3, 2.0, 150)

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_logits_that_are_not_finite(self, codec: Codec, bad: float) -> None:
        logits = random_logits(3, 200)
        logits[1, 7] = bad
        with pytest.raises(SignalError, match="row 1: the teacher's logits are not finite"):
            codec.encode(logits, 1, 0)

    def test_a_row_with_nothing_but_masked_tokens(self, codec: Codec) -> None:
        with pytest.raises(SignalError, match="not finite"):
            codec.encode(torch.full((1, 200), -math.inf), 1, 0)

    @pytest.mark.parametrize("unmasked", [1, 5, 100])
    def test_masked_tokens_have_probability_zero(self, codec: Codec, unmasked: int) -> None:
        logits = random_logits(3, 200, spread=2.0)
        logits[:, unmasked:] = -math.inf
        signal = codec.decode(stored(codec, logits), 0, 3, 2.0, 200)
        tensors = [signal.rows] if isinstance(signal, LogitsSignal) else [signal.log_probs, signal.tail_mass]
        assert all(tensor.isfinite().all() for tensor in tensors)
        got = probabilities(signal, 2.0, 200)
        assert float(got[:, unmasked:].amax()) < 1e-12
        if codec.name in ("tail", "sampled"):
            return  # random: tests of their own
        exact = torch.softmax(logits.double() / 2.0, dim=1)
        # eight gaps share one scale, the masked ones' distance of 120: 120 / 65535 / 2 per step
        torch.testing.assert_close(got.amax(1), exact.amax(1), rtol=2e-3, atol=0)

    def test_made_again_from_its_identity(self, codec: Codec) -> None:
        again = get_codec(codec.name, codec.version, codec.options)
        payload = stored(codec, random_logits(2, 200))
        first, second = codec.decode(payload, 0, 2, 2.0, 200), again.decode(payload, 0, 2, 2.0, 200)
        assert torch.equal(probabilities(first, 2.0, 200), probabilities(second, 2.0, 200))


@pytest.mark.parametrize("temperature", [0.5, 4.5, math.inf, math.nan])
def test_topk_outside_its_temperatures(temperature: float) -> None:
    payload = stored(TopKCodec(4), random_logits(2, 50))
    with pytest.raises(SignalError, match=r"expected 0\.667 to 4"):
        TopKCodec(4).decode(payload, 0, 2, temperature, 50)


def test_full_answers_at_any_temperature() -> None:
    payload = stored(FullCodec(), random_logits(2, 50))
    for temperature in (1e-3, 0.5, 100.0):
        assert FullCodec().decode(payload, 0, 2, temperature, 50).num_positions == 2
    with pytest.raises(SignalError):
        FullCodec().decode(payload, 0, 2, 0.0, 50)


def test_an_id_beyond_the_vocabulary_is_refused() -> None:
    payload = stored(TopKCodec(4), random_logits(2, 50))
    payload["ids"][0, 0] = 50
    with pytest.raises(PayloadError, match="id 50 in a vocabulary of 50"):
        TopKCodec(4).decode(payload, 0, 2, 2.0, 50)


def test_a_vocabulary_no_larger_than_k_has_no_tail() -> None:
    logits = random_logits(3, 10)
    signal = TopKCodec(64).decode(stored(TopKCodec(64), logits), 0, 3, 2.0, 10)
    assert signal.tail_mass.eq(0).all()
    exact = torch.softmax(logits.double() / 2.0, dim=1)
    torch.testing.assert_close(probabilities(signal, 2.0, 10), exact, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "version", "options", "message"),
    [
        ("zip", None, None, r"unknown codec; got 'zip'; expected one of tail, full, topk, sampled"),
        ("topk", 99, None, r"version 99; expected version 1\. Install the newer"),
        ("topk", 0, None, r"version 0; expected version 1\. Capture the signal again"),
        ("topk", None, {"q": 3}, r"options that codec 'topk' does not have"),
        ("full", None, {"k": 3}, r"options that codec 'full' does not have"),
        ("topk", None, {"k": 0}, r"got 0; expected a positive integer"),
        ("topk", None, {"k": "8"}, r"expected a positive integer"),
        ("topk", None, {"k": True}, r"expected a positive integer"),
        ("tail", None, {"draws_t2": 0}, r"number of draws as draws_t2; got 0; expected more than 0, at most 1024"),
        ("tail", None, {"draws_t4": "8"}, r"number of draws as draws_t4; got 8"),
        ("tail", None, {"draws_t1": True}, r"number of draws as draws_t1; got True"),
        ("sampled", None, {"draws": 256}, r"got 256; expected 1 to 255"),
        ("sampled", None, {"draws": 2.5}, r"got 2\.5; expected 1 to 255"),
        ("sampled", None, {"temperature": 0}, r"needs a temperature; got 0; expected a positive number"),
    ],
)
def test_codecs_that_do_not_exist(name: str, version: int | None, options: dict[str, int] | None, message: str) -> None:
    with pytest.raises(SignalError, match=message):
        get_codec(name, version, options)


def test_registry_names_are_the_codecs_own() -> None:
    assert all(get_codec(name).name == name for name in registry.CODECS)
