"""Values and gradients of the loss for a few rows of logits, in as few passes over them as eager torch allows.

raw logits: a row of ``hidden @ weight.T + bias``, before scale and soft-cap; slice: the rows handled at once, few
enough that they stay in a core's cache between passes; gradient: of the summed loss with respect to the raw logits,
written over them.

Gradients, with p = softmax of the student, m = 1 where there is a signal, W = sum of a sparse signal's weights,
r = tail mass and R = the student's own mass outside the ids:

    CE      (1 - alpha m) (p_1 - onehot(label))
    KD      alpha m T (p_T - q_T)                                       dense
            alpha m T (W p_T - weights)                                 sparse
            - alpha m T r (1 - R) / R p_T  outside the ids,  + alpha m T r p_T  on them    its tail bucket
    L2      2 gamma / vocab (z - z_reference)
    chain   scale (1 - (z / soft_cap)^2)
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from liquid_llm.data.types import IGNORE_INDEX
from liquid_llm.losses.signals import OutputHead, SparseSignal


class LabelledRows:
    """The rows with a label.

    Args:
        labels: [rows] int64.
        all_labelled: the caller knows that each row has one. Otherwise the host waits for the device to count them.

    Attributes:
        count: how many there are.
        labels: theirs, [count].
        indices: their places, [count]; None where all rows are labelled, which are then taken as they lie.
    """

    def __init__(self, labels: Tensor, *, all_labelled: bool) -> None:
        self.indices: Tensor | None = None
        if not all_labelled:
            indices = (labels != IGNORE_INDEX).nonzero().squeeze(1)
            self.indices = None if indices.shape[0] == labels.shape[0] else indices
        self.labels = self.take(labels)
        self.count = self.labels.shape[0]

    def take(self, tensor: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Labelled rows ``start`` to ``stop`` of ``tensor`` [rows, ...]: a view where all are labelled."""
        return tensor[start:stop] if self.indices is None else tensor[self.indices[start:stop]]

    def put(self, values: Tensor, into: Tensor, start: int, stop: int) -> None:
        """Write labelled rows ``start`` to ``stop`` of ``into`` [rows, ...]."""
        if self.indices is None:
            into[start:stop] = values
        else:
            into[self.indices[start:stop]] = values


@dataclass(frozen=True)
class DenseRows:
    """A teacher's logits for a slice: raw ones with the head that finishes them, or stored ones with ``head`` None.

    Attributes:
        raw: [rows, shared vocab]; overwritten when it is in the dtype of the softmax.
        head: whose scale and soft-cap apply, or None.
        mask: [rows] bool, or None where every row has a signal.
    """

    raw: Tensor
    head: OutputHead | None
    mask: Tensor | None


@dataclass(frozen=True)
class SparseRows:
    """A sparse signal for a slice with unused slots cleared: weight 0, log-prob 0, id 0, also in rows without a record.

    Attributes:
        ids, weights, log_probs: [rows, K]; tail_mass: [rows]; mask: [rows] bool, or None where every row has a record.
        any_tail: False only if no row of the whole signal has a tail.
    """

    ids: Tensor
    weights: Tensor
    log_probs: Tensor
    tail_mass: Tensor
    mask: Tensor | None
    any_tail: bool

    @staticmethod
    def of(signal: SparseSignal, rows: LabelledRows, dtype: torch.dtype) -> SparseRows:
        """The labelled rows of ``signal``, cleaned and in ``dtype``."""
        mask = rows.take(signal.mask)
        weights = torch.where(mask.unsqueeze(1), rows.take(signal.weights).to(dtype), 0.0)
        used = weights > 0
        return SparseRows(
            ids=torch.where(used, rows.take(signal.ids), 0),
            weights=torch.where(used, weights, 0.0),
            log_probs=torch.where(used, rows.take(signal.log_probs).to(dtype), 0.0),
            tail_mass=torch.where(mask, rows.take(signal.tail_mass).to(dtype), 0.0),
            mask=None if signal.num_signal == signal.num_positions else mask,
            any_tail=signal.any_tail is not False,
        )

    def slice(self, start: int, stop: int) -> SparseRows:
        return replace(
            self,
            ids=self.ids[start:stop],
            weights=self.weights[start:stop],
            log_probs=self.log_probs[start:stop],
            tail_mass=self.tail_mass[start:stop],
            mask=None if self.mask is None else self.mask[start:stop],
        )


# Sums of exponentials between these are exact enough without a shift, in float32 too: what underflows is below 1e-18 of
# the sum, and products with differences of logits do not overflow.
_MIN_TOTAL, _MAX_TOTAL = 1e-20, 1e30


