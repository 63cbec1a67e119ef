"""Codec ``tail``: what comes back is, on average over captures, the teacher's distribution at every temperature.

unbiased    the mean over 160 captures (seeds) lies within 4.5 standard errors of the exact value. Seeds are fixed, so a
            test does not fail by chance; with other seeds some of the thousand values here would in 1 of 150 runs
projection  a sum of weights over ids, each id with a random sign: it sees every id at once and is near to normal
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.support.distillation import reference_loss
from tests.support.teachers import random_logits

from liquid_llm.losses.signals import LogitsSignal, OutputHead, SparseSignal
from liquid_llm.signal_store.codecs import Payload, PayloadError, get_codec, usual_codec
from liquid_llm.signal_store.codecs.tail import TailCodec
from liquid_llm.signal_store.codecs.tail import _partition as partition_of
from liquid_llm.signal_store.codecs.tail.bits import BitsError, BitWriter
from liquid_llm.signal_store.codecs.tail.chosen import EXACT_PRICE, MOST_EXACT, most_draws
from liquid_llm.signal_store.codecs.tail.draws import (
    DRAW_STEP,
    DRAW_TURN,
    NODES,
    Draws,
    candidates,
    dither_gain,
    dither_shift,
    uniforms,
    window_starts,
)
from liquid_llm.signal_store.codecs.tail.payload import Levels, Values, read_levels, write_levels

STORED_TEMPERATURES = (2 / 3, 1.0, 4 / 3, 2.0, 4.0)
DRAWS = Draws(40, 24, 8)
CODEC = TailCodec(DRAWS.at_1, DRAWS.at_2, DRAWS.at_4)
SHAPES = {"peaked": 6.0, "like a model's": 3.0, "flat": 0.7}
VOCAB = 500
NUM_CAPTURES = 160


def stored(logits: torch.Tensor, seed: int = 1, codec: TailCodec = CODEC) -> Payload:
    return codec.pack(codec.encode(logits.clone(), seed, 0))


def dense(signal: SparseSignal, vocab: int) -> torch.Tensor:
    """Weights by id [positions, vocab]; an id may have two slots."""
    return torch.zeros(signal.num_positions, vocab, dtype=torch.float64).scatter_add_(
        1, signal.ids, signal.weights.double()
    )


def exact_probabilities(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    return torch.softmax(logits.double() / temperature, dim=1)


# ------------------------------------------------------------------------------------------------------------- unbiased


@lru_cache(maxsize=8)
def captures(shape: str, draws: tuple[float, float, float] = (40, 24, 8)) -> tuple[torch.Tensor, list[Payload]]:
    logits = random_logits(3, VOCAB, seed=5, spread=SHAPES[shape])
    codec = TailCodec(*draws)
    return logits, [stored(logits, seed, codec) for seed in range(NUM_CAPTURES)]


def z_scores(values: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """How many standard errors the mean of ``values`` [captures, ...] is from ``expected``."""
    error = values.std(dim=0) / math.sqrt(values.shape[0])
    return ((values.mean(dim=0) - expected) / error.clamp(min=1e-9)).abs()


@pytest.mark.parametrize("draws", [(40, 24, 8), (3, 5, 2)], ids=["default", "few"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("temperature", STORED_TEMPERATURES)
def test_weights_are_unbiased(shape: str, temperature: float, draws: tuple[float, float, float]) -> None:
    logits, payloads = captures(shape, draws)
    codec = TailCodec(*draws)
    exact = exact_probabilities(logits, temperature)
    found = torch.stack([dense(codec.decode(payload, 0, 3, temperature, VOCAB), VOCAB) for payload in payloads])
    signs = torch.randint(0, 2, (VOCAB, 6), generator=torch.Generator().manual_seed(0)).double() * 2 - 1
    order = exact.argsort(dim=1, descending=True)
    places = torch.zeros_like(order).scatter_(1, order, torch.arange(VOCAB).expand(3, -1))
    classes = torch.stack([(places < 3), (places >= 3) & (places < 30), places >= 30], dim=2).double()
    assert z_scores(found @ signs, exact @ signs).amax() < 4.5
    sums = torch.einsum("cnv,nvk->cnk", found, classes)
    assert z_scores(sums, torch.einsum("nv,nvk->nk", exact, classes)).amax() < 4.5
    if draws[0] == 40:  # what that says: the mean misses no mass larger than this
        assert float((sums.mean(dim=0) - torch.einsum("nv,nvk->nk", exact, classes)).abs().amax()) < 0.03


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("temperature", STORED_TEMPERATURES)
def test_the_divergence_and_its_gradient_are_unbiased(shape: str, temperature: float) -> None:
    """Of the loss itself, against the loss with the full distribution."""
    logits, payloads = captures(shape)
    generator = torch.Generator().manual_seed(2)
    head = OutputHead(torch.randn(VOCAB, 8, generator=generator))
    hidden = torch.randn(3, 8, generator=generator)

    def outcome(signal: SparseSignal | LogitsSignal) -> torch.Tensor:
        leaf = hidden.clone().requires_grad_()
        labels = torch.zeros(3, dtype=torch.int64)
        output = reference_loss(leaf, head, labels, signal=signal, alpha=1.0, temperature=temperature)
        output.loss.backward()
        assert leaf.grad is not None
        return torch.cat([output.kd[None], leaf.grad.flatten()]).double()

    full = outcome(LogitsSignal(logits, torch.ones(3, dtype=torch.bool)))
    some = torch.stack([outcome(CODEC.decode(payload, 0, 3, temperature, VOCAB)) for payload in payloads[:80]])
    assert z_scores(some, full).amax() < 4.5


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("temperature", [0.8, 1.2, 1.5, 3.0])
def test_between_stored_temperatures_the_direction_is_unbiased(shape: str, temperature: float) -> None:
    """Relative weights of a position; their common factor carries the error of an interpolation, bounded here."""
    logits, payloads = captures(shape)
    exact = exact_probabilities(logits, temperature)
    found = torch.stack([dense(CODEC.decode(payload, 0, 3, temperature, VOCAB), VOCAB) for payload in payloads])
    factor = found.sum(dim=2).mean(dim=0)
    assert float((factor - 1).abs().amax()) < 0.1
    signs = torch.randint(0, 2, (VOCAB, 6), generator=torch.Generator().manual_seed(0)).double() * 2 - 1
    assert z_scores(found @ signs / factor[None, :, None], exact @ signs).amax() < 5.5


@lru_cache(maxsize=1)
def read_back() -> tuple[torch.Tensor, Levels, Values]:
    """Logits of positions as different as a model's, from sure ones to open ones, and what is stored of them."""
    generator = torch.Generator().manual_seed(0)
    spread = 0.7 + 2.8 * torch.rand(600, 1, generator=generator)
    slope = 2.0 * torch.rand(600, 1, generator=generator)
    logits = spread * torch.randn(600, 3000, generator=generator) - slope * torch.log(torch.arange(3000) + 10.0)
    draws = Draws(48, 30, 8)
    levels, values = read_levels(stored(logits, codec=TailCodec(48, 30, 8))["bytes"].numpy(), draws, 3000, len(NODES))
    return logits, levels, values


