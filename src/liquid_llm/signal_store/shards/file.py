"""Layout ``shards``, one file: thousands of records in one safetensors file that needs no other.

    header     the file's beginning: safetensors' own header, ends, ids; enough to find any record
    ends       where each record ends in ``records``, u32 or u64
    ids        the sample ids as compressed JSON, in the order of the records
    records    the records back to back
    form       names, dtypes and trailing shapes of a payload's tensors; a file lists its few forms once

What all records share (teacher, tokenizer, codec) is said once, in the file's metadata. A record is

    crc32 | hash of all tokens | type, form, number of tokens, length of each tensor as varints | token marks | tensors

The checksum covers the sample id too, so bytes that are found under a wrong name do not pass. That is 20 to 30 bytes a
record, and a sixteenth of a byte a token (``records.token_hashes``), against some 900 of a ``.pt`` file. A record that
leaves positions out carries its runs as one tensor more, and its file is of version 2.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from liquid_llm.parsing import ParseError, parse_json
from liquid_llm.signal_store.codecs import Payload
from liquid_llm.signal_store.records import (
    FORMAT_VERSION,
    MARK_BYTES,
    PREFIX_TOKENS,
    WHOLE_BYTES,
    WHOLE_VERSION,
    Record,
    RecordError,
    RecordHeader,
    SignalIdentity,
    compact,
)
from liquid_llm.signal_store.varints import decode_varint, encode_varint

SHARD_VERSION = 2
WHOLE_SHARD_VERSION = 1  # where each record has a row for every position: written as it always was
_RUNS = "learnt runs"  # among a record's tensors: varints
KEY_BYTES = 16
PREFIX, SUFFIX = "shard-", ".safetensors"

_METADATA = "liquid_llm"
_LENGTH_BYTES = 8
_CHECKSUM = struct.Struct("<I")
_MAX_HEADER_BYTES = 64 * 2**20
_MAX_IDS_BYTES = 2**28  # unpacked; a shard is some hundred megabytes and has far fewer records than that
_NUMPY = {"U8": "u1", "U32": "<u4", "U64": "<u8"}
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.uint8, torch.uint16, torch.uint32, torch.int8, torch.int16, torch.int32, torch.int64),
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool),
    )
}

T = TypeVar("T")
Form: TypeAlias = tuple[tuple[str, str, tuple[int, ...] | None], ...]  # (name, dtype, trailing shape; None: 0-dim)
Reader: TypeAlias = Callable[[int, int], bytes]


class NewerShardError(RecordError):
    """A shard that a newer program has written: not damaged, and not to be read by this one."""


def is_shard(name: str) -> bool:
    """Whether a file of a folder is one of its shards."""
    return name.startswith(PREFIX) and name.endswith(SUFFIX) and "/" not in name


def sample_key(sample_id: str) -> bytes:
    """What a sample is looked up by: 16 bytes of blake2b. Two of a billion ids share one with odds of 10^-21."""
    data = sample_id.encode("utf-8", "surrogatepass")
    return hashlib.blake2b(data, digest_size=KEY_BYTES, person=b"sample id").digest()


@dataclass
class Tables:
    """The types and forms that records refer to by number; they only grow."""

    types: list[str] = field(default_factory=list)
    forms: list[Form] = field(default_factory=list)

    def copy(self) -> Tables:
        return Tables(self.types[:], self.forms[:])


class PackedRecord(NamedTuple):
    """A record as bytes, and what the file's header counts of it. ``payload_bytes`` of ``data`` are the codec's.

    ``num_rows``: where that is not one for every position; None where it is.
    """

    sample_id: str
    type: str
    num_tokens: int
    data: bytes
    payload_bytes: int
    num_rows: int | None = None


class ShardHeader(NamedTuple):
    """The header of a shard.

    Attributes:
        identity: of all its records.
        types, forms: what records refer to by number.
        by_type: type -> {"records", "tokens", "positions", "payload_bytes"}.
        ends: [records], where each ends.
        begin: where ``records`` begins in the file.
        ids: begin and end of the ids in the file, and their checksum.
        size: of the whole file.
    """

    identity: SignalIdentity
    types: list[str]
    forms: list[Form]
    by_type: dict[str, dict[str, int]]
    ends: NDArray[Any]
    begin: int
    ids: tuple[int, int, int]
    size: int

    @property
    def num_records(self) -> int:
        return int(self.ends.size)

    def span(self, row: int) -> tuple[int, int]:
        """Begin and end of a record in the file."""
        begin = int(self.ends[row - 1]) if row else 0
        return self.begin + begin, self.begin + int(self.ends[row])


# -------------------------------------------------------------------------------------------------------------- records


def pack_record(record: Record, tables: Tables) -> PackedRecord:
    """A record as the bytes that lie in a shard whose types and forms are ``tables``."""
    header, payload = record.header, record.payload
    runs = b"".join(map(encode_varint, header.runs))
    if runs:
        payload = {**payload, _RUNS: torch.frombuffer(bytearray(runs), dtype=torch.uint8)}
    tensors = sorted(payload.items())
    form: Form = tuple(
        (name, str(one.dtype).removeprefix("torch."), tuple(one.shape[1:]) if one.dim() else None)
        for name, one in tensors
    )
    numbers = [_number_of(tables.types, header.type), _number_of(tables.forms, form), header.num_tokens]
    numbers += [one.shape[0] for _, one in tensors if one.dim()]
    data = [_raw(one) for _, one in tensors]
    whole, marks = header.token_hashes[:WHOLE_BYTES], header.token_hashes[WHOLE_BYTES:]
    body = b"".join([whole, *map(encode_varint, numbers), marks, *data])
    checksum = zlib.crc32(body, zlib.crc32(sample_key(header.sample_id)))
    packed = _CHECKSUM.pack(checksum) + body
    payload_bytes = sum(map(len, data)) - len(runs)
    num_rows = header.num_rows if runs else None
    return PackedRecord(header.sample_id, header.type, header.num_tokens, packed, payload_bytes, num_rows)


def unpack_record(header: ShardHeader, sample_id: str, data: bytes) -> Record:
    """Inverse of ``pack_record``.

    Raises:
        RecordError: the bytes are damaged, cut, or not of this sample.
    """
    if len(data) < _CHECKSUM.size + WHOLE_BYTES:
        raise RecordError(f"cut to {len(data)} bytes")
    body = memoryview(data)[_CHECKSUM.size :]
    if zlib.crc32(body, zlib.crc32(sample_key(sample_id))) != _CHECKSUM.unpack_from(data)[0]:
        raise RecordError("the checksum does not match")
    try:
        (type_number, form_number, num_tokens), at = _read_varints(body, WHOLE_BYTES, 3)
        form = header.forms[form_number]
        lengths, at = _read_varints(body, at, sum(trailing is not None for _, _, trailing in form))
        payload_at = at + num_tokens // PREFIX_TOKENS * MARK_BYTES
        hashes = bytes(body[:WHOLE_BYTES]) + bytes(body[at:payload_at])
        payload, end = _read_tensors(body, payload_at, form, lengths)
        type = header.types[type_number]
        runs = _read_runs(payload.pop(_RUNS, None), num_tokens)
    except (IndexError, ValueError, KeyError, RuntimeError, OverflowError) as error:
        raise RecordError("its fields do not fit together") from error
    if end != len(body):
        raise RecordError(f"{len(body)} bytes, {end} expected")
    version = FORMAT_VERSION if runs else WHOLE_VERSION
    return Record(RecordHeader(version, sample_id, type, header.identity, num_tokens, hashes, runs), payload)


def _read_runs(stored: Tensor | None, num_tokens: int) -> tuple[int, ...]:
    """The runs of a record of so many tokens. Raises ValueError or IndexError where they are none."""
    if stored is None:
        return ()
    data, at = memoryview(stored.numpy().tobytes()), 0
    runs = []
    while at < len(data):
        length, at = decode_varint(data, at)
        runs.append(length)
    if sum(runs) != num_tokens - 1:
        raise ValueError("runs of another number of tokens")
    return tuple(runs)


def _number_of(table: list[T], entry: T) -> int:
    if entry not in table:
        table.append(entry)
    return table.index(entry)


def _raw(tensor: Tensor) -> bytes:
    return compact(tensor).reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def _read_tensors(data: memoryview, at: int, form: Form, lengths: Sequence[int]) -> tuple[Payload, int]:
    payload: Payload = {}
    left = iter(lengths)
    for name, dtype_name, trailing in form:
        dtype = _DTYPES[dtype_name]
        shape = () if trailing is None else (next(left), *trailing)
        count = math.prod(shape)
        if at + count * dtype.itemsize > len(data):
            raise ValueError("a tensor beyond the end")
        # A copy: records lie at odd addresses in memory that must not be written to.
        raw = bytearray(data[at : at + count * dtype.itemsize])
        payload[name] = torch.frombuffer(raw, dtype=dtype).reshape(shape) if count else torch.zeros(shape, dtype=dtype)
        at += len(raw)
    return payload, at


def _read_varints(data: memoryview, at: int, count: int) -> tuple[list[int], int]:
    found = []
    for _ in range(count):
        value, at = decode_varint(data, at)
        found.append(value)
    return found, at


# ---------------------------------------------------------------------------------------------------------------- files


def build_shard(records: Iterable[PackedRecord], tables: Tables, identity: SignalIdentity) -> bytes:
    """The bytes of a shard of these records, ordered by key so that the same records give the same file."""
    ordered = sorted(records, key=lambda record: sample_key(record.sample_id))
    ends = np.cumsum([len(record.data) for record in ordered], dtype=np.uint64)
    if not ends.size or int(ends[-1]) < 2**32:
        ends = ends.astype(np.uint32)
    ids = zlib.compress(json.dumps([record.sample_id for record in ordered]).encode(), 9)
    by_type: dict[str, Counter[str]] = {}
    for record in ordered:
        counts = by_type.setdefault(record.type, Counter())
        counts.update(records=1, tokens=record.num_tokens, payload_bytes=record.payload_bytes)
    masked = any(record.num_rows is not None for record in ordered)
    for record in ordered if masked else ():
        rows = record.num_tokens - 1 if record.num_rows is None else record.num_rows
        by_type[record.type].update(positions=rows)
    values = {
        "format_version": SHARD_VERSION if masked else WHOLE_SHARD_VERSION,
        "identity": identity.plain(),
        "types": tables.types,
        "forms": tables.forms,
        "records": len(ordered),
        "by_type": by_type,
        "ids_crc": zlib.crc32(ids),
    }
    tensors: dict[str, NDArray[Any]] = {
        "ends": ends,
        "ids": np.frombuffer(ids, np.uint8),
        "records": np.frombuffer(b"".join(record.data for record in ordered), np.uint8),
    }
    return save_safetensors(tensors, values)


def read_shard_header(read: Reader, size: int) -> ShardHeader:
    """The header of a shard file of ``size`` bytes, given a way to read its bytes ``[begin, end)``.

    Raises:
        RecordError: it is cut, damaged or no shard.
        NewerShardError: a newer program wrote it.
    """
    try:
        values, spans = read_safetensors_header(read)
        if int(values["format_version"]) > SHARD_VERSION:
            raise NewerShardError(f"shard format {values['format_version']}, this program reads {SHARD_VERSION}")
        (_, ids_begin, ids_end), (_, begin, end) = spans["ids"], spans["records"]
        ends = read_array(read, spans["ends"])
        # A damaged end in between hits two records: their checksums do not match.
        if ends.size != values["records"] or end - begin != (int(ends[-1]) if ends.size else 0):
            raise RecordError("the table of records is damaged")
        forms = [
            tuple((name, dtype, None if trailing is None else tuple(trailing)) for name, dtype, trailing in form)
            for form in values["forms"]
        ]
        for counts in values["by_type"].values():
            counts.setdefault("positions", counts["tokens"] - counts["records"])
        identity = SignalIdentity(**values["identity"])
        ids = (ids_begin, ids_end, int(values["ids_crc"]))
        return ShardHeader(identity, list(values["types"]), forms, values["by_type"], ends, begin, ids, end)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise RecordError(f"its header is damaged, {size:,} bytes" if size else "it is empty") from error


def read_ids(header: ShardHeader, read: Reader) -> list[str]:
    """The sample ids of a shard, in the order of its records. Raises RecordError where they are damaged."""
    begin, end, checksum = header.ids
    data = read(begin, end)
    if zlib.crc32(data) != checksum:
        raise RecordError("the list of sample ids is damaged")
    unpacked = zlib.decompressobj()
    try:
        ids: list[str] = parse_json(unpacked.decompress(data, _MAX_IDS_BYTES), most=_MAX_IDS_BYTES)
    except (ParseError, zlib.error) as error:
        raise RecordError("the list of sample ids is damaged") from error
    are_ids = isinstance(ids, list) and all(isinstance(one, str) for one in ids)
    if not unpacked.eof or not are_ids or len(ids) != header.num_records:
        raise RecordError(f"no list of sample ids for its {header.num_records} records")
    return ids


# ---------------------------------------------------------------------------------------------------------- safetensors


def save_safetensors(arrays: dict[str, NDArray[Any]], values: Mapping[str, Any]) -> bytes:
    """A safetensors file of ``arrays`` whose metadata holds plain ``values`` behind their checksum."""
    from safetensors.numpy import save

    text = json.dumps(values, sort_keys=True)
    # One key only: safetensors writes several in no particular order.
    return bytes(save(arrays, {_METADATA: f"{zlib.crc32(text.encode()):08x} {text}"}))


def read_safetensors_header(read: Reader) -> tuple[dict[str, Any], dict[str, tuple[str, int, int]]]:
    """The values, and (dtype, begin, end in the file) of each array. The library itself reads whole files only.

    Raises:
        ValueError, TypeError, KeyError, AttributeError: it is damaged, or not one of ``save_safetensors``.
    """
    length = int.from_bytes(read(0, _LENGTH_BYTES), "little")
    if length > _MAX_HEADER_BYTES:
        raise ValueError("a header of impossible length")
    begin = _LENGTH_BYTES + length
    tensors = parse_json(bytes(read(_LENGTH_BYTES, begin)))
    checksum, _, text = tensors.pop("__metadata__")[_METADATA].partition(" ")
    if int(checksum, 16) != zlib.crc32(text.encode()):
        raise ValueError("a checksum that does not match")
    spans = {}
    for name, tensor in tensors.items():
        first, last = tensor["data_offsets"]
        if not 0 <= first <= last:
            raise ValueError("an array of negative size")
        spans[name] = (str(tensor["dtype"]), begin + first, begin + last)
    return parse_json(text), spans


def read_array(read: Reader, span: tuple[str, int, int]) -> NDArray[Any]:
    """A one-dimensional array of unsigned integers."""
    dtype, begin, end = span
    data = read(begin, end)
    if len(data) != end - begin:
        raise ValueError("cut")
    return np.frombuffer(data, np.dtype(_NUMPY[dtype]))
