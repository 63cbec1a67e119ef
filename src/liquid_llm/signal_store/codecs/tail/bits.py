"""Columns of small integers as bits, written and read by whole columns and never value by value.

    fixed    every value in its own number of bits, which the reader knows
    unary    v as v zeros and a one: right for a geometric column of mean 1
    rice     v as v >> k in unary and k fixed bits (Rice and Plaunt 1971); k is chosen by the writer, and stored
    signed   0, -1, 1, -2, 2 ... as 0, 1, 2, 3, 4 ..., in Rice code; or so around the column's median
    sparse   mostly zeros: a Rice column of the runs of zeros, and one of the other values
    ranked   few different values: a Rice column of their places in a list by falling frequency

The unary parts of a column lie together and so do its fixed parts: then both are read by a few array operations over
all values at once, at memory speed, where a usual prefix code is read one value after the other. Every column starts
at a byte.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from liquid_llm.signal_store.varints import decode_varint, encode_varint

Ints = NDArray[np.int64]
Bytes = NDArray[np.uint8]

MAX_WIDTH = 24  # bits of a fixed value: it must lie within four bytes wherever it starts
_MAX_RICE = 15


class BitsError(ValueError):
    """Bytes that end too early or say something impossible."""


class BitWriter:
    """Appends columns; ``bytes()`` is what a ``BitReader`` reads in the same order."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def number(self, value: int) -> None:
        """One non-negative integer."""
        self._parts.append(encode_varint(value))

    def fixed(self, values: Ints, widths: Ints | int) -> None:
        """``values[i]`` in ``widths[i]`` bits, lowest first."""
        widest = widths if isinstance(widths, int) else int(widths.max(initial=0))
        if widest == 0:
            return
        room = np.dtype("u1" if widest <= 8 else "<u2" if widest <= 16 else "<u4")
        bits = np.unpackbits(values.astype(room)[:, None].view(np.uint8), axis=1, bitorder="little")
        used = bits[:, :widths] if isinstance(widths, int) else bits[np.arange(bits.shape[1]) < widths[:, None]]
        self._append(used.ravel())

    def unary(self, values: Ints) -> None:
        ends = np.cumsum(values + 1)
        bits = np.zeros(int(ends[-1]) if ends.size else 0, np.uint8)
        bits[ends - 1] = 1
        self.number((bits.size + 7) // 8)
        self._append(bits)

    def rice(self, values: Ints) -> None:
        """Non-negative values, with the k that makes the column shortest."""
        parameters = _likely_parameters(values.sum(keepdims=True), np.array([values.size]))
        k = parameters[int(np.argmin([(values >> k).sum() + values.size * k for k in parameters]))]
        self.number(k)
        self.unary(values >> k)
        self.fixed(values & ((1 << k) - 1), k)

    def rice_by(self, values: Ints, groups: Ints, num_groups: int) -> None:
        """A Rice column with one k for each of ``num_groups`` groups of values, which the reader can tell apart."""
        counts = np.bincount(groups, minlength=num_groups)
        sums = np.bincount(groups, weights=values, minlength=num_groups)
        parameters = _likely_parameters(sums, counts)
        sizes = [np.bincount(groups, weights=values >> k, minlength=num_groups) + counts * k for k in parameters]
        ks = np.where(counts > 0, np.argmin(sizes, axis=0) + parameters[0], 0)
        self.fixed(ks, 4)
        k = ks[groups]
        self.unary(values >> k)
        self.fixed(values & ((1 << k) - 1), k)

    def signed(self, values: Ints) -> None:
        self.rice(np.where(values < 0, -2 * values - 1, 2 * values))

    def around_median(self, values: Ints) -> None:
        middle = int(np.median(values)) if values.size else 0
        self.number(2 * middle if middle >= 0 else -2 * middle - 1)
        self.signed(values - middle)

    def sparse(self, values: Ints) -> None:
        places = np.flatnonzero(values)
        self.number(places.size)
        self.rice(np.diff(places, prepend=-1) - 1)
        self.rice(values[places] - 1)

    def ranked(self, values: Ints, width: int) -> None:
        """Values of ``width`` bits, at most 6."""
        counts = np.bincount(values, minlength=1 << width)
        order = np.argsort(-counts, kind="stable")
        ranks = np.empty_like(order)
        ranks[order] = np.arange(order.size)
        self.fixed(order, width)
        self.rice(ranks[values])

    def bytes(self) -> bytes:
        return b"".join(self._parts)

    @property
    def size(self) -> int:
        """Bytes so far."""
        return sum(map(len, self._parts))

    def _append(self, bits: Bytes) -> None:
        self._parts.append(np.packbits(bits, bitorder="little").tobytes())


def _likely_parameters(sums: NDArray[Any], counts: Ints) -> range:
    """The k among which the best Rice parameter is, of each group of ``counts`` values that add up to ``sums``.

    One more bit a value pays as long as sum ceil((v >> k) / 2) exceeds the number of values. By the bounds of ``ceil``
    it pays while 2**k is below a third of the mean, and not once 2**k has reached the mean.
    """
    means = sums[counts > 0] / counts[counts > 0]
    highest = math.ceil(math.log2(max(1.0, means.max(initial=0.0)))) + 1  # one more for the rounding of logarithms
    lowest = math.floor(math.log2(max(1.0, means.min(initial=math.inf) / 3))) if means.size else 0
    return range(min(lowest, _MAX_RICE), min(highest, _MAX_RICE) + 1)


class BitReader:
    """Reads the columns of ``data``, which is one-dimensional uint8.

    Raises:
        BitsError: from every method, where the data cannot be what was written.
    """

    def __init__(self, data: Bytes) -> None:
        self._size = data.size
        self._data = data
        # The four bytes from each byte on, lowest first: any value of up to MAX_WIDTH bits lies within four.
        padded = np.concatenate([data, np.zeros(3, np.uint8)]).astype(np.uint32)
        self._words = padded[:-3] | (padded[1:-2] << 8) | (padded[2:-1] << 16) | (padded[3:] << 24)
        self._at = 0

    @property
    def bytes_left(self) -> int:
        return self._size - self._at

    def number(self) -> int:
        try:
            value, self._at = decode_varint(self._data, self._at)
        except (IndexError, ValueError) as error:
            raise BitsError("a number has no end") from error
        return value

    def count(self, per_byte: int) -> int:
        """A number of things of which the rest of the data holds at most ``per_byte`` a byte."""
        value = self.number()
        if value > per_byte * self.bytes_left:
            raise BitsError(f"{value} values in {self.bytes_left} bytes")
        return value

    def fixed(self, count: int, width: int) -> Ints:
        """``count`` values of ``width`` bits each."""
        if width == 0:
            return np.zeros(count, np.int64)
        return self._read(np.arange(count, dtype=np.int64) * width, width, count * width)

    def ragged(self, widths: Ints) -> Ints:
        """Values of ``widths`` bits each."""
        ends = np.cumsum(widths)
        return self._read(ends - widths, widths, int(ends[-1]) if ends.size else 0)

    def unary(self, count: int) -> Ints:
        size = self.number()
        if size > self.bytes_left:
            raise BitsError("a column ends too early")
        bits = np.unpackbits(self._data[self._at : self._at + size], bitorder="little")
        self._at += size
        ends = np.flatnonzero(bits.view(bool))
        if ends.size != count:
            raise BitsError(f"{ends.size} values in a column of {count}")
        values: Ints = ends.copy()
        values[1:] -= ends[:-1] + 1
        return values

    def rice(self, count: int) -> Ints:
        k = self.number()
        if k > _MAX_RICE:
            raise BitsError("a Rice column of an unknown kind")
        high = self.unary(count)
        return high if k == 0 else (high << k) | self.fixed(count, k)

    def rice_by(self, groups: Ints, num_groups: int) -> Ints:
        k = self.fixed(num_groups, 4)[groups]
        return (self.unary(groups.size) << k) | self.ragged(k)

    def signed(self, count: int) -> Ints:
        values = self.rice(count)
        return _signed(values)

    def around_median(self, count: int) -> Ints:
        middle = self.number()
        return self.signed(count) + _signed(np.array([middle], np.int64))

    def sparse(self, count: int) -> Ints:
        num_places = self.count(per_byte=8)
        places = np.cumsum(self.rice(num_places) + 1) - 1
        if num_places and int(places[-1]) >= count:
            raise BitsError("a value behind the end of its column")
        values = np.zeros(count, np.int64)
        values[places] = self.rice(num_places) + 1
        return values

    def ranked(self, count: int, width: int) -> Ints:
        order = self.fixed(1 << width, width)
        ranks = self.rice(count)
        if count and int(ranks.max()) >= order.size:
            raise BitsError("a value that is not in its list")
        values: Ints = order[ranks]
        return values

    def _read(self, starts: Ints, widths: Ints | int, num_bits: int) -> Ints:
        size = (num_bits + 7) // 8
        if size > self.bytes_left:
            raise BitsError("a column ends too early")
        if num_bits == 0:
            return np.zeros(starts.size, np.int64)
        starts = starts + self._at * 8
        self._at += size
        # A value without bits may lie behind the last byte.
        words = self._words[np.minimum(starts >> 3, self._size - 1)].astype(np.int64)
        values: Ints = (words >> (starts & 7)) & ((1 << np.asarray(widths, np.int64)) - 1)
        return values


def _signed(values: Ints) -> Ints:
    """0, 1, 2, 3, 4 ... as 0, -1, 1, -2, 2 ..."""
    return np.where(values & 1, -(values >> 1) - 1, values >> 1)
