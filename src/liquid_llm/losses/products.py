"""Products with an output head, and its gradient: float32 results of whatever was multiplied (float64 of float64).

operands: what is multiplied. Hidden states in float32 or float64 stay as they are; float16 ones are widened, for the
entries of a softmax gradient leave its range. bfloat16 ones stay bfloat16 where a device gives float32 results of them
("mixed", see ``plan.PRODUCTS``) and are widened elsewhere.

Where operands are wider than the head (a bfloat16 head on a CPU) it is widened block of vocabulary by block, each use
anew: that is cheap beside the product and needs no second copy of the head. Where they are narrower (a float32 head,
bfloat16 hidden states, mixed products) the head is narrowed once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from liquid_llm.losses.plan import bfloat16_tiles
from liquid_llm.losses.signals import LEAST_BIAS, OutputHead

_CPU_BLOCK_ELEMENTS = 1 << 21  # widened at once: 8 MiB of float32, about what the caches of two cores hold
_BLOCK_ELEMENTS = 1 << 24  # where the host does not share the caches and each launch costs
_ACCUMULATOR_BLOCKS = 8

# Before torch 2.12 addmm takes an ``out_dtype`` but no float32 tensor to add to.
_ADDS_MIXED = torch.torch_version.TorchVersion(torch.__version__) >= "2.12"


class HeadProducts:
    """``hidden @ weight.T + bias`` and ``gradient @ weight`` for chunks of rows.

    Args:
        head: whose weight and bias are multiplied; scale and soft-cap are left to others, but for ``logits``.
        hidden_dtype: of the hidden states that will be given.
        product: a key of ``plan.PRODUCTS``.

    Attributes:
        head, hidden_dtype: as given.
        dtype: of all results: float64 where hidden states are, else float32.
        operand_dtype: what hidden states are turned into before they are multiplied.
    """

    def __init__(self, head: OutputHead, hidden_dtype: torch.dtype, product: str) -> None:
        self.head = head
        self.hidden_dtype = hidden_dtype
        self.dtype = torch.float64 if hidden_dtype == torch.float64 else torch.float32
        self._is_mixed = product == "mixed" and hidden_dtype == torch.bfloat16
        self._uses_tiles = product == "tiles" and hidden_dtype == torch.bfloat16
        self.operand_dtype = torch.bfloat16 if self._is_mixed else self.dtype
        widens = torch.promote_types(head.weight.dtype, self.operand_dtype) == self.operand_dtype
        self._weight = head.weight.detach() if widens else head.weight.detach().to(self.operand_dtype)
        self._bias = None if head.bias is None else head.bias.detach().to(self.dtype).clamp(min=LEAST_BIAS)
        self._widened: Tensor | None = None
        self._narrowed: Tensor | None = None

    @property
    def adds_in_place(self) -> bool:
        """Whether ``add`` needs no memory beside the sum it adds to."""
        return _ADDS_MIXED or not self._is_mixed

    def raw_logits(self, hidden: Tensor, out: Tensor) -> Tensor:
        """Fill ``out`` [rows, vocab], in ``dtype``, from ``hidden`` [rows, hidden], in ``operand_dtype``."""
        with self._arithmetic():
            for start, stop, weight in self._blocks():
                if self._bias is None or self._is_mixed:
                    self.multiply(hidden, weight.t(), out=out[:, start:stop])
                else:
                    torch.addmm(self._bias[start:stop], hidden, weight.t(), out=out[:, start:stop])
        if self._bias is not None and self._is_mixed:
            out.add_(self._bias)
        return out

    def logits(self, hidden: Tensor, out: Tensor) -> Tensor:
        """Fill ``out`` [rows, vocab], in ``dtype``, with finished logits of ``hidden`` [rows, hidden]."""
        return self.head.finish(self.raw_logits(hidden.to(self.operand_dtype), out), in_place=True)

    def operand(self, gradient: Tensor) -> Tensor:
        """``gradient`` [rows, vocab] in ``dtype`` as its products take it; good until the next is asked for."""
        space = self.operand_space(gradient)
        return gradient if space is None else space.copy_(gradient)

    def operand_space(self, gradient: Tensor) -> Tensor | None:
        """Where an operand of the shape of ``gradient`` is to lie; None where its products take it as it is."""
        if not self._is_mixed:
            return None
        if self._narrowed is None or self._narrowed.numel() < gradient.numel():
            self._narrowed = torch.empty_like(gradient, dtype=self.operand_dtype)
        return self._narrowed[: gradient.shape[0]]

    def hidden_gradient(self, gradient: Tensor) -> Tensor:
        """[rows, hidden] in ``dtype`` from an ``operand``: the gradient [rows, vocab] by the raw logits."""
        total = gradient.new_zeros(gradient.shape[0], self._weight.shape[1], dtype=self.dtype)
        with self._arithmetic():
            for start, stop, weight in self._blocks():
                if self._is_mixed:
                    self.multiply(gradient[:, start:stop], weight, out=total)
                else:
                    total.addmm_(gradient[:, start:stop], weight)
        return total

    def head_gradient(self, gradient: Tensor, hidden: Tensor, out: Tensor, *, add: bool) -> None:
        """Fill or add to ``out`` [part of vocab, hidden]; ``gradient`` [rows, part of vocab] is an ``operand``'s."""
        with self._arithmetic():
            if not add:
                self.multiply(gradient.t(), hidden, out=out)
            elif not self._is_mixed:
                out.addmm_(gradient.t(), hidden)
            elif _ADDS_MIXED:
                torch.addmm(out, gradient.t(), hidden, out_dtype=self.dtype, out=out)
            else:
                out.add_(torch.mm(gradient.t(), hidden, out_dtype=self.dtype))

    def multiply(self, left: Tensor, right: Tensor, out: Tensor) -> None:
        """``out = left @ right``, operands to result."""
        if self._is_mixed:
            torch.mm(left, right, out_dtype=self.dtype, out=out)
        else:
            torch.mm(left, right, out=out)

    def _arithmetic(self) -> AbstractContextManager[None]:
        return bfloat16_tiles() if self._uses_tiles else nullcontext()

    def _blocks(self) -> Iterator[tuple[int, int, Tensor]]:
        """The weight as an operand: (first, end, rows of it); a block is good until the next is asked for."""
        vocab_size, width = self._weight.shape
        if self._weight.dtype == self.operand_dtype:
            yield 0, vocab_size, self._weight
            return
        elements = _CPU_BLOCK_ELEMENTS if self._weight.device.type == "cpu" else _BLOCK_ELEMENTS
        rows = max(1, min(vocab_size, elements // width))
        if self._widened is None:
            self._widened = self._weight.new_empty(rows, width, dtype=self.operand_dtype)
        for start in range(0, vocab_size, rows):
            stop = min(start + rows, vocab_size)
            yield start, stop, self._widened[: stop - start].copy_(self._weight[start:stop])


class HeadGradient:
    """Sum over chunks of a head's weight and bias gradients, in ``products.dtype``."""

    def __init__(self, products: HeadProducts, *, with_weight: bool, with_bias: bool) -> None:
        head = products.head
        self._head = head
        self._products = products
        self._dtype = products.dtype
        vocab_size = head.vocab_size
        # Another dtype than the weight's is accumulated in parts, so that each can be freed as soon as it is converted.
        self._is_whole = head.weight.dtype == products.dtype
        parts = 1 if self._is_whole and products.adds_in_place else _ACCUMULATOR_BLOCKS
        self._step = max(1, -(-vocab_size // parts))
        self._with_weight = with_weight
        self.with_bias = with_bias
        self._whole: Tensor | None = None
        self._parts: list[Tensor] = []
        self._bias = head.weight.new_zeros(vocab_size, dtype=self._dtype) if with_bias else None

    def add(self, gradient: Tensor, operand: Tensor, hidden: Tensor) -> None:
        """Add a chunk.

        Args:
            gradient: [rows, vocab] with respect to the raw logits; of consequence to a bias alone.
            operand: the same as ``products.operand`` gave it.
            hidden: [rows, hidden] in ``products.operand_dtype``.
        """
        if self._with_weight:
            add = bool(self._parts)
            if not add:
                self._parts = self._empty_parts()
            for part, columns in zip(self._parts, torch.split(operand, self._step, dim=1), strict=True):
                self._products.head_gradient(columns, hidden, part, add=add)
        if self._bias is not None:
            self._bias.add_(gradient.sum(dim=0, dtype=self._bias.dtype))

    def finish(self) -> tuple[Tensor | None, Tensor | None]:
        """The gradients of weight and bias in their own dtypes; the accumulators are given up."""
        weight, head_bias = self._head.weight, self._head.bias
        bias = None
        if self._bias is not None and head_bias is not None:  # what is masked stays so
            bias = self._bias.masked_fill_(head_bias < LEAST_BIAS, 0.0).to(head_bias.dtype)
        if not self._with_weight:
            return None, bias
        if not self._parts:
            return torch.zeros_like(weight, memory_format=torch.contiguous_format), bias
        if self._whole is not None:
            self._parts.clear()
            return self._whole, bias
        total = torch.empty_like(weight, memory_format=torch.contiguous_format)
        stop = total.shape[0]
        while self._parts:
            part = self._parts.pop()
            total[stop - part.shape[0] : stop].copy_(part)
            stop -= part.shape[0]
        return total, bias

    def _empty_parts(self) -> list[Tensor]:
        """Where the parts of the vocabulary are summed: views of one tensor if that can be the result."""
        weight = self._head.weight
        vocab_size, width = weight.shape
        if self._is_whole:
            self._whole = weight.new_empty(vocab_size, width)
            return list(torch.split(self._whole, self._step))
        sizes = [min(self._step, vocab_size - start) for start in range(0, vocab_size, self._step)]
        return [weight.new_empty(size, width, dtype=self._dtype) for size in sizes]
