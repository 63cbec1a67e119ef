"""The index: every sample found, the last record of each counts, and damaged files are told."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from liquid_llm.signal_store.records import RecordError
from liquid_llm.signal_store.shards.file import sample_key
from liquid_llm.signal_store.shards.folder import (
    ShardEntry,
    ShardIndex,
    build_index,
    index_bytes,
    keys_of,
    read_index,
)

SHARDS = st.lists(st.lists(st.text("ab/C", max_size=3), max_size=8), max_size=6)


def table(number: int, ids: Sequence[str]) -> tuple[ShardEntry, np.ndarray]:
    return ShardEntry(f"shard-{number:03d}", 100 * number, len(ids)), keys_of(ids)


def read_back(data: bytes) -> ShardIndex:
    return read_index(lambda begin, end: data[begin:end])


def assert_finds(index: ShardIndex, shards: Sequence[Sequence[str]]) -> None:
    """The last shard that has an id counts, and in it the last of equal ids."""
    expected = {name: (number, row) for number, ids in enumerate(shards) for row, name in enumerate(ids)}
    assert {name: index.find(sample_key(name)) for name in expected} == expected
    assert len(index) == len(expected)
    assert index.superseded == sum(map(len, shards)) - len(expected)
    assert index.find(sample_key("not there")) is None
    rows = {(number, row) for number in range(len(shards)) for row in index.rows_of(number).tolist()}
    assert rows == set(expected.values())


@given(shards=SHARDS)
def test_every_sample_is_found_where_its_last_record_is(shards: list[list[str]]) -> None:
    assert_finds(build_index(table(number, ids) for number, ids in enumerate(shards)), shards)


@given(shards=SHARDS, known=st.sets(st.integers(0, 5)))
def test_shards_added_in_any_order_give_the_same(shards: list[list[str]], known: set[int]) -> None:
    tables = [table(number, ids) for number, ids in enumerate(shards)]
    base = build_index(one for number, one in enumerate(tables) if number in known)
    index = build_index((one for number, one in enumerate(tables) if number not in known), base)
    assert_finds(index, shards)
    assert_finds(read_back(index_bytes(index)), shards)


@given(shards=SHARDS, unreadable=st.sets(st.integers(0, 5)))
def test_what_is_known_of_some_shards(shards: list[list[str]], unreadable: set[int]) -> None:
    """With the others read again it is the whole index, their superseded records excepted, which no one counts."""
    tables = [table(number, ids) for number, ids in enumerate(shards)]
    whole = build_index(tables)
    part = whole.part({tables[number][0].name for number in unreadable if number < len(shards)})
    assert [entry.name for entry in part.shards] == [f"shard-{n:03d}" for n in sorted(unreadable) if n < len(shards)]
    assert_finds(build_index((one for n, one in enumerate(tables) if n not in unreadable), part), shards)


def test_keys_that_agree_in_their_first_half() -> None:
    keys = np.array([[7, 3], [7, 1], [7, 2], [2**64 - 1, 2**64 - 1]], np.uint64)
    index = build_index([(ShardEntry("a", 1, 4), keys)])
    for row, (high, low) in enumerate(keys.tolist()):
        assert index.find(high.to_bytes(8, "big") + low.to_bytes(8, "big")) == (0, row)
    assert index.find((7).to_bytes(8, "big") + (4).to_bytes(8, "big")) is None


def test_samples_lost_with_a_shard() -> None:
    known = build_index([table(0, ["a", "b", "c"]), table(1, ["c", "d"])])
    now = build_index([table(0, ["a", "b", "c"])])
    assert known.lost(["shard-001"], now) == 1
    assert known.lost(["shard-000", "shard-001"], build_index([])) == 4
    assert known.lost([], now) == 0


INDEX = index_bytes(build_index([table(0, ["a", "b"]), table(1, ["b", "c", "d"])]))


@given(position=st.integers(0, len(INDEX) - 1), flip=st.integers(1, 255))
def test_a_changed_byte_is_noticed_or_means_nothing(position: int, flip: int) -> None:
    data = bytearray(INDEX)
    data[position] ^= flip
    try:
        index = read_back(bytes(data))
    except RecordError:
        return
    assert_finds(index, [["a", "b"], ["b", "c", "d"]])


@pytest.mark.parametrize("data", [b"", b"{}", INDEX[:-1], INDEX[:100], bytes(50)])
def test_damaged_files(data: bytes) -> None:
    with pytest.raises(RecordError):
        read_back(data)


def test_a_newer_index_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("liquid_llm.signal_store.shards.folder.INDEX_VERSION", 2)
    data = index_bytes(build_index([table(0, ["a"])]))
    monkeypatch.undo()
    with pytest.raises(RecordError, match="index format 2, this program reads 1"):
        read_back(data)
