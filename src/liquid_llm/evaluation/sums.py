"""Measures added up text by text, and what follows from such sums.

    column     one measure, or one count of positions, summed over the positions of a text
    estimate   a mean over positions of all texts, with its standard error
    gap        of a bin of confidences: sum of (confidence - right) over the positions in it

A figure is a ratio of sums over texts, R = sum(x_t) / sum(n_t). Positions of one text depend on each other and texts do
not, so its standard error is that of a ratio over texts (linearised: Cochran 1977, Sampling Techniques, section 6.4):
sqrt(T / (T - 1) * sum((x_t - R n_t)^2)) / sum(n_t). With one text it has none.

The expected calibration error (Guo et al. 2017, arXiv 1706.04599, equation 3) is sum_b |gap_b| / positions. It is the
same kind of ratio with each position's gap under the sign of its bin, which is where its standard error comes from.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from liquid_llm.distributed import Engine
from liquid_llm.evaluation.measures import NUM_BINS, PositionMeasures

COLUMNS = (
    *("positions", "bytes", "ce"),
    *("kl_positions", "kl"),
    *("agreement_positions", "agreement"),
    *("teacher_positions", "teacher_ce", "ce_beside_teacher", "overlap", "teacher_bytes"),
)
"""What is summed of a text: ``*_positions`` count those where the teacher tells what is beside them."""

_BINNED = ("", "teacher_")  # whose confidences
_BITS = 1.0 / math.log(2.0)


@dataclass(frozen=True)
class Estimate:
    """A figure and its standard error over texts; None: there are too few of them."""

    value: float
    error: float | None = None

    def plain(self) -> dict[str, float | None]:
        return {"value": self.value, "error": self.error}


class TextSums:
    """The measures of the texts of one type at one context length.

    Args:
        names: the texts' sample ids.

    Attributes:
        sums: [texts, columns] float64.
        gaps: [2, texts, bins] float64, of the student and of the teacher.
        bins: [2, 3, bins] float64: positions, confidences and rights of each bin, over all texts.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self.sums = torch.zeros(len(self.names), len(COLUMNS), dtype=torch.float64)
        self.gaps = torch.zeros(len(_BINNED), len(self.names), NUM_BINS, dtype=torch.float64)
        self.bins = torch.zeros(len(_BINNED), 3, NUM_BINS, dtype=torch.float64)

    def add(self, texts: Tensor, measured: PositionMeasures, num_bytes: Tensor | None = None) -> None:
        """Add positions.

        Args:
            texts: [positions] int64, which text each is of.
            measured: on the CPU.
            num_bytes: [positions], of the text that each label stands for; None: not known, 0.
        """
        ones = torch.ones_like(measured.ce, dtype=torch.float64)
        size = torch.zeros_like(ones) if num_bytes is None else num_bytes.double()
        known = measured.has_signal
        columns: dict[str, Tensor] = {"positions": ones, "bytes": size, "ce": measured.ce}
        if known is not None and measured.kl is not None:
            columns |= {"kl_positions": known, "kl": measured.kl}
        best = measured.tells_best
        if best is not None and measured.agreement is not None:
            columns |= {"agreement_positions": best, "agreement": measured.agreement}
        if known is not None and measured.teacher_ce is not None and measured.overlap is not None:
            columns |= {
                "teacher_positions": known,
                "teacher_ce": measured.teacher_ce,
                "ce_beside_teacher": measured.ce.where(known, 0.0),
                "overlap": measured.overlap,
                "teacher_bytes": size * known,
            }
        rows = torch.stack([columns[name].double() if name in columns else 0 * ones for name in COLUMNS], dim=1)
        self.sums.index_add_(0, texts, rows)
        self._add_confidence(0, texts, measured.confidence, measured.right)
        if best is not None and measured.teacher_confidence is not None and measured.teacher_right is not None:
            self._add_confidence(1, texts[best], measured.teacher_confidence[best], measured.teacher_right[best])

    def _add_confidence(self, whose: int, texts: Tensor, confidence: Tensor, right: Tensor) -> None:
        confidence, right = confidence.double(), right.double()
        bins = (confidence * NUM_BINS).long().clamp_(0, NUM_BINS - 1)
        self.gaps[whose].view(-1).index_add_(0, texts * NUM_BINS + bins, confidence - right)
        self.bins[whose].index_add_(1, bins, torch.stack([torch.ones_like(right), confidence, right]))

    def sum_over(self, engine: Engine) -> TextSums:
        """The same of all ranks together."""
        found = TextSums(self.names)
        found.sums, found.gaps, found.bins = (engine.sum(one) for one in (self.sums, self.gaps, self.bins))
        return found

    @staticmethod
    def join(parts: Sequence[TextSums]) -> TextSums:
        """Those of several types as one; texts stay apart."""
        found = TextSums([name for part in parts for name in part.names])
        if parts:
            found.sums = torch.cat([part.sums for part in parts])
            found.gaps = torch.cat([part.gaps for part in parts], dim=1)
            found.bins = torch.stack([part.bins for part in parts]).sum(dim=0)
        return found

    def column(self, name: str) -> Tensor:
        """[texts] float64."""
        return self.sums[:, COLUMNS.index(name)]

    def total(self, name: str) -> float:
        """A column over all texts."""
        return float(self.column(name).sum())

    def mean(self, name: str, over: str, factor: float = 1.0) -> Estimate | None:
        """``factor`` times one column by another; None where there is none of the other."""
        return estimate_ratio(self.column(name) * factor, self.column(over))

    def calibration(self, whose: str = "") -> Estimate | None:
        """The expected calibration error of the student, or (``teacher_``) of the teacher; None where none is known."""
        number = _BINNED.index(whose)
        gaps = self.gaps[number]
        signs = gaps.sum(dim=0).sign()
        return estimate_ratio(gaps @ signs, self.column("agreement_positions" if whose else "positions"))

    def estimates(self) -> dict[str, Estimate]:
        """Every figure there is of these texts; see ``docs/evaluation.md``."""
        found = {
            "ce": self.mean("ce", "positions"),
            "bits_per_byte": self.mean("ce", "bytes", _BITS),
            "calibration": self.calibration(),
            "teacher_ce": self.mean("teacher_ce", "teacher_positions"),
            "ce_beside_teacher": self.mean("ce_beside_teacher", "teacher_positions"),
            "teacher_bits_per_byte": self.mean("teacher_ce", "teacher_bytes", _BITS),
            "kl": self.mean("kl", "kl_positions"),
            "agreement": self.mean("agreement", "agreement_positions"),
            "overlap": self.mean("overlap", "teacher_positions"),
            "teacher_calibration": self.calibration("teacher_"),
        }
        return {name: one for name, one in found.items() if one is not None}

    def plain(self) -> dict[str, Any]:
        """The figures and what they are of, as plain values."""
        counts = {
            "texts": int((self.column("positions") > 0).sum()),
            **{name: int(self.total(name)) for name in ("positions", "bytes", "kl_positions", "teacher_positions")},
        }
        bins = {
            f"{whose}bins": [
                {"positions": int(count), "confidence": confidence / count, "right": right / count}
                if count
                else {"positions": 0}
                for count, confidence, right in self.bins[number].T.tolist()
            ]
            for number, whose in enumerate(_BINNED)
            if self.bins[number, 0].any()
        }
        return {**counts, **{name: one.plain() for name, one in self.estimates().items()}, **bins}

    def texts(self) -> list[dict[str, Any]]:
        """The sums of each text that has any, by column, and its gaps; what no position was asked for is left out."""
        rows = []
        for number, (name, values) in enumerate(zip(self.names, self.sums.tolist(), strict=True)):
            sums: Mapping[str, float] = dict(zip(COLUMNS, values, strict=True))
            if not sums["positions"]:
                continue
            row: dict[str, Any] = {"id": name}
            row |= {column: int(value) if column.endswith(_WHOLE) else value for column, value in sums.items()}
            row["gaps"] = self.gaps[0, number].tolist()
            if sums["agreement_positions"]:
                row["teacher_gaps"] = self.gaps[1, number].tolist()
            rows.append(row)
        return rows


_WHOLE = ("positions", "bytes", "agreement")  # columns of whole numbers end so


def estimate_ratio(values: Tensor, counts: Tensor) -> Estimate | None:
    """``sum(values) / sum(counts)`` [texts] each, with its standard error over texts; None where nothing is counted."""
    held = (counts > 0) | (values != 0)  # a text may have a position and no byte: its end alone
    values, counts = values[held].double(), counts[held].double()
    total = float(counts.sum())
    if not total:
        return None
    ratio = float(values.sum()) / total
    texts = len(counts)
    if texts < 2:
        return Estimate(ratio)
    spread = float((values - ratio * counts).square().sum())
    return Estimate(ratio, math.sqrt(texts / (texts - 1) * spread) / total)
