"""Stored signal against what its teacher says today.

divergence    what the loss would report if the student were the teacher itself: the loss's estimate of
              KL(stored || teacher), in nats a position; near 0, whatever the codec
error         how far the mean of the stored distributions over many positions lies from the mean of the true ones,
              relatively (Euclidean): what is left of the codec's noise, and any bias
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from liquid_llm.capture.scoring import Scratch, chunk_rows, record_seed
from liquid_llm.losses.signals import SparseSignal
from liquid_llm.signal_store.codecs import Rows, StoredSignal
from liquid_llm.signal_store.compare import is_same_payload, to_dense
from liquid_llm.signal_store.records import Record
from liquid_llm.signal_store.store import StoreReader
from liquid_llm.teachers.online import OnlineTeacher

# A divergence this far from that of a fresh encoding is not what the teacher says. Other arithmetic gives other draws:
# their noise (see the decision on shards) is allowed for.
_DIFFERS_NATS, _NOISE_NATS = 0.02, 0.45


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
            self.identical += is_same_payload(record.payload, payload)
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
            stored, fresh = (to_dense(signal, part, temperature, log_probs.shape[1]) for signal in signals)
            one.add(log_probs.exp_(), stored, fresh)
        return one.add_divergences(sums[0], sums[1], hidden.shape[0])

    def _logits(self, hidden: Tensor) -> Iterator[tuple[int, Tensor]]:
        """As capture forms them: (first position, logits [positions, vocab]), good until the next are asked for."""
        step = chunk_rows(self._teacher.head.vocab_size, self._teacher.device)
        for start in range(0, hidden.shape[0], step):
            yield start, self._scratch.logits(self._teacher.head, hidden[start : start + step])
