"""One row of the table."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Term:
    """How one amount grows with one size.

    Attributes:
        name: of what is looked at, and of the amount.
        unit: of the amount: ``bytes``, ``s``, or what is counted.
        of: what grows.
        most: the largest exponent that the thing itself needs.
        slack: what a measured exponent may be above it: counted ones are exact.
        amounts: gives the amount at a size.
    """

    name: str
    unit: str
    of: str
    most: float
    slack: float
    amounts: Callable[[int], float]

    def grow(self, sizes: Sequence[int]) -> Growth:
        return Growth(self, tuple(sizes), tuple(self.amounts(size) for size in sizes))


@dataclass(frozen=True)
class Growth:
    """A term at several sizes, smallest first."""

    term: Term
    sizes: tuple[int, ...]
    amounts: tuple[float, ...]

    @property
    def exponent(self) -> float:
        """End to end; 0 where the largest amount is not above the smallest."""
        first, last = self.amounts[0], self.amounts[-1]
        if last <= first:
            return 0.0
        return math.log(last / max(first, 1e-12)) / math.log(self.sizes[-1] / self.sizes[0])

    @property
    def holds(self) -> bool:
        return self.exponent <= self.term.most + self.term.slack
