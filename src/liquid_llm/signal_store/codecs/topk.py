"""Codec ``topk``: the k largest logits, and how much mass lies outside them at any temperature.

A position holds its k ids, their distance from the largest logit in 16-bit fixed point of the row's own span,
that span, and the tail's log-partition on a grid of temperatures. So the probabilities of the k ids and the mass of
the rest are right at every T in the grid's range; what is lost is where in the tail the rest lies. That is no small
thing when T is high: the loss can only treat the rest as one bucket, a coarse-grained KL.

Sizes at k=64: 274 bytes a position for vocabularies up to 65,536, 338 above.

With the option ``temperature`` the tail's log-partition is kept at that one temperature, and a record can be read at no
other: the ids' own probabilities would follow at another temperature too, but not what the rest then weighs, which
depends on where in the tail it lies. At T = 1 that is all that a served teacher tells (k log-probabilities; the rest of
the mass is what they leave of 1), and twelve bytes a position less. It answers the one-bucket forward KL at T = 1, and
at any temperature the divergence that asks its teacher at T = 1 and never tempers the rest (``decoupled_topk``).

    tail    the vocabulary without the ids that are stored one by one
    edge    the smallest stored logit z_k: the tail's logits lie below it
    f(u)    log sum over the tail of exp(u * (z - z_k)), u = 1/T: what is needed to know all probabilities at T
    grid    the values of u at which f is stored

f is smooth and convex in u (a cumulant generating function up to a constant), so a polynomial through the grid gives
the values between. It is stored relative to the edge and not to the maximum: a tail of 1e-7 keeps as many digits as one
of 0.5, and head and tail sum to one exactly at any T. All grid points are multiples of 1/8, so that one exponential and
a few products give all of them. Measured on SmolLM2-135M (docs/LOG.md, 2026-11-22): error of f between grid points,
largest and mean for T in 1..4: 0.0024 and 0.00014 for the tail behind 64 ids. Quantisation adds at most 0.00025.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from liquid_llm.errors import SignalError
from liquid_llm.losses.largest import largest
from liquid_llm.losses.signals import HEAD, SparseSignal
from liquid_llm.signal_store.codecs.base import (
    TOP,
    Codec,
    Options,
    Payload,
    PayloadError,
    Rows,
    Run,
    check_temperature,
    lagrange_weights,
    require,
    row_blocks,
)

GRID: tuple[float, ...] = (0.25, 0.375, 0.5, 0.75, 1.0, 1.25, 1.5)  # of u = 1/T; T from 4 down to 2/3
TEMPERATURE_RANGE = (1 / GRID[-1], 1 / GRID[0])
LOWEST = -19.0  # f below this is stored as this: a tail of 6e-9 times the edge's probability is no tail
_POWERS = (1, 2, 4, 6)  # of x = exp((z - z_k) / 8); sums over the tail of products of two are exp(f) on the grid
_PAIRS = ((0, 0), (0, 1), (1, 1), (1, 2), (2, 2), (2, 3), (3, 3))
_GPU_BLOCK_BYTES = 256 * 2**20
_LEVELS = 65535
# A token this far below the best has probability 1e-13 at T=4; the distance of a masked one would spoil the row's span.
_MAX_GAP = 120.0


class TopKCodec(Codec):
    """The k largest logits of a position and the mass outside them.

    Args:
        k: ids a position; a vocabulary smaller than k is kept whole.
        temperature: the one that a record can be read at; None: any that the grid covers.

    Attributes:
        grid: the values of 1/T at which the tail's log-partition is stored.
    """

    name = "topk"
    version = 1
    form = HEAD

    def __init__(self, k: int = 64, temperature: float | None = None) -> None:
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise SignalError("codec 'topk' needs a number of ids", got=k, expected="a positive integer")
        self.k = self.most_ids = k
        self.options: Options = {"k": k}
        self.grid, self.temperature_range = GRID, TEMPERATURE_RANGE
        if temperature is not None:
            self.grid = tuple(u for u in GRID if isinstance(temperature, int | float) and 1 / u == temperature)
            if not self.grid or isinstance(temperature, bool):
                expected = ", ".join(f"{1 / u:.17g}" for u in reversed(GRID))
                raise SignalError("codec 'topk' has no such temperature", got=temperature, expected=expected)
            self.temperature_range = (float(temperature), float(temperature))
            self.options = {"k": k, "temperature": float(temperature)}

    def encode_runs(self, logits: Tensor, runs: Sequence[Run], exhaustive: bool = False) -> Rows:
        values, ids = largest(logits, min(self.k, logits.shape[1]))
        top = values[:, :1]
        tail = tail_log_partition(logits, ids, values[:, -1:].clamp(min=top - _MAX_GAP))
        if self.grid != GRID:
            tail = torch.stack([tail[:, GRID.index(u)] for u in self.grid], dim=1)
        return {**_rows(ids, top - values, tail, logits.shape[1]), TOP: top.squeeze(1)}

    def encode_told(self, ids: Tensor, log_probs: Tensor, vocab_size: int) -> Rows:
        """Encode what somebody else says of a chunk of positions: the likeliest ids at T = 1, and no logits.

        What the probabilities leave of 1 is the tail's mass. It is a difference of numbers near 1, of float32 mostly:
        right to about 1e-6, and never more than ids as likely as the last one would have.

        Args:
            ids: [n, min(k, vocab)] int64, likeliest first.
            log_probs: [n, min(k, vocab)] float64, theirs, falling.

        Raises:
            SignalError: the codec keeps more than T = 1, or these are no k ids.
        """
        if self.grid != (1.0,):
            raise SignalError("log-probabilities tell the rest's mass at T = 1 alone", got=dict(self.options))
        if ids.ndim != 2 or ids.shape != log_probs.shape or ids.shape[1] != min(self.k, vocab_size):
            shapes = f"{list(ids.shape)} and {list(log_probs.shape)}"
            raise SignalError("not the codec's ids", got=shapes, expected=f"{min(self.k, vocab_size)} a position")
        gaps = log_probs[:, :1] - log_probs
        edge = log_probs[:, -1] + (gaps[:, -1] - _MAX_GAP).clamp_(min=0.0)
        mass = (1.0 - log_probs.exp().sum(dim=1)).clamp_(min=0.0)
        most = math.log(max(vocab_size - ids.shape[1], 1))
        return _rows(ids, gaps, (mass.log() - edge).clamp_(max=most).unsqueeze(1), vocab_size)

    def decode(self, payload: Payload, start: int, stop: int, temperature: float, vocab_size: int) -> SparseSignal:
        check_temperature(self, temperature)
        k = min(self.k, vocab_size)
        stored = require(payload, "gaps", torch.uint16, (None, k))
        num = stored.shape[0]
        if num < stop:
            raise PayloadError(f"{num} positions, {stop} wanted")
        ids = _join_ids(payload, num, k, vocab_size, slice(start, stop))
        span = require(payload, "span", torch.float32, (num,))[start:stop]
        levels = require(payload, "tail", torch.uint16, (num, len(self.grid)))[start:stop]

        scores = stored[start:stop].to(torch.float32) * (span / -(_LEVELS * temperature)).unsqueeze(1)
        head = scores.logsumexp(dim=1)
        if k == vocab_size:
            tail_mass, log_partition = torch.zeros_like(head), head
        else:
            tail = dequantise(levels, vocab_size)
            tail = tail[:, 0] if self.grid != GRID else interpolate(tail, temperature)
            tail = tail - span / temperature
            log_partition = torch.logaddexp(head, tail)
            tail_mass = (tail - log_partition).exp_()
        log_probs = scores - log_partition.unsqueeze(1)
        mask, num_exact = torch.ones(stop - start, dtype=torch.bool), torch.full((stop - start,), k)
        return SparseSignal(
            ids, log_probs.exp(), log_probs, tail_mass, mask, temperature, form=HEAD, num_exact=num_exact
        )


def _rows(ids: Tensor, gaps: Tensor, tail: Tensor, vocab_size: int) -> Rows:
    """A chunk's rows: its ids [n, k], how far each lies below the first [n, k], and f [n, of the grid]."""
    gaps = gaps.clamp(max=_MAX_GAP)
    span = gaps[:, -1:]
    levels = (gaps * (_LEVELS / span.clamp(min=1e-6))).round_()
    return {
        **_split_ids(ids, vocab_size),
        "gaps": levels.to(torch.int32).to(torch.uint16),
        "span": span.squeeze(1).to(torch.float32),
        "tail": quantise(tail, vocab_size),
    }


