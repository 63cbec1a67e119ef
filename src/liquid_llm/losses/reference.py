"""The distillation loss in plain torch: the specification the fused loss is tested against.

    z      student logits                    p_T = softmax(z / T)
    y      label                             CE  = -log p_1[y]
    q_T    teacher distribution at T         KL  = sum_v q_T[v] (log q_T[v] - log p_T[v])

A labelled position with a teacher signal costs ``alpha T^2 KL + (1 - alpha) CE``; one without costs ``CE``; a reference
student adds ``gamma mean_v (z - z_reference)^2``. The factor T^2 keeps the size of the KD gradient independent of T
(Hinton, Vinyals and Dean 2015, arXiv 1503.02531, section 2). Costs are summed over positions.

Logits are full [positions, vocab] tensors in float32 (float64 when ``hidden`` is): this is for tests and for reading.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from liquid_llm.data.types import IGNORE_INDEX
from liquid_llm.losses._arguments import check_arguments
from liquid_llm.losses.signals import DenseSignal, LogitsSignal, LossOutput, OutputHead, Signal, SparseSignal


def reference_loss(
    hidden: Tensor,
    head: OutputHead,
    labels: Tensor,
    *,
    signal: Signal | None = None,
    kd_alpha: float = 0.0,
    kd_temperature: float = 1.0,
    reference: DenseSignal | None = None,
    l2_gamma: float = 0.0,
) -> LossOutput:
    """Composite distillation loss, summed over labelled positions.

    Args:
        hidden: [positions, hidden], the student's states right before its output head.
        head: the student's output head.
        labels: [positions] int64, already shifted; rows with ``IGNORE_INDEX`` contribute nothing.
        signal: the teacher's word on each row of ``hidden``, or None for plain cross-entropy.
        kd_alpha: weight of the KD term in [0, 1], where there is a signal.
        kd_temperature: T of teacher and student alike.
        reference: hidden states and head of the frozen student, aligned with ``hidden``, or None for no L2 term.
        l2_gamma: weight of the L2 term.

    Raises:
        ValueError: arguments that do not fit together.
        UsageError: a sparse signal that holds at another temperature.
    """
    check_arguments(
        hidden,
        head,
        labels,
        signal=signal,
        kd_alpha=kd_alpha,
        kd_temperature=kd_temperature,
        reference=reference,
        l2_gamma=l2_gamma,
    )
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    labelled = labels != IGNORE_INDEX
    with torch.autocast(hidden.device.type, enabled=False):
        logits = _logits(hidden[labelled], head, dtype)
        ce = F.cross_entropy(logits, labels[labelled], reduction="none")
        kd = torch.zeros_like(ce)
        has_signal = torch.zeros_like(ce, dtype=torch.bool)
        if signal is not None:
            student_log_probs = torch.log_softmax(logits / kd_temperature, dim=-1)
            kd, has_signal = _divergence(student_log_probs, signal, labelled, kd_temperature)
        l2 = torch.zeros_like(ce)
        if reference is not None:
            old_logits = _logits(reference.hidden[labelled], reference.head, dtype)
            l2 = (logits - old_logits.detach()).square().mean(dim=-1)
        distilled = kd_alpha * kd_temperature**2 * kd + (1.0 - kd_alpha) * ce
        loss = torch.where(has_signal, distilled, ce) + l2_gamma * l2
    return LossOutput(
        loss=loss.sum(),
        ce=ce.detach().sum(),
        kd=kd.detach().sum(),
        l2=l2.detach().sum(),
        num_positions=int(labelled.sum()),
        num_signal=int(has_signal.sum()),
    )


def _logits(hidden: Tensor, head: OutputHead, dtype: torch.dtype) -> Tensor:
    """Logits [positions, vocab] with every product formed in ``dtype``."""
    bias = None if head.bias is None else head.bias.to(dtype)
    return OutputHead(head.weight.to(dtype), bias, head.scale, head.soft_cap).logits(hidden.to(dtype))


def _divergence(
    student_log_probs: Tensor, signal: Signal, labelled: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """KL of every labelled position [positions], 0 where there is no signal, and where there is one (bool).

    Args:
        student_log_probs: [labelled positions, vocab], log p_T.
        labelled: [rows of the signal] bool.
    """
    if isinstance(signal, DenseSignal):
        teacher_logits = _logits(signal.hidden[labelled], signal.head, student_log_probs.dtype)
        kd = _dense_divergence(student_log_probs, teacher_logits.detach(), temperature)
        return kd, torch.ones_like(kd, dtype=torch.bool)
    has_signal = signal.mask[labelled]
    if isinstance(signal, LogitsSignal):
        # Rows without a record may hold anything: not even a NaN of theirs may reach the sum or a gradient.
        rows = signal.rows[labelled].to(student_log_probs.dtype).masked_fill(~has_signal.unsqueeze(1), 0.0)
        return torch.where(has_signal, _dense_divergence(student_log_probs, rows, temperature), 0.0), has_signal
    return _sparse_divergence(student_log_probs, signal, labelled, has_signal), has_signal


def _dense_divergence(student_log_probs: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """``sum_v q (log q - log p)`` over the shared vocabulary; the teacher says 0 on what only the student has."""
    shared = min(student_log_probs.shape[-1], teacher_logits.shape[-1])
    teacher_log_probs = torch.log_softmax(teacher_logits[:, :shared] / temperature, dim=-1)
    difference = teacher_log_probs - student_log_probs[:, :shared]
    return (teacher_log_probs.exp() * difference).sum(dim=-1)


def _sparse_divergence(student_log_probs: Tensor, signal: SparseSignal, labelled: Tensor, has_signal: Tensor) -> Tensor:
    """The estimate in ``SparseSignal``'s docstring for each labelled position, 0 without a record."""
    dtype = student_log_probs.dtype
    weights = torch.where(has_signal.unsqueeze(1), signal.weights[labelled].to(dtype), 0.0)
    used = weights > 0
    ids = torch.where(used, signal.ids[labelled], 0)
    terms = weights * (signal.log_probs[labelled].to(dtype) - student_log_probs.gather(1, ids))
    kd = torch.where(used, terms, 0.0).sum(dim=-1)

    tail_mass = torch.where(has_signal, signal.tail_mass[labelled].to(dtype), 0.0)
    rows = (tail_mass > 0).nonzero().squeeze(1)
    held = torch.zeros_like(student_log_probs, dtype=torch.int64).scatter_add(1, ids, used.long()) > 0
    log_student_tail = torch.logsumexp(student_log_probs[rows].masked_fill(held[rows], -torch.inf), dim=-1)
    return kd.index_add(0, rows, tail_mass[rows] * (tail_mass[rows].log() - log_student_tail))
