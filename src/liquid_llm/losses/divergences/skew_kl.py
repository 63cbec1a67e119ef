"""KL(q || M) with M = skew q + (1 - skew) p, of a teacher q and a student p: the forward KL with some of the teacher
mixed into the student, so that its gradient stays bounded where the student says next to nothing (Ko et al. 2024,
DistiLLM, arXiv 2402.03898, equation 2; 0.1 there). ``skew_kl:skew=0.1``; at skew = 0 it is the forward KL.

M needs q itself and not an estimate of it, for the logarithm of an estimate is biased: whole distributions alone are
answered. The gradient by u, the student's logits divided by T, is ``-(1 - skew) p (q / M - sum_v p[v] q[v] / M[v])``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from liquid_llm.losses.divergences import Divergence, SliceGradient, Softmax
from liquid_llm.losses.divergences._mixture import (
    add_centred,
    check_share,
    log_over_mixture,
    log_ratio,
    plain_kl,
    plain_mixture,
    widen,
    widen_plain,
)


class SkewKL(Divergence):
    """See the module.

    Args:
        skew: the teacher's share of the mixture.
    """

    def __init__(self, skew: float = 0.1) -> None:
        self.skew = check_share("skew", skew, "forward_kl", "nothing")

    def plain(self, student: Tensor, teacher: Tensor) -> Tensor:
        teacher = widen_plain(teacher, student.shape[1])
        return plain_kl(teacher, plain_mixture(teacher, student, self.skew))

    def dense(self, student: Softmax, teacher: Softmax, gradient: SliceGradient | None) -> Tensor:
        teacher = widen(teacher, student.logits.shape[1])
        ratio = log_over_mixture(log_ratio(student, teacher).neg_(), 1.0 - self.skew, self.skew)  # log(q / M)
        kl = torch.mul(ratio, teacher.exps, out=teacher.exps).sum(dim=1) / teacher.total
        if gradient is not None:
            weighted = ratio.exp_().mul_(student.exps)
            weight = (self.skew - 1.0) * gradient.weight / student.total
            add_centred(gradient, weighted, weighted.sum(dim=1) / student.total, weight)
        return kl
