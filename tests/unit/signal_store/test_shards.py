"""A shard as bytes: what goes in comes out, what is damaged is noticed, and nothing else is needed to read it."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from tests.support.teachers import HARD_IDS

from liquid_llm.signal_store.codecs import Payload
from liquid_llm.signal_store.records import (
    WHOLE_VERSION,
    Record,
    RecordError,
    RecordHeader,
    SignalIdentity,
    token_hashes,
)
from liquid_llm.signal_store.shards.file import (
    PackedRecord,
    ShardHeader,
    Tables,
    build_shard,
    pack_record,
    read_ids,
    read_shard_header,
    sample_key,
    unpack_record,
)

IDENTITY = SignalIdentity("org/teacher", "r1", "t1", 300, "tail", 1, {"draws_t2": 24})
DTYPES = (torch.uint8, torch.uint16, torch.int32, torch.float16, torch.bfloat16, torch.float32, torch.bool)


def record(sample_id: str = "s", payload: Payload | None = None, num_tokens: int = 150, kind: str = "code") -> Record:
    hashes = token_hashes(np.arange(num_tokens))
    made = {"bytes": torch.arange(40, dtype=torch.uint8)} if payload is None else payload
    return Record(RecordHeader(WHOLE_VERSION, sample_id, kind, IDENTITY, num_tokens, hashes), made)


def shard_of(*records: Record) -> bytes:
    names = Tables()
    return build_shard([pack_record(one, names) for one in records], names, IDENTITY)


def opened(data: bytes) -> tuple[ShardHeader, Callable[[int, int], bytes]]:
    def read(begin: int, end: int) -> bytes:
        return data[begin:end]

    return read_shard_header(read, len(data)), read


def records_of(data: bytes) -> dict[str, Record]:
    head, read = opened(data)
    ids = read_ids(head, read)
    return {name: unpack_record(head, name, read(*head.span(row))) for row, name in enumerate(ids)}


def assert_same(got: Record, expected: Record) -> None:
    assert got.header == expected.header
    assert got.payload.keys() == expected.payload.keys()
    for name, tensor in expected.payload.items():
        assert (got.payload[name].dtype, got.payload[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(got.payload[name], tensor)


@st.composite
def payloads(draw: st.DrawFn) -> Payload:
    found = {}
    for name in draw(st.lists(st.sampled_from(["a", "gaps", "ids"]), unique=True)):
        dtype = draw(st.sampled_from(DTYPES))
        shape = draw(st.lists(st.integers(0, 5), max_size=3))
        values = np.random.default_rng(draw(st.integers(0, 99))).integers(0, 2, shape)
        found[name] = torch.from_numpy(values).to(dtype).reshape(shape)
    return found


@given(made=st.lists(payloads(), max_size=5), lengths=st.lists(st.integers(0, 300), min_size=5, max_size=5))
def test_round_trip(made: list[Payload], lengths: list[int]) -> None:
    """Any tensors, any numbers of them, of any sample."""
    kinds = ["code", "math_tool"]
    records = [record(f"s{n}", one, lengths[n], kinds[n % 2]) for n, one in enumerate(made)]
    found = records_of(shard_of(*records))
    assert found.keys() == {one.header.sample_id for one in records}
    for one in records:
        assert_same(found[one.header.sample_id], one)


@pytest.mark.parametrize("tensor", [torch.zeros(5, 8)[:1, 0], torch.arange(12.0).view(3, 4).T, torch.zeros(9)[::3]])
def test_tensors_of_odd_strides(tensor: torch.Tensor) -> None:
    made = record(payload={"x": tensor})
    assert_same(records_of(shard_of(made))["s"], made)


def test_any_sample_id() -> None:
    ids = [*HARD_IDS, "Case", "case", "CASE", "x" * 301]
    found = records_of(shard_of(*(record(name, num_tokens=n + 1) for n, name in enumerate(ids))))
    assert {name: one.header.num_tokens for name, one in found.items()} == {name: n + 1 for n, name in enumerate(ids)}


@given(st.lists(st.text(max_size=80), unique=True, max_size=50))
def test_keys_differ(ids: list[str]) -> None:
    assert len({sample_key(name) for name in ids}) == len(ids)


def test_the_same_records_give_the_same_file_in_any_order() -> None:
    records = [record(f"s{n}") for n in range(20)]
    assert shard_of(*records) == shard_of(*reversed(records))


def test_a_shard_is_a_plain_safetensors_file(tmp_path: Path) -> None:
    data = shard_of(record("a"), record("b"))
    (tmp_path / "x.safetensors").write_bytes(data)
    with safe_open(tmp_path / "x.safetensors", "np") as file:
        assert sorted(file.keys()) == ["ends", "ids", "records"]
        said = json.loads(file.metadata()["liquid_llm"].partition(" ")[2])
        assert file.get_tensor("records").nbytes == opened(data)[0].ends[-1]
    assert said["identity"]["teacher_id"] == "org/teacher"
    assert said["by_type"] == {"code": {"records": 2, "tokens": 300, "payload_bytes": 80}}


def test_what_a_record_costs() -> None:
    """At 200 tokens a third of a byte a token beyond the codec's own, shard and names included."""
    records = [record(f"gsm8k/train/{n:06d}", num_tokens=200) for n in range(1000)]
    overhead = (len(shard_of(*records)) - 1000 * 40) / 1000
    assert overhead < 45
    names = Tables()
    assert len(pack_record(records[0], names).data) - 40 <= 4 + 8 + 4 + 1 + 12


