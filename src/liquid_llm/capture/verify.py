"""Stored signal against what else could be said: another store's, or the teacher's own word of today.

divergence    what the loss would report if the student were the teacher itself: the loss's estimate of
              KL(stored || teacher), in nats a position; near 0, whatever the codec
error         how far the mean of the stored distributions over many positions lies from the mean of the true ones,
              relatively (Euclidean): what is left of the codec's noise, and any bias
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from liquid_llm.capture.scoring import Scratch, chunk_rows, record_seed
from liquid_llm.losses.signals import SparseSignal
from liquid_llm.signal_store.codecs import PayloadError, Rows, StoredSignal
from liquid_llm.signal_store.records import MARK_BYTES, PREFIX_TOKENS, WHOLE_BYTES, Record, RecordError, RecordHeader
from liquid_llm.signal_store.store import StoreReader
from liquid_llm.teachers.online import OnlineTeacher

# A divergence this far from that of a fresh encoding is not what the teacher says. Other arithmetic gives other draws:
# their noise (see the decision on shards) is allowed for.
_DIFFERS_NATS, _NOISE_NATS = 0.02, 0.45
_SAME_SIGNAL = 0.01  # what arithmetic makes of it is some 1e-6; one position of other tokens among 64 is some 0.1
_CHUNK_BYTES = 64 * 2**20
_LISTED = 20


def dense(signal: StoredSignal, rows: slice, temperature: float, vocab_size: int) -> Tensor:
    """The distributions of some rows [rows, vocab] float32, as far as they are stored id by id."""
    if not isinstance(signal, SparseSignal):
        return torch.softmax(signal.rows[rows].float() / temperature, dim=1)
    ids, weights = signal.ids[rows], signal.weights[rows]
    return torch.zeros(ids.shape[0], vocab_size).scatter_add_(1, ids, weights)


def divergence(signal: StoredSignal, rows: slice, temperature: float, log_probs: Tensor) -> Tensor:
    """The loss's estimate of KL(stored || teacher) for some rows [rows], given the teacher's ``log_probs`` there."""
    if not isinstance(signal, SparseSignal):
        stored = torch.log_softmax(signal.rows[rows].float() / temperature, dim=1)
        return (stored.exp() * (stored - log_probs)).sum(1)
    ids, weights, tail = signal.ids[rows], signal.weights[rows], signal.tail_mass[rows]
    theirs = log_probs.gather(1, ids)
    found = (weights * (signal.log_probs[rows] - theirs)).sum(1)
    rest = 1 - (theirs.exp() * (weights > 0)).sum(1)
    return found + torch.where(tail > 0, tail * (tail.clamp(min=1e-12).log() - rest.clamp(min=1e-12).log()), 0.0)


@dataclass
class Measured:
    """Sums over positions for one type and temperature; see the module."""

    positions: int = 0
    stored: Tensor | None = None
    fresh: Tensor | None = None
    exact: Tensor | None = None
    stored_sum: float = 0.0
    fresh_sum: float = 0.0
    stored_divergences: list[float] = field(default_factory=list)
    fresh_divergences: list[float] = field(default_factory=list)

    def add(self, exact: Tensor, stored: Tensor, fresh: Tensor) -> None:
        """Add distributions [rows, vocab]."""
        self.positions += exact.shape[0]
        for name, rows in (("exact", exact), ("stored", stored), ("fresh", fresh)):
            total = rows.sum(0, dtype=torch.float64)
            before = getattr(self, name)
            setattr(self, name, total if before is None else before + total)

    def add_divergences(self, stored: float, fresh: float, rows: int) -> bool:
        """Add a record's, summed over its rows; whether the two differ too much."""
        self.stored_sum += stored
        self.fresh_sum += fresh
        self.stored_divergences.append(stored / rows)
        self.fresh_divergences.append(fresh / rows)
        return _too_far(stored, fresh, rows)

    @property
    def drifted(self) -> bool:
        """Whether all records together differ too much: a small change of the teacher shows only here."""
        return _too_far(self.stored_sum, self.fresh_sum, self.positions)

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        found: dict[str, Any] = {"positions": self.positions, "drifted": self.drifted}
        for name in ("stored", "fresh"):
            divergences = torch.tensor(getattr(self, f"{name}_divergences") or [0.0], dtype=torch.float64)
            found[f"{name}_divergence"] = float(divergences.mean())
            found[f"{name}_divergence_p95"] = float(divergences.abs().quantile(0.95))
            if self.exact is not None:
                difference = getattr(self, name) - self.exact
                found[f"{name}_error"] = float(difference.norm() / self.exact.norm())
        return found


