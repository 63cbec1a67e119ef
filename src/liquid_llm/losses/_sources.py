"""Where the teacher's rows of a chunk come from, labelled position by labelled position.

A source is told which chunk is next (``load``) and then asked for slices of it (``slice``, counted from the chunk's
start), so that nothing larger than one chunk of logits exists.
"""

from __future__ import annotations

from typing import Protocol

import torch

from liquid_llm.losses._rows import DenseRows, LabelledRows
from liquid_llm.losses.divergences import SparseRows
from liquid_llm.losses.products import HeadProducts
from liquid_llm.losses.signals import DenseSignal, LogitsSignal, SparseSignal


class TeacherSource(Protocol):
    """A signal, chunk by chunk."""

    def load(self, start: int, stop: int) -> None: ...

    def slice(self, start: int, stop: int) -> DenseRows | SparseRows: ...


class DenseSource:
    """Logits formed from hidden states: an online teacher's, or the reference student's."""

    def __init__(
        self, signal: DenseSignal, rows: LabelledRows, *, chunk_tokens: int, vocab_size: int, product: str
    ) -> None:
        self._rows = rows
        self._hidden = signal.hidden.detach()
        self._head = signal.head.cut(vocab_size)
        self._products = HeadProducts(self._head, self._hidden.dtype, product)
        shape = (min(chunk_tokens, rows.count), self._head.vocab_size)
        self._raw = self._hidden.new_empty(shape, dtype=self._products.dtype)

    def load(self, start: int, stop: int) -> None:
        hidden = self._rows.take(self._hidden, start, stop).to(self._products.operand_dtype)
        self._products.raw_logits(hidden, out=self._raw[: stop - start])

    def slice(self, start: int, stop: int) -> DenseRows:
        return DenseRows(self._raw[start:stop], self._head, mask=None)


class LogitsSource:
    """Stored logits: only a slice at a time is gathered and widened."""

    def __init__(self, signal: LogitsSignal, rows: LabelledRows, vocab_size: int) -> None:
        self._mask = None if signal.num_signal == signal.num_positions else rows.take(signal.mask)
        self._rows = rows
        self._stored = signal.rows.detach()[:, :vocab_size]
        self._start = 0

    def load(self, start: int, stop: int) -> None:
        self._start = start

    def slice(self, start: int, stop: int) -> DenseRows:
        start, stop = self._start + start, self._start + stop
        mask = None if self._mask is None else self._mask[start:stop]
        return DenseRows(self._rows.take(self._stored, start, stop), head=None, mask=mask)


class SparseSource:
    """A sparse signal, of which unused slots are cleared once."""

    def __init__(self, signal: SparseSignal, rows: LabelledRows, dtype: torch.dtype) -> None:
        mask = rows.take(signal.mask)
        weights = torch.where(mask.unsqueeze(1), rows.take(signal.weights).to(dtype), 0.0)
        used = weights > 0
        self._rows = SparseRows(
            ids=torch.where(used, rows.take(signal.ids), 0),
            weights=torch.where(used, weights, 0.0),
            log_probs=torch.where(used, rows.take(signal.log_probs).to(dtype), 0.0),
            tail_mass=torch.where(mask, rows.take(signal.tail_mass).to(dtype), 0.0),
            mask=None if signal.num_signal == signal.num_positions else mask,
            any_tail=signal.any_tail is not False,
        )
        self._start = 0

    def load(self, start: int, stop: int) -> None:
        self._start = start

    def slice(self, start: int, stop: int) -> SparseRows:
        return self._rows.slice(self._start + start, self._start + stop)