@pytest.mark.parametrize("temperature", [0.7, 0.8, 1.15, 1.3, 1.5, 1.7, 3.0])
def test_between_stored_temperatures_the_mass_is_right_on_average(temperature: float) -> None:
    """Within 0.3 %: the mean over positions of the factor that interpolating the log-partition puts on all weights."""
    logits, levels, values = read_back()
    exponent = 2.0 / temperature
    exact = torch.logsumexp(exponent * torch.log_softmax(logits.double() / 2, 1), 1).numpy()
    bias = np.exp(exact - partition_of(levels, values, exponent)).mean() - 1
    assert abs(bias) < 0.003


def test_version_1_has_no_log_partition_at_four_thirds() -> None:
    """The rest of its bytes is the same, and so is what it says at the temperatures it has."""
    logits = random_logits(5, 400, spread=3.0)
    old, new = (get_codec("tail", version, CODEC.options) for version in TailCodec.versions)
    encoded = new.encode(logits.clone(), 1, 0)
    payloads = old.pack(encoded), new.pack(encoded)
    assert 0 < payloads[1]["bytes"].numel() - payloads[0]["bytes"].numel() < 5 * 3
    for temperature in (2 / 3, 1.0, 2.0, 4.0, 1.3):
        one, other = (
            codec.decode(payload, 0, 5, temperature, 400) for codec, payload in zip((old, new), payloads, strict=True)
        )
        assert torch.equal(one.ids, other.ids)
        assert torch.equal(one.weights, other.weights) == (temperature != 1.3)
    with pytest.raises(PayloadError):
        old.decode(payloads[1], 0, 5, 1.0, 400)


