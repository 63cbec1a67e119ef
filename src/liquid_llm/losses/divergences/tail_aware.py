"""Tail-aware: the forward KL with the part that lies in the teacher's tail counted ``beta`` times:

    KL(q || p) = KL1 + a KL2        D = KL1 + beta a KL2 = beta KL(q || p) + (1 - beta) KL1

KL1 is the KL with everything outside the teacher's k likeliest ids S as one bucket, a the teacher's mass there, KL2 the
KL of the two conditional distributions outside S (Dasgupta, Cohn and Baldwin 2026, arXiv 2602.20816, section 2; best
there at k = 5 to 10). ``tail_aware:k=10:beta=2``; at beta = 1 it is the forward KL.

The paper divides its beta by the mean of a over the sequence; here it is one factor for all positions, so that a
position's loss depends on nothing but the position and a batch can be cut anywhere. Their ``beta = 2`` at a mean tail
of 0.25 is ``beta = 8`` here.

Which signals answer: whole distributions, and exact ids with draws of the rest (codec ``tail``), where S is what is
stored exactly, k at most. A tail kept as one mass says nothing of KL2.

Gradient by u, the student's logits divided by T, with R the teacher's mass outside S and P the student's inside, W the
sum of all weights (1 of a whole distribution):

    outside S   p (W - (1 - beta) R / (1 - P)) - beta q
    inside S    p W - q
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from liquid_llm.losses.divergences import Divergence, SliceGradient, Softmax, SparseRows, empty_places
from liquid_llm.losses.divergences._head import check_size, likeliest, plain_head, plain_likeliest
from liquid_llm.losses.signals import HEAD_AND_DRAWS, WHOLE


class TailAware(Divergence):
    """See the module.

    Args:
        k: ids of the teacher's head.
        beta: how often the tail's part counts.
    """

    answers = frozenset({WHOLE, HEAD_AND_DRAWS})

    def __init__(self, k: int = 10, beta: float = 2.0) -> None:
        self.k = check_size(k)
        if not 0.0 < beta < math.inf:
            raise ValueError(f"beta must be above 0, got {beta:g}")
        self.beta = float(beta)

    def plain(self, student: Tensor, teacher: Tensor) -> Tensor:
        log_q, ids, rest = plain_likeliest(teacher, self.k)
        log_p, log_rest = plain_head(student, torch.ones_like(ids, dtype=torch.bool), ids)
        bucket = (log_q.exp() * (log_q - log_p)).sum(dim=1) + torch.xlogy(rest, rest) - rest * log_rest
        whole = (teacher.exp() * (teacher - student[:, : teacher.shape[1]])).sum(dim=1)
        return self.beta * whole + (1.0 - self.beta) * bucket

    def plain_sparse(self, student: Tensor, teacher: SparseRows) -> Tensor:
        inside, rest = teacher.head(self.k)
        log_p, log_rest = plain_head(student, inside, teacher.ids)
        each = teacher.weights * (teacher.log_probs - log_p)
        bucket = torch.where(inside, each, 0.0).sum(dim=1) + torch.xlogy(rest, rest) - rest * log_rest
        return self.beta * each.sum(dim=1) + (1.0 - self.beta) * bucket

    def dense(self, student: Softmax, teacher: Softmax, gradient: SliceGradient | None) -> Tensor:
        shared = teacher.logits.shape[1]
        head = likeliest(teacher, self.k)
        log_p = student.logits.gather(1, head.ids) - student.total.log().unsqueeze(1)
        each = head.weights * (head.log_probs - log_p)
        difference = teacher.logits.sub_(student.logits[:, :shared]).mul_(teacher.exps)
        whole = difference.sum(dim=1) / teacher.total + student.total.log() - teacher.total.log()
        held, student_rest = empty_places(student, head.ids, torch.ones_like(head.ids, dtype=torch.bool))
        bucket = each.sum(dim=1) + torch.xlogy(head.tail_mass, head.tail_mass) - head.tail_mass * student_rest.log()
        if gradient is not None:
            drawn = teacher.exps.mul_((self.beta * gradient.weight / teacher.total).unsqueeze(1))
            taken = head.weights * ((1.0 - self.beta) * gradient.weight).unsqueeze(1)
            one = torch.ones_like(student.total)
            out = self._start(gradient, student, held, one, head.tail_mass / student_rest, head.ids, taken)
            out[:, :shared].sub_(drawn)
        return self.beta * whole + (1.0 - self.beta) * bucket

    def sparse(self, student: Softmax, teacher: SparseRows, gradient: SliceGradient | None) -> Tensor:
        inside, rest = teacher.head(self.k)
        log_p = student.logits.gather(1, teacher.ids) - student.total.log().unsqueeze(1)
        each = teacher.weights * (teacher.log_probs - log_p)
        held, student_rest = empty_places(student, teacher.ids, inside)
        bucket = torch.where(inside, each, 0.0).sum(dim=1) + torch.xlogy(rest, rest) - rest * student_rest.log()
        if gradient is not None:
            taken = torch.where(inside, teacher.weights, self.beta * teacher.weights) * gradient.weight.unsqueeze(1)
            whole = teacher.weights.sum(dim=1)
            self._start(gradient, student, held, whole, rest / student_rest, teacher.ids, taken)
        return self.beta * each.sum(dim=1) + (1.0 - self.beta) * bucket

    def _start(
        self,
        gradient: SliceGradient,
        student: Softmax,
        held: Tensor,
        whole: Tensor,
        thinning: Tensor,
        ids: Tensor,
        taken: Tensor,
    ) -> Tensor:
        """The student's part of the gradient, its head's places filled again, less ``taken`` [rows, K] at ``ids``."""
        scale = gradient.weight / student.total
        held_factor = scale * whole
        if gradient.is_shared:  # their part of the cross-entropy was emptied as well
            held_factor = held_factor + gradient.factor
        out = gradient.start(scale * (whole - (1.0 - self.beta) * thinning))
        return out.scatter_add_(1, ids, held * held_factor.unsqueeze(1) - taken)
