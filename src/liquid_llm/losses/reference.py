"""The distillation loss in plain torch: the specification the fused loss is tested against.

    z      student logits                    p_T = softmax(z / T)
    y      label                             CE  = -log p_1[y]
    q_T    teacher distribution at T         D   = the objective's divergence of q_T and p_T, see ``divergences``

A labelled position with a teacher signal costs ``alpha T^2 D + (1 - alpha) CE``; one without costs ``CE``; a reference
student adds ``gamma mean_v (z - z_reference)^2``. A position whose entropy under p_1 is below the objective's
``min_entropy`` costs ``CE`` too, whatever signal it has; which ones those are is not differentiated. The factor T^2
keeps the size of the KD gradient independent of T (Hinton, Vinyals and Dean 2015, arXiv 1503.02531, section 2). Costs
are summed over positions.

Logits are full [positions, vocab] tensors in float32 (float64 when ``hidden`` is): this is for tests and for reading.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from liquid_llm.data.types import IGNORE_INDEX
from liquid_llm.losses._arguments import check_arguments
from liquid_llm.losses.divergences import SparseRows, get_divergence
from liquid_llm.losses.objective import CROSS_ENTROPY, Objective
from liquid_llm.losses.signals import LEAST_BIAS, DenseSignal, LossOutput, OutputHead, Signal, SparseSignal


def reference_loss(
    hidden: Tensor,
    head: OutputHead,
    labels: Tensor,
    *,
    signal: Signal | None = None,
    objective: Objective = CROSS_ENTROPY,
    reference: DenseSignal | None = None,
) -> LossOutput:
    """Composite distillation loss, summed over labelled positions.

    Arguments and what they raise are those of ``fused_loss``.
    """
    check_arguments(hidden, head, labels, signal=signal, objective=objective, reference=reference)
    alpha, temperature = objective.alpha, objective.temperature
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    labelled = labels != IGNORE_INDEX
    with torch.autocast(hidden.device.type, enabled=False):
        logits = _logits(hidden[labelled], head, dtype)
        ce = F.cross_entropy(logits, labels[labelled], reduction="none")
        kd = torch.zeros_like(ce)
        has_signal = torch.zeros_like(ce, dtype=torch.bool)
        if signal is not None:
            student = torch.log_softmax(logits / objective.signal_temperature, dim=-1)
            kd, has_signal = measure(student, signal, labelled, objective)
        num_signal, entropies, num_distilled = int(has_signal.sum()), None, None
        if signal is not None and objective.min_entropy is not None:
            log_probs = torch.log_softmax(logits, dim=-1).detach()
            entropies = torch.where(has_signal, -(log_probs.exp() * log_probs).sum(dim=-1), -1.0)
            num_distilled = LossOutput.count_distilled(entropies, objective.min_entropy)
            has_signal = has_signal & (entropies >= objective.min_entropy)
            kd = torch.where(has_signal, kd, 0.0)
        l2 = torch.zeros_like(ce)
        if reference is not None:
            old_logits = _logits(reference.hidden[labelled], reference.head, dtype)
            l2 = (logits - old_logits.detach()).square().mean(dim=-1)
        distilled = alpha * temperature**2 * kd + (1.0 - alpha) * ce
        loss = torch.where(has_signal, distilled, ce) + objective.gamma * l2
    return LossOutput(
        loss=loss.sum(),
        ce=ce.detach().sum(),
        kd=kd.detach().sum(),
        l2=l2.detach().sum(),
        num_positions=int(labelled.sum()),
        num_signal=num_signal,
        entropies=entropies,
        num_distilled=num_distilled,
    )


def _logits(hidden: Tensor, head: OutputHead, dtype: torch.dtype) -> Tensor:
    """Logits [positions, vocab] with every product formed in ``dtype``."""
    bias = None if head.bias is None else head.bias.to(dtype).clamp(min=LEAST_BIAS)
    return OutputHead(head.weight.to(dtype), bias, head.scale, head.soft_cap).logits(hidden.to(dtype))


def measure(
    student_log_probs: Tensor, signal: Signal, rows: slice | Tensor, objective: Objective
) -> tuple[Tensor, Tensor]:
    """The divergence of some rows of a signal [positions], 0 where there is none, and where there is one (bool).

    Args:
        student_log_probs: [positions, vocab], log p at ``objective.signal_temperature``, in the dtype to compute in.
        rows: which of the signal, as many as ``student_log_probs`` has.
    """
    divergence, dtype = get_divergence(objective.divergence, objective.temperature), student_log_probs.dtype
    has_signal = torch.ones_like(student_log_probs[:, 0], dtype=torch.bool)
    if signal.mask is not None:
        has_signal = signal.mask[rows]
    # Rows without a record may hold anything: not even a NaN of theirs may reach the sum or a gradient.
    if isinstance(signal, SparseSignal):
        clean = SparseRows.of(signal, lambda tensor: tensor[rows], dtype)
        return divergence.plain_sparse(student_log_probs, clean), has_signal
    if isinstance(signal, DenseSignal):
        logits = _logits(signal.hidden[rows], signal.head, dtype).detach()
    else:
        logits = signal.rows[rows].to(dtype).masked_fill(~has_signal.unsqueeze(1), 0.0)
    # The vocabularies differ by padding only: the teacher says 0 on what the student alone has.
    shared = logits[:, : student_log_probs.shape[1]] / objective.signal_temperature
    found = divergence.plain(student_log_probs, torch.log_softmax(shared, dim=-1))
    return torch.where(has_signal, found, 0.0), has_signal
