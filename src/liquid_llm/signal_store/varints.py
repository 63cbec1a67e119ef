"""Whole numbers in as few bytes as they need (LEB128): seven bits a byte, the lowest first; the highest bit says that
more follow."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_MAX_BITS = 63


def encode_varint(value: int) -> bytes:
    """The bytes of a number from 0."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def decode_varint(data: bytes | memoryview | NDArray[np.uint8], at: int) -> tuple[int, int]:
    """The number that begins at ``data[at]``, and where the next byte after it lies.

    Raises:
        IndexError: the data end first.
        ValueError: the number does not end within 63 bits.
    """
    value = shift = 0
    while True:
        byte = int(data[at])
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > _MAX_BITS:
            raise ValueError("a number has no end")
