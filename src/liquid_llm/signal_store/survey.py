"""What a signal store holds and what each part of it costs.

live             the record of a sample that counts; superseded: an older one that it hides
bytes a token    bytes on disk for each position of live records; what is superseded or unreadable is counted apart
parts            where those go: the codec's own parts, what a record says about itself, names, tables, index
mass             sum of a position's stored weights and of its tail's bucket: 1, or 1 on average where ids are drawn
tail share       the part of it that is not stored id by id: one bucket, or ids drawn to stand for others
mass error       root mean square of mass - 1 over positions: the noise of what is drawn, 0 where nothing is
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from liquid_llm import storage
from liquid_llm.losses.signals import SparseSignal
from liquid_llm.signal_store.codecs import PayloadError, StoredSignal
from liquid_llm.signal_store.description import STORE_FILE
from liquid_llm.signal_store.pt import PtLayout
from liquid_llm.signal_store.records import Record, RecordError
from liquid_llm.signal_store.shards.file import ShardHead, read_ids, unpack_record
from liquid_llm.signal_store.shards.folder import ShardsLayout
from liquid_llm.signal_store.shards.index import INDEX_FILE
from liquid_llm.signal_store.shards.listing import is_shard
from liquid_llm.signal_store.store import StoreReader

_LISTED = 20
_DRAWN = 0.02  # a weight this far from its probability, relatively, belongs to a draw


@dataclass
class TypeSurvey:
    """One type of samples. ``positions`` is a row fewer than tokens each; the rest is of the records looked at."""

    records: int = 0
    tokens: int = 0
    payload_bytes: int = 0
    sampled_positions: int = 0
    mass: float = 0.0
    tail_share: float = 0.0
    mass_error: float = 0.0

    @property
    def positions(self) -> int:
        return self.tokens - self.records

    def as_dict(self) -> dict[str, Any]:
        """Plain values; sums have become means, None where there is nothing to divide by."""
        n = self.sampled_positions
        return {
            "records": self.records,
            "positions": self.positions,
            "payload_bytes_per_token": self.payload_bytes / self.positions if self.positions else None,
            "sampled_positions": n,
            "mass": self.mass / n if n else None,
            "tail_share": self.tail_share / n if n else None,
            "mass_error": (self.mass_error / n) ** 0.5 if n else None,
        }


@dataclass
class Survey:
    """A whole store.

    Attributes:
        types: by type, of live records that can be read.
        bytes: on disk, all files of the store.
        parts: where those of live records go; with the two below they add up to ``bytes``.
        files: number of them.
        superseded, superseded_bytes: records hidden by later ones of their samples; packing removes them.
        unreadable, unreadable_bytes: live records, as far as the index knows them, that lie in shards cut or damaged.
        sampled: records looked at; stale, corrupt: how many of those were.
        examples: a few of those, and of shards that cannot be read -> why.
        problems: what is wrong with the folder, in words.
    """

    types: dict[str, TypeSurvey] = field(default_factory=dict)
    bytes: int = 0
    parts: dict[str, float] = field(default_factory=dict)
    files: int = 0
    superseded: int = 0
    superseded_bytes: float = 0.0
    unreadable: int = 0
    unreadable_bytes: float = 0.0
    sampled: int = 0
    stale: int = 0
    corrupt: int = 0
    examples: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def name(self, name: str, why: str) -> None:
        """Take a sample or file into the examples, while there are few."""
        if len(self.examples) < _LISTED:
            self.examples.setdefault(name, why)

    def as_dict(self) -> dict[str, Any]:
        """Plain values; None a token where there is no position."""
        positions = sum(one.positions for one in self.types.values())
        counts = ("bytes", "files", "superseded", "unreadable", "sampled", "stale", "corrupt", "examples", "problems")
        return {
            **{name: getattr(self, name) for name in counts},
            "superseded_bytes": round(self.superseded_bytes),
            "unreadable_bytes": round(self.unreadable_bytes),
            "positions": positions,
            "bytes_per_token": sum(self.parts.values()) / positions if positions else None,
            "parts_bytes_per_token": {name: size / positions for name, size in self.parts.items() if positions},
            "types": {kind: one.as_dict() for kind, one in sorted(self.types.items())},
        }


def survey(store: StoreReader, *, samples: int, temperature: float, seed: int) -> Survey:
    """Measure a store: sizes exactly, the rest on ``samples`` records drawn at random, decoded at ``temperature``.

    Layout ``pt`` says how many tokens a record has only inside it, so all records are read; of layout ``shards`` those
    of shards in which some are superseded.

    Raises:
        SignalError: the codec cannot answer at this temperature.
        StorageError: the store cannot be read.
    """
    found = Survey()
    sizes = {info.name: info.size for info in storage.list_files(store.uri)}
    layout = store.layout
    if isinstance(layout, ShardsLayout):
        drawn: Iterable[tuple[str, Record | RecordError]] = layout.some(samples, seed)
        damaged = _shard_sizes(found, store, layout, sizes)
        found.problems = layout.condition.problems()
        found.superseded = layout.index.superseded
    else:
        assert isinstance(layout, PtLayout)
        drawn, damaged = _pt_sizes(found, layout, sizes, samples, seed), set()
    found.parts[STORE_FILE] = sizes.get(STORE_FILE, 0)
    found.bytes = round(sum(found.parts.values()) + found.superseded_bytes + found.unreadable_bytes)
    codec_bytes: Counter[str] = Counter()
    for name, record in drawn:
        if name in damaged:
            continue  # its records are counted as unreadable
        found.sampled += 1
        if isinstance(record, RecordError):
            found.corrupt += 1
            found.name(name, f"corrupt: {record}")
        elif (difference := record.header.identity.difference(store.identity)) is not None:
            found.stale += 1
            found.name(name, f"stale: captured with {difference[0]} {difference[1]}")
        else:
            _look_at(found, store, record, temperature, codec_bytes)
    _split_payload(found, codec_bytes)
    return found


def _shard_sizes(found: Survey, store: StoreReader, layout: ShardsLayout, sizes: dict[str, int]) -> set[str]:
    """Sizes of all shards; returns the names of those that cannot be read."""
    parts: dict[str, float] = defaultdict(float)
    damaged = dict(layout.condition.damaged)
    live = np.bincount(layout.index.keys()[2], minlength=len(layout.index.shards)).tolist()
    for number, (entry, head) in enumerate(layout.heads()):
        size = sizes.get(entry.name, 0)
        if isinstance(head, RecordError):
            found.unreadable += live[number]
            damaged[entry.name] = str(head)
        elif live[number] == len(head) and size >= head.size:
            _add_records(found, parts, head, head.by_type, head.size - head.begin, 1.0)
        elif live[number]:
            rows = layout.index.rows_of(number).tolist()
            _add_some(found, parts, head, rows, storage.read_bytes(storage.join(store.uri, entry.name)))
        else:
            found.superseded_bytes += size
    for name, why in damaged.items():
        found.unreadable_bytes += sizes.get(name, 0)
        found.name(name, f"unreadable: {why}")
    parts["index"] = sizes.get(INDEX_FILE, 0)
    found.parts = {name: size for name, size in parts.items() if size}
    found.files = sum(is_shard(name) or name in (INDEX_FILE, STORE_FILE) for name in sizes)
    return set(damaged)


def _add_records(
    found: Survey,
    parts: dict[str, float],
    head: ShardHead,
    by_type: Mapping[str, Mapping[str, int]],
    record_bytes: int,
    share: float,
) -> None:
    """Count records of a shard that take ``record_bytes``, and their share of its front."""
    payload = 0
    for kind, counts in by_type.items():
        one = found.types.setdefault(kind, TypeSurvey())
        one.records += counts["records"]
        one.tokens += counts["tokens"]
        one.payload_bytes += counts["payload_bytes"]
        payload += counts["payload_bytes"]
    parts["payload"] += payload
    parts["record headers"] += record_bytes - payload
    parts["sample ids"] += head.front_bytes["ids"] * share
    parts["shard headers and tables"] += (head.front_bytes["header"] + head.front_bytes["ends"]) * share


def _add_some(found: Survey, parts: dict[str, float], head: ShardHead, rows: list[int], data: bytes) -> None:
    """Count the records ``rows`` of a shard of which others are superseded, or whose end is missing.

    Its front says only what all of its records have together, so they are read.
    """
    by_type: dict[str, Counter[str]] = {}
    read_bytes = lost_bytes = read = 0
    try:
        ids = read_ids(head, lambda begin, end: data[begin:end])
    except RecordError:
        ids = []
    for row in rows:
        begin, end = head.span(row)
        part = data[begin:end]
        try:
            record = unpack_record(head, ids[row], part)
        except (RecordError, IndexError):
            lost_bytes += len(part)
            continue
        read += 1
        read_bytes += len(part)
        payload_bytes = sum(tensor.nbytes for tensor in record.payload.values())
        by_type.setdefault(record.header.type, Counter()).update(
            records=1, tokens=record.header.num_tokens, payload_bytes=payload_bytes
        )
    _add_records(found, parts, head, by_type, read_bytes, read / len(head))
    hidden = len(head) - len(rows)
    hidden_bytes = max(len(data) - head.begin, 0) - read_bytes - lost_bytes
    found.superseded_bytes += hidden_bytes + head.begin * hidden / len(head)
    found.unreadable += len(rows) - read
    found.unreadable_bytes += lost_bytes + head.begin * (len(rows) - read) / len(head)


def _pt_sizes(
    found: Survey, layout: PtLayout, sizes: dict[str, int], samples: int, seed: int
) -> Iterable[tuple[str, Record | RecordError]]:
    """Sizes of all records; returns some of them, drawn at random."""
    rng = random.Random(seed)
    drawn: list[tuple[str, Record | RecordError]] = []
    payload = 0
    for number, (name, record) in enumerate(layout.records()):
        if isinstance(record, Record):
            one = found.types.setdefault(record.header.type, TypeSurvey())
            one.records += 1
            one.tokens += record.header.num_tokens
            size = sum(tensor.nbytes for tensor in record.payload.values())
            one.payload_bytes += size
            payload += size
        else:
            found.unreadable += 1
            found.unreadable_bytes += sizes.get(name, 0)
        if len(drawn) < samples:
            drawn.append((name, record))
        elif (place := rng.randrange(number + 1)) < samples:
            drawn[place] = (name, record)
    files = [size for name, size in sizes.items() if name.endswith(".pt") and "/" not in name]
    found.parts = {"payload": payload, "files and headers": sum(files) - payload - found.unreadable_bytes}
    found.files = len(files) + 1
    return drawn


def _look_at(found: Survey, store: StoreReader, record: Record, temperature: float, codec_bytes: Counter[str]) -> None:
    rows = max(record.header.num_tokens - 1, 0)
    try:
        signal = store.codec.decode(record.payload, 0, rows, temperature, store.identity.vocab_size)
        codec_bytes.update(payload_parts(store, record))
    except PayloadError as error:
        found.corrupt += 1
        found.name(record.header.sample_id, f"corrupt: {error}")
        return
    mass, tail = masses(signal)
    one = found.types.setdefault(record.header.type, TypeSurvey())
    one.sampled_positions += rows
    one.mass += float(mass.sum())
    one.tail_share += float(tail.sum())
    one.mass_error += float((mass - 1).square().sum())


def payload_parts(store: StoreReader, record: Record) -> dict[str, int]:
    """Bytes of a payload by what they say: as its codec tells, else by tensor."""
    parts = getattr(store.codec, "parts", None)
    if parts is not None:
        told: dict[str, int] = parts(record.payload, store.identity.vocab_size)
        return told
    return {name: tensor.nbytes for name, tensor in record.payload.items()}


def masses(signal: StoredSignal) -> tuple[torch.Tensor, torch.Tensor]:
    """Mass and tail share of each position."""
    if not isinstance(signal, SparseSignal):
        return torch.ones(signal.num_positions), torch.zeros(signal.num_positions)
    drawn = (signal.weights - signal.log_probs.exp()).abs() > _DRAWN * signal.weights
    return signal.weights.sum(1) + signal.tail_mass, (signal.weights * drawn).sum(1) + signal.tail_mass


def _split_payload(found: Survey, codec_bytes: Counter[str]) -> None:
    """Replace the part "payload" by the codec's parts, in the proportions seen."""
    seen = sum(codec_bytes.values())
    if seen and "payload" in found.parts:
        payload = found.parts.pop("payload")
        shares = {f"payload: {name}": payload * size / seen for name, size in codec_bytes.items()}
        found.parts = {**shares, **found.parts}
