"""What the tail codec keeps, and how likely: the arithmetic shared by its writer and its reader.

base        l = log q_2, the teacher's log-probability at T = 2; at any other T, log q_T = a l - F(a), a = 2 / T
F(a)        log sum exp(a l) over the vocabulary; F(1) = 0
intensity   how often an id is wanted: max over T in {1, 2, 4} of draws_T q_T. An id below 1 is kept that often, an id
            above is worth storing exactly; by this one number hard positions get many bytes and easy ones few.
            Drawn in proportion to q_T and weighted 1 / draws_T, a tail has the least variance that its number of
            draws allows, and the same number for all positions spends them where they help most
dither      a random number, known to both sides, added before rounding and taken away after: the error of a rounded
            value is then uniform whatever the value was (Roberts 1962), so that exp(a * value) can be unbiased
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

BASE_TEMPERATURE = 2.0
NODES = (0.5, 2.0, 3.0)  # values of a at which F is stored: T = 4, 1 and 2/3
TEMPERATURE_RANGE = (BASE_TEMPERATURE / NODES[-1], BASE_TEMPERATURE / NODES[0])

TOP_STEP = 0.03125  # of l, for a position's likeliest id
HEAD_STEP = 0.125  # of l, for the other ids stored exactly
FINER = 4  # HEAD_STEP / TOP_STEP
DRAW_STEP = 1.0  # of l, for drawn ids: at T = 2 their weight does not depend on l at all
DRAW_TURN = 0.7548776662466927  # of the draws' dithers from slot to slot; unrelated to the golden ratio
PARTITION_STEP = 0.0625  # of F


@dataclass(frozen=True)
class Draws:
    """Draws a position would get from the whole distribution at T = 1, 2 and 4."""

    at_1: float
    at_2: float
    at_4: float

    @property
    def logs(self) -> tuple[float, float, float]:
        at_1, at_2, at_4 = (math.log(draws) if draws > 0 else -math.inf for draws in (self.at_1, self.at_2, self.at_4))
        return at_1, at_2, at_4

    def log_intensity(self, base: Floats, partition: Floats) -> Floats:
        """Log of the intensity of ids with log-probability ``base`` [m], ``partition`` [m, 3] being F at ``NODES``."""
        at_1, at_2, at_4 = self.logs
        return np.maximum(
            np.maximum(base + at_2, 2.0 * base + (at_1 - partition[:, 1])), 0.5 * base + (at_4 - partition[:, 0])
        )

    def base_of(self, log_intensity: Floats, partition: Floats) -> Floats:
        """Inverse of ``log_intensity``."""
        at_1, at_2, at_4 = self.logs
        return np.minimum(
            np.minimum(log_intensity - at_2, (log_intensity - at_1 + partition[:, 1]) / 2.0),
            (log_intensity - at_4 + partition[:, 0]) * 2.0,
        )


def undithered(levels: Ints, dither: Floats, step: Floats | float) -> Floats:
    """The value whose rounding gave ``levels = floor(value / step + dither)``, up to half a step."""
    return (levels + (0.5 - dither)) * step


def dither_gain(exponent: float, step: float) -> float:
    """Mean of exp(exponent * error) over the error of a dithered value, which is uniform in a step: sinh(h) / h.

    h = exponent * step / 2.
    """
    half = abs(exponent) * step / 2
    return math.sinh(half) / half if half > 1e-6 else 1.0


def dither_shift(exponent: float, step: float) -> float:
    """How much exponent * error is on average when weighted by exp(exponent * error): h coth(h) - 1."""
    half = abs(exponent) * step / 2
    return half / math.tanh(half) - 1.0 if half > 1e-3 else half * half / 3
