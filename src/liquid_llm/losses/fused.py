"""The distillation loss without a [positions, vocab] tensor: value and gradients chunk of positions by chunk.

chunk: positions whose logits exist at the same time; slice: the few of them whose softmax is computed at once (see
``_rows``). The value needs every logit once and so do the gradients, hence both are computed in the forward pass while
a chunk's logits are there, and the backward pass only scales them by ``grad_output``: three products with the
student's head in all, as in plain training, and one with the teacher's.

``reference.py`` says what is computed; tests hold the two equal. Gradients in the forward pass are Liger Kernel's idea
(Hsu et al. 2024, arXiv 2410.10989).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from liquid_llm.data.types import IGNORE_INDEX
from liquid_llm.losses._arguments import check_arguments
from liquid_llm.losses._heads import HeadGradient, HeadProducts, product_dtype
from liquid_llm.losses._rows import RowLoss
from liquid_llm.losses._sources import DenseSource, LabelledRows, teacher_source
from liquid_llm.losses.signals import DenseSignal, LogitsSignal, LossOutput, OutputHead, Signal, SparseSignal

CHUNK_BYTES = 96 << 20  # of one chunk's logits in float32
MIN_CHUNK_TOKENS = 16
_SLICE_ELEMENTS = 1 << 19  # 2 MiB of float32 on a CPU; elsewhere a chunk is one slice


def fused_loss(
    hidden: Tensor,
    head: OutputHead,
    labels: Tensor,
    *,
    signal: Signal | None = None,
    kd_alpha: float = 0.0,
    kd_temperature: float = 1.0,
    reference: DenseSignal | None = None,
    l2_gamma: float = 0.0,
    chunk_tokens: int | None = None,
) -> LossOutput:
    """Composite distillation loss summed over labelled positions; equal to ``reference_loss``, a chunk at a time.

    Products run in the dtype of ``hidden`` (``_heads.product_dtype`` names the exceptions), softmax arithmetic and the
    accumulation of weight gradients in float32, or float64 if ``hidden`` is. Under autocast pass the hidden states in
    the dtype wanted: autocast itself is switched off inside. Where no gradient is asked for none is computed. Gradients
    reach ``hidden``, ``head.weight`` and ``head.bias``; the teacher and the reference student get none. Differentiating
    twice raises ``RuntimeError``.

    Args:
        hidden: [positions, hidden], the student's states right before its output head.
        head: the student's output head.
        labels: [positions] int64, already shifted; rows with ``IGNORE_INDEX`` are dropped before any product.
        signal: the teacher's word on each row of ``hidden``, or None for plain cross-entropy.
        kd_alpha: weight of the KD term in [0, 1], where there is a signal.
        kd_temperature: T of teacher and student alike.
        reference: hidden states and head of the frozen student, aligned with ``hidden``, or None for no L2 term.
        l2_gamma: weight of the L2 term.
        chunk_tokens: positions per chunk; None chooses ``CHUNK_BYTES`` worth. The result does not depend on it.

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
    if chunk_tokens is None:
        chunk_tokens = max(MIN_CHUNK_TOKENS, CHUNK_BYTES // (4 * head.vocab_size))
    elif chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, got {chunk_tokens}")
    job = _Job(
        head=head,
        labels=labels,
        signal=signal,
        kd_alpha=kd_alpha,
        kd_temperature=kd_temperature,
        reference=reference,
        l2_gamma=l2_gamma,
        chunk_tokens=chunk_tokens,
    )
    parameters = (hidden, head.weight, head.bias)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in parameters):
        loss, ce, kd, l2 = _FusedLoss.apply(*parameters, job)  # type: ignore[no-untyped-call]
    else:
        loss, ce, kd, l2 = _compute(job, hidden, (False, False, False)).sums
    labelled = labels != IGNORE_INDEX
    has_signal = torch.zeros_like(labelled) if signal is None else labelled
    if isinstance(signal, (LogitsSignal, SparseSignal)):
        has_signal = labelled & signal.mask
    return LossOutput(loss, ce, kd, l2, num_positions=int(labelled.sum()), num_signal=int(has_signal.sum()))


