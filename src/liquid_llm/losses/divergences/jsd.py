"""The generalised Jensen-Shannon divergence: beta KL(q || M) + (1 - beta) KL(p || M), M = beta q + (1 - beta) p, of a
teacher q and a student p (Agarwal et al. 2023, GKD, arXiv 2306.13649, equation 1). ``jsd:beta=0.5``.

beta is that of GKD and of TRL's ``beta``: towards 0 the divergence behaves as the forward KL(q || p) (JSD / beta tends
to it), towards 1 as the reverse KL(p || q) (JSD / (1 - beta) does). TRL puts the two KLs themselves at 0 and 1, a jump;
here those have their own names. It is at most log 2 at beta = 0.5 and bounded everywhere, so outliers pull less.

M needs q wherever the student says anything: whole distributions alone are answered. The gradient by u, the student's
logits divided by T, is ``(1 - beta) p (log(p / M) - KL(p || M))``.
"""

from __future__ import annotations

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


class JSD(Divergence):
    """See the module.

    Args:
        beta: the teacher's share of the mixture.
    """

    def __init__(self, beta: float = 0.5) -> None:
        self.beta = check_share("beta", beta, "forward_kl", "reverse_kl")

    def plain(self, student: Tensor, teacher: Tensor) -> Tensor:
        teacher = widen_plain(teacher, student.shape[1])
        mixture = plain_mixture(teacher, student, self.beta)
        return self.beta * plain_kl(teacher, mixture) + (1.0 - self.beta) * plain_kl(student, mixture)

    def dense(self, student: Softmax, teacher: Softmax, gradient: SliceGradient | None) -> Tensor:
        teacher = widen(teacher, student.logits.shape[1])
        difference = log_ratio(student, teacher)
        student_part = log_over_mixture(difference, self.beta, 1.0 - self.beta)  # log(p / M)
        teacher_part = difference.add_(student_part)  # log(q / M)
        of_teacher = teacher_part.mul_(teacher.exps).sum(dim=1) / teacher.total
        weighted = student_part.mul_(student.exps)
        of_student = weighted.sum(dim=1) / student.total
        if gradient is not None:
            weight = (1.0 - self.beta) * gradient.weight / student.total
            add_centred(gradient, weighted, of_student, weight)
        return self.beta * of_teacher + (1.0 - self.beta) * of_student
