"""Records as bytes: names that cannot leave a folder, hashes that find the difference, damage that is noticed."""

from __future__ import annotations

import io
import re
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.support.teachers import HARD_IDS, make_samples, random_logits

from liquid_llm.identity import ModelIdentity
from liquid_llm.signal_store.codecs.full import FullCodec
from liquid_llm.signal_store.codecs.topk import TopKCodec
from liquid_llm.signal_store.pt import _checksum, _header_values, file_name, from_bytes, to_bytes
from liquid_llm.signal_store.records import (
    FORMAT_VERSION,
    Record,
    RecordError,
    RecordHeader,
    SignalIdentity,
    first_difference,
    token_hashes,
    tokens_agreeing,
)


def make_record(num_tokens: int = 150, codec: TopKCodec | FullCodec | None = None) -> Record:
    codec = codec or TopKCodec(4)
    sample = make_samples(1, low=num_tokens, high=num_tokens)[0]
    rows = codec.encode(random_logits(num_tokens - 1, 50), 1, 0)
    identity = SignalIdentity.of(codec, ModelIdentity("org/teacher", "r", "t"), 50)
    hashes = token_hashes(sample.input_ids)
    header = RecordHeader(FORMAT_VERSION, sample.sample_id, sample.type, identity, num_tokens, hashes)
    return Record(header, codec.pack(rows))


@pytest.mark.parametrize("codec", [FullCodec(), TopKCodec(4)], ids=lambda codec: codec.name)
@pytest.mark.parametrize("num_tokens", [1, 2, 64, 150])
def test_round_trip(codec: TopKCodec | FullCodec, num_tokens: int) -> None:
    record = make_record(num_tokens, codec)
    again = from_bytes(to_bytes(record))
    assert again.header == record.header
    assert again.payload.keys() == record.payload.keys()
    assert all(torch.equal(again.payload[name], record.payload[name]) for name in record.payload)


def test_a_record_is_a_plain_torch_file() -> None:
    content = torch.load(io.BytesIO(to_bytes(make_record())), weights_only=True)
    assert content["header"]["sample_id"] == "s/0"
    assert content["header"]["codec_options"] == {"k": 4}
    assert content["payload"]["gaps"].shape == (149, 4)


def test_equal_records_are_equal_bytes() -> None:
    assert to_bytes(make_record()) == to_bytes(make_record())


# ------------------------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.6, 0.9, 0.999])
def test_truncated_bytes(share: float) -> None:
    data = to_bytes(make_record())
    with pytest.raises(RecordError, match="truncated or not a record"):
        from_bytes(data[: int(share * len(data))])


@given(position=st.integers(0, 2**20), flip=st.integers(1, 255))
def test_a_changed_byte_is_noticed_or_means_nothing(position: int, flip: int) -> None:
    """A zip has bytes without meaning (dates, attributes); any other change must be a RecordError and nothing else."""
    record = make_record(20)
    data = bytearray(to_bytes(record))
    data[position % len(data)] ^= flip
    try:
        again = from_bytes(bytes(data))
    except RecordError:
        return
    assert again.header == record.header
    assert all(torch.equal(again.payload[name], record.payload[name]) for name in record.payload)


@given(start=st.integers(0, 2**20), junk=st.binary(min_size=1, max_size=300))
def test_overwritten_stretches_are_noticed(start: int, junk: bytes) -> None:
    record = make_record(20)
    data = bytearray(to_bytes(record))
    start %= len(data)
    data[start : start + len(junk)] = junk
    try:
        again = from_bytes(bytes(data))
    except RecordError:
        return
    assert again.header == record.header
    assert all(torch.equal(again.payload[name], record.payload[name]) for name in record.payload)


def test_changed_numbers_with_an_intact_file() -> None:
    content = torch.load(io.BytesIO(to_bytes(make_record())), weights_only=True)
    content["payload"]["gaps"][3, 1] = 7
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with pytest.raises(RecordError, match="checksum"):
        from_bytes(buffer.getvalue())


def test_a_changed_header_with_an_intact_file() -> None:
    content = torch.load(io.BytesIO(to_bytes(make_record())), weights_only=True)
    content["header"]["num_tokens"] += 1
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with pytest.raises(RecordError, match="checksum"):
        from_bytes(buffer.getvalue())


