"""The largest logits of each row."""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK = 64


def largest(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """``logits.topk(k)`` on [n, vocab], quicker: the k largest lie in the k blocks of the largest maxima."""
    n, vocab = logits.shape
    num_blocks = vocab // _BLOCK
    if num_blocks < 2 * k or not n:
        return logits.topk(k, dim=1)
    blocks = logits[:, : num_blocks * _BLOCK].view(n, num_blocks, _BLOCK)
    chosen = blocks.amax(dim=2).topk(k, dim=1, sorted=False).indices  # [n, k]
    row = torch.arange(n, device=logits.device).repeat_interleave(k)
    candidates = stretches(logits, row, chosen.flatten() * _BLOCK, _BLOCK).view(n, k * _BLOCK)
    rest = logits[:, num_blocks * _BLOCK :]
    values, where = torch.cat([candidates, rest], dim=1).topk(k, dim=1)
    in_block = chosen.gather(1, (where // _BLOCK).clamp_(max=k - 1)) * _BLOCK + where % _BLOCK
    in_rest = where - k * _BLOCK + num_blocks * _BLOCK
    return values, torch.where(where < k * _BLOCK, in_block, in_rest)


def stretches(logits: Tensor, row: Tensor, first: Tensor, length: int) -> Tensor:
    """``logits[row, first : first + length]`` of each pair of ``row`` and ``first`` [m]: [m, length].

    Each is copied as a whole, several times quicker than value by value.
    """
    if not row.numel():
        return logits.new_empty(0, length)
    return logits.reshape(-1).unfold(0, length, 1).index_select(0, row * logits.shape[1] + first)
