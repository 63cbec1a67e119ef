"""The arithmetic of ``bench_retention``: what is drawn, what is compared with what, and the interval of a share."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from benchmarks.retention.data import Texts, draw_batches, padded
from benchmarks.retention.findings import gains, retention
from benchmarks.retention.sketch import MOST_BITS, allot_bits, look_up, make_cells
from benchmarks.retention.students import Case, compare


def texts_of(*lengths: int) -> Texts:
    return Texts([np.arange(length) for length in lengths], np.array(["text"] * len(lengths)))


def test_a_case_says_tokens_temperature_and_where_alpha_goes() -> None:
    case = Case.parse("1024:2:0.7-0.4")
    assert case.name == "1024:2:0.7-0.4"
    assert case.objective(0.5).alpha == pytest.approx(0.55)
    assert Case.parse("32768:1:0.7").objective(0.9).alpha == 0.7


def test_every_epoch_has_each_text_once_and_no_batch_is_too_full() -> None:
    texts = texts_of(3, 5, 2, 7, 4, 6)
    batches = list(draw_batches(texts, 10, 9, seed=1))
    order = [one for batch in batches for one in batch]
    for start in range(0, len(order) - 5, 6):
        assert sorted(order[start : start + 6]) == list(range(6))
    assert all(sum(texts.ids[one].size for one in batch) <= 10 for batch in batches)
    for batch, after in pairwise(batches):  # nor too empty
        assert sum(texts.ids[one].size for one in [*batch, after[0]]) > 10
    assert list(draw_batches(texts, 10, 9, seed=1)) == batches


def test_positions_and_labels_belong_together() -> None:
    texts = texts_of(3, 5)
    ids, places, labels = padded(texts, [1, 0], torch.device("cpu"))
    assert (ids.flatten()[places] + 1).tolist() == labels.tolist()  # each text counts up
    assert texts.rows([1, 0]).tolist() == [2, 3, 4, 5, 0, 1]


def test_a_model_is_no_distance_from_itself() -> None:
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    found = compare(logits, logits, torch.arange(4))
    assert found[:, 1:].abs().max() < 1e-6
    assert torch.allclose(found[:, 0], torch.nn.functional.cross_entropy(logits, torch.arange(4), reduction="none"))
    assert (compare(logits, logits.flip(1), torch.arange(4))[:, 1:] > 0).all()


def test_a_share_is_of_the_same_seed_and_its_interval_holds_it() -> None:
    rows = [
        {"case": case, "seed": seed, "arm": arm, "texts": [[value + 0.1 * seed, 0, 0], [2 * value, 0, 0]]}
        for seed in (0, 1)
        for case, arm, value in (("256", "ce", 5.0), ("256:1:0.7", "full", 4.0), ("256:1:0.7", "tail", 4.2))
    ]
    contents = {
        "rows": [*rows, {"case": "256:1:0.7", "seed": 2, "arm": "tail", "texts": [[9, 0, 0]] * 2}],
        "types": ["text", "code"],
    }
    found = gains(contents, "256:1:0.7", "tail", "all", 0)
    assert found is not None
    assert found.shape == (2, 2, 2)  # the third seed has nothing to be compared with
    share, low, high = retention(found)
    assert share == pytest.approx(0.8)
    assert low <= share <= high
    noisy = np.random.default_rng(0).normal(1.0, 0.5, (3, 40, 1)) * np.array([0.9, 1.0])
    noisy[..., 0] += np.random.default_rng(1).normal(0.0, 0.2, (3, 40))
    share, low, high = retention(noisy)
    assert low < 0.9 < high
    assert high - low < 0.2


def test_bits_go_where_they_take_off_most() -> None:
    bits = allot_bits(torch.tensor([16.0, 1.0, 1e-9]), 1)
    assert bits.tolist() == [5, 3, 0]
    assert allot_bits(torch.tensor([1.0, 1.0]), 100).tolist() == [MOST_BITS] * 2
    values = torch.randn(4000, generator=torch.Generator().manual_seed(0))
    error = (values - look_up(values, make_cells(values, 2))).square().mean()
    assert float(error) == pytest.approx(0.1175, rel=0.1)  # the best four values of a Gaussian (Max 1960)