def tail_log_partition(logits: Tensor, ids: Tensor, edge: Tensor) -> Tensor:
    """f at every grid point.

    Args:
        logits: [n, vocab] float32.
        ids: [n, k] int64, the stored ids, left out of the sums.
        edge: [n, 1], not smaller than any tail logit.

    Returns:
        [n, len(GRID)] float32; minus infinity where the tail is empty.
    """
    num, vocab_size = logits.shape
    blocks = row_blocks(num, logits.device, 16 * vocab_size, _GPU_BLOCK_BYTES)  # the powers of a block stay in cache
    buffer = logits.new_empty(blocks[0].stop, len(_POWERS), vocab_size)
    products = logits.new_empty(num, len(_POWERS), len(_POWERS))
    for rows in blocks:
        powers = buffer[: rows.stop - rows.start]
        one, two, four, six = powers.unbind(1)
        torch.add(edge[rows] * -0.125, logits[rows], alpha=0.125, out=one)
        one.exp_().scatter_(1, ids[rows], 0.0)
        torch.mul(one, one, out=two)
        torch.mul(two, two, out=four)
        torch.mul(two, four, out=six)
        torch.bmm(powers, powers.transpose(1, 2), out=products[rows])
    return torch.stack([products[:, left, right] for left, right in _PAIRS], dim=1).log_()


def quantise(values: Tensor, vocab_size: int) -> Tensor:
    """f as 16-bit fixed point between ``LOWEST`` and log vocab, where it must lie: uint16 of the same shape."""
    step = _step(vocab_size)
    return ((values - LOWEST) / step).round_().clamp_(0, _LEVELS).to(torch.int32).to(torch.uint16)


def dequantise(levels: Tensor, vocab_size: int) -> Tensor:
    """Inverse of ``quantise``, float32."""
    return levels.to(torch.float32) * _step(vocab_size) + LOWEST


def interpolate(values: Tensor, temperature: float) -> Tensor:
    """f at ``temperature`` from its grid values [n, len(GRID)]: [n]. Exact (up to rounding) at grid temperatures."""
    return values @ torch.tensor(lagrange_weights(GRID, 1 / temperature), dtype=values.dtype)


def _step(vocab_size: int) -> float:
    return (math.log(vocab_size) - LOWEST) / _LEVELS


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
