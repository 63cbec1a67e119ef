"""The ids a reader can make by itself: every id in proportion, evenly, the same everywhere."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from liquid_llm.signal_store.codecs.tail.draws import NUM_STREAMS, candidates, uniforms, window_starts

VOCABULARIES = [1, 2, 3, 63, 300, 4097, 49_152]


@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_the_sequence_holds_every_id_in_proportion(vocab: int) -> None:
    known = candidates(vocab)
    cycle = known.sequence[: known.total_cells]
    assert known.num_cells.min() >= 1
    assert known.num_cells.sum() == known.total_cells
    np.testing.assert_array_equal(np.bincount(cycle, minlength=vocab), known.num_cells)
    np.testing.assert_array_equal(known.sequence[known.total_cells :], cycle[: known.window])
    assert 1 <= known.window <= known.total_cells


@pytest.mark.parametrize("vocab", [300, 49_152])
def test_frequent_ids_come_first(vocab: int) -> None:
    cells = candidates(vocab).num_cells
    assert (np.diff(cells) <= 1).all()  # the shares fall; cells are whole, so neighbours may differ by rounding
    expected = np.log1p(vocab / 2 / 1000) / np.log1p(vocab / 1000)  # of 1 / (id + 1000)
    assert cells[: vocab // 2].sum() / cells.sum() == pytest.approx(0.75 * expected + 0.25 * 0.5, abs=0.13)


@pytest.mark.parametrize("length", [64, 1000, 4096])
def test_every_stretch_is_even(length: int) -> None:
    """Ids met in any stretch differ from their share of it by little: a random list would differ by its square root."""
    known = candidates(4097)
    rng = np.random.default_rng(0)
    for start in rng.integers(0, known.total_cells, 20):
        stretch = np.take(known.sequence, np.arange(start, start + length) % known.total_cells)
        below = np.cumsum(np.bincount(stretch, minlength=4097))
        expected = np.cumsum(known.share) * length
        assert np.abs(below - expected).max() < 8


@given(seed=st.integers(0, 2**63 - 1), start=st.integers(0, 5000), count=st.integers(0, 30))
def test_numbers_belong_to_seed_and_position(seed: int, start: int, count: int) -> None:
    known = candidates(300)
    whole = uniforms(seed, 0, start + count)
    np.testing.assert_array_equal(whole[start:], uniforms(seed, start, count))
    np.testing.assert_array_equal(
        window_starts(seed, 0, start + count, known)[start:], window_starts(seed, start, count, known)
    )
    assert whole.shape == (start + count, NUM_STREAMS)
    assert ((whole >= 0) & (whole < 1)).all()


def test_numbers_look_uniform_and_unrelated() -> None:
    numbers = np.concatenate([uniforms(seed, 0, 500) for seed in range(40)])  # 20,000 rows
    assert np.abs(numbers.mean(axis=0) - 0.5).max() < 4.5 * (1 / 12 / 20_000) ** 0.5
    correlations = np.corrcoef(np.concatenate([numbers[1:], numbers[:-1]], axis=1).T)
    assert np.abs(correlations - np.eye(2 * NUM_STREAMS)).max() < 4.5 / 20_000**0.5


def test_windows_of_a_record_start_all_over_the_circle() -> None:
    """In cells (the order of the prior), not in places of the sequence: gaps between neighbours are even."""
    known = candidates(49_152)
    step = int(known.total_cells * (5**0.5 - 1) / 2) | 1
    cells = np.sort(window_starts(3, 0, 200, known) * step % known.total_cells)
    gaps = np.diff(np.append(cells, cells[0] + known.total_cells))
    assert gaps.max() < 3 * known.total_cells / 200


def test_first_windows_are_uniform_over_seeds() -> None:
    known = candidates(300)
    starts = np.array([window_starts(seed, 0, 1, known)[0] for seed in range(4000)])
    counts = np.bincount(starts * 16 // known.total_cells, minlength=16)
    assert ((counts - 250) ** 2 / 250).sum() < 45  # chi-square of 15 degrees of freedom: one in ten thousand


def test_stored_records_depend_on_these_numbers() -> None:
    """Another value here makes every stored record unreadable: raise the codec's version with it."""
    known = candidates(49_152)
    assert (known.total_cells, known.window, known.stride) == (262_144, 4096, 47_926)
    assert known.sequence[:6].tolist() == [0, 14_147, 2005, 32_634, 7476, 528]
    assert known.num_cells[[0, 1000, 49_151]].tolist() == [55, 28, 3]
    assert window_starts(12345, 0, 2, known).tolist() == [19_643, 67_569]
    numbers = [0.8690368279451488, 0.44260595544688175, 0.10789286173763668]
    np.testing.assert_allclose(uniforms(12345, 7, 1)[0, :3], numbers, rtol=1e-15)
    assert [candidates(vocab).window for vocab in (128_256, 151_936)] == [8192, 16_384]
