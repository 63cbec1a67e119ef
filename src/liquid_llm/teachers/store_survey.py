"""What a signal store holds and what each part of it costs.

bytes a token    bytes on disk for each stored position, as ``CaptureSummary`` counts them
parts            where the bytes go: the codec's own parts, what a record says about itself, names, tables, index
mass             sum of a position's stored weights and of its tail's bucket: 1, or 1 on average where ids are drawn
tail share       the part of it that is not stored id by id: one bucket, or ids drawn to stand for others
mass error       root mean square of mass - 1 over positions: the noise of what is drawn, 0 where nothing is
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from liquid_llm import storage
from liquid_llm.losses.signals import SparseSignal
from liquid_llm.teachers.codecs import PayloadError, StoredSignal
from liquid_llm.teachers.pt_layout import PtLayout
from liquid_llm.teachers.records import Record, RecordError
from liquid_llm.teachers.shards_index import INDEX_FILE
from liquid_llm.teachers.shards_layout import ShardsLayout, is_shard
from liquid_llm.teachers.store import StoreReader
from liquid_llm.teachers.store_file import STORE_FILE

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
        """Plain values; sums have become means."""
        n = max(self.sampled_positions, 1)
        return {
            "records": self.records,
            "positions": self.positions,
            "payload_bytes_per_token": self.payload_bytes / max(self.positions, 1),
            "sampled_positions": self.sampled_positions,
            "mass": self.mass / n,
            "tail_share": self.tail_share / n,
            "mass_error": (self.mass_error / n) ** 0.5,
        }


@dataclass
class Survey:
    """A whole store.

    Attributes:
        types: by type.
        bytes: on disk, all files of the store.
        parts: where they go; they add up to ``bytes``.
        files: number of them.
        superseded: records hidden by later ones of their samples; packing removes them.
        sampled: records looked at; stale, corrupt: how many of those were.
        problems: what is wrong with the folder, in words.
    """

    types: dict[str, TypeSurvey] = field(default_factory=dict)
    bytes: int = 0
    parts: dict[str, float] = field(default_factory=dict)
    files: int = 0
    superseded: int = 0
    sampled: int = 0
    stale: int = 0
    corrupt: int = 0
    problems: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        positions = max(sum(one.positions for one in self.types.values()), 1)
        return {
            **{name: getattr(self, name) for name in ("bytes", "files", "superseded", "sampled", "stale", "corrupt")},
            "positions": positions,
            "bytes_per_token": self.bytes / positions,
            "parts_bytes_per_token": {name: size / positions for name, size in self.parts.items()},
            "types": {kind: one.as_dict() for kind, one in sorted(self.types.items())},
            "problems": self.problems,
        }


def survey(store: StoreReader, *, samples: int, temperature: float, seed: int) -> Survey:
    """Measure a store: sizes exactly, the rest on ``samples`` records drawn at random, decoded at ``temperature``.

    Layout ``pt`` says how many tokens a record has only inside it, so all records are read.

    Raises:
        SignalError: the codec cannot answer at this temperature.
        StorageError: the store cannot be read.
    """
    found = Survey()
    sizes = {info.name: info.size for info in storage.list_files(store.uri)}
    layout = store.layout
    if isinstance(layout, ShardsLayout):
        drawn: Iterable[tuple[str, Record | RecordError]] = layout.some(samples, seed)
        _shard_sizes(found, layout, sizes)
        found.problems = layout.condition.problems()
        found.superseded = layout.index.superseded
    else:
        assert isinstance(layout, PtLayout)
        drawn = _pt_sizes(found, layout, sizes, samples, seed)
    found.parts[STORE_FILE] = sizes.get(STORE_FILE, 0)
    found.bytes = round(sum(found.parts.values()))
    codec_bytes: Counter[str] = Counter()
    for _, record in drawn:
        found.sampled += 1
        if isinstance(record, RecordError):
            found.corrupt += 1
        elif record.header.identity != store.identity:
            found.stale += 1
        else:
            _look_at(found, store, record, temperature, codec_bytes)
    _split_payload(found, codec_bytes)
    return found


def _shard_sizes(found: Survey, layout: ShardsLayout, sizes: dict[str, int]) -> None:
    parts: Counter[str] = Counter()
    for entry, head in layout.heads():
        if isinstance(head, RecordError):
            parts["unreadable shards"] += sizes.get(entry.name, 0)
            continue
        payload = 0
        for kind, counts in head.by_type.items():
            one = found.types.setdefault(kind, TypeSurvey())
            one.records += counts["records"]
            one.tokens += counts["tokens"]
            one.payload_bytes += counts["payload_bytes"]
            payload += counts["payload_bytes"]
        parts["payload"] += payload
        parts["record headers"] += head.size - head.begin - payload
        parts["sample ids"] += head.front_bytes["ids"]
        parts["shard headers and tables"] += head.front_bytes["header"] + head.front_bytes["ends"]
    parts["unreadable shards"] += sum(sizes[name] for name in layout.condition.damaged)
    parts["index"] = sizes.get(INDEX_FILE, 0)
    found.parts = {name: size for name, size in parts.items() if size}
    found.files = sum(is_shard(name) or name in (INDEX_FILE, STORE_FILE) for name in sizes)


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
        if len(drawn) < samples:
            drawn.append((name, record))
        elif (place := rng.randrange(number + 1)) < samples:
            drawn[place] = (name, record)
    files = [size for name, size in sizes.items() if name.endswith(".pt") and "/" not in name]
    found.parts = {"payload": payload, "files and headers": sum(files) - payload}
    found.files = len(files) + 1
    return drawn


def _look_at(found: Survey, store: StoreReader, record: Record, temperature: float, codec_bytes: Counter[str]) -> None:
    rows = max(record.header.num_tokens - 1, 0)
    try:
        signal = store.codec.decode(record.payload, 0, rows, temperature, store.identity.vocab_size)
        codec_bytes.update(payload_parts(store, record))
    except PayloadError:
        found.corrupt += 1
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
    if seen:
        payload = found.parts.pop("payload")
        shares = {f"payload: {name}": payload * size / seen for name, size in codec_bytes.items()}
        found.parts = {**shares, **found.parts}
