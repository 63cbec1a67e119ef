"""Columns of small integers as bits, written and read by whole columns and never value by value.

    fixed    every value in its own number of bits, which the reader knows
    unary    v as v zeros and a one: right for a geometric column of mean 1
    rice     v as v >> k in unary and k fixed bits (Rice and Plaunt 1971); k is chosen by the writer, and stored
    signed   0, -1, 1, -2, 2 ... as 0, 1, 2, 3, 4 ...

The unary parts of a column lie together and so do its fixed parts: then both are read by a few array operations over
all values at once, at memory speed, where a usual prefix code is read one value after the other. Every column starts
at a byte.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

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
        """One non-negative integer of any size, seven bits a byte (LEB128)."""
        out = bytearray()
        while True:
            value, low = value >> 7, value & 0x7F
            out.append(low | (0x80 if value else 0))
            if not value:
                break
        self._parts.append(bytes(out))

    def fixed(self, values: Ints, widths: Ints | int) -> None:
        """``values[i]`` in ``widths[i]`` bits, lowest first."""
        if isinstance(widths, int):
            bits = (values[:, None] >> np.arange(widths)) & 1
            self._append(bits.astype(np.uint8).ravel())
            return
        starts = np.cumsum(widths) - widths
        within = np.arange(int(widths.sum())) - np.repeat(starts, widths)
        self._append(((np.repeat(values, widths) >> within) & 1).astype(np.uint8))

    def unary(self, values: Ints) -> None:
        ends = np.cumsum(values + 1)
        bits = np.zeros(int(ends[-1]) if ends.size else 0, np.uint8)
        bits[ends - 1] = 1
        self.number((bits.size + 7) // 8)
        self._append(bits)

    def rice(self, values: Ints) -> None:
        """Non-negative values, with the k that makes the column shortest."""
        sizes = [int((values >> k).sum()) + values.size * (1 + k) for k in range(_MAX_RICE + 1)]
        k = int(np.argmin(sizes))
        self.number(k)
        self.unary(values >> k)
        self.fixed(values & ((1 << k) - 1), k)

    def signed(self, values: Ints) -> None:
        self.rice(np.where(values < 0, -2 * values - 1, 2 * values))

    def bytes(self) -> bytes:
        return b"".join(self._parts)

    def _append(self, bits: Bytes) -> None:
        self._parts.append(np.packbits(bits, bitorder="little").tobytes())


class BitReader:
    """Reads the columns of ``data``, which is one-dimensional uint8.

    Raises:
        BitsError: from every method, where the data cannot be what was written.
    """

    def __init__(self, data: Bytes) -> None:
        self._size = data.size
        self._data = np.concatenate([data, np.zeros(4, np.uint8)])  # so that any value can be read as four bytes
        self._at = 0

    @property
    def bytes_left(self) -> int:
        return self._size - self._at

    def number(self) -> int:
        value, shift = 0, 0
        while True:
            if self._at >= self._size or shift > 63:
                raise BitsError("a number has no end")
            byte = int(self._data[self._at])
            self._at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
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
        ends = np.flatnonzero(bits)
        if ends.size != count:
            raise BitsError(f"{ends.size} values in a column of {count}")
        return np.diff(ends, prepend=-1) - 1

    def rice(self, count: int) -> Ints:
        k = self.number()
        if k > _MAX_RICE:
            raise BitsError("a Rice column of an unknown kind")
        high = self.unary(count)
        return high if k == 0 else (high << k) | self.fixed(count, k)

    def signed(self, count: int) -> Ints:
        values = self.rice(count)
        return np.where(values & 1, -(values >> 1) - 1, values >> 1)

    def _read(self, starts: Ints, widths: Ints | int, num_bits: int) -> Ints:
        size = (num_bits + 7) // 8
        if size > self.bytes_left:
            raise BitsError("a column ends too early")
        first = (starts >> 3) + self._at
        self._at += size
        data = self._data
        words = data[first].astype(np.int64)
        for byte in (1, 2, 3):
            words |= data[first + byte].astype(np.int64) << (8 * byte)
        return (words >> (starts & 7)) & ((1 << np.asarray(widths, np.int64)) - 1)
