"""Stored signal against what its teacher says today.

divergence    what the loss would report if the student were the teacher itself: the loss's estimate of
              KL(stored || teacher), in nats a position; near 0, whatever the codec
error         how far the mean of the stored distributions over many positions lies from the mean of the true ones,
              relatively (Euclidean): what is left of the codec's noise, and any bias

Both are said of what is stored and of a fresh encoding of what the teacher says now.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from liquid_llm.capture.plan import Window
from liquid_llm.capture.scoring import Scratch, Taken, encoded, padded_ids
from liquid_llm.errors import SignalError
from liquid_llm.losses.objective import Objective
from liquid_llm.losses.reference import measure
from liquid_llm.signal_store.codecs import PayloadError, Rows
from liquid_llm.signal_store.compare import is_same_payload, to_dense
from liquid_llm.signal_store.records import Record, RecordError
from liquid_llm.signal_store.store import StoreReader
from liquid_llm.teachers.online import OnlineTeacher

# A divergence this far from that of a fresh encoding is not what the teacher says. Other arithmetic gives other draws:
# their noise (see the decision on shards) is allowed for.
_DIFFERS_NATS, _NOISE_NATS = 0.02, 0.45
_LISTED = 20


class Verifier:
    """Compares records with the teacher, which scores their samples again.

    Args:
        store: of that teacher.
        teacher: the same, loaded.
        temperatures: to compare at.
    """

    def __init__(self, store: StoreReader, teacher: OnlineTeacher, temperatures: tuple[float, ...]) -> None:
        self._store, self._teacher, self._temperatures = store, teacher, temperatures
        self._scratch = Scratch()
        self._statuses: Counter[str] = Counter()
        self._examples: dict[str, str] = {}
        self._measured: dict[tuple[str, float], _Measured] = {}
        self._identical = 0
        self._differing: list[str] = []  # samples whose stored signal is not what the teacher says

    def check(self, batch: Sequence[Window]) -> None:
        """Compare the records of samples with the teacher's own signal of their tokens, asked in one forward pass.

        Raises:
            SignalError: the teacher's logits are not finite.
            StorageError: the store cannot be read.
        """
        found: list[tuple[Record, Taken]] = []
        for window in batch:
            sample = window.sample()
            try:
                record = self._store.layout.read(sample.sample_id, sample.shard)
                lookup = self._store.check(sample, record.header.num_tokens)
            except RecordError as error:
                self._count(sample.sample_id, "corrupt", str(error))
                continue
            if lookup.status != "usable":
                self._count(sample.sample_id, lookup.status, lookup.reason)
                continue
            ids, places = sample.input_ids[: record.header.num_tokens], record.header.positions()
            found.append((record, Taken(window, ids, places, self._store.codec, row=len(found))))
        with torch.inference_mode():
            for record, hidden, made in self._scored(found):
                try:
                    self._compare(record, hidden, made)
                    self._count(record.header.sample_id, "usable", "")
                except PayloadError as error:
                    self._count(record.header.sample_id, "corrupt", str(error))

    def _count(self, sample_id: str, status: str, why: str) -> None:
        self._statuses[status] += 1
        if why and len(self._examples) < _LISTED:
            self._examples.setdefault(sample_id, f"{status}: {why}")

    def _scored(self, found: Sequence[tuple[Record, Taken]]) -> Iterator[tuple[Record, Tensor, Rows]]:
        """Of each record the hidden states of its positions [positions, hidden], and what the codec makes of them."""
        if not found:
            return
        hidden = self._teacher.hidden(padded_ids([one.input_ids for _, one in found]))
        outcomes = list(encoded(self._teacher.head, hidden, [one for _, one in found], self._scratch))
        for (record, one), of_sample, (_, rows, _) in zip(found, hidden, outcomes, strict=True):
            if isinstance(rows, SignalError):
                raise rows
            places = torch.from_numpy(np.flatnonzero(one.places)).to(of_sample.device)
            yield record, of_sample.index_select(0, places), rows

    @property
    def agrees(self) -> bool:
        """Whether all records looked at are usable and say what the teacher says."""
        return not self._differs and self._statuses["usable"] == self._statuses.total()

    def as_dict(self) -> dict[str, Any]:
        """What was found, as plain values."""
        return {
            "looked_at": self._statuses.total(),
            **{status: self._statuses[status] for status in ("usable", "stale", "corrupt")},
            "identical": self._identical,
            "differing": len(self._differing),
            "differing_samples": self._differing[:_LISTED],
            "examples": self._examples,
            "measured": [
                {"type": type, "temperature": temperature, **one.as_dict()}
                for (type, temperature), one in sorted(self._measured.items())
            ],
            "agrees": self.agrees,
            "verdict": self._verdict(),
        }

    @property
    def _differs(self) -> bool:
        return bool(self._differing) or any(one.drifted for one in self._measured.values())

    def _verdict(self) -> str:
        if self._differs:
            return "the store does NOT say what its teacher says"
        bad = ", ".join(f"{self._statuses[name]} {name}" for name in ("stale", "corrupt") if self._statuses[name])
        if not bad:
            return "the store says what its teacher says"
        rest = "the usable ones say what the teacher says" if self._statuses["usable"] else "none could be compared"
        return f"{bad}, {len(self._differing)} differing: {rest}"

    def _compare(self, record: Record, hidden: Tensor, made: Rows) -> None:
        codec, vocab_size = self._store.codec, self._store.identity.vocab_size
        rows = record.header.num_rows
        if rows < 1:
            return
        payload = codec.pack(made)
        differs = False
        for temperature in self._temperatures:
            signals = [codec.decode(each, 0, rows, temperature, vocab_size) for each in (record.payload, payload)]
            one = self._measured.setdefault((record.header.type, temperature), _Measured(vocab_size))
            found, objective = [0.0, 0.0], Objective(temperature=temperature)
            for start, logits in self._logits(hidden):
                log_probs = torch.log_softmax(logits.div_(temperature), dim=1).cpu()
                part = slice(start, start + log_probs.shape[0])
                one.sums[0] += log_probs.exp().sum(0, dtype=torch.float64)
                for number, signal in enumerate(signals):
                    found[number] += float(measure(log_probs, signal, part, objective)[0].sum())
                    dense = to_dense(signal, part, temperature, vocab_size)
                    one.sums[1 + number] += dense.sum(0, dtype=torch.float64)
            one.records.append((found[0], found[1], rows))
            differs |= _too_far(found[0], found[1], rows)
        self._identical += is_same_payload(record.payload, payload)
        if differs:
            self._differing.append(record.header.sample_id)

    def _logits(self, hidden: Tensor) -> Iterator[tuple[int, Tensor]]:
        """As capture forms them: (first position, logits [positions, vocab]), good until the next are asked for."""
        step = self._scratch.rows(self._teacher.head.vocab_size, self._teacher.device)
        for start in range(0, hidden.shape[0], step):
            yield start, self._scratch.logits(self._teacher.head, hidden[start : start + step])


class _Measured:
    """One type at one temperature.

    Attributes:
        sums: [3, vocab] float64, over positions: of the exact, the stored and the freshly encoded distributions.
        records: of each, the stored and the fresh divergence summed over its rows, and those.
    """

    def __init__(self, vocab_size: int) -> None:
        self.sums = torch.zeros(3, vocab_size, dtype=torch.float64)
        self.records: list[tuple[float, float, int]] = []

    @property
    def drifted(self) -> bool:
        """Whether all records together differ too much: a small change of the teacher shows only here."""
        stored, fresh, rows = (sum(column) for column in zip(*self.records, strict=True))
        return _too_far(stored, fresh, int(rows))

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        stored, fresh, rows = torch.tensor(self.records, dtype=torch.float64).unbind(1)
        exact, *means = self.sums
        found: dict[str, Any] = {"positions": int(rows.sum()), "drifted": self.drifted}
        for name, divergences, mean in (("stored", stored / rows, means[0]), ("fresh", fresh / rows, means[1])):
            found[f"{name}_divergence"] = float(divergences.mean())
            found[f"{name}_divergence_p95"] = float(divergences.abs().quantile(0.95))
            found[f"{name}_error"] = float((mean - exact).norm() / exact.norm())
        return found


def _too_far(stored: float, fresh: float, rows: int) -> bool:
    return not abs(stored - fresh) <= _DIFFERS_NATS * rows + _NOISE_NATS * rows**0.5
