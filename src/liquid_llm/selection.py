"""Which positions are distilled: the share of them on which the student is least sure, type by type.

Distilling only the fifth of the positions with the highest student entropy loses next to nothing (Tavor et al. 2026,
Rethinking Selective Knowledge Distillation, arXiv 2602.01395). There they are the highest of each sequence or batch;
here all whose entropy reaches a *threshold* that stands before a step is taken. So a position is chosen by itself, and
neither cutting a micro-batch nor dealing it out to ranks changes which are.

threshold   the quantile of the entropies seen lately, of one type, moved to where the next step's are expected
histogram   where they are counted: equal bins from 0 to log(vocabulary), so narrow that they tell a fresh student's
            positions apart, which all lie within a hundredth of a nat; each step's counts added to half of what was
            there. A step's counts are whole numbers, so their sum over parts and ranks does not depend on its order
level       the mean entropy that the next step is expected to have. A young student becomes surer in one step by more
            than its positions differ, so a threshold of the steps before would let none through: the histogram moves
            with the level. What is moved are distances from what was *expected*, so an expectation that is always too
            high or too low is made good by the quantile
trend       what the level moves by from step to step, damped (Gardner and McKenzie 1985). An error of the expectation
            counts by its square against the variance of the entropies: one that is small against their spread is
            chance, as with a student that hardly changes any more, and the threshold rests

A type that was never seen has no threshold: in its first step every position is distilled. So it is in a step after one
in which the expectation was so wrong that hardly any position would have been let through.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

BINS = 1 << 16
_KEPT = 0.5  # of the counts, from step to step of a type
_FOLLOW, _DAMP = 0.3, 0.9  # of an error, into the trend; of the trend, from step to step
_FEW = 0.1  # of the share: a threshold that lets fewer through is of no use


class PositionSelection:
    """The thresholds of a run and what they come from; the same on every rank.

    Args:
        share: of the positions with a signal, in (0, 1).
        types: all types of the run, in one order.
        vocab_size: of the student, whose entropy is at most its logarithm.
    """

    def __init__(self, share: float, types: Sequence[str], vocab_size: int) -> None:
        self.share = share
        self.types = tuple(types)
        self.highest = math.log(vocab_size)
        self.counts = torch.zeros(len(self.types), BINS, dtype=torch.float64)
        # Of each type, in bins; NaN before it was seen.
        self.levels = torch.full((len(self.types),), math.nan, dtype=torch.float64)
        self.trends = torch.zeros(len(self.types), dtype=torch.float64)
        self.missed = torch.zeros(len(self.types), dtype=torch.bool)  # whether hardly any position reached the last one

    def thresholds(self) -> dict[str, float]:
        """Type -> the least entropy at which a position is distilled, nats; minus infinity where all are."""
        return {
            type: -math.inf if missed or not counts.any() else self._lowest_bin(counts) * self.highest / BINS
            for type, counts, missed in zip(self.types, self.counts, self.missed.tolist(), strict=True)
        }

    def _lowest_bin(self, counts: Tensor) -> int:
        """The bin at whose lower edge the threshold lies: where many positions share it rather too many are distilled
        than none."""
        above = counts.flip(0).cumsum(0)  # from the highest bin down
        return BINS - 1 - min(int(torch.searchsorted(above, self.share * float(above[-1]))), BINS - 1)

    def count(self, seen: Sequence[tuple[str, Tensor]], device: torch.device) -> Tensor:
        """How many entropies fell into each bin of each type: float32 [types, BINS] on ``device``, without a wait.

        Args:
            seen: of each pass of a step its type and the entropies, negative where a position has no signal.
        """
        flat = torch.zeros(len(self.types) * BINS, device=device)
        for type, entropies in seen:
            bins = (entropies.float() * (BINS / self.highest)).clamp(0, BINS - 1).long()
            flat.scatter_add_(0, bins + self.types.index(type) * BINS, (entropies >= 0).float())
        return flat.view(-1, BINS)

    def update(self, counted: Tensor) -> None:
        """Take in what a step counted, of all ranks; a type that was not in it keeps what it has."""
        for number, counts in enumerate(counted.to(self.counts)):
            if counts.sum() > 0:
                reached = (
                    counts[self._lowest_bin(self.counts[number]) :].sum() if self.counts[number].any() else math.inf
                )
                self.missed[number] = reached < _FEW * self.share * counts.sum()
                moved = self._expect(number, counts)
                self.counts[number] = _shift(_KEPT * self.counts[number] + counts, moved)

    def _expect(self, number: int, counts: Tensor) -> int:
        """Learn from a step's counts what the next one's level will be; by how many bins that is another."""
        bins = torch.arange(BINS, dtype=torch.float64)
        mean = float(counts @ bins / counts.sum())
        variance = float(counts @ (bins - mean).square() / counts.sum())
        level, trend = float(self.levels[number]), float(self.trends[number])
        if math.isnan(level):
            self.levels[number] = mean
            return 0
        error = mean - level
        error *= error**2 / (error**2 + variance) if error else 0.0
        self.trends[number] = _DAMP * trend + _FOLLOW * error
        self.levels[number] = level + error + self.trends[number]
        return round(float(self.levels[number])) - round(level)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        values = {"counts": self.counts, "levels": self.levels, "trends": self.trends, "missed": self.missed}
        by_type = {name: dict(zip(self.types, value.clone(), strict=True)) for name, value in values.items()}
        return {"highest": self.highest, **by_type}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state_dict()``; another vocabulary's counts are of no use and left.

        Where a state has counts alone, as it had before there were levels, they lie where they were seen, and the level
        is found anew.
        """
        if state["highest"] != self.highest:
            return
        for number, type in enumerate(self.types):
            if type in state["counts"] and len(state["counts"][type]) == BINS:
                self.counts[number] = state["counts"][type]
                self.levels[number] = state.get("levels", {}).get(type, math.nan)
                self.trends[number] = state.get("trends", {}).get(type, 0.0)
                self.missed[number] = state.get("missed", {}).get(type, False)


def _shift(counts: Tensor, bins: int) -> Tensor:
    """Counts [BINS] so many bins higher; what would lie beyond an end lies in its last bin."""
    places = (torch.arange(BINS) + bins).clamp_(0, BINS - 1)
    return torch.zeros_like(counts).scatter_add_(0, places, counts)
