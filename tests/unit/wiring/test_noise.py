"""The law of noise, and the variance it is fed with."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.support.datasets import token_dataset
from tests.support.stores import writer
from tests.support.teachers import make_samples, random_logits

from liquid_llm.data.loader import TrainingStream, WeightedDataset
from liquid_llm.signal_store.codecs import get_codec
from liquid_llm.signal_store.store import open_store
from liquid_llm.signal_store.survey import DrawnVariance, drawn_variance
from liquid_llm.wiring.noise import WORTH_SAYING, Noise, learnt_positions, most_cost

# SmolLM2's mean variance on prose, mathematics and code with draws 48, 30, 8, by temperature.
VARIANCE = {1.0: DrawnVariance(0.0037, 0.0016), 2.0: DrawnVariance(0.0247, 0.0173)}


def cost(alpha: float, temperature: float, num_positions: float, variance: DrawnVariance | None = None) -> float:
    return Noise.of_step(alpha, temperature, variance or VARIANCE[temperature], num_positions).cost


def test_what_ended_worse_than_without_a_teacher_is_flagged_and_what_did_not_is_not() -> None:
    """Settings of docs/LOG.md with what they lost against full logits, in nats: whole vocabularies, then 4,096 ids."""
    assert cost(0.7, 2.0, 256) > most_cost(0.7)  # lost 0.070 of a gain of 0.037
    for alpha, temperature, num_positions, lost in (
        (0.7, 1.0, 256, 0.031),
        (0.4, 1.0, 256, 0.019),
        (0.4, 2.0, 256, 0.060),
        (0.7, 1.0, 1024, 0.0191),
        (0.4, 2.0, 1024, 0.0452),
        (0.4, 2.0, 32768, 0.0084),
        (0.7, 1.0, 32768, 0.0064),
    ):
        found = cost(alpha, temperature, num_positions)
        assert found < most_cost(alpha)
        assert found == pytest.approx(lost, abs=0.011)
    assert cost(0.7, 1.0, 32768) < WORTH_SAYING
    for alpha, variance, lost, gain in (
        (0.6, 1.10, 0.285, 0.059),
        (0.6, 0.354, 0.121, 0.059),
        (0.3, 0.0854, 0.012, 0.142),
    ):
        found = cost(alpha, 2.0, 96, DrawnVariance(variance, 0.0))
        assert (found > most_cost(alpha)) == (lost > gain)
        assert found == pytest.approx(lost, abs=0.045)


def test_more_draws_and_more_positions_cost_less() -> None:
    variances = [DrawnVariance(0.1, 0.05), DrawnVariance(0.01, 0.005)]
    costs = [cost(0.7, 2.0, positions, variance) for positions in (256, 4096) for variance in variances]
    assert costs == sorted(costs, reverse=True)
    assert Noise(0.0, 0.0).cost == 0.0
    assert Noise(0.4, 0.2).in_larger_steps(4) == Noise(0.2, 0.1)


def test_the_variance_of_a_store_is_that_of_its_captures(tmp_path: Path) -> None:
    """Of one position encoded with 300 seeds, ids' variances summed; the store's is of 60 positions encoded once."""
    codec, vocab = get_codec("tail", options={"draws_t1": 20, "draws_t2": 12, "draws_t4": 4}), 6000
    logits = random_logits(1, vocab, seed=3, spread=2.5)
    store = writer(tmp_path, codec=codec, vocab_size=vocab)
    for number, sample in enumerate(make_samples(6, type="code", low=11, high=11)):
        rows = codec.encode(logits.expand(10, -1).clone(), number, 0)
        store.write(sample, 11, codec.pack(rows))
    store.finish()
    reader = open_store(str(tmp_path))
    captures = [codec.pack(codec.encode(logits.clone(), seed, 0)) for seed in range(300)]
    for temperature in (1.0, 2.0):
        dense = torch.zeros(300, vocab)
        for seed, capture in enumerate(captures):
            signal = codec.decode(capture, 0, 1, temperature, vocab)
            dense[seed].scatter_add_(0, signal.ids[0], signal.weights[0])
        found = drawn_variance(reader, "code", samples=6, temperature=temperature)
        assert found.total == pytest.approx(float(dense.var(0).sum()), rel=0.25)
        assert found.rare == pytest.approx(float(dense.var(0)[4096:].sum()), rel=0.25)
    assert drawn_variance(reader, "math_tool", samples=6, temperature=1.0) == (0.0, 0.0)
    reader.close()


@pytest.mark.parametrize("positions", [None, 0.25])
def test_what_is_not_learnt_or_not_stored_is_no_noise_of_a_position(tmp_path: Path, positions: float | None) -> None:
    """A prompt has no rows; positions without a row dilute the draws of the others."""
    codec, vocab, whole = get_codec("tail", options={"draws_t1": 20, "draws_t2": 12, "draws_t4": 4}), 2000, {}
    logits = random_logits(1, vocab, seed=3, spread=2.5)
    samples = make_samples(6, type="code", low=41, high=41)
    for name, learnt, share in (("whole", range(40), None), ("part", range(20, 40), positions)):
        store = writer(tmp_path / name, codec=codec, vocab_size=vocab, positions=share)
        for number, sample in enumerate(samples):
            mask = np.zeros(41, dtype=bool)
            mask[1:][list(learnt)] = True
            stored = sample.learnt_positions(41) & mask[1:]
            if share is not None:
                stored[np.flatnonzero(stored)[store.identity.num_chosen(20) :]] = False
            rows = codec.encode(logits.expand(int(stored.sum()), -1).clone(), number, 0)
            store.write(replace(sample, learnt=mask), 41, codec.pack(rows), stored)
        store.finish()
        with closing(open_store(str(tmp_path / name))) as reader:
            whole[name] = drawn_variance(reader, "code", samples=6, temperature=2.0).total
    assert whole["part"] == pytest.approx(whole["whole"] * (positions or 1.0), rel=0.1)


def test_a_steps_positions_are_those_that_its_micro_batches_learn() -> None:
    """No padding, no prompt, no last token of a sample; datasets of one type count by their weights."""
    rng = np.random.default_rng(0)
    samples = [rng.integers(1, 99, length).tolist() for length in rng.integers(5, 41, 200)]
    answers = [[n >= len(one) // 2 for n in range(len(one))] for one in samples]
    mixture = [
        WeightedDataset(token_dataset([rng.integers(1, 99, 400).tolist()] * 6), 1.0),
        WeightedDataset(token_dataset(samples, "code"), 1.0),
        WeightedDataset(token_dataset(samples, "code", learnt=answers), 3.0),
    ]
    stream = TrainingStream(mixture, block_size=40, batch_size=4, seed=0)
    means = [
        np.mean([order.micro_batch(place).num_positions for place in range(order.num_micro_batches)])
        for order in stream.orders
    ]
    assert means[0] == 4 * 39
    assert means[2] < 0.6 * means[1] < 0.6 * 4 * 40
    found = learnt_positions(stream, mixture)
    assert found["lm"] == means[0]
    assert found["code"] == pytest.approx((means[1] + 3 * means[2]) / 4, rel=0.1)
