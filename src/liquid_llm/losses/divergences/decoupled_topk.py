"""Decoupled top-K: what the teacher's k likeliest ids S weigh together, untempered, and how they share it, tempered:

    D = Q log(Q / P) + (1 - Q) log((1 - Q) / (1 - P))  +  Q KL(c || pi)

with Q and P the masses of S for teacher and student at T = 1, c and pi their distributions inside S at the temperature.
At T = 1 this is the KL with everything outside S as one bucket (the chain rule of KL); at any other T the mass that is
cut off is never tempered, so k log-probabilities stored at T = 1 are all there is to know. ``decoupled_topk:k=32``.

As the makers of LFM2 describe it (arXiv 2511.23404: 32 ids; its text was not at hand, what stands here follows several
digests of it that agree). The objective's T^2 multiplies both parts, as every divergence.

Which signals answer: any that has the head exactly. From ``tail`` S is what is stored exactly, k at most.

Gradient by z, the student's logits, with R the teacher's mass outside S (1 - Q but for the noise of draws):

    outside S   p (Q + R - R / (1 - P))
    inside S    p (Q + R - Q / P) + Q / T (pi - c)
"""

from __future__ import annotations

import torch
from torch import Tensor

from liquid_llm.losses.divergences import Divergence, SliceGradient, Softmax, SparseRows, empty_places
from liquid_llm.losses.divergences._head import check_size, likeliest, log_weights, plain_head, plain_likeliest
from liquid_llm.losses.signals import HEAD, HEAD_AND_DRAWS, WHOLE

_OUTSIDE = -1e30  # log-probability inside S of what is not there, finite


class DecoupledTopK(Divergence):
    """See the module.

    Args:
        k: ids of the teacher's head.
    """

    answers = frozenset({WHOLE, HEAD, HEAD_AND_DRAWS})
    tempers = True

    def __init__(self, k: int = 32) -> None:
        self.k = check_size(k)

    def plain(self, student: Tensor, teacher: Tensor) -> Tensor:
        log_q, ids, rest = plain_likeliest(teacher, self.k)
        return self._plain(student, ids, log_q, torch.ones_like(ids, dtype=torch.bool), rest)

    def plain_sparse(self, student: Tensor, teacher: SparseRows) -> Tensor:
        inside, rest = teacher.head(self.k)
        return self._plain(student, teacher.ids, log_weights(teacher), inside, rest)

    def _plain(self, student: Tensor, ids: Tensor, log_q: Tensor, inside: Tensor, rest: Tensor) -> Tensor:
        log_p, log_rest = plain_head(student, inside, ids)
        log_p, log_q = (one.masked_fill(~inside, _OUTSIDE) for one in (log_p, log_q))
        log_mass_p, log_mass_q = log_p.logsumexp(dim=1), log_q.logsumexp(dim=1)
        mass = log_mass_q.exp()
        bernoulli = mass * (log_mass_q - log_mass_p) + torch.xlogy(rest, rest) - rest * log_rest
        log_c, log_pi = (torch.log_softmax(one / self.temperature, dim=1) for one in (log_q, log_p))
        return bernoulli + mass * (log_c.exp() * (log_c - log_pi)).sum(dim=1)

    def dense(self, student: Softmax, teacher: Softmax, gradient: SliceGradient | None) -> Tensor:
        return self.sparse(student, likeliest(teacher, self.k), gradient)

    def sparse(self, student: Softmax, teacher: SparseRows, gradient: SliceGradient | None) -> Tensor:
        inside, rest = teacher.head(self.k)
        weights = torch.where(inside, teacher.weights, 0.0)
        log_p = student.logits.gather(1, teacher.ids) - student.total.log().unsqueeze(1)
        held, student_rest = empty_places(student, teacher.ids, inside)
        mass = weights.sum(dim=1)
        log_p, log_q = (one.masked_fill(~inside, _OUTSIDE) for one in (log_p, log_weights(teacher)))
        student_mass = log_p.logsumexp(dim=1)  # its log: a student may say next to nothing of what the teacher says
        d = torch.xlogy(mass, mass) - mass * student_mass + torch.xlogy(rest, rest) - rest * student_rest.log()
        log_c, log_pi = (torch.log_softmax(one / self.temperature, dim=1) for one in (log_q, log_p))
        c = log_c.exp()
        d += mass * (c * (log_c - log_pi)).sum(dim=1)
        if gradient is not None:
            scale = gradient.weight / student.total
            held_factor = gradient.factor + scale * (mass + rest)
            share = torch.softmax(log_p, dim=1)  # p / P
            inner = (log_pi.exp() - c).div_(self.temperature).sub_(share).mul_((gradient.weight * mass).unsqueeze(1))
            out = gradient.start(scale * (mass + rest - rest / student_rest))
            out.scatter_add_(1, teacher.ids, held * held_factor.unsqueeze(1) + inner.masked_fill_(~inside, 0.0))
        return d
