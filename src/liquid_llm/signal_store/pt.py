"""Layout ``pt``: one small ``.pt`` file a sample, named after its id.

A file holds header and payload as one dictionary of plain values and tensors, with a crc32 over both, and loads with
``weights_only=True``. The folder is listed once by whoever opens it. A file appears complete or not at all
(``storage.write_bytes``), so processes that capture the same sample at the same time only replace each other's equal
records.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
import re
import zipfile
import zlib
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import MISSING, asdict, fields
from typing import Any

import torch

from liquid_llm import storage
from liquid_llm.signal_store.codecs import Payload
from liquid_llm.signal_store.layout import Contents, Found
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
from liquid_llm.storage import TORCH_DAMAGE, FileInfo, unpacks_far

SUFFIX = ".pt"

_READERS = 8
_READ_AHEAD = 64

_END_OF_ZIP = b"PK\x05\x06"
_DISPENSABLE = (".format_version", ".storage_alignment", ".data/serialization_id")  # of what torch.save writes


class PtLayout:
    """Records of one folder; see ``layout.Layout``."""

    name = "pt"
    superseded = 0

    def __init__(self, uri: str, infos: Iterable[FileInfo]) -> None:
        self._uri = uri
        self._sizes = {info.name: info.size for info in infos if is_record_file(info.name)}

    def __len__(self) -> int:
        return len(self._sizes)

    def is_empty(self) -> bool:
        return not self._sizes

    def counts(self) -> dict[str, int]:
        return {"records": len(self)}

    def has(self, sample_id: str, shard: str | None = None) -> bool:
        return file_name(sample_id) in self._sizes

    def problems(self) -> list[str]:
        return []

    def read(self, sample_id: str, shard: str | None = None) -> Record:
        return from_bytes(storage.read_bytes(storage.join(self._uri, file_name(sample_id))))

    def records(self) -> Iterator[Found]:
        """See ``Layout``; read ahead by threads."""
        return self._read_files(sorted(self._sizes))

    def draw(self, count: int, seed: int) -> Iterator[Found]:
        names = sorted(self._sizes)
        return self._read_files(random.Random(seed).sample(names, min(count, len(names))))

    def contents(self) -> Contents:
        """See ``Layout``. All records are read: only inside them is said how many tokens they have."""
        found = Contents(len(self))
        for name, record in self.records():
            if isinstance(record, RecordError):
                found.unreadable += 1
                found.unreadable_bytes += self._sizes[name]
                continue
            payload_bytes = sum(tensor.nbytes for tensor in record.payload.values())
            header = record.header
            found.types.setdefault(header.type, Counter()).update(
                records=1, tokens=header.num_tokens, positions=header.num_rows, payload_bytes=payload_bytes
            )
            found.parts["payload"] += payload_bytes
        found.parts["files and headers"] = sum(self._sizes.values()) - found.parts["payload"] - found.unreadable_bytes
        return found

    def replaceable(self, left_out: set[str]) -> list[FileInfo]:
        return []

    def writer(self, identity: SignalIdentity, *, shard_bytes: int, part_seconds: float) -> PtLayout:
        return self

    def write(self, record: Record) -> int:
        """Publish a record; returns the bytes it takes. Raises StorageError."""
        data = to_bytes(record)
        storage.write_bytes(storage.join(self._uri, file_name(record.header.sample_id)), data)
        return len(data)

    def finish(self) -> int:
        """Nothing is held back."""
        return 0

    def close(self) -> None:
        """Nothing is open."""

    def _read_files(self, names: Iterable[str]) -> Iterator[Found]:
        waiting: deque[Future[Found]] = deque()
        with ThreadPoolExecutor(_READERS, "records") as threads:
            for name in names:
                waiting.append(threads.submit(self._read_file, name))
                if len(waiting) > _READ_AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

    def _read_file(self, name: str) -> Found:
        try:
            record = from_bytes(storage.read_bytes(storage.join(self._uri, name)))
        except RecordError as error:
            return name, error
        return record.header.sample_id, record


def is_record_file(name: str) -> bool:
    """Whether a file of a folder is one of its records."""
    return name.endswith(SUFFIX) and "/" not in name


def file_name(sample_id: str) -> str:
    """A name that is safe on any file system or object store and differs for any two ids, even by case only."""
    slug = re.sub(r"[^A-Za-z0-9_-]", "_", sample_id)[:48]
    digest = hashlib.blake2b(sample_id.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
    return f"{slug}-{digest}{SUFFIX}"


def to_bytes(record: Record) -> bytes:
    """The record as a ``.pt`` file's bytes."""
    header = _header_values(record.header)
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
    if unpacks_far(io.BytesIO(data)):
        raise RecordError("it unpacks to far more than a record has")
    try:
        content = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
        values, payload = dict(content["header"]), dict(content["payload"])
        expected = values.pop("checksum")
        if any(one.nbytes > one.untyped_storage().nbytes() for one in payload.values()):
            raise ValueError("a tensor of more values than are stored")
        actual = _checksum(values, payload)
        header = _read_header(values)
    except TORCH_DAMAGE as error:
        raise RecordError(f"unreadable: {type(error).__name__}") from error
    if actual != expected:
        raise RecordError("the checksum does not match")
    return Record(header, payload)


def _header_values(header: RecordHeader) -> dict[str, Any]:
    """Plain values, flat."""
    values = asdict(header)
    del values["identity"]
    runs = values.pop("runs")
    values |= {"runs": list(runs)} if runs else {}
    return {**header.identity.plain(), **values, "token_hashes": header.token_hashes.hex()}


def _read_header(values: Mapping[str, Any]) -> RecordHeader:
    """Inverse of ``_header_values``. Format 1 had a whole hash for every 64 tokens."""
    named = {field.name: field.default for field in fields(SignalIdentity)}
    identity = SignalIdentity(
        **{name: values[name] if default is MISSING else values.get(name, default) for name, default in named.items()}
    )
    version, num_tokens, hashes = int(values["format_version"]), int(values["num_tokens"]), values["token_hashes"]
    if version > 1:
        hashes = bytes.fromhex(hashes)
    else:
        whole = [bytes.fromhex(one) for one in hashes]
        hashes = whole[-1] + b"".join(one[:MARK_BYTES] for one in whole[: num_tokens // PREFIX_TOKENS])
    if num_tokens < 0 or len(hashes) != WHOLE_BYTES + num_tokens // PREFIX_TOKENS * MARK_BYTES:
        raise ValueError("its hashes are not of so many tokens")
    names = (str(values["sample_id"]), str(values["type"]), identity)
    runs = tuple(int(one) for one in values.get("runs", ()))
    if runs and (min(runs) < 0 or sum(runs) != num_tokens - 1):
        raise ValueError("its runs are not of so many tokens")
    return RecordHeader(version, *names, num_tokens, hashes, runs)


def _checksum(header: Mapping[str, Any], payload: Payload) -> int:
    shapes = {name: [str(tensor.dtype), list(tensor.shape)] for name, tensor in payload.items()}
    running = zlib.crc32(json.dumps([header, shapes], sort_keys=True).encode())
    for name in sorted(payload):
        running = zlib.crc32(payload[name].contiguous().view(torch.uint8).numpy().data, running)
    return running
