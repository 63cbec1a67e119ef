"""What divergences from a mixture of teacher and student have in common: the ratio of a part to the mixture.

With d = log q - log p and M = a q + b p, both ratios are taken from d alone, so that nothing overflows and equal
distributions have a ratio of 1 to rounding:

    log(p / M) = -log b - softplus(d + log(a / b))
    log(q / M) = -log a - softplus(log(b / a) - d)

The teacher says 0 on entries that the student alone has; M is b p there.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from liquid_llm.losses.divergences import SliceGradient, Softmax

_NEVER = -1e4  # log-probability of what the teacher lacks: a probability of 0, and finite


def check_share(name: str, value: float, at_0: str, at_1: str) -> float:
    """An option strictly between 0 and 1; what the limits are is said where it is not."""
    if not 0.0 < value < 1.0:
        raise ValueError(f"{name} must lie between 0 and 1, got {value:g} ({at_0} is its limit at 0, {at_1} at 1)")
    return float(value)


def widen(teacher: Softmax, width: int) -> Softmax:
    """The teacher over the student's vocabulary; the same where it has all of it."""
    missing = width - teacher.logits.shape[1]
    if missing == 0:
        return teacher
    return Softmax(F.pad(teacher.logits, (0, missing), value=_NEVER), F.pad(teacher.exps, (0, missing)), teacher.total)


def widen_plain(teacher: Tensor, width: int) -> Tensor:
    """Log q [positions, width] of log q over the shared entries."""
    return F.pad(teacher, (0, width - teacher.shape[1]), value=_NEVER)


def plain_mixture(first: Tensor, second: Tensor, share: float) -> Tensor:
    """log(share exp(first) + (1 - share) exp(second))."""
    return torch.logaddexp(first + math.log(share), second + math.log1p(-share))


def plain_kl(first: Tensor, second: Tensor) -> Tensor:
    """KL [positions] between log-probabilities [positions, vocab]."""
    return (first.exp() * (first - second)).sum(dim=1)


def log_ratio(student: Softmax, teacher: Softmax) -> Tensor:
    """d = log q - log p [rows, vocab], in the place of the teacher's logits."""
    return teacher.logits.sub_(student.logits).add_((student.total.log() - teacher.total.log()).unsqueeze(1))


def add_centred(gradient: SliceGradient, weighted: Tensor, mean: Tensor, weight: Tensor) -> None:
    """Complete the gradient by u where that by log p is g: ``weight p (g - sum_v p[v] g[v])``.

    Args:
        weighted: [rows, vocab], g times the student's exponentials.
        mean: [rows], ``sum_v p[v] g[v]``.
        weight: [rows], the factor of the row over its total.
    """
    gradient.start(-weight * mean).addcmul_(weighted, weight.unsqueeze(1))


def log_over_mixture(difference: Tensor, of_other: float, of_own: float) -> Tensor:
    """log(own / M), a new tensor: M = ``of_other`` other + ``of_own`` own, ``difference`` = log other - log own."""
    shifted = difference + math.log(of_other / of_own)
    return F.softplus(shifted).add_(math.log(of_own)).neg_()
