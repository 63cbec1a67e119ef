"""The squared Hellinger distance, 1 - sum_v sqrt(p[v] q[v]): symmetric and never above 1, so that single positions on
which teacher and student disagree do not outweigh the others (Csiszar 1967 has it among the f-divergences):
``--divergence=hellinger``.

It asks for q of whatever the student says, which a signal of some ids a position does not tell: whole distributions
alone are answered, as ``Divergence`` has it. Its gradient by the student's logits / T is ``(p A - sqrt(p q)) / 2`` with
A the sum of sqrt(p q).
"""

from __future__ import annotations

import torch
from torch import Tensor

from liquid_llm.losses.divergences import Divergence, SliceGradient, Softmax


class Hellinger(Divergence):
    """See the module."""

    def plain(self, student: Tensor, teacher: Tensor) -> Tensor:
        return 1.0 - ((student[:, : teacher.shape[1]] + teacher) / 2).exp().sum(dim=1)

    def dense(self, student: Softmax, teacher: Softmax, gradient: SliceGradient | None) -> Tensor:
        shared = teacher.logits.shape[1]
        totals = (student.total.log() + teacher.total.log()).unsqueeze(1)
        means = teacher.logits.add_(student.logits[:, :shared]).sub_(totals).div_(2).exp_()  # sqrt(p q)
        affinity = means.sum(dim=1)
        if gradient is not None:
            weight = gradient.weight / 2
            out = gradient.start(weight * affinity / student.total)
            out[:, :shared].sub_(torch.mul(means, weight.unsqueeze(1), out=teacher.exps))
        return 1.0 - affinity