def _too_far(stored: float, fresh: float, rows: int) -> bool:
    return not abs(stored - fresh) <= _DIFFERS_NATS * rows + _NOISE_NATS * rows**0.5


class Verifier:
    """Compares records with the teacher, scored again.

    Args:
        store: of that teacher.
        teacher: the same, loaded.
        temperatures: to compare at.

    Attributes:
        measured: (type, temperature) -> what was found.
        identical: records whose bytes are those of a fresh encoding.
        differing: sample ids whose stored signal is not what the teacher says.
    """

    def __init__(self, store: StoreReader, teacher: OnlineTeacher, temperatures: tuple[float, ...]) -> None:
        self._store, self._teacher, self._temperatures = store, teacher, temperatures
        self._scratch = Scratch()
        self.measured: dict[tuple[str, float], Measured] = {}
        self.identical = 0
        self.differing: list[str] = []

    def check(self, record: Record, input_ids: Tensor) -> None:
        """Compare one record with the teacher's own signal of ``input_ids`` [tokens], the tokens it was made from.

        Raises:
            PayloadError: the payload is not the codec's.
            SignalError: the teacher's logits are not finite.
        """
        codec, vocab_size = self._store.codec, self._store.identity.vocab_size
        rows = len(input_ids) - 1
        if rows < 1:
            return
        with torch.inference_mode():
            hidden = self._teacher.hidden(input_ids[None])[0, :rows]
            seed = record_seed(record.header.sample_id)
            parts = [codec.encode(logits, seed, start) for start, logits in self._logits(hidden)]
            made: Rows = {name: torch.cat([part[name].cpu() for part in parts]) for name in parts[0]}
            payload = codec.pack(made)
            same = payload.keys() == record.payload.keys() and all(
                torch.equal(tensor, record.payload[name]) for name, tensor in payload.items()
            )
            self.identical += same
            differs = []
            for temperature in self._temperatures:
                one = self.measured.setdefault((record.header.type, temperature), Measured())
                signals = [codec.decode(each, 0, rows, temperature, vocab_size) for each in (record.payload, payload)]
                differs.append(self._differs(one, hidden, signals, temperature))
        if any(differs):
            self.differing.append(record.header.sample_id)

    def _differs(self, one: Measured, hidden: Tensor, signals: list[StoredSignal], temperature: float) -> bool:
        sums = [0.0, 0.0]
        for start, logits in self._logits(hidden):
            log_probs = torch.log_softmax(logits.div_(temperature), dim=1).cpu()
            part = slice(start, start + log_probs.shape[0])
            for number, signal in enumerate(signals):
                sums[number] += float(divergence(signal, part, temperature, log_probs).sum())
            stored, fresh = (dense(signal, part, temperature, log_probs.shape[1]) for signal in signals)
            one.add(log_probs.exp_(), stored, fresh)
        return one.add_divergences(sums[0], sums[1], hidden.shape[0])

    def _logits(self, hidden: Tensor) -> Iterator[tuple[int, Tensor]]:
        """As capture forms them: (first position, logits [positions, vocab]), good until the next are asked for."""
        step = chunk_rows(self._teacher.head.vocab_size, self._teacher.device)
        for start in range(0, hidden.shape[0], step):
            yield start, self._scratch.logits(self._teacher.head, hidden[start : start + step])


# ----------------------------------------------------------------------------------------------------------- two stores


KINDS = (
    *("equal", "payload", "longer_first", "longer_second", "length"),
    *("tokens", "only_first", "only_second", "unreadable"),
)


@dataclass
class Difference:
    """How two stores differ. Lists hold sample ids, the first few; counts hold all.

    Attributes:
        counts: equal; payload (same tokens); longer_first, longer_second (one is of a longer window, see
            ``common_tokens``); length (likewise, but too short for the hashes to say more); tokens (made from different
            texts); only_first, only_second; unreadable.
        examples: kind -> sample ids.
        decoded: of each record whose payloads differ, how far the decoded distributions lie apart: the Euclidean
            distance over all its positions, relatively.
        common: likewise for each longer window, over the positions known to be common.
        common_positions: number of those.
    """

    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    examples: dict[str, list[str]] = field(default_factory=dict)
    decoded: list[float] = field(default_factory=list)
    common: list[float] = field(default_factory=list)
    common_positions: int = 0
    identity: tuple[str, object, object] | None = None

    def add(self, kind: str, sample_id: str) -> None:
        self.counts[kind] += 1
        if kind != "equal" and len(self.examples.setdefault(kind, [])) < _LISTED:
            self.examples[kind].append(sample_id)

    @property
    def same(self) -> bool:
        """Whether the two hold the same signal of the same samples."""
        others = sum(count for kind, count in self.counts.items() if kind != "equal")
        return others == 0 and self.identity is None

    def as_dict(self) -> dict[str, Any]:
        """Plain values; None where nothing was decoded."""
        name, first, second = self.identity or ("", None, None)
        return {
            "same": self.same,
            "identity": {"field": name, "first": first, "second": second} if self.identity else None,
            **self.counts,
            "examples": self.examples,
            "common_positions": self.common_positions,
            **{
                f"{words}_difference_{how}": function(values) if values else None
                for words, values in (("decoded", self.decoded), ("common", self.common))
                for how, function in (("mean", fmean), ("max", max))
            },
        }