@dataclass(frozen=True)
class _Job:
    """One call's arguments but for the hidden states, which autograd must see by themselves."""

    head: OutputHead
    labels: Tensor
    signal: Signal | None
    kd_alpha: float
    kd_temperature: float
    reference: DenseSignal | None
    l2_gamma: float
    chunk_tokens: int


@dataclass(frozen=True)
class _Result:
    """``sums``: loss, ce, kd, l2; ``gradients``: of hidden, weight and bias, None where not wanted."""

    sums: tuple[Tensor, Tensor, Tensor, Tensor]
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None]


class _FusedLoss(torch.autograd.Function):
    """Computes the gradients in ``forward``, scales them in ``backward``."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, job: _Job
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        result = _compute(job, hidden, ctx.needs_input_grad[:3])
        ctx.save_for_backward(*result.gradients)
        ctx.mark_non_differentiable(*result.sums[1:])
        ctx.set_materialize_grads(False)
        return result.sums

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("fused_loss cannot be differentiated twice (create_graph=True): use reference_loss")
        if grad_output is None:
            return None, None, None, None
        gradients = ctx.saved_tensors
        if _graph_is_kept():
            return *(None if gradient is None else gradient * grad_output for gradient in gradients), None
        # Nobody can ask for these again, so the largest of them, [vocab, hidden], need not be copied to be scaled.
        if grad_output.device.type != "cpu" or grad_output.item() != 1.0:
            for gradient in gradients:
                if gradient is not None:
                    gradient.mul_(grad_output)
        return *gradients, None


def _graph_is_kept() -> bool:
    """Whether the running backward pass was started with ``retain_graph=True``; yes where torch does not say."""
    query = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if query is None else bool(query())


def _compute(job: _Job, hidden: Tensor, wanted: tuple[bool, bool, bool]) -> _Result:
    """Value and wanted gradients (hidden, weight, bias) of the loss."""
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        return _compute_by_chunks(job, hidden, wanted)


def _compute_by_chunks(job: _Job, hidden: Tensor, wanted: tuple[bool, bool, bool]) -> _Result:
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    rows = LabelledRows(job.labels)
    chunk_tokens = min(job.chunk_tokens, max(1, rows.count))
    vocab_size = job.head.vocab_size
    slice_tokens = max(1, _SLICE_ELEMENTS // vocab_size) if hidden.device.type == "cpu" else chunk_tokens

    student = HeadProducts(job.head, product_dtype(hidden))
    teacher = teacher_source(job.signal, rows, chunk_tokens=chunk_tokens, vocab_size=vocab_size, dtype=dtype)
    old = None if job.reference is None else DenseSource(job.reference, rows, chunk_tokens, vocab_size)
    row_loss = RowLoss(
        job.head,
        kd_alpha=job.kd_alpha,
        kd_temperature=job.kd_temperature,
        l2_gamma=job.l2_gamma,
        dtype=dtype,
        with_grad=any(wanted),
    )
    raw = hidden.new_empty(chunk_tokens, vocab_size, dtype=student.dtype)
    values = hidden.new_zeros(4, rows.count, dtype=dtype)  # loss, ce, kd, l2
    hidden_gradient = torch.zeros_like(hidden) if wanted[0] else None
    head_gradient = HeadGradient(job.head, dtype, with_weight=wanted[1], with_bias=wanted[2])

    for start in range(0, rows.count, chunk_tokens):
        stop = min(start + chunk_tokens, rows.count)
        states = rows.take(hidden, start, stop).to(student.dtype)
        logits = student.raw_logits(states, out=raw[: stop - start])
        for source in (teacher, old):
            if source is not None:
                source.load(start, stop)
        for first in range(0, stop - start, slice_tokens):
            last = min(first + slice_tokens, stop - start)
            values[:, start + first : start + last] = row_loss(
                logits[first:last],
                rows.labels[start + first : start + last],
                None if teacher is None else teacher.slice(first, last),
                None if old is None else old.slice(first, last),
            )
        if hidden_gradient is not None:
            hidden_gradient[rows.indices[start:stop]] = student.hidden_gradient(logits).to(hidden.dtype)
        head_gradient.add(logits, states)

    del raw, logits, teacher, old, row_loss  # the buffers, before the head's gradient is converted
    loss, ce, kd, l2 = values.sum(dim=1)
    return _Result((loss, ce, kd, l2), (hidden_gradient, *head_gradient.finish()))
