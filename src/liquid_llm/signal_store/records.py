"""A record: the stored teacher signal of one sample, as bytes and back.

    header         plain values: whose signal it is, of which tokens, in which codec
    payload        the codec's tensors
    token hashes   of all captured tokens, and short ones of the first 64, 128, ...: a record is used only for the very
                   tokens it was made from, and where a text has changed behind a window, for that window still
    checksum       crc32 over header and payload; a damaged record is told from a foreign one

``.pt`` bytes hold both as one dictionary of tensors and plain values and load with ``weights_only=True``. Shards hold
the same in fewer bytes (``shards.py``).
"""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import re
import struct
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from liquid_llm.identity import ModelIdentity
from liquid_llm.signal_store.codecs import Codec, Payload

FORMAT_VERSION = 2  # 1 had a whole hash for every 64 tokens; both are read
PREFIX_TOKENS = 64
WHOLE_BYTES, MARK_BYTES = 8, 4
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
_DISPENSABLE = (".format_version", ".storage_alignment", ".data/serialization_id")  # of what torch.save writes


class RecordError(Exception):
    """Bytes that are not a complete record."""


class RecordMissingError(RecordError):
    """There is no record of the sample."""


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
    def of(cls, codec: Codec, teacher: ModelIdentity, vocab_size: int) -> SignalIdentity:
        """What ``teacher``'s signal is in this codec."""
        options = dict(codec.options)
        model = (teacher.id, teacher.revision, teacher.tokenizer_hash)
        return cls(*model, vocab_size, codec.name, codec.version, options)


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
    token_hashes: bytes

    def to_dict(self) -> dict[str, Any]:
        """Plain values, flat."""
        values = asdict(self)
        return {**values.pop("identity"), **values, "token_hashes": self.token_hashes.hex()}

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
            _hashes_of(values),
        )


@dataclass(frozen=True)
class Record:
    """A header and the payload it describes."""

    header: RecordHeader
    payload: Payload


def token_hashes(input_ids: np.ndarray) -> bytes:
    """Hash of all tokens (8 bytes of blake2b), then of the first 64, 128, ... as far as they go (4 bytes each).

    Another text passes for this one with odds of 2^-64. The short ones cost a sixteenth of a byte a token and let a
    window be used of a text that has changed behind it; one that has changed inside passes with odds of 2^-32 or less.
    """
    data = np.ascontiguousarray(input_ids, dtype="<i4")
    running = hashlib.blake2b(digest_size=WHOLE_BYTES)
    full = len(data) // PREFIX_TOKENS * PREFIX_TOKENS
    marks = []
    for start in range(0, full, PREFIX_TOKENS):
        running.update(data[start : start + PREFIX_TOKENS].data)
        marks.append(running.digest()[:MARK_BYTES])
    running.update(data[full:].data)
    return running.digest() + b"".join(marks)


def tokens_agreeing(header: RecordHeader, input_ids: np.ndarray) -> int:
    """How many leading tokens of a text are known to be those a record was made from."""
    n = header.num_tokens
    if len(input_ids) >= n:
        data = np.ascontiguousarray(input_ids[:n], dtype="<i4")
        if hashlib.blake2b(data.data, digest_size=WHOLE_BYTES).digest() == header.token_hashes[:WHOLE_BYTES]:
            return n
    now, then = token_hashes(input_ids[:n])[WHOLE_BYTES:], header.token_hashes[WHOLE_BYTES:]
    places = range(0, min(len(now), len(then)), MARK_BYTES)
    pieces = slice(0, MARK_BYTES)
    agreeing = next((at for at in places if now[at:][pieces] != then[at:][pieces]), len(places) * MARK_BYTES)
    return agreeing // MARK_BYTES * PREFIX_TOKENS


def first_difference(header: RecordHeader, input_ids: np.ndarray, window: int) -> str | None:
    """Where the captured tokens of a text's first ``window`` part from the text; None where they agree."""
    agreeing = tokens_agreeing(header, input_ids)
    if agreeing >= min(window, header.num_tokens):
        return None
    if len(input_ids) < header.num_tokens and agreeing == len(input_ids) // PREFIX_TOKENS * PREFIX_TOKENS:
        return f"the text has {len(input_ids)} tokens, {header.num_tokens} were captured"
    return f"the text differs from the captured one after token {agreeing}"


def _hashes_of(values: Mapping[str, Any]) -> bytes:
    hashes = values["token_hashes"]
    if int(values["format_version"]) > 1:
        return bytes.fromhex(hashes)
    whole = [bytes.fromhex(one) for one in hashes]
    return whole[-1] + b"".join(one[:MARK_BYTES] for one in whole[: int(values["num_tokens"]) // PREFIX_TOKENS])


def file_name(sample_id: str) -> str:
    """A name that is safe on any file system or object store and differs for any two ids, even by case only."""
    slug = re.sub(r"[^A-Za-z0-9_-]", "_", sample_id)[:48]
    digest = hashlib.blake2b(sample_id.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
    return f"{slug}-{digest}{SUFFIX}"


def to_bytes(record: Record) -> bytes:
    """The record as a ``.pt`` file's bytes."""
    header = record.header.to_dict()
    # torch.save writes all of the storage behind a view, and a single row may keep odd strides: a copy has neither
    payload = {name: compact(tensor) for name, tensor in record.payload.items()}
    header["checksum"] = _checksum(header, payload)
    buffer = io.BytesIO()
    torch.save({"header": header, "payload": payload}, buffer)
    return _without_slack(buffer)


def _without_slack(saved: io.BytesIO) -> bytes:
    """The same archive without alignment and what ``torch.load`` does not need: a kilobyte less a record."""
    small = io.BytesIO()
    with zipfile.ZipFile(saved) as source, zipfile.ZipFile(small, "w") as target:
        for entry in source.infolist():
            name = entry.filename.partition("/")[2]
            if name not in _DISPENSABLE:
                method = zipfile.ZIP_DEFLATED if name == "data.pkl" else zipfile.ZIP_STORED
                target.writestr(zipfile.ZipInfo(f"r/{name}"), source.read(entry), method)
    return small.getvalue()


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


def compact(tensor: Tensor) -> Tensor:
    """The same values with memory of its own in the usual order, also where a single entry hides odd strides."""
    if tensor.dim() and tensor.stride(-1) == 1 and tensor.nbytes == tensor.untyped_storage().nbytes():
        return tensor.contiguous()
    return tensor.clone(memory_format=torch.contiguous_format)


def _checksum(header: Mapping[str, Any], payload: Payload) -> int:
    shapes = {name: [str(tensor.dtype), list(tensor.shape)] for name, tensor in payload.items()}
    running = zlib.crc32(json.dumps([header, shapes], sort_keys=True).encode())
    for name in sorted(payload):
        running = zlib.crc32(payload[name].contiguous().view(torch.uint8).numpy().data, running)
    return running
