"""Which positions are distilled: the share of them on which the student is least sure, type by type.

Distilling only the fifth of the positions with the highest student entropy loses next to nothing (Tavor et al. 2026,
Rethinking Selective Knowledge Distillation, arXiv 2602.01395). There they are the highest of each sequence or batch;
here all whose entropy reaches a *threshold* that stands before a step is taken. So a position is chosen by itself, and
neither cutting a micro-batch nor dealing it out to ranks changes which are.

threshold   the quantile of the entropies seen lately, of one type
histogram   where they are counted: equal bins from 0 to log(vocabulary), so narrow that they tell a fresh student's
            positions apart, which all lie within a hundredth of a nat; each step's counts added to half of what was
            there: a young student becomes surer with every step, and an old histogram would choose too few. A step's
            counts are whole numbers, so their sum over parts and ranks does not depend on its order

A type that was never seen has no threshold: in its first step every position is distilled.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

BINS = 1 << 16
_KEPT = 0.5  # of the counts, from step to step of a type


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

    def thresholds(self) -> dict[str, float]:
        """Type -> the least entropy at which a position is distilled, nats; minus infinity before it was seen."""
        return dict(zip(self.types, map(self._threshold, self.counts), strict=True))

    def _threshold(self, counts: Tensor) -> float:
        total = float(counts.sum())
        if total == 0.0:
            return -math.inf
        above = counts.flip(0).cumsum(0)  # from the highest bin down
        wanted = self.share * total
        place = min(int(torch.searchsorted(above, wanted)), BINS - 1)
        # The lower edge: where many positions share a bin too many are distilled, rather than none.
        return (BINS - 1 - place) * self.highest / BINS

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
        counted = counted.to(self.counts)
        seen = counted.sum(dim=1, keepdim=True) > 0
        self.counts = torch.where(seen, _KEPT * self.counts + counted, self.counts)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"highest": self.highest, "counts": dict(zip(self.types, self.counts.clone(), strict=True))}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state_dict()``; another vocabulary's counts are of no use and left."""
        if state["highest"] != self.highest:
            return
        for number, type in enumerate(self.types):
            if type in state["counts"] and len(state["counts"][type]) == BINS:
                self.counts[number] = state["counts"][type]