def test_what_a_store_is_begun_with_follows_from_what_it_will_hold() -> None:
    many, few = usual_codec("tail", 9_999_999_999), usual_codec("tail", 10_000_000_000)
    assert many.options == {"draws_t1": 180, "draws_t2": 112, "draws_t4": 30}
    assert few.options == TailCodec().options == {"draws_t1": 48, "draws_t2": 30, "draws_t4": 8}
    assert usual_codec("topk", 10**12).options == {"k": 64}


def test_variance_is_what_the_draws_allow() -> None:
    """Of a flat tail at T=2: about mass / draws a position, that of as many independent draws."""
    _, payloads = captures("flat")
    found = torch.stack([dense(CODEC.decode(payload, 0, 3, 2.0, VOCAB), VOCAB) for payload in payloads])
    variance = found.var(dim=0).sum(dim=1)
    assert float(variance.amax()) < 1.1 / DRAWS.at_2


# --------------------------------------------------------------------------------------------- the plain specification


def wanted(base: np.ndarray, partition: np.ndarray) -> np.ndarray:
    """Intensity as the docstring of ``intensity`` has it: draws_T q_T, the greatest of three."""
    at_4, at_1 = (np.exp(exponent * base - partition[NODES.index(exponent)]) for exponent in (0.5, 2.0))
    return np.maximum(np.maximum(DRAWS.at_1 * at_1, DRAWS.at_2 * np.exp(base)), DRAWS.at_4 * at_4)


@given(vocab=st.integers(1, 600), rows=st.integers(1, 4), seed=st.integers(0, 2**40), spread=st.floats(0.0, 6.0))
def test_what_is_kept(vocab: int, rows: int, seed: int, spread: float) -> None:
    """Exact ids and draws as a walk over every id and every slot finds them."""
    logits = random_logits(rows, vocab, seed=seed % 1000, spread=spread)
    data = stored(logits, seed)["bytes"].numpy()
    levels, values = read_levels(data, DRAWS, vocab, len(NODES))
    known = candidates(vocab)
    base = torch.log_softmax(logits.double() / 2, dim=1).numpy()
    for row in range(rows):
        partition = np.array([np.log(np.exp(exponent * base[row]).sum()) for exponent in NODES])
        mine = values.head_rows == row
        exact = levels.head_ids[mine]
        intensity = wanted(base[row], partition)
        met = np.minimum(intensity, known.share * known.window)
        worth = intensity**2 / met + met
        assert set(np.flatnonzero(worth > EXACT_PRICE + 1e-3)) <= set(exact) or exact.size == MOST_EXACT
        assert exact.size == 1 or (worth[exact] > EXACT_PRICE - 1e-3).all()
        assert exact.size == np.unique(exact).size
        assert (np.diff(base[row, exact]) <= 1e-5).all()
        assert np.abs(values.head_base[mine] - base[row, exact]).max() <= 0.0625 + 1e-4

        numbers = uniforms(seed, row, 1)[0]
        slots = np.arange(known.window)
        ids = known.sequence[window_starts(seed, row, 1, known)[0] + slots]
        dither = (numbers[5] + slots * DRAW_TURN) % 1.0
        level = np.floor(base[row, ids] / DRAW_STEP + dither)
        rounded = (level + 0.5 - dither) * DRAW_STEP
        margin = np.log(wanted(rounded, values.partition[row]) / known.share[ids]) - np.log(slots + 1 - numbers[0])
        margin[np.isin(ids, exact)] = -1.0
        drawn = levels.draw_slots[values.draw_rows == row]
        certain, possible = np.flatnonzero(margin > 1e-4), np.flatnonzero(margin > -1e-4)
        assert set(certain) <= set(drawn) <= set(possible)
        np.testing.assert_array_equal(levels.draw_levels[values.draw_rows == row], level[drawn])


