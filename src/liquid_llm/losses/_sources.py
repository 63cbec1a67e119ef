"""Where the rows of a chunk come from: labelled positions, and the teacher's word on each.

A source is told which chunk is next (``load``) and then asked for slices of it (``slice``, counted from the chunk's
start), so that nothing larger than one chunk of logits exists.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from liquid_llm.data.types import IGNORE_INDEX
from liquid_llm.losses._heads import HeadProducts
from liquid_llm.losses._rows import DenseRows, SparseRows
from liquid_llm.losses.signals import DenseSignal, LogitsSignal


class LabelledRows:
    """The rows with a label: ``count`` of them, their ``labels`` [count] and their places ``indices`` [count]."""

    def __init__(self, labels: Tensor) -> None:
        self.indices = (labels != IGNORE_INDEX).nonzero().squeeze(1)
        self.count = self.indices.shape[0]
        self._all = self.count == labels.shape[0]
        self.labels = labels if self._all else labels[self.indices]

    def take(self, tensor: Tensor, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` of the labelled rows of ``tensor`` [rows, ...]: a view where all are labelled."""
        return tensor[start:stop] if self._all else tensor[self.indices[start:stop]]


class TeacherSource(Protocol):
    """A signal, chunk by chunk."""

    def load(self, start: int, stop: int) -> None: ...

    def slice(self, start: int, stop: int) -> DenseRows | SparseRows: ...


class DenseSource:
    """Logits formed from hidden states in ``product_dtype``: an online teacher's, or the reference student's."""

    def __init__(
        self, signal: DenseSignal, rows: LabelledRows, *, chunk_tokens: int, vocab_size: int, product_dtype: torch.dtype
    ) -> None:
        self._rows = rows
        self._hidden = signal.hidden.detach()
        self._head = signal.head.cut(vocab_size)
        self._products = HeadProducts(self._head, product_dtype)
        shape = (min(chunk_tokens, rows.count), self._head.vocab_size)
        self._raw = self._hidden.new_empty(shape, dtype=self._products.dtype)

    def load(self, start: int, stop: int) -> None:
        hidden = self._rows.take(self._hidden, start, stop).to(self._products.dtype)
        self._products.raw_logits(hidden, out=self._raw[: stop - start])

    def slice(self, start: int, stop: int) -> DenseRows:
        return DenseRows(self._raw[start:stop], self._head, mask=None)


class LogitsSource:
    """Stored logits: only a slice at a time is gathered and widened."""

    def __init__(self, signal: LogitsSignal, rows: LabelledRows, vocab_size: int) -> None:
        mask = rows.take(signal.mask, 0, rows.count)
        self._mask = None if bool(mask.all()) else mask
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
    """A sparse signal, cleaned once."""

    def __init__(self, rows: SparseRows) -> None:
        self._clean = rows
        self._start = 0

    def load(self, start: int, stop: int) -> None:
        self._start = start

    def slice(self, start: int, stop: int) -> SparseRows:
        return self._clean.slice(self._start + start, self._start + stop)
