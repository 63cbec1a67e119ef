"""KL(p || M) with M = (1 - skew) q + skew p, of a teacher q and a student p: the reverse KL with some of the student
mixed into the teacher, so that it stays finite where the teacher says nothing (Ko et al. 2024, DistiLLM, arXiv
2402.03898, section 3.1; 0.1 there). ``skew_reverse_kl:skew=0.1``; at skew = 0 it is the reverse KL.

It asks for q of whatever the student says: whole distributions alone are answered. With r = log(p / M), the gradient
by u, the student's logits divided by T, is ``p (g - sum_v p[v] g[v])`` of ``g = r - skew exp(r)``.
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


class SkewReverseKL(Divergence):
    """See the module.

    Args:
        skew: the student's share of the mixture.
    """

    def __init__(self, skew: float = 0.1) -> None:
        self.skew = check_share("skew", skew, "reverse_kl", "nothing")

    def plain(self, student: Tensor, teacher: Tensor) -> Tensor:
        teacher = widen_plain(teacher, student.shape[1])
        return plain_kl(student, plain_mixture(student, teacher, self.skew))

    def dense(self, student: Softmax, teacher: Softmax, gradient: SliceGradient | None) -> Tensor:
        teacher = widen(teacher, student.logits.shape[1])
        ratio = log_over_mixture(log_ratio(student, teacher), 1.0 - self.skew, self.skew)  # log(p / M)
        kl = torch.mul(ratio, student.exps, out=teacher.exps).sum(dim=1) / student.total
        if gradient is not None:
            slope = torch.exp(ratio, out=teacher.exps)
            weighted = ratio.sub_(slope, alpha=self.skew).mul_(student.exps)
            add_centred(gradient, weighted, weighted.sum(dim=1) / student.total, gradient.weight / student.total)
        return kl
