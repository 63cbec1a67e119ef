"""Layout ``shards``, one file: thousands of records in one safetensors file that needs no other.

    front      the file's beginning: safetensors header, ends, ids; enough to find any record
    ends       where each record ends in ``records``, u32 or u64
    ids        the sample ids as compressed JSON, in the order of the records
    records    the records back to back
    form       names, types and trailing shapes of a payload's tensors; a file lists its few forms once

What all records share (teacher, tokenizer, codec) is said once, in the file's metadata. A record is

    crc32 | hash of all tokens | type, form, number of tokens, length of each tensor as varints | token marks | tensors

The checksum covers the sample id too, so bytes that are found under a wrong name do not pass. That is 20 to 30 bytes a
record, and a sixteenth of a byte a token (``records.token_hashes``), against some 900 of a ``.pt`` file.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from liquid_llm.signal_store.codecs import Payload
from liquid_llm.signal_store.records import (
    MARK_BYTES,
    PREFIX_TOKENS,
    WHOLE_BYTES,
    Record,
    RecordError,
    RecordHeader,
    SignalIdentity,
    compact,
)
from liquid_llm.signal_store.varints import decode_varint, encode_varint

SHARD_VERSION = 1
RECORD_VERSION = 2  # what ``RecordHeader.format_version`` says of records in shards of this version
KEY_BYTES = 16
PREFIX, SUFFIX = "shard-", ".safetensors"

_METADATA = "liquid_llm"
_LENGTH_BYTES = 8
_CHECKSUM = struct.Struct("<I")
_MAX_HEADER_BYTES = 64 * 2**20
_NUMPY = {"U8": "u1", "U32": "<u4", "U64": "<u8"}
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.uint8, torch.uint16, torch.uint32, torch.int8, torch.int16, torch.int32, torch.int64),
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool),
    )
}

Form: TypeAlias = tuple[
    tuple[str, str, tuple[int, ...] | None], ...
]  # (name, dtype, trailing shape; None: no dimension)
Reader: TypeAlias = Callable[[int, int], bytes]


class NewerShardError(RecordError):
    """A shard of a format that this program does not know."""


def sample_key(sample_id: str) -> bytes:
    """What a sample is looked up by: 16 bytes of blake2b. Two of a billion ids share one with odds of 10^-21."""
    data = sample_id.encode("utf-8", "surrogatepass")
    return hashlib.blake2b(data, digest_size=KEY_BYTES, person=b"sample id").digest()


@dataclass
class Names:
    """The types and forms that records refer to by number; they only grow."""

    types: list[str] = field(default_factory=list)
    forms: list[Form] = field(default_factory=list)

    def number_of(self, names: list[Any], name: object) -> int:
        if name not in names:
            names.append(name)
        return names.index(name)


@dataclass(frozen=True)
class Packed:
    """A record as bytes, and what the file's front says about it. ``num_payload`` bytes are the codec's."""

    sample_id: str
    type: str
    num_tokens: int
    data: bytes
    num_payload: int


@dataclass(frozen=True)
class ShardHead:
    """The front of a shard.

    Attributes:
        identity: of all its records.
        types, forms: what records refer to by number.
        by_type: type -> {"records", "tokens", "payload_bytes"}.
        ends: [records], where each ends.
        begin: where ``records`` begins in the file.
        front_bytes: bytes of header, ends and ids.
        ids: begin and end of the ids in the file, and their checksum.
        size: of the whole file.
    """

    identity: SignalIdentity
    types: tuple[str, ...]
    forms: tuple[Form, ...]
    by_type: dict[str, dict[str, int]]
    ends: NDArray[Any]
    begin: int
    front_bytes: dict[str, int]
    ids: tuple[int, int, int]
    size: int

    def __len__(self) -> int:
        return int(self.ends.size)

    def span(self, row: int) -> tuple[int, int]:
        """Begin and end of a record in the file."""
        begin = int(self.ends[row - 1]) if row else 0
        return self.begin + begin, self.begin + int(self.ends[row])


# -------------------------------------------------------------------------------------------------------------- records


def pack_record(record: Record, names: Names) -> Packed:
    """A record as the bytes that lie in a shard whose types and forms are ``names``."""
    header, payload = record.header, record.payload
    shapes = {name: tuple(tensor.shape) for name, tensor in payload.items()}
    form: Form = tuple(
        (name, str(payload[name].dtype).removeprefix("torch."), shapes[name][1:] if shapes[name] else None)
        for name in sorted(payload)
    )
    tensors = [_raw(payload[name]) for name in sorted(payload)]
    numbers = [names.number_of(names.types, header.type), names.number_of(names.forms, form), header.num_tokens]
    numbers += [shapes[name][0] for name in sorted(payload) if shapes[name]]
    body = b"".join(
        [
            header.token_hashes[:WHOLE_BYTES],
            *map(encode_varint, numbers),
            header.token_hashes[WHOLE_BYTES:],
            *tensors,
        ]
    )
    checksum = zlib.crc32(body, zlib.crc32(sample_key(header.sample_id)))
    data = _CHECKSUM.pack(checksum) + body
    return Packed(header.sample_id, header.type, header.num_tokens, data, sum(map(len, tensors)))


def unpack_record(head: ShardHead, sample_id: str, data: bytes) -> Record:
    """Inverse of ``pack_record``.

    Raises:
        RecordError: the bytes are damaged, cut, or not of this sample.
    """
    if len(data) < _CHECKSUM.size + WHOLE_BYTES:
        raise RecordError(f"cut to {len(data)} bytes")
    view = memoryview(data)
    if zlib.crc32(view[_CHECKSUM.size :], zlib.crc32(sample_key(sample_id))) != _CHECKSUM.unpack_from(data)[0]:
        raise RecordError("the checksum does not match")
    try:
        at = _CHECKSUM.size + WHOLE_BYTES
        (type_number, form_number, num_tokens), at = _varints(data, at, 3)
        form = head.forms[form_number]
        lengths, at = _varints(data, at, sum(trailing is not None for _, _, trailing in form))
        marks = num_tokens // PREFIX_TOKENS * MARK_BYTES
        hashes = data[_CHECKSUM.size : _CHECKSUM.size + WHOLE_BYTES] + data[at : at + marks]
        payload, at = _tensors(data, at + marks, form, lengths)
        kind = head.types[type_number]
    except (IndexError, ValueError, KeyError, RuntimeError, OverflowError) as error:
        raise RecordError("its fields do not fit together") from error
    if at != len(data):
        raise RecordError(f"{len(data)} bytes, {at} expected")
    return Record(RecordHeader(RECORD_VERSION, sample_id, kind, head.identity, num_tokens, hashes), payload)


def _raw(tensor: Tensor) -> bytes:
    return compact(tensor).reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def _tensors(data: bytes, at: int, form: Form, lengths: Sequence[int]) -> tuple[Payload, int]:
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


def _varints(data: bytes, at: int, count: int) -> tuple[list[int], int]:
    found = []
    for _ in range(count):
        value, at = decode_varint(data, at)
        found.append(value)
    return found, at


# ---------------------------------------------------------------------------------------------------------------- files


def build_shard(records: Iterable[Packed], names: Names, identity: SignalIdentity) -> bytes:
    """The bytes of a shard of these records, ordered by key so that the same records give the same file."""
    from safetensors.numpy import save

    ordered = sorted(records, key=lambda record: sample_key(record.sample_id))
    ends = np.cumsum([len(record.data) for record in ordered], dtype=np.uint64)
    if not ends.size or int(ends[-1]) < 2**32:
        ends = ends.astype(np.uint32)
    ids = zlib.compress(json.dumps([record.sample_id for record in ordered]).encode(), 9)
    by_type: dict[str, Counter[str]] = {}
    for record in ordered:
        by_type.setdefault(record.type, Counter()).update(
            records=1, tokens=record.num_tokens, payload_bytes=record.num_payload
        )
    text = json.dumps(
        {
            "format_version": SHARD_VERSION,
            "identity": asdict(identity),
            "types": names.types,
            "forms": names.forms,
            "records": len(ordered),
            "by_type": by_type,
            "ids_crc": zlib.crc32(ids),
        },
        sort_keys=True,
    )
    tensors = {
        "ends": ends,
        "ids": np.frombuffer(ids, np.uint8),
        "records": np.frombuffer(b"".join(record.data for record in ordered), np.uint8),
    }
    # One key only: safetensors writes several in no particular order.
    return bytes(save(tensors, {_METADATA: f"{zlib.crc32(text.encode()):08x} {text}"}))


def read_head(read: Reader, size: int) -> ShardHead:
    """The front of a shard file of ``size`` bytes, given a way to read its bytes ``[begin, end)``.

    Raises:
        RecordError: it is cut, damaged or no shard.
        NewerShardError: a newer program wrote it.
    """
    try:
        metadata, places = read_safetensors_head(read)
        text = checked_text(metadata[_METADATA])
        values = json.loads(text)
        if int(values["format_version"]) > SHARD_VERSION:
            raise NewerShardError(f"shard format {values['format_version']}, this program reads {SHARD_VERSION}")
        ends_at, ids_at, records_at = places["ends"], places["ids"], places["records"]
        ends = read_array(read, ends_at)
        num_bytes = int(ends[-1]) if ends.size else 0
        # A damaged end in between hits two records: their checksums do not match.
        if ends.size != values["records"] or records_at[2] - records_at[1] != num_bytes:
            raise RecordError("the table of records is damaged")
        forms = tuple(
            tuple((name, dtype, None if trailing is None else tuple(trailing)) for name, dtype, trailing in form)
            for form in values["forms"]
        )
        return ShardHead(
            SignalIdentity(**values["identity"]),
            tuple(values["types"]),
            forms,
            values["by_type"],
            ends,
            records_at[1],
            {"header": ends_at[1], "ends": ends_at[2] - ends_at[1], "ids": ids_at[2] - ids_at[1]},
            (ids_at[1], ids_at[2], int(values["ids_crc"])),
            records_at[2],
        )
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        what = f"its front is damaged, {size:,} bytes" if size else "it is empty"
        raise RecordError(what) from error


def read_ids(head: ShardHead, read: Reader) -> list[str]:
    """The sample ids of a shard, in the order of its records. Raises RecordError where they are damaged."""
    begin, end, checksum = head.ids
    data = read(begin, end)
    if zlib.crc32(data) != checksum:
        raise RecordError("the list of sample ids is damaged")
    ids: list[str] = json.loads(zlib.decompress(data))
    if len(ids) != len(head):
        raise RecordError(f"{len(ids)} sample ids for {len(head)} records")
    return ids


# ---------------------------------------------------------------------------------------------------------- safetensors


def checked_text(text: str) -> str:
    """What follows a checksum and a space. Raises ValueError where the two do not belong together."""
    checksum, _, rest = text.partition(" ")
    if int(checksum, 16) != zlib.crc32(rest.encode()):
        raise ValueError("a checksum that does not match")
    return rest


def read_safetensors_head(read: Reader) -> tuple[dict[str, str], dict[str, tuple[str, int, int]]]:
    """Metadata, and (dtype, begin, end in the file) of each tensor. The library itself reads whole files only."""
    length = int.from_bytes(read(0, _LENGTH_BYTES), "little")
    if length > _MAX_HEADER_BYTES:
        raise ValueError("a header of impossible length")
    values = json.loads(bytes(read(_LENGTH_BYTES, _LENGTH_BYTES + length)))
    metadata = values.pop("__metadata__")
    begin = _LENGTH_BYTES + length
    places = {}
    for name, tensor in values.items():
        first, last = tensor["data_offsets"]
        if not 0 <= first <= last:
            raise ValueError("a tensor of negative size")
        places[name] = (str(tensor["dtype"]), begin + first, begin + last)
    return metadata, places


def read_array(read: Reader, place: tuple[str, int, int]) -> NDArray[Any]:
    """A one-dimensional tensor of unsigned integers."""
    dtype, begin, end = place
    data = read(begin, end)
    if len(data) != end - begin:
        raise ValueError("cut")
    return np.frombuffer(data, np.dtype(_NUMPY[dtype]))
