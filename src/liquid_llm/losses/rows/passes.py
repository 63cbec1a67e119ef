"""What row arithmetic in two passes over the logits must give: one value for what goes in, one place for each figure.

    measure    reads each row once and leaves ``NUM_FIGURES`` numbers of it
    fill       reads each row once more and writes the gradient by the raw logits
    place      writes the gradient anew at the ids of a sparse signal; what it has to be made ready for is done before
               ``fill``, so that a form that fails has left the logits as they were

Between the passes there are vectors of rows only (``two_passes``). Who carries the passes out has these methods:
Triton's kernels, plain torch, which is their specification, and nobody at all, where only memory is asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from liquid_llm.losses.signals import finished

# Of each row, with u = z / T, w the teacher's logits / T, and z0, w0 the largest z and w of the row.
AT_LABEL = 0  # z of the label
LARGEST = 1  # z0
TOTAL = 2  # sum exp(z - z0)
TEMPERED = 3  # sum exp((z - z0) / T)
REST = 4  # the same outside the emptied places
TEACHER_LARGEST = 5  # w0
TEACHER_TOTAL = 6  # sum exp(w - w0)
CROSSED = 7  # sum exp(w - w0) (w - u)
DISTANCE = 8  # sum (z - z_reference)^2
SPREAD = 9  # sum exp(z - z0) (z - z0)
NUM_FIGURES = 10

# Factors of each row in its gradient by z: OWN exp(z - z0) + KD exp((z - z0) / T) - TAUGHT exp(w - w0), and less HIT at
# the label.
OWN, KD, TAUGHT, HIT = range(4)
NUM_FACTORS = 4


@dataclass(frozen=True)
class Logits:
    """Raw logits [rows, vocab] and what their model does to them."""

    raw: Tensor
    scale: float = 1.0
    soft_cap: float | None = None

    def finish(self, raw: Tensor) -> Tensor:
        """Finished logits of any ``raw`` of theirs, in float32 or wider; to be read alone."""
        return finished(raw.to(torch.promote_types(raw.dtype, torch.float32)), self.scale, self.soft_cap)

    def slope(self, finished: Tensor) -> Tensor:
        """The derivative of finished logits by the raw ones."""
        if self.soft_cap is None:
            return torch.full_like(finished, self.scale)
        return self.scale * (1.0 - (finished / self.soft_cap).square())


@dataclass(frozen=True)
class Slice:
    """Some rows and all that is compared with them.

    Attributes:
        student: float32 raw logits.
        labels: [rows] int64.
        temperature: T.
        teacher: whole distributions, over the first entries of the student's vocabulary at least one of them; or None.
        mask: [rows] bool, the rows whose ``teacher`` is looked at; None for all.
        reference: the frozen student's, or None.
        ids, emptied: [rows, K] int64 and bool: which ids of a row are no part of ``REST``; None where none is. The
            emptied ids of a row are distinct.
        with_spread: whether ``SPREAD`` is wanted.
    """

    student: Logits
    labels: Tensor
    temperature: float
    teacher: Logits | None = None
    mask: Tensor | None = None
    reference: Logits | None = None
    ids: Tensor | None = None
    emptied: Tensor | None = None
    with_spread: bool = False


class Passes(Protocol):
    """Who carries the passes out."""

    def measure(self, part: Slice) -> Tensor:
        """The figures of each row, float32 [NUM_FIGURES, rows]; what was not asked for may be anything.

        The raw logits are as before afterwards.
        """

    def fill(self, part: Slice, figures: Tensor, factors: Tensor, pull: float, out: Tensor) -> None:
        """Write the gradient by the raw logits into ``out`` [rows, vocab], which may be their own place.

        Args:
            factors: [NUM_FACTORS, rows]; ``TAUGHT`` is 0 in rows whose teacher is not looked at.
            pull: factor of the difference to the reference student's logits.
        """

    def prepare_place(
        self, out: Tensor, ids: Tensor, used: Tensor, values: Tensor, shares: Tensor, slopes: Tensor
    ) -> None:
        """Do what ``place`` of the same needs and may fail in, and write nothing: called before ``fill`` overwrites."""

    def place(self, out: Tensor, ids: Tensor, used: Tensor, values: Tensor, shares: Tensor, slopes: Tensor) -> None:
        """Write ``(values + the shares of all used slots of the same id) * slopes`` at the used ids of each row.

        The sum goes through the slots in order, so that it is the same each time. All are [rows, K].
        """


class NoPasses:
    """Takes the memory that passes take, and does nothing: for tensors without values."""

    def measure(self, part: Slice) -> Tensor:
        return part.student.raw.new_empty(NUM_FIGURES, len(part.labels))

    def fill(self, part: Slice, figures: Tensor, factors: Tensor, pull: float, out: Tensor) -> None:
        pass

    def prepare_place(
        self, out: Tensor, ids: Tensor, used: Tensor, values: Tensor, shares: Tensor, slopes: Tensor
    ) -> None:
        pass

    def place(self, out: Tensor, ids: Tensor, used: Tensor, values: Tensor, shares: Tensor, slopes: Tensor) -> None:
        pass


class PlainPasses:
    """The passes in plain torch, as they are easiest to read: many more than two, and whole rows in between."""

    def measure(self, part: Slice) -> Tensor:
        z = part.student.finish(part.student.raw)
        figures = z.new_zeros(NUM_FIGURES, len(z))
        figures[AT_LABEL] = z.gather(1, part.labels.unsqueeze(1)).squeeze(1)
        figures[LARGEST] = z.amax(dim=1)
        above = z - figures[LARGEST].unsqueeze(1)
        exps, tempered = above.exp(), (above / part.temperature).exp()
        figures[TOTAL], figures[TEMPERED] = exps.sum(dim=1), tempered.sum(dim=1)
        if part.ids is not None and part.emptied is not None:
            held = torch.zeros_like(z).scatter_add(1, part.ids, part.emptied.to(z.dtype)) > 0
            figures[REST] = tempered.masked_fill(held, 0.0).sum(dim=1)
        if part.teacher is not None:
            w = self._teacher(part, z)
            figures[TEACHER_LARGEST] = w.amax(dim=1)
            taught = (w - figures[TEACHER_LARGEST].unsqueeze(1)).exp()
            figures[TEACHER_TOTAL] = taught.sum(dim=1)
            figures[CROSSED] = (taught * (w - z[:, : w.shape[1]] / part.temperature)).sum(dim=1)
        if part.reference is not None:
            figures[DISTANCE] = (z - part.reference.finish(part.reference.raw)).square().sum(dim=1)
        figures[SPREAD] = (exps * above).sum(dim=1)
        return figures

    def fill(self, part: Slice, figures: Tensor, factors: Tensor, pull: float, out: Tensor) -> None:
        z = part.student.finish(part.student.raw)
        above = z - figures[LARGEST].unsqueeze(1)
        columns = factors.unsqueeze(2)
        total = columns[OWN] * above.exp() + columns[KD] * (above / part.temperature).exp()
        if part.teacher is not None:
            w = self._teacher(part, z)
            total[:, : w.shape[1]] -= columns[TAUGHT] * (w - figures[TEACHER_LARGEST].unsqueeze(1)).exp()
        if part.reference is not None:
            total += pull * (z - part.reference.finish(part.reference.raw))
        total.scatter_add_(1, part.labels.unsqueeze(1), -columns[HIT])
        out.copy_(total * part.student.slope(z))

    def prepare_place(
        self, out: Tensor, ids: Tensor, used: Tensor, values: Tensor, shares: Tensor, slopes: Tensor
    ) -> None:
        pass

    def place(self, out: Tensor, ids: Tensor, used: Tensor, values: Tensor, shares: Tensor, slopes: Tensor) -> None:
        for row, slots in enumerate(used):
            own, share = ids[row, slots], shares[row, slots]
            same = own.unsqueeze(1) == own.unsqueeze(0)
            out[row, own] = ((values[row, slots] + (same * share).sum(dim=1)) * slopes[row, slots]).to(out.dtype)

    @staticmethod
    def _teacher(part: Slice, z: Tensor) -> Tensor:
        assert part.teacher is not None
        w = part.teacher.finish(part.teacher.raw).to(z.dtype) / part.temperature
        return w if part.mask is None else w.masked_fill(~part.mask.unsqueeze(1), 0.0)
