"""Which source a micro-batch comes from, and in which order a source's material is seen: pure functions of integers.

draw: the choice of a source for one group of micro-batches; epoch: one pass over a source's material.

Nothing here keeps a state, so resuming is setting an integer. Random bits are the raw output of the Philox counter
generator (Salmon et al. 2011), which NumPy guarantees not to change between versions, and orders come from sorting
them; NumPy's own ``permutation`` gives no such promise.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

_TWO64 = 1 << 64
_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, odd


def keyed_bits(count: int, *key: int | str) -> NDArray[np.uint64]:
    """``count`` random 64-bit words that depend on ``key`` alone, the same on every machine."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
    generator = np.random.Philox(key=int.from_bytes(digest, "little"))
    bits: NDArray[np.uint64] = generator.random_raw(count)
    return bits


def keyed_permutation(count: int, *key: int | str) -> NDArray[np.int64]:
    """A permutation of ``range(count)`` that depends on ``key`` alone."""
    return np.argsort(keyed_bits(count, *key), kind="stable")


def floor_sum(count: int, modulus: int, step: int, start: int) -> int:
    """``sum(floor((start + i * step) / modulus) for i in range(count))`` in logarithmically many steps.

    The lattice-point count under a line, by the same recursion as Euclid's algorithm. ``start`` may be negative.
    """
    total = 0
    while True:
        total += (count - 1) * count // 2 * (step // modulus) + count * (start // modulus)
        step %= modulus
        start %= modulus
        top = step * count + start
        if top < modulus:
            return total
        count, start = divmod(top, modulus)
        modulus, step = step, modulus


class WeightedDraws:
    """Draws of sources by weight along a golden-ratio (Weyl) sequence.

    Draw ``m`` looks up ``frac(u + m / golden ratio)``, held as a 64-bit integer, in the cumulative weights. The
    sequence has low discrepancy: after any number of draws each source's count is within a few of ``weight *
    draws``, where independent draws would wander by the square root. How often a source was drawn before is counted
    in closed form, so that jumping to any position costs microseconds.

    Args:
        weights: positive numbers, any scale.
        seed: moves the starting point ``u``.

    Raises:
        ValueError: no weights, or one that is not positive and finite.
    """

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        if not weights or not all(0 < weight < float("inf") for weight in weights):
            raise ValueError(f"weights must be positive and finite, got {list(weights)}")
        shares = [Fraction(weight) for weight in weights]
        sums = list(accumulate(shares, initial=Fraction(0)))
        self._bounds = [int(one / sums[-1] * _TWO64) for one in sums]
        self._start = int(keyed_bits(1, "source draws", seed)[0])

    def source(self, draw: int) -> int:
        """Index of the source that draw number ``draw`` chooses."""
        return bisect_right(self._bounds, (self._start + draw * _GOLDEN) % _TWO64) - 1

    def count(self, source: int, draws: int) -> int:
        """How many of the first ``draws`` draws chose ``source``."""
        low, high = self._bounds[source], self._bounds[source + 1]
        if draws == 0:
            return 0
        # floor((x - low) / M) - floor((x - high) / M) is 1 where x mod M lies in [low, high), else 0
        return floor_sum(draws, _TWO64, _GOLDEN, self._start - low) - floor_sum(
            draws, _TWO64, _GOLDEN, self._start - high
        )
