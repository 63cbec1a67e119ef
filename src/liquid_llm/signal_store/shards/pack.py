"""Packing: the records of any store into full shards, in another folder or, for small and superseded shards, in place.

Records are copied as they are. In place, new shards are published first; then those shards go that the reader knew when
it was opened and whose records were all copied or are superseded. What another process publishes meanwhile is not among
them, and a crash at any moment loses nothing. Into another folder, running again goes on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from liquid_llm import storage
from liquid_llm.identity import ModelIdentity
from liquid_llm.signal_store.records import RecordError
from liquid_llm.signal_store.shards.folder import ShardsLayout
from liquid_llm.signal_store.shards.writer import SHARD_BYTES, write_index
from liquid_llm.signal_store.store import StoreReader, StoreWriter
from liquid_llm.storage import FileInfo

_LISTED = 20


@dataclass
class PackSummary:
    """What packing did. ``left_out``: the first samples or files whose record could not be taken, and why."""

    packed: int = 0
    present: int = 0
    left_out_count: int = 0
    left_out: dict[str, str] = field(default_factory=dict)
    bytes_before: int = 0
    bytes_after: int = 0
    files_before: int = 0
    files_after: int = 0

    def leave_out(self, name: str, why: str) -> None:
        self.left_out_count += 1
        if len(self.left_out) < _LISTED:
            self.left_out[name] = why

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def pack(
    source: StoreReader,
    target: str,
    *,
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[int], None] = lambda records: None,
) -> PackSummary:
    """Copy every usable record of ``source`` into the shards of folder ``target``, which may be the same.

    Raises:
        SignalError: the target holds another teacher's signal, another codec's or another layout's.
        StorageError: something cannot be read or written.
    """
    identity = source.identity
    before = storage.list_files(source.uri)
    in_place = _same_place(source.uri, target)
    summary = PackSummary(bytes_before=sum(info.size for info in before), files_before=len(before))
    teacher = ModelIdentity(identity.teacher_id, identity.teacher_revision, identity.tokenizer_hash)
    writer = StoreWriter(
        target,
        teacher,
        source.codec,
        vocab_size=identity.vocab_size,
        layout="shards",
        versions=source.versions,
        shard_bytes=shard_bytes,
    )
    left_out: set[str] = set()
    for name, record in source.layout.records():
        progress(1)
        if isinstance(record, RecordError):
            left_out.add(name)
            summary.leave_out(name, str(record))
        elif (difference := record.header.identity.difference(identity)) is not None:
            left_out.add(name)
            summary.leave_out(name, f"captured with {difference[0]} {difference[1]}")
        elif not in_place and writer.holds(record):
            summary.present += 1
        else:
            writer.put(record)
            summary.packed += 1
    writer.finish()
    if in_place and isinstance(source.layout, ShardsLayout):
        for info in _done_with(source.layout, left_out):
            storage.remove(info.uri)
        write_index(target)
    after = storage.list_files(target)
    summary.bytes_after, summary.files_after = sum(info.size for info in after), len(after)
    return summary


def _done_with(layout: ShardsLayout, left_out: set[str]) -> list[FileInfo]:
    """The shards that hold nothing of what was left out (samples, or shards that cannot be read), and empty files."""
    kept = left_out | {layout.shard_of(name) for name in left_out}
    known = [entry.name for entry in layout.index.shards if entry.name not in kept]
    empty = [name for name in layout.condition.damaged if not layout.files[name].size]
    return [layout.files[name] for name in known + empty if name in layout.files]


def _same_place(first: str, second: str) -> bool:
    if storage.is_remote(first) or storage.is_remote(second):
        return first.rstrip("/") == second.rstrip("/")
    return storage.local_path(first).resolve() == storage.local_path(second).resolve()
