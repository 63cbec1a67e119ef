"""Packing: the records of any store into full shards, in another folder or, for small and superseded shards, in place.

Records are copied as they are. In place, new shards are published first; then those shards go that the reader knew when
it was opened and whose records were all copied or are superseded. What another process publishes meanwhile is not among
them, and a crash at any moment loses nothing. Into another folder, running again goes on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from liquid_llm import storage
from liquid_llm.identity import ModelIdentity
from liquid_llm.signal_store.description import HELD_OUT
from liquid_llm.signal_store.records import RecordError, difference_in_words
from liquid_llm.signal_store.shards.folder import write_index
from liquid_llm.signal_store.shards.writer import SHARD_BYTES
from liquid_llm.signal_store.store import StoreReader, StoreWriter

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


def _own_files(uri: str) -> list[storage.FileInfo]:
    """The files of a store without those of the store in it."""
    return [info for info in storage.list_files(uri) if not info.name.startswith(f"{HELD_OUT}/")]


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
    before = _own_files(source.uri)
    in_place = _is_same_folder(source.uri, target)
    summary = PackSummary(bytes_before=sum(info.size for info in before), files_before=len(before))
    writer = StoreWriter(
        target,
        ModelIdentity(identity.teacher_id, identity.teacher_revision, identity.tokenizer_hash),
        source.codec,
        vocab_size=identity.vocab_size,
        layout="shards",
        framing=identity.framing,
        positions=identity.positions,
        versions=source.versions,
        shard_bytes=shard_bytes,
    )
    left_out: dict[str, str] = {}
    for name, record in source.layout.records():
        progress(1)
        if isinstance(record, RecordError):
            left_out[name] = str(record)
        elif (difference := record.header.identity.difference(identity)) is not None:
            what, theirs, _ = difference_in_words(*difference)
            left_out[name] = f"captured with {what} {theirs}"
        elif not in_place and writer.holds(record):
            summary.present += 1
        else:
            writer.put(record)
            summary.packed += 1
    writer.finish()
    if in_place:
        for info in source.layout.replaceable(set(left_out)):
            storage.remove(info.uri)
        write_index(target)
    summary.left_out_count, summary.left_out = len(left_out), dict(list(left_out.items())[:_LISTED])
    after = _own_files(target)
    summary.bytes_after, summary.files_after = sum(info.size for info in after), len(after)
    return summary


def _is_same_folder(first: str, second: str) -> bool:
    if storage.is_remote(first) or storage.is_remote(second):
        return first.rstrip("/") == second.rstrip("/")
    return storage.local_path(first).resolve() == storage.local_path(second).resolve()
