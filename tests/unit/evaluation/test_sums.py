"""Sums by text: means, standard errors and calibration against plain loops, and ranks against one process."""

import math
import random
import statistics
from functools import partial

import pytest
import torch
from tests.support.ranks import World

from liquid_llm.distributed import Engine
from liquid_llm.evaluation import PositionMeasures, TextSums
from liquid_llm.evaluation.sums import COLUMNS, estimate_ratio

NAMES = [f"text-{n}" for n in range(11)]
SIZES = [3, 40, 7, 1, 12, 0, 5, 9, 30, 2, 8]


def positions(seed=0):
    """Positions of all texts, shuffled: which text each is of, its bytes and its measures."""
    chance = random.Random(seed)
    texts = [number for number, size in enumerate(SIZES) for _ in range(size)]
    chance.shuffle(texts)
    columns = {name: [chance.random() for _ in texts] for name in ("ce", "confidence", "kl", "overlap", "teacher_ce")}
    columns["teacher_confidence"] = [chance.random() for _ in texts]
    flags = {name: [chance.random() < 0.6 for _ in texts] for name in ("right", "agreement", "teacher_right")}
    flags["has_signal"] = [text % 3 > 0 for text in texts]
    return texts, [chance.randrange(5) for _ in texts], columns | flags


def measures(columns, chosen=slice(None)):
    known = torch.tensor(columns["has_signal"])[chosen]
    tensors = {name: torch.tensor(values)[chosen] for name, values in columns.items()}
    for name in ("kl", "overlap", "teacher_ce", "agreement", "teacher_right"):
        tensors[name] = tensors[name] * known
    return PositionMeasures(**tensors, tells_best=known)


def filled(seed=0, parts=1, engine=None):
    texts, sizes, columns = positions(seed)
    sums = TextSums(NAMES)
    mine = range(parts) if engine is None else range(engine.rank, parts, engine.world_size)
    for part in mine:
        chosen = slice(part * len(texts) // parts, (part + 1) * len(texts) // parts)
        sums.add(torch.tensor(texts)[chosen], measures(columns, chosen), torch.tensor(sizes)[chosen])
    return sums if engine is None else sums.sum_over(engine)


def test_sums_are_those_of_each_text_however_they_come():
    texts, sizes, columns = positions()
    for parts in (1, 5):
        rows = {row["id"]: row for row in filled(parts=parts).texts()}
        assert set(rows) == {name for name, size in zip(NAMES, SIZES, strict=True) if size}
        for number, name in enumerate(NAMES):
            own = [n for n, text in enumerate(texts) if text == number]
            if not own:
                continue
            known = [n for n in own if columns["has_signal"][n]]
            assert rows[name]["positions"] == len(own)
            assert rows[name]["bytes"] == sum(sizes[n] for n in own)
            assert rows[name]["ce"] == pytest.approx(sum(columns["ce"][n] for n in own), rel=1e-6)
            assert rows[name]["kl_positions"] == rows[name]["teacher_positions"] == len(known)
            for column in ("kl", "overlap", "teacher_ce", "agreement"):
                assert rows[name][column] == pytest.approx(sum(columns[column][n] for n in known), rel=1e-6), column
            assert rows[name]["ce_beside_teacher"] == pytest.approx(sum(columns["ce"][n] for n in known), rel=1e-6)
            assert rows[name]["teacher_bytes"] == sum(sizes[n] for n in known)


def test_means_are_over_positions_and_bits_over_bytes():
    texts, sizes, columns = positions()
    found = filled().estimates()
    known = [n for n in range(len(texts)) if columns["has_signal"][n]]
    assert found["ce"].value == pytest.approx(statistics.fmean(columns["ce"]), rel=1e-6)
    assert found["bits_per_byte"].value == pytest.approx(sum(columns["ce"]) / math.log(2) / sum(sizes), rel=1e-6)
    assert found["kl"].value == pytest.approx(statistics.fmean(columns["kl"][n] for n in known), rel=1e-6)
    assert found["agreement"].value == pytest.approx(statistics.fmean(columns["agreement"][n] for n in known), rel=1e-6)
    beside = statistics.fmean(columns["ce"][n] for n in known)
    assert found["ce_beside_teacher"].value == pytest.approx(beside, rel=1e-6) != found["ce"].value


def test_calibration_is_the_mean_gap_of_fifteen_bins():
    texts, _, columns = positions()
    for whose, confidence, right in (("", "confidence", "right"), ("teacher_", "teacher_confidence", "teacher_right")):
        used = [n for n in range(len(texts)) if not whose or columns["has_signal"][n]]
        gaps = [0.0] * 15  # as in the paper
        for n in used:
            gaps[min(int(columns[confidence][n] * 15), 14)] += columns[confidence][n] - columns[right][n]
        expected = sum(map(abs, gaps)) / len(used)
        assert filled().calibration(whose).value == pytest.approx(expected, rel=1e-6)


def test_a_perfectly_calibrated_model_has_no_error():
    sums = TextSums(["a", "b"])
    right = torch.arange(100) < 80
    confidence = torch.full((100,), 0.8, dtype=torch.float64)
    sums.add(torch.arange(100) % 2, PositionMeasures(confidence, confidence, right))
    assert sums.calibration().value == pytest.approx(0.0, abs=1e-12)
    assert sums.calibration("teacher_") is None


def test_standard_errors_are_what_other_texts_would_have_given():
    """The spread of a figure over draws of texts, against the error that a single draw tells."""
    chance = random.Random(1)

    def draw():
        sizes = [chance.randrange(1, 30) for _ in range(60)]
        values = [size * (1.0 + chance.gauss(0, 0.5)) + chance.gauss(0, 2.0) for size in sizes]
        return estimate_ratio(torch.tensor(values), torch.tensor(sizes))

    found = [draw() for _ in range(400)]
    spread = statistics.stdev(one.value for one in found)
    assert statistics.fmean(one.error for one in found) == pytest.approx(spread, rel=0.12)


def test_of_one_text_no_error_is_known_and_of_none_nothing():
    assert estimate_ratio(torch.tensor([3.0]), torch.tensor([2.0])).plain() == {"value": 1.5, "error": None}
    assert estimate_ratio(torch.tensor([0.0, 0.0]), torch.tensor([0.0, 0.0])) is None


def test_ranks_sum_to_one_process():
    expected = filled(parts=7)
    for found in World(3).run(partial(filled, 0, 7)):
        assert torch.allclose(found.sums, expected.sums)
        assert torch.allclose(found.gaps, expected.gaps)
        assert torch.allclose(found.bins, expected.bins)
    assert isinstance(Engine().sum(expected.sums), torch.Tensor)


def test_types_are_joined_with_their_texts_apart():
    one, two = filled(0), filled(1)
    both = TextSums.join([one, two])
    assert both.total("ce") == pytest.approx(one.total("ce") + two.total("ce"))
    assert len(both.texts()) == len(one.texts()) + len(two.texts())
    assert (
        both.calibration().value * both.total("positions")
        <= sum(part.calibration().value * part.total("positions") for part in (one, two)) + 1e-9
    )
    assert not set(COLUMNS) - set(both.texts()[0])
