"""KL(student || teacher) = sum_v p[v] (log p[v] - log q[v]), which makes a student drop what its teacher never says
instead of covering all it says (Gu et al. 2023, MiniLLM, arXiv 2306.08543).

It asks for log q of whatever the student says, which a signal of some ids a position does not tell: whole distributions
alone are answered. p is taken over the vocabulary that both share: on what the teacher lacks it would be infinite. Its
gradient by u, the student's logits divided by T, is ``p (log p - log q - KL)``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from liquid_llm.losses.divergences import Divergence, SliceGradient, Softmax


class ReverseKL(Divergence):
    """See the module."""

    def plain(self, student: Tensor, teacher: Tensor) -> Tensor:
        log_p = torch.log_softmax(student[:, : teacher.shape[1]], dim=1)
        return (log_p.exp() * (log_p - teacher)).sum(dim=1)

    def dense(self, student: Softmax, teacher: Softmax, gradient: SliceGradient | None) -> Tensor:
        shared = teacher.logits.shape[1]
        exps = student.exps[:, :shared]
        total = student.total if shared == student.exps.shape[1] else exps.sum(dim=1)
        difference = torch.sub(student.logits[:, :shared], teacher.logits, out=teacher.logits)
        difference.add_((teacher.total.log() - total.log()).unsqueeze(1))
        kl = torch.mul(difference, exps, out=teacher.exps).sum(dim=1) / total
        if gradient is not None:
            weight = gradient.weight / total
            difference = torch.addcmul(teacher.exps, exps, kl.unsqueeze(1), value=-1.0, out=teacher.logits)
            gradient.start(torch.zeros_like(total))[:, :shared].addcmul_(difference, weight.unsqueeze(1))
        return kl
