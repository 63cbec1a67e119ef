"""Products with an output head, and its gradient, in a chosen dtype.

product dtype: the dtype matrix products run in. Where it is wider than the head's (bfloat16 weights on a CPU without
bfloat16 matrix units) the head is widened block of vocabulary by block, each use anew: that is cheap beside the product
and needs no second copy of the head. Where it is narrower (float32 weights under autocast) the head is narrowed once.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from liquid_llm.losses.signals import OutputHead
from liquid_llm.runtime import has_amx

_BLOCK_ELEMENTS = 1 << 21  # widened at once: 8 MiB of float32, about what the caches of two cores hold
_ACCUMULATOR_BLOCKS = 8


def choose_product_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype for products of ``hidden`` [positions, hidden] with a head.

    float32 instead of 16 bits in two cases: float16, whose range the entries of a softmax gradient leave, and a CPU
    without bfloat16 matrix units, where float32 products are faster (and more exact).
    """
    if hidden.dtype == torch.float16:
        return torch.float32
    if hidden.dtype == torch.bfloat16 and hidden.device.type == "cpu" and not has_amx():
        return torch.float32
    return hidden.dtype


class HeadProducts:
    """``hidden @ weight.T + bias`` and ``gradient @ weight`` for chunks of rows."""

    def __init__(self, head: OutputHead, dtype: torch.dtype) -> None:
        self.head = head
        self.dtype = dtype
        widens = torch.promote_types(head.weight.dtype, dtype) == dtype
        self._weight = head.weight.detach() if widens else head.weight.detach().to(dtype)
        self._bias = None if head.bias is None else head.bias.detach().to(dtype)
        self._widened: Tensor | None = None

    def raw_logits(self, hidden: Tensor, out: Tensor) -> Tensor:
        """Fill ``out`` [rows, vocab] from ``hidden`` [rows, hidden]; scale and soft-cap are left to others."""
        for start, stop, weight in self._blocks():
            if self._bias is None:
                torch.mm(hidden, weight.t(), out=out[:, start:stop])
            else:
                torch.addmm(self._bias[start:stop], hidden, weight.t(), out=out[:, start:stop])
        return out

    def hidden_gradient(self, gradient: Tensor) -> Tensor:
        """[rows, hidden] from the gradient [rows, vocab] with respect to the raw logits."""
        total = gradient.new_zeros(gradient.shape[0], self._weight.shape[1])
        for start, stop, weight in self._blocks():
            total.addmm_(gradient[:, start:stop], weight)
        return total

    def _blocks(self) -> Iterator[tuple[int, int, Tensor]]:
        """The weight in the product dtype, as (first, end, rows of it); a block is good until the next is asked for."""
        vocab_size, width = self._weight.shape
        if self._weight.dtype == self.dtype:
            yield 0, vocab_size, self._weight
            return
        rows = max(1, min(vocab_size, _BLOCK_ELEMENTS // width))
        if self._widened is None:
            self._widened = self._weight.new_empty(rows, width, dtype=self.dtype)
        for start in range(0, vocab_size, rows):
            stop = min(start + rows, vocab_size)
            yield start, stop, self._widened[: stop - start].copy_(self._weight[start:stop])


class HeadGradient:
    """Sum over chunks of a head's weight and bias gradients in ``dtype`` (float32 or wider)."""

    def __init__(self, head: OutputHead, dtype: torch.dtype, *, with_weight: bool, with_bias: bool) -> None:
        vocab_size, width = head.weight.shape
        self._weight_dtype = head.weight.dtype
        self._bias_dtype = None if head.bias is None else head.bias.dtype
        # Another dtype than the weight's is accumulated in parts, so that each can be freed as soon as it is converted.
        parts = 1 if head.weight.dtype == dtype else _ACCUMULATOR_BLOCKS
        self._step = max(1, -(-vocab_size // parts))
        self._vocab_size, self._width = vocab_size, width
        self._dtype = dtype
        self._device = head.weight.device
        self._with_weight = with_weight
        self._parts: list[Tensor] = []
        self._bias = head.weight.new_zeros(vocab_size, dtype=dtype) if with_bias else None

    def add(self, gradient: Tensor, hidden: Tensor) -> None:
        """Add a chunk: ``gradient`` [rows, vocab] with respect to the raw logits, ``hidden`` [rows, hidden]."""
        if self._with_weight and not self._parts:
            self._parts = [torch.mm(columns, hidden).to(self._dtype) for columns in self._columns(gradient)]
        elif self._with_weight:
            for part, columns in zip(self._parts, self._columns(gradient), strict=True):
                if columns.dtype == part.dtype:
                    part.addmm_(columns, hidden)
                else:
                    part.add_(torch.mm(columns, hidden))
        if self._bias is not None:
            self._bias.add_(gradient.sum(dim=0, dtype=self._bias.dtype))

    def _columns(self, gradient: Tensor) -> Iterator[Tensor]:
        """``gradient`` transposed, in parts of the vocabulary [part, rows]."""
        for start in range(0, self._vocab_size, self._step):
            yield gradient[:, start : start + self._step].t()

    def finish(self) -> tuple[Tensor | None, Tensor | None]:
        """The gradients of weight and bias in their own dtypes; the accumulators are given up."""
        bias = None if self._bias is None else self._bias.to(self._bias_dtype)
        if not self._with_weight:
            return None, bias
        if len(self._parts) == 1:
            return self._parts.pop().to(self._weight_dtype), bias
        device = self._device
        if not self._parts:
            return torch.zeros(self._vocab_size, self._width, dtype=self._weight_dtype, device=device), bias
        weight = torch.empty(self._vocab_size, self._width, dtype=self._weight_dtype, device=device)
        stop = self._vocab_size
        while self._parts:
            part = self._parts.pop()
            weight[stop - part.shape[0] : stop].copy_(part)
            stop -= part.shape[0]
        return weight, bias
