"""Where the teacher's rows of a slice come from, labelled position by labelled position.

A source is asked for the rows of slice after slice, and before those of each chunk told which it is: only where logits
must be formed does that matter, so that nothing larger than one chunk of them exists.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from liquid_llm.data.types import IGNORE_INDEX
from liquid_llm.losses.divergences import SparseRows
from liquid_llm.losses.plan import LossPlan
from liquid_llm.losses.products import HeadProducts
from liquid_llm.losses.signals import DenseSignal, LogitsSignal, OutputHead, Signal


class LabelledRows:
    """The rows with a label.

    Args:
        labels: [rows] int64.
        all_labelled: the caller knows that each row has one. Otherwise the host waits for the device to count them.

    Attributes:
        count: how many there are.
        labels: theirs, [count].
        indices: their places, [count]; None where all rows are labelled, which are then taken as they lie.
    """

    def __init__(self, labels: Tensor, *, all_labelled: bool) -> None:
        self.indices: Tensor | None = None
        if not all_labelled:
            indices = (labels != IGNORE_INDEX).nonzero().squeeze(1)
            self.indices = None if indices.shape[0] == labels.shape[0] else indices
        self.labels = self.take(labels)
        self.count = self.labels.shape[0]

    def take(self, tensor: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Labelled rows ``start`` to ``stop`` of ``tensor`` [rows, ...]: a view where all are labelled."""
        return tensor[start:stop] if self.indices is None else tensor[self.indices[start:stop]]

    def put(self, values: Tensor, into: Tensor, start: int, stop: int) -> None:
        """Write labelled rows ``start`` to ``stop`` of ``into`` [rows, ...]."""
        if self.indices is None:
            into[start:stop] = values
        else:
            into[self.indices[start:stop]] = values


@dataclass(frozen=True)
class DenseRows:
    """A teacher's logits for a slice: raw ones with the head that finishes them, or stored ones with ``head`` None.

    Attributes:
        raw: [rows, shared vocab]; overwritten when it is in the dtype of the softmax.
        head: whose scale and soft-cap apply, or None.
        mask: [rows] bool, or None where every row has a signal.
    """

    raw: Tensor
    head: OutputHead | None
    mask: Tensor | None


class DenseSource:
    """Logits formed from hidden states: an online teacher's, or the reference student's."""

    def __init__(self, signal: DenseSignal, rows: LabelledRows, vocab_size: int, plan: LossPlan) -> None:
        self._rows = rows
        self._hidden = signal.hidden.detach()
        self._head = signal.head.cut(vocab_size)
        self._products = HeadProducts(self._head, self._hidden.dtype, plan.product)
        shape = (min(plan.chunk_tokens, rows.count), self._head.vocab_size)
        self._raw = self._hidden.new_empty(shape, dtype=self._products.dtype)
        self._start = 0

    def load(self, start: int, stop: int) -> None:
        """Form the logits of a chunk."""
        self._start = start
        hidden = self._rows.take(self._hidden, start, stop).to(self._products.operand_dtype)
        self._products.raw_logits(hidden, out=self._raw[: stop - start])

    def slice(self, start: int, stop: int) -> DenseRows:
        """Labelled rows ``start`` to ``stop``, of the chunk that was loaded."""
        return DenseRows(self._raw[start - self._start : stop - self._start], self._head, mask=None)


class LogitsSource:
    """Stored logits: only a slice at a time is gathered and widened."""

    def __init__(self, signal: LogitsSignal, rows: LabelledRows, vocab_size: int) -> None:
        self._mask = None if signal.num_signal == signal.num_positions else rows.take(signal.mask)
        self._rows = rows
        self._stored = signal.rows.detach()[:, :vocab_size]

    def slice(self, start: int, stop: int) -> DenseRows:
        """Labelled rows ``start`` to ``stop``."""
        mask = None if self._mask is None else self._mask[start:stop]
        return DenseRows(self._rows.take(self._stored, start, stop), head=None, mask=mask)


Source = DenseSource | LogitsSource | SparseRows


def open_source(
    signal: Signal | None, rows: LabelledRows, vocab_size: int, plan: LossPlan, dtype: torch.dtype
) -> Source | None:
    """The source of a signal's labelled rows, its vocabulary cut to the student's; None without a signal.

    Args:
        dtype: of the softmax.
    """
    if signal is None:
        return None
    if isinstance(signal, DenseSignal):
        return DenseSource(signal, rows, vocab_size, plan)
    if isinstance(signal, LogitsSignal):
        return LogitsSource(signal, rows, vocab_size)
    return SparseRows.of(signal, rows.take, dtype)