@given(vocab=st.integers(1, 400), rows=st.integers(0, 5), seed=st.integers(0, 2**62), spread=st.floats(0.0, 6.0))
def test_all_integers_survive(vocab: int, rows: int, seed: int, spread: float) -> None:
    encoded = CODEC.encode(random_logits(rows, vocab, seed=seed % 997, spread=spread), seed, 0)
    payload = CODEC.pack(encoded)
    if rows == 0:
        assert payload["bytes"].numel() == 0
        return
    levels, _ = read_levels(payload["bytes"].numpy(), DRAWS, vocab, len(NODES))
    assert (levels.seed, levels.vocab_size, levels.num_positions) == (seed, vocab, rows)
    np.testing.assert_array_equal(levels.head_counts, encoded["head_counts"])
    np.testing.assert_array_equal(levels.partition, encoded["partition"])
    np.testing.assert_array_equal(levels.draw_counts, encoded["draw_counts"])
    head = np.arange(MOST_EXACT) < levels.head_counts[:, None]
    draw = np.arange(most_draws(DRAWS)) < levels.draw_counts[:, None]
    np.testing.assert_array_equal(levels.head_ids, encoded["head_ids"].numpy()[head])
    np.testing.assert_array_equal(levels.head_levels, encoded["head_levels"].numpy()[head])
    np.testing.assert_array_equal(levels.draw_slots, encoded["draw_slots"].numpy()[draw])
    np.testing.assert_array_equal(levels.draw_levels, encoded["draw_levels"].numpy()[draw])
    assert write_levels(levels, DRAWS) == payload["bytes"].numpy().tobytes()


def test_parts_add_up_to_the_payload() -> None:
    payload = stored(random_logits(40, 700, seed=5, spread=3.0), 9)
    parts = CODEC.parts(payload, 700)
    assert sum(parts.values()) == payload["bytes"].numel()
    assert parts["exact ids"] > 0
    assert parts["draws"] > 0
    assert CODEC.parts(stored(torch.zeros(0, 700)), 700) == {}


def test_a_draw_below_the_least_level_is_left_out() -> None:
    """As float32 and float64 may disagree by a rounding error: it must not shift the levels of the others."""
    data = stored(random_logits(4, 300))["bytes"].numpy()
    levels, values = read_levels(data, DRAWS, 300, len(NODES))
    levels.draw_levels[5] = values.least_levels(DRAWS)[5] - 1
    again, _ = read_levels(np.frombuffer(write_levels(levels, DRAWS), np.uint8), DRAWS, 300, len(NODES))
    np.testing.assert_array_equal(again.draw_slots, np.delete(levels.draw_slots, 5))
    np.testing.assert_array_equal(again.draw_levels, np.delete(levels.draw_levels, 5))


# ------------------------------------------------------------------------------------------------------- form and size


