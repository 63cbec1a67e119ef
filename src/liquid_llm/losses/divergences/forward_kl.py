"""KL(teacher || student) = sum_v q[v] (log q[v] - log p[v]): what most of distillation uses (Hinton et al. 2015,
arXiv 1503.02531).

Gradients by u, the student's logits divided by T, with W = sum of a sparse signal's weights, r = tail mass and R = the
student's own mass outside the ids:

    dense     p - q
    sparse    W p - weights  - r (1 - R) / R p  outside the ids,  + r p  on them    (its tail bucket)
"""

from __future__ import annotations

import torch
from torch import Tensor

from liquid_llm.losses.divergences import Divergence, SliceGradient, Softmax, SparseRows, empty_places
from liquid_llm.losses.signals import FORMS


class ForwardKL(Divergence):
    """See the module. The estimate of a sparse signal is that of ``SparseSignal``'s docstring."""

    answers = frozenset(FORMS)

    def plain(self, student: Tensor, teacher: Tensor) -> Tensor:
        return (teacher.exp() * (teacher - student[:, : teacher.shape[1]])).sum(dim=1)

    def plain_sparse(self, student: Tensor, teacher: SparseRows) -> Tensor:
        kl = (teacher.weights * (teacher.log_probs - student.gather(1, teacher.ids))).sum(dim=1)
        rows = (teacher.tail_mass > 0).nonzero().squeeze(1)
        tail_mass, ids, used = teacher.tail_mass[rows], teacher.ids[rows], (teacher.weights[rows] > 0).long()
        held = torch.zeros_like(student[rows], dtype=torch.int64).scatter_add(1, ids, used) > 0
        log_student_tail = torch.logsumexp(student[rows].masked_fill(held, -torch.inf), dim=1)
        return kl.index_add(0, rows, tail_mass * (tail_mass.log() - log_student_tail))

    def dense(self, student: Softmax, teacher: Softmax, gradient: SliceGradient | None) -> Tensor:
        shared = teacher.logits.shape[1]
        difference = teacher.logits.sub_(student.logits[:, :shared])
        kl = difference.mul_(teacher.exps).sum(dim=1) / teacher.total + student.total.log() - teacher.total.log()
        if gradient is not None:
            out = gradient.start(gradient.weight / student.total)
            out[:, :shared].sub_(teacher.exps.mul_((gradient.weight / teacher.total).unsqueeze(1)))
        return kl

    def sparse(self, student: Softmax, teacher: SparseRows, gradient: SliceGradient | None) -> Tensor:
        ids, weights, tail_mass = teacher.ids, teacher.weights, teacher.tail_mass
        log_student = student.logits.gather(1, ids) - student.total.log().unsqueeze(1)
        kl = (weights * (teacher.log_probs - log_student)).sum(dim=1)
        mass = rest_mass = weights.sum(dim=1)  # each row's factors of p, on the ids and outside them
        held = torch.zeros_like(weights)
        if teacher.any_tail:
            held, rest = empty_places(student, ids, (weights > 0) & (tail_mass > 0).unsqueeze(1))
            kl += torch.where(tail_mass > 0, torch.xlogy(tail_mass, tail_mass) - tail_mass * rest.log(), 0.0)
            rest_mass = mass - tail_mass * (held.sum(dim=1) / student.total) / rest
        if gradient is not None:
            scale = student.total.reciprocal() * gradient.weight
            held_factor = ((mass + tail_mass) * scale).unsqueeze(1)
            if gradient.is_shared:  # their part of the cross-entropy was emptied as well
                held_factor = held_factor + gradient.factor.unsqueeze(1)
            out = gradient.start(rest_mass * scale)
            out.scatter_add_(1, ids, held * held_factor - weights * gradient.weight.unsqueeze(1))
        return kl
