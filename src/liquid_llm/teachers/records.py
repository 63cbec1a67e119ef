"""A record: the stored teacher signal of one sample, as bytes and back.

    header         plain values: whose signal it is, of which tokens, in which codec
    payload        the codec's tensors
    token hashes   of the first 64, 128, ... tokens and of all captured ones; a record is used only for the very
                   tokens it was made from, and a mismatch can say where the texts part
    checksum       crc32 over header and payload; a damaged record is told from a foreign one

``.pt`` bytes hold both as one dictionary of tensors and plain values and load with ``weights_only=True``.
"""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import re
import struct
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from liquid_llm.teachers.codecs import Codec, Payload

FORMAT_VERSION = 1
PREFIX_TOKENS = 64
SUFFIX = ".pt"

# What torch.load is known to raise on damaged bytes (found by fuzzing, see the tests).
_DAMAGE = (
    RuntimeError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    EOFError,
    OSError,
    OverflowError,
    MemoryError,
    AssertionError,
    struct.error,
    pickle.UnpicklingError,
)
_END_OF_ZIP = b"PK\x05\x06"


class RecordError(Exception):
    """Bytes that are not a complete record."""


@dataclass(frozen=True)
class SignalIdentity:
    """Whose signal this is and how it is encoded: the same for all records of a store.

    Attributes:
        teacher_id, teacher_revision: the model's name, and its commit or the fingerprint of its weights.
        tokenizer_hash: hash of the teacher's tokenizer.
        vocab_size: entries the codec was given, after cutting the embedding's padding.
        codec, codec_version, codec_options: enough to make the codec again.
    """

    teacher_id: str
    teacher_revision: str
    tokenizer_hash: str
    vocab_size: int
    codec: str
    codec_version: int
    codec_options: dict[str, int | float | str]

    @property
    def teacher(self) -> str:
        """Name and revision in one word."""
        return f"{self.teacher_id}@{self.teacher_revision[:12]}"

    def difference(self, other: SignalIdentity) -> tuple[str, object, object] | None:
        """The first field that differs: its name, this value, the other's; None when equal."""
        for field in fields(self):
            mine, others = getattr(self, field.name), getattr(other, field.name)
            if mine != others:
                return field.name.replace("_", " "), mine, others
        return None

    @classmethod
    def of(
        cls, codec: Codec, *, teacher_id: str, teacher_revision: str, tokenizer_hash: str, vocab_size: int
    ) -> SignalIdentity:
        options = dict(codec.options)
        return cls(teacher_id, teacher_revision, tokenizer_hash, vocab_size, codec.name, codec.version, options)


@dataclass(frozen=True)
class RecordHeader:
    """What a record says about itself.

    Attributes:
        sample_id, type: of the sample.
        identity: teacher, tokenizer, vocabulary and codec.
        num_tokens: tokens scored, a window from the sample's start; the payload has one row fewer.
        token_hashes: see :func:`token_hashes`, of those tokens.
    """

    format_version: int
    sample_id: str
    type: str
    identity: SignalIdentity
    num_tokens: int
    token_hashes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, flat."""
        values = asdict(self)
        return {**values.pop("identity"), **values, "token_hashes": list(self.token_hashes)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RecordHeader:
        """Inverse of ``to_dict``. Raises KeyError or TypeError for what it cannot have written."""
        identity = SignalIdentity(**{field.name: values[field.name] for field in fields(SignalIdentity)})
        return cls(
            int(values["format_version"]),
            str(values["sample_id"]),
            str(values["type"]),
            identity,
            int(values["num_tokens"]),
            tuple(str(value) for value in values["token_hashes"]),
        )


@dataclass(frozen=True)
class Record:
    """A header and the payload it describes."""

    header: RecordHeader
    payload: Payload


def token_hashes(input_ids: np.ndarray) -> tuple[str, ...]:
    """Hashes of the first 64, 128, ... tokens and, last, of all: 16 hexadecimal digits each (blake2b)."""
    data = np.ascontiguousarray(input_ids, dtype="<i4")
    running = hashlib.blake2b(digest_size=8)
    found = []
    for start in range(0, max(len(data), 1), PREFIX_TOKENS):
        running.update(data[start : start + PREFIX_TOKENS].tobytes())
        found.append(running.copy().hexdigest())
    return tuple(found)


def first_difference(header: RecordHeader, input_ids: np.ndarray) -> str | None:
    """Where a sample's tokens part from the ones a record was made from; None where they agree."""
    if len(input_ids) < header.num_tokens:
        return f"the text has {len(input_ids)} tokens, {header.num_tokens} were captured"
    now = token_hashes(input_ids[: header.num_tokens])
    if now == header.token_hashes:
        return None
    agreeing = next((n for n, (a, b) in enumerate(zip(now, header.token_hashes, strict=False)) if a != b), len(now))
    return f"the text differs from the captured one after token {agreeing * PREFIX_TOKENS}"


def file_name(sample_id: str) -> str:
    """A name that is safe on any file system or object store and differs for any two ids, even by case only."""
    slug = re.sub(r"[^A-Za-z0-9_-]", "_", sample_id)[:48]
    digest = hashlib.blake2b(sample_id.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
    return f"{slug}-{digest}{SUFFIX}"


def to_bytes(record: Record) -> bytes:
    """The record as a ``.pt`` file's bytes."""
    header = record.header.to_dict()
    # torch.save writes all of the storage behind a view, and a single row may keep odd strides: a copy has neither
    payload = {name: _compact(tensor) for name, tensor in record.payload.items()}
    header["checksum"] = _checksum(header, payload)
    buffer = io.BytesIO()
    torch.save({"header": header, "payload": payload}, buffer)
    return buffer.getvalue()


def from_bytes(data: bytes) -> Record:
    """Inverse of ``to_bytes``.

    Raises:
        RecordError: the bytes are truncated, damaged or no record, with the reason.
    """
    if data[-22:-18] != _END_OF_ZIP:  # a cut file has lost its end; torch would try other formats on it
        raise RecordError(f"truncated or not a record ({len(data)} bytes)")
    try:
        content = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
        values, payload = dict(content["header"]), dict(content["payload"])
        expected = values.pop("checksum")
        actual = _checksum(values, payload)
        header = RecordHeader.from_dict(values)
    except _DAMAGE as error:
        raise RecordError(f"unreadable: {type(error).__name__}") from error
    if actual != expected:
        raise RecordError("the checksum does not match")
    return Record(header, payload)


def _compact(tensor: Tensor) -> Tensor:
    if tensor.dim() and tensor.stride(-1) == 1 and tensor.nbytes == tensor.untyped_storage().nbytes():
        return tensor.contiguous()
    return tensor.clone(memory_format=torch.contiguous_format)


def _checksum(header: Mapping[str, Any], payload: Payload) -> int:
    shapes = {name: [str(tensor.dtype), list(tensor.shape)] for name, tensor in payload.items()}
    running = zlib.crc32(json.dumps([header, shapes], sort_keys=True).encode())
    for name in sorted(payload):
        running = zlib.crc32(payload[name].contiguous().view(torch.uint8).numpy().data, running)
    return running