@pytest.mark.parametrize("vocab", [1, 2, 64, 65, 300, 65_537, 151_936])
def test_any_vocabulary(vocab: int) -> None:
    logits = random_logits(2, vocab, spread=1.0)
    logits[:, vocab - 1] += 30.0
    for temperature in (2 / 3, 1.5, 4.0):
        signal = CODEC.decode(stored(logits), 0, 2, temperature, vocab)
        assert signal.tail_mass.eq(0).all()
        assert signal.weights.isfinite().all()
        assert signal.weights.ge(0).all()
        assert signal.log_probs.isfinite().all()
        assert int(signal.ids.max()) == vocab - 1
        assert signal.ids.dtype == torch.int64
        if vocab == 1:
            torch.testing.assert_close(signal.weights, torch.ones(2, 1), rtol=0.05, atol=0)


@pytest.mark.parametrize("rows_at_once", [1, 2, 7])
@pytest.mark.parametrize("threads", [1, 2])
def test_threads_and_chunks_change_no_byte(threads: int, rows_at_once: int) -> None:
    """Of a vocabulary so large that one row's sums are shared among threads and few rows make a block."""
    logits = random_logits(7, 50_001, seed=3)
    expected = stored(logits)["bytes"]
    usual = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        chunks = [CODEC.encode(logits[at : at + rows_at_once].clone(), 1, at) for at in range(0, 7, rows_at_once)]
    finally:
        torch.set_num_threads(usual)
    found = CODEC.pack({name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]})
    assert torch.equal(found["bytes"], expected)


def test_no_positions() -> None:
    payload = stored(torch.zeros(0, 300))
    signal = CODEC.decode(payload, 0, 0, 2.0, 300)
    assert signal.num_positions == 0
    with pytest.raises(PayloadError, match="0 positions, 1 wanted"):
        CODEC.decode(payload, 0, 1, 2.0, 300)


def test_seeds_make_captures() -> None:
    logits = random_logits(3, 300)
    assert torch.equal(stored(logits, 7)["bytes"], stored(logits, 7)["bytes"])
    assert not torch.equal(stored(logits, 7)["bytes"], stored(logits, 8)["bytes"])


def test_easy_positions_take_few_bytes() -> None:
    sure, unsure = torch.zeros(100, 5000), random_logits(100, 5000, spread=2.0)
    sure[:, 17] = 40.0
    assert stored(sure)["bytes"].numel() / 100 < 4
    assert 15 < stored(unsure)["bytes"].numel() / 100 < 60


def test_more_draws_cost_more_and_err_less() -> None:
    logits = random_logits(200, 3000, spread=2.0)
    exact = exact_probabilities(logits, 2.0)
    sizes, errors = [], []
    for factor in (1, 4):
        codec = TailCodec(10 * factor, 6 * factor, 2 * factor)
        payload = stored(logits, 3, codec)
        sizes.append(payload["bytes"].numel())
        errors.append(float((dense(codec.decode(payload, 0, 200, 2.0, 3000), 3000) - exact).norm()))
    assert 1.5 < sizes[1] / sizes[0] < 4
    assert errors[1] / errors[0] == pytest.approx(0.5, abs=0.12)


def test_ids_far_more_wanted_than_common_are_not_lost() -> None:
    """Ids wanted 0.3 times that a window meets 0.1 times, not worth storing exactly: weighted by how often met."""
    vocab = 20_000
    logits = torch.zeros(1, vocab)
    logits[0, -60:] = 5.6
    exact = exact_probabilities(logits, 1.0)[0, -60:].sum()
    found = [dense(CODEC.decode(stored(logits, s), 0, 1, 1.0, vocab), vocab)[0, -60:].sum() for s in range(150)]
    assert z_scores(torch.stack(found)[:, None], exact).amax() < 4.5
    assert float(torch.stack(found).mean()) == pytest.approx(float(exact), rel=0.15)