def compare(first: StoreReader, second: StoreReader, temperature: float | None) -> Difference:
    """Every record of two stores, compared by tokens, bytes and, where those differ, by what is decoded.

    Nothing is decoded where ``temperature`` is None.

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
                kind = _compare(first, mine, second, second.layout.read(sample_id), temperature, found)
            except (RecordError, PayloadError):
                kind = "unreadable"
            found.add(kind, sample_id)
    for sample_id, theirs in second.layout.records():
        if isinstance(theirs, RecordError):
            if not first.has(sample_id):
                found.add("unreadable", sample_id)
        elif not first.has(sample_id):
            found.add("only_second", sample_id)
    return found


def common_tokens(a: RecordHeader, b: RecordHeader) -> int | None:
    """How many leading tokens two records are known to share; None where they are known to part before that.

    All tokens have a hash, and every 64 from the start; so of windows of different length only whole 64s are known.
    """
    if (a.num_tokens, a.token_hashes) == (b.num_tokens, b.token_hashes):
        return a.num_tokens
    marks = min(a.num_tokens, b.num_tokens) // PREFIX_TOKENS
    part = slice(WHOLE_BYTES, WHOLE_BYTES + marks * MARK_BYTES)
    if a.num_tokens == b.num_tokens or a.token_hashes[part] != b.token_hashes[part]:
        return None
    return marks * PREFIX_TOKENS


def _compare(
    first: StoreReader, mine: Record, second: StoreReader, theirs: Record, temperature: float | None, found: Difference
) -> str:
    a, b = mine.header, theirs.header
    common = common_tokens(a, b)
    if a.type != b.type or common is None:
        return "tokens"
    if a.num_tokens != b.num_tokens:
        longer = "longer_first" if a.num_tokens > b.num_tokens else "longer_second"
        # The signal of a position is of the tokens up to it, so even windows too short for a mark show by the same
        # signal that they begin alike.
        shorter_rows = max(min(a.num_tokens, b.num_tokens) - 1, 0)
        rows = min(common, shorter_rows) if common else shorter_rows
        if temperature is None:
            return longer if common else "length"
        distance = _distance(first, mine, second, theirs, rows, temperature)
        if not common and (distance > _SAME_SIGNAL or not rows):
            return "length"
        found.common.append(distance)
        found.common_positions += rows
        return longer
    if mine.payload.keys() == theirs.payload.keys() and all(
        torch.equal(tensor, theirs.payload[name]) for name, tensor in mine.payload.items()
    ):
        return "equal"
    if temperature is not None:
        rows = max(a.num_tokens - 1, 0)
        found.decoded.append(_distance(first, mine, second, theirs, rows, temperature))
    return "payload"


def _distance(
    first: StoreReader, mine: Record, second: StoreReader, theirs: Record, rows: int, temperature: float
) -> float:
    """Euclidean distance of the decoded distributions of the first ``rows`` positions, relative to the first's norm."""
    vocab_size = max(first.identity.vocab_size, second.identity.vocab_size)
    signals = [
        store.codec.decode(record.payload, 0, rows, temperature, store.identity.vocab_size)
        for store, record in ((first, mine), (second, theirs))
    ]
    squares = [0.0, 0.0]
    step = max(1, _CHUNK_BYTES // (4 * vocab_size))
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        one, other = (
            torch.nn.functional.pad(rows_of, (0, vocab_size - rows_of.shape[1]))
            for rows_of in (dense(signal, part, temperature, vocab_size) for signal in signals)
        )
        squares[0] += float((one - other).square().sum())
        squares[1] += float(one.square().sum())
    return math.sqrt(squares[0] / max(squares[1], 1e-30))
