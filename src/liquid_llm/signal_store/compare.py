"""Two stores compared, record by record: by tokens, by bytes and, where those differ, by what is decoded."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from liquid_llm.losses.signals import SparseSignal
from liquid_llm.signal_store.codecs import Payload, PayloadError, StoredSignal
from liquid_llm.signal_store.records import Record, RecordError
from liquid_llm.signal_store.store import StoreReader

OUTCOMES = ("equal", "payload", "tokens", "only_first", "only_second", "unreadable")

_CHUNK_BYTES = 64 * 2**20
_LISTED = 20


@dataclass
class Difference:
    """How two stores differ. Lists hold sample ids, the first few; counts hold all.

    Attributes:
        counts: equal; payload (same tokens, other signal); tokens (of another text, another length or other positions
            of it); only_first, only_second; unreadable.
        examples: outcome -> sample ids.
        decoded: of each record whose payloads differ, how far the decoded distributions lie apart: the Euclidean
            distance over all its positions, relatively.
        identity: the first field in which the stores' identities differ, and its two values.
    """

    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(OUTCOMES, 0))
    examples: dict[str, list[str]] = field(default_factory=dict)
    decoded: list[float] = field(default_factory=list)
    identity: tuple[str, object, object] | None = None

    def add(self, outcome: str, sample_id: str) -> None:
        self.counts[outcome] += 1
        if outcome != "equal" and len(self.examples.setdefault(outcome, [])) < _LISTED:
            self.examples[outcome].append(sample_id)

    @property
    def same(self) -> bool:
        """Whether the two hold the same signal of the same samples."""
        return self.identity is None and sum(self.counts.values()) == self.counts["equal"]

    def as_dict(self) -> dict[str, Any]:
        """Plain values; None where nothing was decoded."""
        name, mine, theirs = self.identity or ("", None, None)
        return {
            "same": self.same,
            "identity": {"field": name, "first": mine, "second": theirs} if self.identity else None,
            **self.counts,
            "examples": self.examples,
            "decoded_difference_mean": fmean(self.decoded) if self.decoded else None,
            "decoded_difference_max": max(self.decoded, default=None),
        }


def compare(first: StoreReader, second: StoreReader, temperature: float | None) -> Difference:
    """Every record of two stores, compared; nothing is decoded where ``temperature`` is None.

    Raises:
        SignalError: a codec cannot answer at this temperature.
        StorageError: a store cannot be read.
    """
    found = Difference(identity=first.identity.difference(second.identity))
    for sample_id, mine in first.layout.records():
        if isinstance(mine, RecordError):
            found.add("unreadable", sample_id)
        elif not second.has(sample_id):
            found.add("only_first", sample_id)
        else:
            try:
                outcome = _compare(first, mine, second, second.layout.read(sample_id), temperature, found)
            except (RecordError, PayloadError):
                outcome = "unreadable"
            found.add(outcome, sample_id)
    for sample_id, theirs in second.layout.records():
        if not first.has(sample_id):
            found.add("unreadable" if isinstance(theirs, RecordError) else "only_second", sample_id)
    return found


def is_same_payload(first: Payload, second: Payload) -> bool:
    """Whether two payloads are equal to the byte."""
    return first.keys() == second.keys() and all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def to_dense(signal: StoredSignal, rows: slice, temperature: float, vocab_size: int) -> Tensor:
    """The distributions of some rows [rows, vocab] float32, as far as they are stored id by id."""
    if not isinstance(signal, SparseSignal):
        return torch.softmax(signal.rows[rows].float() / temperature, dim=1)
    ids, weights = signal.ids[rows], signal.weights[rows]
    return torch.zeros(ids.shape[0], vocab_size).scatter_add_(1, ids, weights)


def _compare(
    first: StoreReader, mine: Record, second: StoreReader, theirs: Record, temperature: float | None, found: Difference
) -> str:
    a, b = mine.header, theirs.header
    if (a.type, a.num_tokens, a.token_hashes, a.runs) != (b.type, b.num_tokens, b.token_hashes, b.runs):
        return "tokens"
    if is_same_payload(mine.payload, theirs.payload):
        return "equal"
    if temperature is not None:
        found.decoded.append(_distance(first, mine, second, theirs, temperature))
    return "payload"


def _distance(first: StoreReader, mine: Record, second: StoreReader, theirs: Record, temperature: float) -> float:
    """Euclidean distance of the decoded distributions of all positions, relative to the first's norm."""
    rows = mine.header.num_rows
    vocab_size = max(first.identity.vocab_size, second.identity.vocab_size)
    signals = [
        store.codec.decode(record.payload, 0, rows, temperature, store.identity.vocab_size)
        for store, record in ((first, mine), (second, theirs))
    ]
    distance = norm = 0.0
    step = max(1, _CHUNK_BYTES // (4 * vocab_size))
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        one, other = (
            pad(dense, (0, vocab_size - dense.shape[1]))
            for dense in (to_dense(signal, part, temperature, vocab_size) for signal in signals)
        )
        distance += float((one - other).square().sum())
        norm += float(one.square().sum())
    return math.sqrt(distance / max(norm, 1e-30))
