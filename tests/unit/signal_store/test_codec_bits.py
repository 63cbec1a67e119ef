"""Columns of bits: what is read is what was written, and nothing else is read."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from liquid_llm.signal_store.codecs.tail.bits import MAX_WIDTH, BitReader, BitsError, BitWriter, _likely_parameters

Ints = NDArray[np.int64]
COUNTS = st.lists(st.integers(0, 300), max_size=60)
SIGNED = st.lists(st.integers(-4000, 4000), max_size=60)


def array(values: list[int]) -> Ints:
    return np.array(values, np.int64)


def read_back(writer: BitWriter) -> BitReader:
    return BitReader(np.frombuffer(writer.bytes(), np.uint8))


def check(write: Callable[[BitWriter], None], read: Callable[[BitReader], Ints], values: Ints) -> None:
    """Written between two numbers, so that a column that takes too much or too little is seen."""
    writer = BitWriter()
    writer.number(300)
    write(writer)
    writer.number(7)
    reader = read_back(writer)
    assert reader.number() == 300
    found = read(reader)
    assert found.dtype == np.int64
    np.testing.assert_array_equal(found, values)
    assert reader.number() == 7
    assert reader.bytes_left == 0


@given(values=st.lists(st.integers(0, 2**70), max_size=8))
def test_numbers(values: list[int]) -> None:
    writer = BitWriter()
    for value in values:
        writer.number(value)
    small = [value for value in values if value < 2**63]
    reader = read_back(writer)
    if small == values:
        assert [reader.number() for _ in values] == values


@given(values=COUNTS)
def test_unary(values: list[int]) -> None:
    column = array(values)
    check(lambda out: out.unary(column), lambda source: source.unary(column.size), column)


@given(groups=st.lists(COUNTS.filter(len), min_size=1, max_size=3), factor=st.sampled_from([1, 3, 50, 3000]))
def test_the_best_rice_parameter_is_among_the_likely(groups: list[list[int]], factor: int) -> None:
    columns = [array(values) * factor for values in groups]
    likely = _likely_parameters(np.array([one.sum() for one in columns]), np.array([one.size for one in columns]))
    for column in columns:
        assert int(np.argmin([(column >> k).sum() + column.size * k for k in range(16)])) in likely
    assert len(likely) < 16


@given(values=COUNTS, factor=st.sampled_from([1, 50, 3000]))
def test_rice(values: list[int], factor: int) -> None:
    column = array(values) * factor
    check(lambda out: out.rice(column), lambda source: source.rice(column.size), column)


@given(values=SIGNED, shift=st.integers(-100_000, 100_000))
def test_signed_and_around_the_median(values: list[int], shift: int) -> None:
    column = array(values)
    check(lambda out: out.signed(column), lambda source: source.signed(column.size), column)
    check(
        lambda out: out.around_median(column + shift), lambda source: source.around_median(column.size), column + shift
    )


@given(values=st.lists(st.one_of(st.just(0), st.integers(0, 40)), max_size=80))
def test_sparse(values: list[int]) -> None:
    column = array(values)
    check(lambda out: out.sparse(column), lambda source: source.sparse(column.size), column)


@given(values=st.lists(st.integers(0, 15), max_size=60))
def test_ranked(values: list[int]) -> None:
    column = array(values)
    check(lambda out: out.ranked(column, 4), lambda source: source.ranked(column.size, 4), column)


@given(width=st.integers(0, MAX_WIDTH), seed=st.integers(0, 1000), count=st.integers(0, 40))
def test_fixed(width: int, seed: int, count: int) -> None:
    column = np.random.default_rng(seed).integers(0, 1 << width, count)
    check(lambda out: out.fixed(column, width), lambda source: source.fixed(count, width), column)


@given(widths=st.lists(st.integers(0, MAX_WIDTH), max_size=60), seed=st.integers(0, 1000))
def test_ragged(widths: list[int], seed: int) -> None:
    sizes = array(widths)
    column = np.random.default_rng(seed).integers(0, 1 << sizes)
    check(lambda out: out.fixed(column, sizes), lambda source: source.ragged(sizes), column)


@given(values=COUNTS, groups=st.integers(1, 16), seed=st.integers(0, 1000))
def test_rice_by_groups(values: list[int], groups: int, seed: int) -> None:
    column = array(values)
    which = np.random.default_rng(seed).integers(0, groups, column.size)
    check(lambda out: out.rice_by(column, which, groups), lambda source: source.rice_by(which, groups), column)


def test_groups_of_different_size_cost_less_apart() -> None:
    rng = np.random.default_rng(0)
    which = rng.integers(0, 2, 2000)
    column = rng.geometric(np.where(which == 0, 0.5, 0.002)) - 1
    together, apart = BitWriter(), BitWriter()
    together.rice(column)
    apart.rice_by(column, which, 2)
    assert len(apart.bytes()) < 0.8 * len(together.bytes())


@pytest.mark.parametrize(("mean", "most"), [(0.3, 1.6), (1.0, 2.1), (10.0, 5.1), (1000.0, 11.7)])
def test_rice_comes_close_to_the_entropy_of_geometric_columns(mean: float, most: float) -> None:
    """Entropies: 1.27 (unary cannot go below 1 + mean), 2.0, 4.8 and 11.4 bits."""
    column = np.random.default_rng(0).geometric(1 / (1 + mean), 20_000) - 1
    writer = BitWriter()
    writer.rice(column)
    assert 8 * len(writer.bytes()) / column.size < most


COLUMNS: list[Callable[[BitReader], object]] = [
    BitReader.number,
    lambda source: source.unary(9),
    lambda source: source.rice(9),
    lambda source: source.signed(9),
    lambda source: source.sparse(9),
    lambda source: source.ranked(9, 4),
    lambda source: source.fixed(9, 13),
    lambda source: source.ragged(np.arange(9)),
    lambda source: source.rice_by(np.arange(9) % 3, 3),
    lambda source: source.around_median(9),
]


@pytest.mark.parametrize("column", COLUMNS)
def test_an_end_that_comes_too_early(column: Callable[[BitReader], object]) -> None:
    with pytest.raises(BitsError):
        column(BitReader(np.zeros(0, np.uint8)))


@given(data=st.binary(max_size=60), which=st.integers(0, len(COLUMNS) - 1))
def test_any_bytes_are_read_or_refused(data: bytes, which: int) -> None:
    source = BitReader(np.frombuffer(data, np.uint8))
    try:
        COLUMNS[which](source)
    except BitsError:
        return
    assert 0 <= source.bytes_left <= len(data)


def test_a_count_larger_than_what_follows() -> None:
    writer = BitWriter()
    writer.number(17)
    writer.fixed(array([1, 2]), 8)
    with pytest.raises(BitsError, match="17 values in 2 bytes"):
        read_back(writer).count(per_byte=8)
