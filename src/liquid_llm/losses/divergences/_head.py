"""The teacher's head of a whole distribution, in the form in which a store has it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from liquid_llm.losses.divergences import Softmax, SparseRows
from liquid_llm.losses.largest import largest


def check_size(k: float) -> int:
    """A number of ids."""
    if not math.isfinite(k) or k != int(k) or k < 1:
        raise ValueError(f"k must be a whole number of ids, at least 1, got {k:g}")
    return int(k)


def likeliest(teacher: Softmax, k: int) -> SparseRows:
    """The k likeliest ids of each row and the mass of the others; the teacher stays as it is."""
    values, ids = largest(teacher.logits, min(k, teacher.logits.shape[1]))
    log_probs = values - teacher.total.log().unsqueeze(1)
    held = teacher.exps.gather(1, ids)
    rest = teacher.exps.scatter_(1, ids, 0.0).sum(dim=1) / teacher.total
    teacher.exps.scatter_(1, ids, held)
    return SparseRows(
        ids=ids,
        weights=log_probs.exp(),
        log_probs=log_probs,
        tail_mass=rest,
        mask=None,
        any_tail=True,
        num_exact=torch.full_like(ids[:, 0], ids.shape[1]),
    )


def log_weights(rows: SparseRows) -> Tensor:
    """Finite, whatever the weights."""
    return rows.weights.clamp(min=torch.finfo(rows.weights.dtype).tiny).log()


def plain_likeliest(teacher: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of log q [positions, vocab]: that of the k likeliest ids, these ids, and the mass of the others [positions]."""
    log_q, ids = teacher.topk(min(k, teacher.shape[1]), dim=1)
    rest = 1.0 - log_q.exp().sum(dim=1) if log_q.shape[1] < teacher.shape[1] else torch.zeros_like(log_q[:, 0])
    return log_q, ids, rest


def plain_head(student: Tensor, inside: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Of log p [positions, vocab], that of ``ids`` [positions, K], and log of the mass on all ids but those inside."""
    held = torch.zeros_like(student, dtype=torch.int64).scatter_add(1, ids, inside.long()) > 0
    rest = torch.where(held.all(dim=1, keepdim=True), math.log(torch.finfo(student.dtype).tiny), student)
    rest = rest.masked_fill(held & ~held.all(dim=1, keepdim=True), -torch.inf)
    return student.gather(1, ids), torch.logsumexp(rest, dim=1)
