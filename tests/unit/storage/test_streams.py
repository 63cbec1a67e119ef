"""Unpacking and lines: what comes out does not depend on how the bytes come."""

from __future__ import annotations

import bz2
import gzip
import io
import itertools

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from liquid_llm.storage.streams import CHUNK_BYTES, DamageError, lines, unpack

PACK = {None: bytes, "gz": gzip.compress, "bz2": bz2.compress, "zst": zstandard.compress}
cut_points = st.lists(st.integers(0, 10**6), max_size=30)


@given(st.binary(max_size=200), cut_points, st.none() | st.integers(1, 50))
def test_lines_do_not_depend_on_how_the_bytes_come(data: bytes, cuts: list[int], limit: int | None) -> None:
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    chunks = [data[begin:end] for begin, end in itertools.pairwise(edges)]
    expected = [line if limit is None or len(line) <= limit else None for line in data.split(b"\n")]
    expected = expected[:-1] if data.endswith(b"\n") or not data else expected
    assert list(lines(chunks) if limit is None else lines(chunks, limit)) == expected


@pytest.mark.parametrize("packing", PACK)
@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES, 2 * CHUNK_BYTES + 1])
def test_what_was_packed_comes_out_in_chunks(packing: str | None, size: int) -> None:
    data = bytes(index % 251 for index in range(size))
    twice = PACK[packing](data) + PACK[packing](data)  # streams one after another are one file
    assert b"".join(unpack(io.BytesIO(twice), packing)) == data * 2


@pytest.mark.parametrize("packing", ["gz", "bz2", "zst"])
@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_damage_is_said(packing: str, damage: str) -> None:
    packed = PACK[packing](bytes(range(256)) * 4000)
    packed = packed[: len(packed) // 2] if damage == "cut" else b"??" + packed[2:]
    with pytest.raises(DamageError, match="truncated or damaged"):
        list(unpack(io.BytesIO(packed), packing))
