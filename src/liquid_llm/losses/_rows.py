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

from liquid_llm.losses.signals import OutputHead, SparseSignal


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
        any_tail: whether any row of the whole signal has a tail.
    """

    ids: Tensor
    weights: Tensor
    log_probs: Tensor
    tail_mass: Tensor
    mask: Tensor | None
    any_tail: bool

    @staticmethod
    def of(signal: SparseSignal, rows: Tensor, dtype: torch.dtype) -> SparseRows:
        """The rows of ``signal`` numbered ``rows``, cleaned and in ``dtype``."""
        mask = signal.mask[rows]
        weights = torch.where(mask.unsqueeze(1), signal.weights[rows].to(dtype), 0.0)
        used = weights > 0
        tail_mass = torch.where(mask, signal.tail_mass[rows].to(dtype), 0.0)
        return SparseRows(
            ids=torch.where(used, signal.ids[rows], 0),
            weights=torch.where(used, weights, 0.0),
            log_probs=torch.where(used, signal.log_probs[rows].to(dtype), 0.0),
            tail_mass=tail_mass,
            mask=None if bool(mask.all()) else mask,
            any_tail=bool((tail_mass > 0).any()),
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


class RowLoss:
    """The loss of rows of logits, with scratch space for one slice.

    Args:
        head: the student's, for its scale and soft-cap.
        kd_alpha, kd_temperature, l2_gamma: as in ``fused_loss``.
        dtype: of the softmax and of everything derived from it.
        with_grad: whether to overwrite the raw logits by the gradient.
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
    ) -> None:
        self._head = head
        self._alpha = kd_alpha
        self._temperature = kd_temperature
        self._gamma = l2_gamma
        self._dtype = dtype
        self._with_grad = with_grad
        self._buffers: dict[str, Tensor] = {}

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
        distance = None
        if reference is not None:
            old = self._finish(reference.raw, reference.head, "reference")
            distance = torch.sub(logits, old, out=old)
        log_probs = torch.log_softmax(logits, dim=1, out=self._scratch("log_probs", logits))
        ce = -log_probs.gather(1, labels).squeeze(1)
        l2 = torch.zeros_like(ce)
        if distance is not None:
            l2 = torch.linalg.vector_norm(distance, dim=1).square_().div_(distance.shape[1])
        # The gradient takes the place of the logits, unless the slope of the soft-cap still needs them.
        out = logits if self._head.soft_cap is None else log_probs
        if isinstance(teacher, DenseRows):
            kd = self._dense(teacher, logits, log_probs, out)
        elif isinstance(teacher, SparseRows):
            kd = self._sparse(teacher, logits, log_probs, out)
        else:
            kd = torch.zeros_like(ce)
            if self._with_grad:
                torch.exp(log_probs, out=out)
        ce_weight = self._ce_weight(teacher, ce)
        loss = ce_weight * ce + self._alpha * self._temperature**2 * kd + self._gamma * l2
        if self._with_grad:
            out.scatter_add_(1, labels, -ce_weight.unsqueeze(1))
            if distance is not None and self._gamma > 0:
                out.add_(distance, alpha=2.0 * self._gamma / distance.shape[1])
            self._chain(out, logits)
            if out is not raw:
                raw.copy_(out)
        return torch.stack((loss, ce, kd, l2))

    def _dense(self, teacher: DenseRows, logits: Tensor, log_probs: Tensor, out: Tensor) -> Tensor:
        """KL [rows] to a whole teacher distribution; ``out`` becomes the gradient but for the label's part."""
        teacher_logits = self._finish(teacher.raw, teacher.head, "teacher")
        if self._temperature != 1.0:
            teacher_logits.div_(self._temperature)
        log_student = self._at_temperature(logits, log_probs)
        shared = teacher_logits.shape[1]
        log_ratio = torch.log_softmax(teacher_logits, dim=1, out=self._scratch("log_teacher", teacher_logits))
        probs = torch.exp(log_ratio, out=teacher_logits)
        log_ratio.sub_(log_student[:, :shared])
        kd = log_ratio.mul_(probs).sum(dim=1)
        if teacher.mask is not None:
            # Rows without a record may hold anything, so their part is replaced, never multiplied by 0.
            kd = torch.where(teacher.mask, kd, 0.0)
            probs.masked_fill_(~teacher.mask.unsqueeze(1), 0.0)
        if not self._with_grad:
            return kd
        if log_student is log_probs:  # T = 1: alpha p + (1 - alpha) p is p, with and without a record
            student = log_probs.exp_()
            torch.sub(student[:, :shared], probs, alpha=self._alpha, out=out[:, :shared])
            if out is not student:
                out[:, shared:] = student[:, shared:]
            return kd
        gradient = log_student.exp_()
        gradient[:, :shared].sub_(probs)
        if teacher.mask is not None:
            gradient.masked_fill_(~teacher.mask.unsqueeze(1), 0.0)
        self._add_ce(gradient, log_probs, teacher, out)
        return kd

    def _sparse(self, teacher: SparseRows, logits: Tensor, log_probs: Tensor, out: Tensor) -> Tensor:
        """KL estimate [rows] of a sparse signal; ``out`` becomes the gradient but for the label's part."""
        ids, weights, tail_mass = teacher.ids, teacher.weights, teacher.tail_mass
        log_student = self._at_temperature(logits, log_probs)
        kd = (weights * (teacher.log_probs - log_student.gather(1, ids))).sum(dim=1)
        if not self._with_grad and not teacher.any_tail:
            return kd
        probs = log_student.exp_()
        total = weights.sum(dim=1)
        row_factor = total
        slot_values = -weights
        held = torch.zeros_like(weights)
        if teacher.any_tail:
            # The student's tail is summed with the ids' places emptied: 1 - sum would cancel where the tail is thin.
            held = torch.where((weights > 0) & (tail_mass > 0).unsqueeze(1), probs.gather(1, ids), 0.0)
            probs.scatter_add_(1, ids, -held)
            rest = probs.sum(dim=1).clamp_min_(torch.finfo(probs.dtype).tiny)
            kd += torch.where(tail_mass > 0, torch.xlogy(tail_mass, tail_mass) - tail_mass * rest.log(), 0.0)
            row_factor = total - tail_mass * held.sum(dim=1) / rest
        if not self._with_grad:
            return kd
        held_factor = total + tail_mass
        if log_student is log_probs:  # T = 1: both terms scale the same probabilities
            ce_weight = self._ce_weight(teacher, kd)
            row_factor = self._alpha * row_factor + ce_weight
            held_factor = self._alpha * held_factor + ce_weight
            slot_values = self._alpha * slot_values
        slot_values = slot_values + held * held_factor.unsqueeze(1)
        if log_student is log_probs:
            torch.mul(probs, row_factor.unsqueeze(1), out=out).scatter_add_(1, ids, slot_values)
        else:
            self._add_ce(probs.mul_(row_factor.unsqueeze(1)).scatter_add_(1, ids, slot_values), log_probs, teacher, out)
        return kd

    def _add_ce(self, kd_gradient: Tensor, log_probs: Tensor, teacher: DenseRows | SparseRows, out: Tensor) -> None:
        """``out = alpha T kd_gradient + (1 - alpha m) p_1``, both [rows, vocab]; ``log_probs`` is used up."""
        factor = self._alpha * self._temperature
        if self._alpha == 1.0 and teacher.mask is None:
            torch.mul(kd_gradient, factor, out=out)
        else:
            probs = log_probs.exp_()
            probs.mul_(self._ce_weight(teacher, probs[:, 0]).unsqueeze(1))
            torch.add(probs, kd_gradient, alpha=factor, out=out)

    def _ce_weight(self, teacher: DenseRows | SparseRows | None, like: Tensor) -> Tensor:
        """Weight of each row's cross-entropy [rows], so that a position's weights sum to 1."""
        weight = torch.ones_like(like)
        if teacher is None:
            return weight
        if teacher.mask is None:
            return weight.fill_(1.0 - self._alpha)
        return weight.masked_fill_(teacher.mask, 1.0 - self._alpha)

    def _at_temperature(self, logits: Tensor, log_probs: Tensor) -> Tensor:
        """Log of the student's softmax at T [rows, vocab]; at T = 1 ``log_probs`` itself. May use up ``logits``."""
        if self._temperature == 1.0:
            return log_probs
        scaled = logits if self._head.soft_cap is None else self._scratch("scaled", logits)
        torch.div(logits, self._temperature, out=scaled)
        return torch.log_softmax(scaled, dim=1, out=self._scratch("log_student", logits))

    def _finish(self, raw: Tensor, head: OutputHead | None, slot: str) -> Tensor:
        """Logits in the softmax's dtype: in place where ``raw`` is a product of ours, else in scratch space."""
        in_place = raw.dtype == self._dtype and head is not None
        logits = raw if in_place else self._scratch(slot, raw).copy_(raw)
        if head is not None and head.scale != 1.0:
            logits.mul_(head.scale)
        if head is not None and head.soft_cap is not None:
            logits.div_(head.soft_cap).tanh_().mul_(head.soft_cap)
        return logits

    def _chain(self, gradient: Tensor, logits: Tensor) -> None:
        """From the gradient with respect to the logits to that with respect to the raw ones, in place."""
        scale, soft_cap = self._head.scale, self._head.soft_cap
        if soft_cap is not None:
            gradient.mul_(logits.square_().mul_(-scale / soft_cap**2).add_(scale))
        elif scale != 1.0:
            gradient.mul_(scale)

    def _scratch(self, slot: str, like: Tensor) -> Tensor:
        """Contiguous space of the shape of ``like``, kept from slice to slice."""
        buffer = self._buffers.get(slot)
        if buffer is None or buffer.numel() < like.numel():
            buffer = self._buffers[slot] = torch.empty(like.numel(), dtype=self._dtype, device=like.device)
        return buffer[: like.numel()].view(like.shape)
