"""The loss of rows of logits, in as few passes over them as eager torch allows.

raw logits: a row of ``hidden @ weight.T + bias``, before scale and soft-cap; slice: the rows handled at once, few
enough that they stay in a core's cache between passes; gradient: of the summed loss with respect to the raw logits,
written over them.

Gradients, with p = softmax of the student, m = 1 where there is a signal and u = z / T:

    CE      (1 - alpha m) (p - onehot(label))
    KD      alpha m T dD/du                      of the divergence D, see ``divergences`` (T^2 where u = z)
    L2      2 gamma / vocab (z - z_reference)
    chain   scale (1 - (z / soft_cap)^2)
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from liquid_llm.losses._sources import DenseRows
from liquid_llm.losses.divergences import SliceGradient, Softmax, SparseRows, get_divergence
from liquid_llm.losses.objective import Objective
from liquid_llm.losses.signals import OutputHead

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
        objective: as in ``fused_loss``.
        dtype: of the softmax and of everything derived from it.
        with_grad: whether to overwrite the raw logits by the gradient.
        looks: whether the host may read results; see ``LossPlan``.
    """

    def __init__(
        self, head: OutputHead, objective: Objective, *, dtype: torch.dtype, with_grad: bool, looks: bool
    ) -> None:
        self._head = head
        self._objective = objective
        self._divergence = get_divergence(objective.divergence, objective.temperature)
        self._asked = objective.signal_temperature
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
        into: Tensor | None = None,
    ) -> Tensor:
        """Loss, CE, divergence, mean squared distance and entropy of every row [5, rows].

        The entropy is -1 in a row without a signal, and everywhere if the objective does not look at it.
        ``raw`` [rows, vocab] becomes the gradient with respect to itself when one is wanted, unless ``into`` is given,
        of any floating dtype, which then becomes that.
        ``labels`` [rows] are all real. ``reference``'s raw logits are overwritten when in the softmax's dtype.
        """
        alpha, gamma = self._objective.alpha, self._objective.gamma
        labels = labels.unsqueeze(1)
        logits = self._finish(raw, self._head, "student")
        slope = self._slope(logits)
        distance = None
        if reference is not None:
            old = self._finish(reference.raw, reference.head, "reference")
            distance = torch.sub(logits, old, out=old)
        exps, total = self._exponentials(logits, "student_exps")
        ce = total.log() - logits.gather(1, labels).squeeze(1)
        teacher, entropy = self._select(teacher, logits, exps, total)
        ce_weight = torch.ones_like(ce) if teacher is None else self._masked(teacher, 1.0 - alpha, 1.0, like=ce)
        ce_factor = ce_weight / total
        kd = torch.zeros_like(ce)
        # From here on the place of the logits is free; the gradient takes it.
        if teacher is not None:
            kd = self._distill(teacher, logits, exps, total, ce_factor)
        elif self._with_grad:
            torch.mul(exps, ce_factor.unsqueeze(1), out=logits)
        l2 = torch.zeros_like(ce)
        if distance is not None:
            l2 = torch.linalg.vector_norm(distance, dim=1).square_().div_(distance.shape[1])
        if self._with_grad:
            logits.scatter_add_(1, labels, -ce_weight.unsqueeze(1))
            if distance is not None and gamma > 0:
                logits.add_(distance, alpha=2.0 * gamma / distance.shape[1])
            if slope is not None:
                logits.mul_(slope)
            elif self._head.scale != 1.0:
                logits.mul_(self._head.scale)
            out = raw if into is None else into
            if logits is not out:
                out.copy_(logits)
        loss = ce_weight * ce + alpha * self._objective.temperature**2 * kd + gamma * l2
        return torch.stack((loss, ce, kd, l2, entropy))

    def _select(
        self, teacher: DenseRows | SparseRows | None, logits: Tensor, exps: Tensor, total: Tensor
    ) -> tuple[DenseRows | SparseRows | None, Tensor]:
        """The teacher's rows, masked where the student is surer than the objective asks for, and the entropies."""
        if teacher is None or self._objective.min_entropy is None:
            return teacher, torch.full_like(total, -1.0)
        entropy = (total.log() - torch.linalg.vecdot(exps, logits) / total).clamp_(min=0.0)
        if teacher.mask is not None:
            entropy.masked_fill_(~teacher.mask, -1.0)
        return replace(teacher, mask=entropy >= max(self._objective.min_entropy, 0.0)), entropy

    def _distill(
        self, teacher: DenseRows | SparseRows, logits: Tensor, exps: Tensor, total: Tensor, ce_factor: Tensor
    ) -> Tensor:
        """The divergence [rows], 0 without a signal; ``logits`` become the gradient but for the label's part."""
        temperature = self._asked
        tempered = Softmax(logits, exps, total)
        if temperature != 1.0:
            logits.div_(temperature)
            tempered = Softmax(logits, *self._exponentials(logits, "tempered_exps"))
        gradient = None
        if self._with_grad:
            by_logits = self._objective.alpha * self._objective.temperature
            by_logits *= self._objective.temperature / temperature
            weight = self._masked(teacher, by_logits, 0.0, like=total)
            gradient = SliceGradient(weight, tempered, exps, ce_factor)
        whole = teacher if isinstance(teacher, SparseRows) else self._teacher_softmax(teacher)
        kd = self._diverge(tempered, whole, gradient)
        return kd if teacher.mask is None else torch.where(teacher.mask, kd, 0.0)

    def _diverge(self, student: Softmax, teacher: Softmax | SparseRows, gradient: SliceGradient | None) -> Tensor:
        if isinstance(teacher, SparseRows):
            return self._divergence.sparse(student, teacher, gradient)
        return self._divergence.dense(student, teacher, gradient)

    def _teacher_softmax(self, teacher: DenseRows) -> Softmax:
        logits = self._finish(teacher.raw, teacher.head, "teacher")
        if teacher.mask is not None:
            # Rows without a record may hold anything, NaN too.
            logits.masked_fill_(~teacher.mask.unsqueeze(1), 0.0)
        if self._asked != 1.0:
            logits.div_(self._asked)
        return Softmax(logits, *self._exponentials(logits, "teacher_exps"))

    @staticmethod
    def _masked(teacher: DenseRows | SparseRows, with_signal: float, without: float, *, like: Tensor) -> Tensor:
        """A number for rows with a signal and another for those without [rows]."""
        if teacher.mask is None:
            return torch.full_like(like, with_signal)
        return torch.full_like(like, without).masked_fill_(teacher.mask, with_signal)

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
        return logits if head is None else head.finish(logits, in_place=True)

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
