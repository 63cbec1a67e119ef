"""Codec ``topk``: the k largest logits, and how much mass lies outside them at any temperature.

A position holds its k ids, their distance from the largest logit in 16-bit fixed point of the row's own span,
that span, and the tail's log-partition on a grid of temperatures (``partition.py``). So the probabilities of the k
ids and the mass of the rest are right at every T in the grid's range; what is lost is where in the tail the rest lies.
That is no small thing when T is high: the loss can only treat the rest as one bucket, a coarse-grained KL.

Sizes at k=64: 274 bytes a position for vocabularies up to 65,536, 338 above.
"""

from __future__ import annotations

import torch
from torch import Tensor

from liquid_llm.errors import SignalError
from liquid_llm.losses.signals import SparseSignal
from liquid_llm.signal_store.codecs import partition
from liquid_llm.signal_store.codecs.base import (
    Options,
    Payload,
    PayloadError,
    Rows,
    check_temperature,
    require,
    require_finite,
)

_LEVELS = 65535
# A token this far below the best has probability 1e-13 at T=4; the distance of a masked one would spoil the row's span.
_MAX_GAP = 120.0
_BLOCK = 64


class TopKCodec:
    """The k largest logits of a position and the mass outside them.

    Args:
        k: ids a position; a vocabulary smaller than k is kept whole.
    """

    name = "topk"
    version = 1
    temperature_range = partition.TEMPERATURE_RANGE

    def __init__(self, k: int = 64) -> None:
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise SignalError("codec 'topk' needs a number of ids", got=k, expected="a positive integer")
        self.k = k
        self.options: Options = {"k": k}

    def encode(self, logits: Tensor, seed: int, start: int) -> Rows:
        values, ids = largest(logits, min(self.k, logits.shape[1]))
        top = values[:, :1]
        require_finite(top)
        gaps = (top - values).clamp_(max=_MAX_GAP)
        span = gaps[:, -1:]
        levels = (gaps * (_LEVELS / span.clamp(min=1e-6))).round_()
        tail = partition.tail_log_partition(logits, ids, values[:, -1:].clamp(min=top - _MAX_GAP))
        return {
            **_split_ids(ids, logits.shape[1]),
            "gaps": levels.to(torch.int32).to(torch.uint16),
            "span": span.squeeze(1).to(torch.float32),
            "tail": partition.quantise(tail, logits.shape[1]),
        }

    def pack(self, rows: Rows) -> Payload:
        return {name: tensor.contiguous() for name, tensor in rows.items()}

    def decode(self, payload: Payload, start: int, stop: int, temperature: float, vocab_size: int) -> SparseSignal:
        check_temperature(self, temperature)
        k = min(self.k, vocab_size)
        stored = require(payload, "gaps", torch.uint16, (None, k))
        num = stored.shape[0]
        if num < stop:
            raise PayloadError(f"{num} positions, {stop} wanted")
        ids = _join_ids(payload, num, k, vocab_size, slice(start, stop))
        span = require(payload, "span", torch.float32, (num,))[start:stop]
        levels = require(payload, "tail", torch.uint16, (num, len(partition.GRID)))[start:stop]

        scores = stored[start:stop].to(torch.float32) * (span / -(_LEVELS * temperature)).unsqueeze(1)
        head = scores.logsumexp(dim=1)
        if k == vocab_size:
            tail_mass, log_partition = torch.zeros_like(head), head
        else:
            tail = partition.interpolate(partition.dequantise(levels, vocab_size), temperature) - span / temperature
            log_partition = torch.logaddexp(head, tail)
            tail_mass = (tail - log_partition).exp_()
        log_probs = scores - log_partition.unsqueeze(1)
        mask = torch.ones(stop - start, dtype=torch.bool)
        return SparseSignal(ids, log_probs.exp(), log_probs, tail_mass, mask, temperature)


def largest(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """``logits.topk(k)`` on [n, vocab], quicker: the k largest lie in the k blocks of the largest maxima."""
    n, vocab = logits.shape
    num_blocks = vocab // _BLOCK
    if num_blocks < 2 * k:
        return logits.topk(k, dim=1)
    blocks = logits[:, : num_blocks * _BLOCK].view(n, num_blocks, _BLOCK)
    chosen = blocks.amax(dim=2).topk(k, dim=1, sorted=False).indices  # [n, k]
    candidates = blocks.gather(1, chosen.unsqueeze(2).expand(n, k, _BLOCK)).view(n, k * _BLOCK)
    rest = logits[:, num_blocks * _BLOCK :]
    values, where = torch.cat([candidates, rest], dim=1).topk(k, dim=1)
    in_block = chosen.gather(1, (where // _BLOCK).clamp_(max=k - 1)) * _BLOCK + where % _BLOCK
    in_rest = where - k * _BLOCK + num_blocks * _BLOCK
    return values, torch.where(where < k * _BLOCK, in_block, in_rest)


def _split_ids(ids: Tensor, vocab_size: int) -> Rows:
    """Ids in 2 bytes, or 3 where the vocabulary needs them."""
    low = {"ids": (ids & 0xFFFF).to(torch.int32).to(torch.uint16)}
    return low if vocab_size <= 0x10000 else {**low, "ids_high": (ids >> 16).to(torch.uint8)}


def _join_ids(payload: Payload, num: int, k: int, vocab_size: int, rows: slice) -> Tensor:
    ids = require(payload, "ids", torch.uint16, (num, k))[rows].to(torch.int64)
    if vocab_size > 0x10000:
        ids |= require(payload, "ids_high", torch.uint8, (num, k))[rows].to(torch.int64) << 16
    if ids.numel() and int(ids.max()) >= vocab_size:
        raise PayloadError(f"id {int(ids.max())} in a vocabulary of {vocab_size}")
    return ids