def saved(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def a_zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("../outside.txt", "x")
    return buffer.getvalue()


class Planted:
    """Unpickled without weights_only, this would run code."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (exec, ("raise SystemExit('code from a record was run')",))


@pytest.mark.parametrize(
    "data",
    [
        saved({"weights": torch.zeros(3)}),
        saved([1, 2, 3]),
        saved({"header": {}, "payload": {}}),
        saved({"header": {"checksum": 0}, "payload": {"ids": 3}}),
        saved({"header": Planted(), "payload": {}}),
        a_zip(),
        b"hello",
        b"",
    ],
    ids=["state", "list", "empty", "values", "code", "zip", "text", "nothing"],
)
def test_other_files_are_refused(data: bytes) -> None:
    with pytest.raises(RecordError):
        from_bytes(data)


# -------------------------------------------------------------------------------------------------------------- tokens


@pytest.mark.parametrize("count", [0, 1, 63, 64, 65, 128, 1000])
def test_hashes_of_prefixes(count: int) -> None:
    tokens = np.arange(count, dtype=np.int32)
    hashes = token_hashes(tokens)
    assert len(hashes) == 8 + 4 * (count // 64)
    assert hashes == token_hashes(tokens.astype(np.int64))  # how tokens are held is no part of what they are
    for place in range(count // 64):
        assert token_hashes(tokens[: (place + 1) * 64])[:4] == hashes[8 + 4 * place : 12 + 4 * place]


def header_of(length: int) -> RecordHeader:
    return replace(make_record().header, num_tokens=length, token_hashes=token_hashes(np.arange(length)))


@given(length=st.integers(1, 300), place=st.integers(0, 10_000), extra=st.integers(0, 100), window=st.integers(1, 400))
def test_a_changed_token_is_found_wherever_it_matters(length: int, place: int, extra: int, window: int) -> None:
    """Never missed inside the window; behind it the record serves as soon as a mark lies between."""
    header = header_of(length)
    tokens = np.arange(length + extra)  # the untruncated sample may go on after the window
    assert first_difference(header, tokens, window) is None
    place %= length
    tokens[place] = 9999
    assert tokens_agreeing(header, tokens) == place // 64 * 64
    found = first_difference(header, tokens, window)
    assert (found is None) == (min(window, length) <= place // 64 * 64)
    assert found in (None, f"the text differs from the captured one after token {place // 64 * 64}")


@pytest.mark.parametrize(("window", "served"), [(64, True), (65, False), (100, False), (1024, False)])
def test_a_text_that_became_shorter(window: int, served: bool) -> None:
    found = first_difference(header_of(150), np.arange(100), window)
    assert found == (None if served else "the text has 100 tokens, 150 were captured")


def test_records_of_the_first_format_are_read() -> None:
    record = make_record(150)
    tokens = make_samples(1, low=150, high=150)[0].input_ids
    whole = [token_hashes(tokens[:end])[:8].hex() for end in (64, 128, 150)]
    header = {**_header_values(record.header), "format_version": 1, "token_hashes": whole}
    payload = {name: tensor.clone() for name, tensor in record.payload.items()}
    header["checksum"] = _checksum(header, payload)
    again = from_bytes(saved({"header": header, "payload": payload}))
    assert again.header == replace(record.header, format_version=1)
    assert first_difference(again.header, tokens, 1024) is None


def test_a_file_costs_less_than_a_kilobyte_beyond_its_tensors() -> None:
    record = replace(make_record(1024), payload={"bytes": torch.zeros(9000, dtype=torch.uint8)})
    assert len(to_bytes(record)) < 9000 + 1000


# --------------------------------------------------------------------------------------------------------------- names


def test_names_are_plain() -> None:
    names = [file_name(sample_id) for sample_id in HARD_IDS]
    assert not [name for name in names if not re.fullmatch(r"[A-Za-z0-9_-]{1,65}\.pt", name)]


@given(st.lists(st.text(max_size=80), unique=True, max_size=30))
def test_names_differ_even_where_case_does_not_count(ids: list[str]) -> None:
    assert len({file_name(sample_id).lower() for sample_id in ids}) == len(ids)


@pytest.mark.parametrize(("a", "b"), [("Case", "case"), ("a/b", "a_b"), ("x" * 300, "x" * 301), ("é", "e\u0301")])
def test_near_equal_ids_have_names_of_their_own(a: str, b: str) -> None:
    assert file_name(a).lower() != file_name(b).lower()


def test_a_view_takes_its_own_bytes_only() -> None:
    record = make_record(150)
    rows = {name: tensor[:1] for name, tensor in record.payload.items()}
    assert len(to_bytes(replace(record, payload=rows))) < 4000 < len(to_bytes(record))
