"""The log-partition of the tail of a distribution as a function of temperature, held by a few values.

    tail          the vocabulary without the ids that are stored one by one
    edge          the smallest stored logit z_k; where the stored ids are the largest, the tail's logits lie below it
    f(u)          log sum over the tail of exp(u * (z - z_k)), u = 1/T: what is needed to know all probabilities at T
    grid          the values of u at which f is stored

f is smooth and convex in u (a cumulant generating function up to a constant), so a polynomial through the grid
gives the values between. It is stored relative to the edge and not to the maximum: a tail of 1e-7 keeps as many digits
as one of 0.5, and head and tail sum to one exactly at any T. All grid points are multiples of 1/8, so that one
exponential and a few products give all of them.

Measured on SmolLM2-135M (docs/LOG.md, 2026-11-22): error of f between grid points, largest and mean for T in 1..4:
0.0024 and 0.00014 for the tail behind 64 ids, 0.013 and 0.0007 behind 12. Quantisation adds at most 0.00025.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from liquid_llm.signal_store.codecs.base import cuts_for_cache

GRID: tuple[float, ...] = (0.25, 0.375, 0.5, 0.75, 1.0, 1.25, 1.5)  # of u = 1/T; T from 4 down to 2/3
TEMPERATURE_RANGE = (1 / GRID[-1], 1 / GRID[0])
LOWEST = -19.0  # f below this is stored as this: a tail of 6e-9 times the edge's probability is no tail
_LEVELS = 65535
_POWERS = (
    1,
    2,
    4,
    6,
)  # of x = exp((z - z_k) / 8); products of two of them, summed over the tail, are exp(f) on the grid
_PAIRS = ((0, 0), (0, 1), (1, 1), (1, 2), (2, 2), (2, 3), (3, 3))
_CPU_BLOCK_BYTES = 3 * 2**20  # the powers of a block of rows stay in cache: 16 ms for 256 rows of 49,152, not 200
_GPU_BLOCK_BYTES = 256 * 2**20


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
    block = max(1, (_CPU_BLOCK_BYTES if cuts_for_cache(logits.device) else _GPU_BLOCK_BYTES) // (16 * vocab_size))
    buffer = logits.new_empty(min(block, num), len(_POWERS), vocab_size)
    products = logits.new_empty(num, len(_POWERS), len(_POWERS))
    for begin in range(0, num, block):
        rows = slice(begin, min(begin + block, num))
        powers = buffer[: rows.stop - begin]
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
    return values @ torch.tensor(_weights(temperature), dtype=values.dtype)


def _step(vocab_size: int) -> float:
    return (math.log(vocab_size) - LOWEST) / _LEVELS


@lru_cache(maxsize=64)
def _weights(temperature: float) -> tuple[float, ...]:
    """Lagrange's weights of the grid values at u = 1/temperature."""
    u = 1 / temperature
    return tuple(math.prod((u - other) / (point - other) for other in GRID if other != point) for point in GRID)