class RowLoss:
    """The loss of rows of logits, with scratch space for one slice.

    Throughout, ``exps`` are exp(logits) and ``total`` their row sums, so that log p = logits - log(total); 1 / total
    goes into the factors of the rows, which saves the passes of a softmax. Logits are shifted by their maximum only
    where their exponentials would leave the range of the dtype.

    Args:
        head: the student's, for its scale and soft-cap.
        kd_alpha, kd_temperature, l2_gamma: as in ``fused_loss``.
        dtype: of the softmax and of everything derived from it.
        with_grad: whether to overwrite the raw logits by the gradient.
        looks: whether the host may read results; see ``LossPlan``.
    """

    def __init__(
        self,
        head: OutputHead,
        *,
        kd_alpha: float,
        kd_temperature: float,
        l2_gamma: float,
        dtype: torch.dtype,
        with_grad: bool,
        looks: bool,
    ) -> None:
        self._head = head
        self._alpha = kd_alpha
        self._temperature = kd_temperature
        self._gamma = l2_gamma
        self._dtype = dtype
        self._with_grad = with_grad
        self._looks = looks
        self._buffers: dict[str, Tensor] = {}
        self._shifts: set[str] = set()

    def __call__(
        self,
        raw: Tensor,
        labels: Tensor,
        teacher: DenseRows | SparseRows | None = None,
        reference: DenseRows | None = None,
    ) -> Tensor:
        """Loss, CE, KL and mean squared distance of every row [4, rows].

        ``raw`` [rows, vocab] becomes the gradient with respect to itself when one is wanted.
        ``labels`` [rows] are all real. ``reference``'s raw logits are overwritten when in the softmax's dtype.
        """
        labels = labels.unsqueeze(1)
        logits = self._finish(raw, self._head, "student")
        slope = self._slope(logits)
        distance = None
        if reference is not None:
            old = self._finish(reference.raw, reference.head, "reference")
            distance = torch.sub(logits, old, out=old)
        exps, total = self._exponentials(logits, "student_exps")
        ce = total.log() - logits.gather(1, labels).squeeze(1)
        ce_weight = self._ce_weight(teacher, ce)
        ce_factor = (ce_weight / total).unsqueeze(1)
        # From here on the place of the logits is free; the gradient takes it.
        if isinstance(teacher, DenseRows):
            kd = self._dense(teacher, logits, exps, total, ce_factor)
        elif isinstance(teacher, SparseRows):
            kd = self._sparse(teacher, logits, exps, total, ce_factor)
        else:
            kd = torch.zeros_like(ce)
            if self._with_grad:
                torch.mul(exps, ce_factor, out=logits)
        l2 = torch.zeros_like(ce)
        if distance is not None:
            l2 = torch.linalg.vector_norm(distance, dim=1).square_().div_(distance.shape[1])
        if self._with_grad:
            logits.scatter_add_(1, labels, -ce_weight.unsqueeze(1))
            if distance is not None and self._gamma > 0:
                logits.add_(distance, alpha=2.0 * self._gamma / distance.shape[1])
            if slope is not None:
                logits.mul_(slope)
            elif self._head.scale != 1.0:
                logits.mul_(self._head.scale)
            if logits is not raw:
                raw.copy_(logits)
        loss = ce_weight * ce + self._alpha * self._temperature**2 * kd + self._gamma * l2
        return torch.stack((loss, ce, kd, l2))

    def _dense(self, teacher: DenseRows, logits: Tensor, exps: Tensor, total: Tensor, ce_factor: Tensor) -> Tensor:
        """KL [rows] to a whole teacher distribution; ``logits`` become the gradient but for the label's part."""
        teacher_logits = self._finish(teacher.raw, teacher.head, "teacher")
        if teacher.mask is not None:
            # Rows without a record may hold anything, NaN too.
            teacher_logits.masked_fill_(~teacher.mask.unsqueeze(1), 0.0)
        shared = teacher_logits.shape[1]
        tempered, tempered_total = exps, total
        if self._temperature != 1.0:
            teacher_logits.div_(self._temperature)
            tempered, tempered_total = self._exponentials(logits.div_(self._temperature), "tempered_exps")
        teacher_exps, teacher_total = self._exponentials(teacher_logits, "teacher_exps")
        difference = teacher_logits.sub_(logits[:, :shared])
        kd = difference.mul_(teacher_exps).sum(dim=1) / teacher_total + tempered_total.log() - teacher_total.log()
        weight = torch.full_like(kd, self._alpha * self._temperature)
        if teacher.mask is not None:
            kd = torch.where(teacher.mask, kd, 0.0)
            weight = torch.where(teacher.mask, weight, 0.0)
        if self._with_grad:
            self._combine(exps, ce_factor, tempered, (weight / tempered_total).unsqueeze(1), out=logits)
            logits[:, :shared].sub_(teacher_exps.mul_((weight / teacher_total).unsqueeze(1)))
        return kd

    def _sparse(self, teacher: SparseRows, logits: Tensor, exps: Tensor, total: Tensor, ce_factor: Tensor) -> Tensor:
        """KL estimate [rows] of a sparse signal; ``logits`` become the gradient but for the label's part."""
        ids, weights, tail_mass = teacher.ids, teacher.weights, teacher.tail_mass
        tempered, tempered_total = exps, total
        if self._temperature != 1.0:
            tempered, tempered_total = self._exponentials(logits.div_(self._temperature), "tempered_exps")
        log_student = logits.gather(1, ids) - tempered_total.log().unsqueeze(1)
        kd = (weights * (teacher.log_probs - log_student)).sum(dim=1)
        mass = rest_mass = weights.sum(dim=1)  # each row's factors of p, on the ids and outside them
        held = torch.zeros_like(weights)
        if teacher.any_tail:
            # The student's tail is summed with the ids' places emptied: 1 - (their sum) would cancel where it is thin.
            held = torch.where((weights > 0) & (tail_mass > 0).unsqueeze(1), tempered.gather(1, ids), 0.0)
            tempered.scatter_add_(1, ids, -held)
            rest = (tempered.sum(dim=1) / tempered_total).clamp_min_(torch.finfo(self._dtype).tiny)
            kd += torch.where(tail_mass > 0, torch.xlogy(tail_mass, tail_mass) - tail_mass * rest.log(), 0.0)
            rest_mass = mass - tail_mass * (held.sum(dim=1) / tempered_total) / rest
        if self._with_grad:
            scale = self._alpha * self._temperature / tempered_total
            held_factor = ((mass + tail_mass) * scale).unsqueeze(1)
            if tempered is exps:  # at T = 1 their part of the cross-entropy was emptied as well
                held_factor = held_factor + ce_factor
            self._combine(exps, ce_factor, tempered, (rest_mass * scale).unsqueeze(1), out=logits)
            logits.scatter_add_(1, ids, held * held_factor - weights * (self._alpha * self._temperature))
        return kd

    @staticmethod
    def _combine(exps: Tensor, factor: Tensor, tempered: Tensor, tempered_factor: Tensor, *, out: Tensor) -> None:
        """``out = factor exps + tempered_factor tempered`` [rows, vocab]; both are used up."""
        if tempered is exps:
            torch.mul(exps, factor + tempered_factor, out=out)
        else:
            torch.add(exps.mul_(factor), tempered.mul_(tempered_factor), out=out)

    def _ce_weight(self, teacher: DenseRows | SparseRows | None, like: Tensor) -> Tensor:
        """Weight of each row's cross-entropy [rows], so that a position's weights sum to 1."""
        weight = torch.ones_like(like)
        if teacher is None:
            return weight
        if teacher.mask is None:
            return weight.fill_(1.0 - self._alpha)
        return weight.masked_fill_(teacher.mask, 1.0 - self._alpha)

    def _exponentials(self, logits: Tensor, slot: str) -> tuple[Tensor, Tensor]:
        """exp(logits) [rows, vocab] and its row sums [rows]; ``logits`` are shifted in place where they must be.

        Most models' logits need no shift, which saves two passes. Where looking at a result costs nothing that is tried
        first; a model that once needed the shift gets it at once from then on.
        """
        exps = self._scratch(slot, logits)
        if self._looks and slot not in self._shifts:
            total = torch.exp(logits, out=exps).sum(dim=1)
            if bool(((total > _MIN_TOTAL) & (total < _MAX_TOTAL)).all()):
                return exps, total
            self._shifts.add(slot)
        logits.sub_(logits.amax(dim=1, keepdim=True))
        return exps, torch.exp(logits, out=exps).sum(dim=1)

    def _finish(self, raw: Tensor, head: OutputHead | None, slot: str) -> Tensor:
        """Logits in the softmax's dtype: in place where ``raw`` is a product of ours, else in scratch space."""
        in_place = raw.dtype == self._dtype and head is not None
        logits = raw if in_place else self._scratch(slot, raw).copy_(raw)
        if head is not None and head.scale != 1.0:
            logits.mul_(head.scale)
        if head is not None and head.soft_cap is not None:
            logits.div_(head.soft_cap).tanh_().mul_(head.soft_cap)
        return logits

    def _slope(self, logits: Tensor) -> Tensor | None:
        """Derivative of soft-capped logits with respect to the raw ones [rows, vocab]; None without a soft-cap."""
        scale, soft_cap = self._head.scale, self._head.soft_cap
        if soft_cap is None or not self._with_grad:
            return None
        slope = torch.mul(logits, logits, out=self._scratch("slope", logits))
        return slope.mul_(-scale / soft_cap**2).add_(scale)

    def _scratch(self, slot: str, like: Tensor) -> Tensor:
        """Contiguous space of the shape of ``like``, kept from slice to slice."""
        buffer = self._buffers.get(slot)
        if buffer is None or buffer.numel() < like.numel():
            buffer = self._buffers[slot] = torch.empty(like.numel(), dtype=self._dtype, device=like.device)
        return buffer[: like.numel()].view(like.shape)