def test_the_same_logits_up_to_a_constant() -> None:
    logits = random_logits(5, 400)
    assert torch.equal(stored(logits)["bytes"], stored(logits + 64.0)["bytes"])


@given(seed=st.integers(0, 10_000), data=st.data())
def test_damaged_bytes_are_read_or_refused(seed: int, data: st.DataObject) -> None:
    """A checksum guards a record, but no bytes may do worse than a wrong signal."""
    payload = stored(random_logits(4, 300, seed=seed % 17))
    damaged = payload["bytes"].clone()
    for _ in range(data.draw(st.integers(0, 3))):
        damaged[data.draw(st.integers(0, damaged.numel() - 1))] = data.draw(st.integers(0, 255))
    damaged = damaged[: data.draw(st.integers(0, damaged.numel()))]
    try:
        signal = CODEC.decode({"bytes": damaged}, 0, 4, 1.0, 300)
    except PayloadError:
        return
    assert int(signal.ids.max()) < 300


def test_bytes_behind_the_end_are_refused() -> None:
    payload = stored(random_logits(4, 300))
    longer = torch.cat([payload["bytes"], torch.zeros(2, dtype=torch.uint8)])
    with pytest.raises(PayloadError):
        CODEC.decode({"bytes": longer}, 0, 4, 2.0, 300)


def test_a_few_bytes_do_not_promise_billions_of_exact_ids() -> None:
    """They are refused before memory is taken for them."""
    out = BitWriter()
    for number in (2, 300, 0):
        out.number(number)
    out.rice(np.full(2, 1 << 34))
    with pytest.raises(BitsError, match="an impossible number of exact ids"):
        read_levels(np.frombuffer(out.bytes() + bytes(8), np.uint8), DRAWS, 300, len(NODES))


def test_version_1_is_read_as_it_was_written() -> None:
    """Bytes of an older program. If this fails, stored records have become unreadable: raise the version."""
    old = (
        "02ac02959aef3a0001060601243a0f0001017403010a3330020124092003010a213210547698badcfe00010b3ffe010a0201050b00005000"
        "0002030403899725901b040001590001e2"
    )
    payload = {"bytes": torch.tensor(list(bytes.fromhex(old)), dtype=torch.uint8)}
    signal = TailCodec(6, 3, 2, version=1).decode(payload, 0, 2, 1.0, 300)
    assert signal.ids.tolist() == [[159, 220, 106, 116, 125, 0, 0, 0, 0], [231, 31, 213, 97, 167, 123, 269, 158, 158]]
    first = [0.147771, 0.157543, 0.077209, 0.141797, 0.141797, 0.0, 0.0, 0.0, 0.0]
    second = [0.164095, 0.008174, 0.049165, 0.062823, 0.141797, 0.141797, 0.141797, 0.141797, 0.141797]
    torch.testing.assert_close(signal.weights, torch.tensor([first, second]), rtol=0, atol=1e-6)


@given(exponent=st.floats(0.01, 4.0), step=st.sampled_from([0.03125, 0.125, 1.0]), value=st.floats(-20, 0))
def test_dithering_is_corrected_exactly(exponent: float, step: float, value: float) -> None:
    """Averaged over all dithers, a rounded value's power is the value's own, and so is power times logarithm."""
    dither = (np.arange(100_000) + 0.5) / 100_000
    rounded = (np.floor(value / step + dither) + 0.5 - dither) * step
    assert np.abs(rounded - value).max() <= step / 2 + 1e-9
    power = np.exp(exponent * rounded) / dither_gain(exponent, step)
    assert power.mean() == pytest.approx(math.exp(exponent * value), rel=1e-3)
    log = exponent * rounded - dither_shift(exponent, step)
    assert (power * log).mean() / math.exp(exponent * value) == pytest.approx(exponent * value, rel=1e-3, abs=1e-3)
