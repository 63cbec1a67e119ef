"""The loss of rows of logits in two passes over them: what a GPU can do where its kernels are written for it.

The eager form (``eager``) takes 14 to 37 passes over rows in float32, each a kernel that reads and writes memory; on a
CPU slices stay in a core's cache and passes cost little, on a GPU they are most of the loss. Here one pass measures
each row, a few vectors of rows follow, and a second pass writes the gradient, straight in the dtype that the products
take.

The forward KL and the cross-entropy are all that is done this way: their gradients need nothing of a row but sums that
one pass can take, each over the exponentials of what is largest so far (Milakov and Gimelshein 2018, arXiv 1805.02867).
"""

from __future__ import annotations

import torch
from torch import Tensor

from liquid_llm.losses._sources import DenseRows
from liquid_llm.losses.divergences import SparseRows
from liquid_llm.losses.objective import Objective
from liquid_llm.losses.rows.passes import (
    AT_LABEL,
    CROSSED,
    DISTANCE,
    HIT,
    KD,
    LARGEST,
    NUM_FACTORS,
    OWN,
    REST,
    SPREAD,
    TAUGHT,
    TEACHER_LARGEST,
    TEACHER_TOTAL,
    TEMPERED,
    TOTAL,
    Logits,
    Passes,
    Slice,
)
from liquid_llm.losses.signals import OutputHead


class TwoPassRows:
    """The same as ``eager.RowLoss``, of float32 logits and of the divergences in ``DIVERGENCES``.

    Args:
        head, objective, with_grad: as there.
        passes: who carries them out.
    """

    DIVERGENCES = frozenset({"forward_kl"})

    def __init__(self, head: OutputHead, objective: Objective, passes: Passes, *, with_grad: bool) -> None:
        self._head = head
        self._objective = objective
        self._passes = passes
        self._with_grad = with_grad

    def __call__(
        self,
        raw: Tensor,
        labels: Tensor,
        teacher: DenseRows | SparseRows | None = None,
        reference: DenseRows | None = None,
        into: Tensor | None = None,
    ) -> Tensor:
        """As ``eager.RowLoss``; nothing but the gradient's place is overwritten."""
        objective = self._objective
        part = self._slice(raw, labels, teacher, reference)
        figures = self._passes.measure(part)
        ce = figures[TOTAL].log() + figures[LARGEST] - figures[AT_LABEL]
        mask, entropy = self._select(teacher, figures)
        taught = torch.ones_like(ce) if mask is None else mask.to(ce.dtype)
        factors = ce.new_zeros(NUM_FACTORS, len(ce))
        hits = factors[HIT].fill_(1.0)
        if teacher is not None:
            hits.sub_(taught, alpha=objective.alpha)
        torch.div(hits, figures[TOTAL], out=factors[OWN])
        weight = objective.alpha * objective.temperature * taught
        kd = torch.zeros_like(ce)
        sparse = None
        if isinstance(teacher, SparseRows):
            sparse = _SparsePart(teacher, part, figures)
            kd = sparse.kl
            torch.mul(sparse.rest_mass / figures[TEMPERED], weight, out=factors[KD])
        elif teacher is not None:
            own_log, teacher_log = figures[TEMPERED].log(), figures[TEACHER_TOTAL].log()
            shift = figures[LARGEST] / part.temperature - figures[TEACHER_LARGEST]
            kd = figures[CROSSED] / figures[TEACHER_TOTAL] + (own_log - teacher_log + shift)
            torch.div(weight, figures[TEMPERED], out=factors[KD])
            torch.div(weight, figures[TEACHER_TOTAL], out=factors[TAUGHT])
            if mask is not None:  # a row that is not looked at has no sum
                factors[TAUGHT].masked_fill_(~mask, 0.0)
        if mask is not None:
            kd = torch.where(mask, kd, 0.0)
        vocab_size = raw.shape[1]
        pull = 2.0 * objective.gamma / vocab_size
        if self._with_grad:
            out = raw if into is None else into
            placed = None
            if sparse is not None and isinstance(teacher, SparseRows):
                placed = (out, teacher.ids, teacher.weights > 0, *sparse.gradient(factors, weight, pull))
                self._passes.prepare_place(*placed)
            self._passes.fill(part, figures, factors, pull, out)
            if placed is not None:
                self._passes.place(*placed)
        l2 = torch.zeros_like(ce) if reference is None else figures[DISTANCE] / vocab_size
        loss = hits * ce + objective.alpha * objective.temperature**2 * kd + objective.gamma * l2
        return torch.stack((loss, ce, kd, l2, entropy))

    def _slice(
        self, raw: Tensor, labels: Tensor, teacher: DenseRows | SparseRows | None, reference: DenseRows | None
    ) -> Slice:
        dense = teacher if isinstance(teacher, DenseRows) else None
        ids = emptied = None
        if isinstance(teacher, SparseRows) and teacher.any_tail:
            ids, emptied = teacher.ids, (teacher.weights > 0) & (teacher.tail_mass > 0).unsqueeze(1)
        return Slice(
            student=Logits(raw, self._head.scale, self._head.soft_cap),
            labels=labels,
            temperature=self._objective.temperature if teacher is not None else 1.0,
            teacher=None if dense is None else _logits(dense),
            mask=None if dense is None else dense.mask,
            reference=None if reference is None else _logits(reference),
            ids=ids,
            emptied=emptied,
            with_spread=teacher is not None and self._objective.min_entropy is not None,
        )

    def _select(self, teacher: DenseRows | SparseRows | None, figures: Tensor) -> tuple[Tensor | None, Tensor]:
        """The rows that have a KD term, None for all, and the entropies; see ``eager.RowLoss``."""
        if teacher is None or self._objective.min_entropy is None:
            return None if teacher is None else teacher.mask, torch.full_like(figures[TOTAL], -1.0)
        entropy = (figures[TOTAL].log() - figures[SPREAD] / figures[TOTAL]).clamp_(min=0.0)
        if teacher.mask is not None:
            entropy.masked_fill_(~teacher.mask, -1.0)
        return entropy >= max(self._objective.min_entropy, 0.0), entropy