# -------------------------------------------------------------------------------------------------------------- damage


DATA = shard_of(*(record(f"s{n}", num_tokens=n * 30) for n in range(6)))
WHOLE = records_of(DATA)


def assert_harmless(data: bytes) -> None:
    """Whatever is still read is what was written."""
    try:
        head, read = opened(data)
        ids = read_ids(head, read)
    except RecordError:
        return
    for row, name in enumerate(ids):
        try:
            found = unpack_record(head, name, read(*head.span(row)))
        except RecordError:
            continue
        assert_same(found, WHOLE[name])


@given(position=st.integers(0, len(DATA) - 1), flip=st.integers(1, 255))
def test_a_changed_byte_is_noticed(position: int, flip: int) -> None:
    data = bytearray(DATA)
    data[position] ^= flip
    assert_harmless(bytes(data))


@given(start=st.integers(0, len(DATA) - 1), junk=st.binary(min_size=1, max_size=300))
def test_overwritten_stretches_are_noticed(start: int, junk: bytes) -> None:
    assert_harmless(DATA[:start] + junk + DATA[start + len(junk) :])


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.9, 0.999])
def test_truncation_is_noticed(share: float) -> None:
    assert_harmless(DATA[: int(share * len(DATA))])


def test_a_record_under_another_name_does_not_pass() -> None:
    head, read = opened(DATA)
    with pytest.raises(RecordError, match="checksum"):
        unpack_record(head, "s9", read(*head.span(0)))


@pytest.mark.parametrize(
    "data",
    [b"", b"hello", struct.pack("<Q", 2**60), struct.pack("<Q", 2) + b"{}", struct.pack("<Q", 2) + b"[]", bytes(100)],
)
def test_other_files_are_refused(data: bytes) -> None:
    with pytest.raises(RecordError):
        opened(data)


def test_a_shard_of_a_newer_format_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("liquid_llm.signal_store.shards.file.WHOLE_SHARD_VERSION", 3)
    data = shard_of(record())
    monkeypatch.undo()
    with pytest.raises(RecordError, match="shard format 3, this program reads 2"):
        opened(data)


def test_more_than_four_gigabytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ends are then 8 bytes wide; the records are only claimed here."""

    class Long(bytes):
        def __len__(self) -> int:
            return 3 * 2**30

    names = Tables()
    real = pack_record(record(), names)
    records = [PackedRecord(f"s{n}", "code", 150, Long(real.data), 40) for n in range(2)]
    monkeypatch.setattr("safetensors.numpy.save", lambda tensors, metadata: tensors["ends"].dtype.str.encode())
    assert build_shard(records, names, IDENTITY) == b"<u8"


def test_records_do_not_share_memory_with_the_file() -> None:
    data = bytearray(shard_of(record()))
    head = read_shard_header(lambda begin, end: bytes(data[begin:end]), len(data))
    found = unpack_record(head, "s", bytes(data[slice(*head.span(0))]))
    found.payload["bytes"].zero_()
    assert_same(unpack_record(head, "s", bytes(data[slice(*head.span(0))])), record())
    assert replace(record().header) == found.header