def _logits(rows: DenseRows) -> Logits:
    return Logits(rows.raw) if rows.head is None else Logits(rows.raw, rows.head.scale, rows.head.soft_cap)


class _SparsePart:
    """What a sparse signal adds between the passes: the formulas are those of ``divergences.forward_kl``.

    Attributes:
        kl: [rows].
        rest_mass: [rows], each row's factor of p outside the ids; ``mass + tail`` on those that were emptied.
    """

    def __init__(self, teacher: SparseRows, part: Slice, figures: Tensor) -> None:
        self._teacher, self._part, self._figures = teacher, part, figures
        self._z = part.student.finish(part.student.raw.gather(1, teacher.ids))
        self._above = self._z - figures[LARGEST].unsqueeze(1)
        self._exps = (self._above / part.temperature).exp()
        weights, tail_mass, tempered = teacher.weights, teacher.tail_mass, figures[TEMPERED]
        log_student = self._above / part.temperature - tempered.log().unsqueeze(1)
        self.kl = (weights * (teacher.log_probs - log_student)).sum(dim=1)
        self._mass = self.rest_mass = weights.sum(dim=1)
        if part.emptied is not None:
            rest = (figures[REST] / tempered).clamp_min_(torch.finfo(tempered.dtype).tiny)
            self.kl += torch.where(tail_mass > 0, torch.xlogy(tail_mass, tail_mass) - tail_mass * rest.log(), 0.0)
            held = torch.where(part.emptied, self._exps, 0.0).sum(dim=1) / tempered
            self.rest_mass = self._mass - tail_mass * held / rest

    def gradient(self, factors: Tensor, weight: Tensor, pull: float) -> tuple[Tensor, Tensor, Tensor]:
        """What ``Passes.place`` is given: values, shares and slopes [rows, K]."""
        part, teacher = self._part, self._teacher
        columns = factors.unsqueeze(2)
        by_student = columns[KD]
        if part.emptied is not None:
            on_ids = weight * (self._mass + teacher.tail_mass) / self._figures[TEMPERED]
            by_student = torch.where(part.emptied, on_ids.unsqueeze(1), by_student)
        values = columns[OWN] * self._above.exp() + by_student * self._exps
        values -= torch.where(teacher.ids == part.labels.unsqueeze(1), columns[HIT], 0.0)
        if part.reference is not None:
            values += pull * (self._z - part.reference.finish(part.reference.raw.gather(1, teacher.ids)))
        return values, -teacher.weights * weight.unsqueeze(1), part.student.slope(self._z)
