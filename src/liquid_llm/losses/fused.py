"""The distillation loss without a [positions, vocab] tensor: value and gradients chunk of positions by chunk.

chunk: positions whose logits exist at the same time; slice: the few of them whose softmax is computed at once (see
``rows``). The value needs every logit once and so do the gradients, hence both are computed in the forward pass while
a chunk's logits are there, and the backward pass only scales them by ``grad_output``: three products with the
student's head in all, as in plain training, and one with the teacher's.

``reference.py`` says what is computed; tests hold the two equal. Gradients in the forward pass are Liger Kernel's idea
(Hsu et al. 2024, arXiv 2410.10989).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from liquid_llm.data.types import IGNORE_INDEX
from liquid_llm.losses._arguments import check_arguments
from liquid_llm.losses._sources import DenseSource, LabelledRows, open_source
from liquid_llm.losses.objective import CROSS_ENTROPY, Objective
from liquid_llm.losses.plan import LossPlan, choose_plan
from liquid_llm.losses.products import HeadGradient, HeadProducts
from liquid_llm.losses.rows.opening import open_rows
from liquid_llm.losses.signals import DenseSignal, LossOutput, OutputHead, Signal


def fused_loss(
    hidden: Tensor,
    head: OutputHead,
    labels: Tensor,
    *,
    signal: Signal | None = None,
    objective: Objective = CROSS_ENTROPY,
    reference: DenseSignal | None = None,
    chunk_tokens: int | None = None,
    plan: LossPlan | None = None,
    all_labelled: bool = False,
) -> LossOutput:
    """Composite distillation loss summed over labelled positions; equal to ``reference_loss``, a chunk at a time.

    Logits, softmax arithmetic, the gradient by the logits and all sums are in float32, or float64 if ``hidden`` is.
    Products of bfloat16 hidden states (the student's, the teacher's, each for itself) take bfloat16 operands where the
    plan says "mixed" or "tiles": a float32 head is rounded for them, and so is the gradient by the logits for its own
    two products. Under autocast pass hidden states in the dtype wanted: autocast itself is switched off inside.

    Where no gradient is asked for none is computed. Gradients reach ``hidden``, ``head.weight`` and ``head.bias``; the
    teacher and the reference student get none. Differentiating twice raises ``RuntimeError``.

    Args:
        hidden: [positions, hidden], the student's states right before its output head.
        head: the student's output head.
        labels: [positions] int64, already shifted; rows with ``IGNORE_INDEX`` are dropped before any product.
        signal: what the teacher says of each row of ``hidden``, or None for plain cross-entropy.
        objective: alpha, T, gamma and the divergence.
        reference: hidden states and head of the frozen student, aligned with ``hidden``, or None for no L2 term.
        chunk_tokens: positions per chunk, instead of the plan's. The result does not depend on it.
        plan: how to go about it; None is ``choose_plan`` for the device of ``hidden``.
        all_labelled: every row has a label, as the caller knows: then nothing is gathered, and with a plan that does
            not look the host waits for the device nowhere, unless a signal does not say how many rows have a record.

    Raises:
        ValueError: arguments that do not fit together.
        UsageError: a sparse signal that holds at another temperature, or that the divergence cannot answer.
    """
    plan = plan or choose_plan(hidden.device, head.vocab_size)
    if chunk_tokens is not None:
        slice_tokens = plan.slice_tokens if plan.looks else chunk_tokens
        plan = replace(plan, chunk_tokens=chunk_tokens, slice_tokens=slice_tokens)
    check_arguments(
        hidden,
        head,
        labels,
        signal=signal,
        objective=objective,
        reference=reference,
        all_labelled=all_labelled,
        looks=plan.looks,
    )
    job = _Job(head, labels, signal, objective, reference, plan, all_labelled)
    parameters = (hidden, head.weight, head.bias)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in parameters):
        loss, ce, kd, l2, entropies = _FusedLoss.apply(*parameters, job)  # type: ignore[no-untyped-call]
    else:
        loss, ce, kd, l2, entropies = _compute(job, hidden, (False, False, False)).outputs
    num_positions, num_signal = _counts(labels, signal, all_labelled=all_labelled)
    if signal is None or objective.min_entropy is None:
        return LossOutput(loss, ce, kd, l2, num_positions, num_signal)
    distilled = LossOutput.count_distilled(entropies, objective.min_entropy)
    return LossOutput(loss, ce, kd, l2, num_positions, num_signal, entropies, distilled)


def _counts(labels: Tensor, signal: Signal | None, *, all_labelled: bool) -> tuple[int, int]:
    """How many rows have a label, and how many of those a signal."""
    labelled = None if all_labelled else labels != IGNORE_INDEX
    num_positions = labels.shape[0] if labelled is None else int(labelled.sum())
    if signal is None:
        return num_positions, 0
    if signal.mask is None:
        return num_positions, num_positions
    if labelled is not None:
        return num_positions, int((labelled & signal.mask).sum())
    return num_positions, int(signal.mask.sum()) if signal.num_signal is None else signal.num_signal


@dataclass(frozen=True)
class _Job:
    """One call's arguments but for the hidden states, which autograd must see by themselves."""

    head: OutputHead
    labels: Tensor
    signal: Signal | None
    objective: Objective
    reference: DenseSignal | None
    plan: LossPlan
    all_labelled: bool


@dataclass(frozen=True)
class _Result:
    """``outputs``: the sums loss, ce, kd, l2, and entropies; ``gradients``: of hidden, weight and bias, None where not
    wanted."""

    outputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None]


class _FusedLoss(torch.autograd.Function):
    """Computes the gradients in ``forward``, scales them in ``backward``."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, job: _Job
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        result = _compute(job, hidden, ctx.needs_input_grad[:3])
        ctx.save_for_backward(*result.gradients)
        ctx.mark_non_differentiable(*result.outputs[1:])
        ctx.set_materialize_grads(False)
        ctx.hidden_dtype, ctx.looks = hidden.dtype, job.plan.looks
        return result.outputs

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("fused_loss cannot be differentiated twice (create_graph=True): use reference_loss")
        if grad_output is None:
            return None, None, None, None
        gradients = ctx.saved_tensors
        if _graph_is_kept():
            gradients = tuple(None if gradient is None else gradient * grad_output for gradient in gradients)
        # Nobody can ask for these again, so the largest of them, [vocab, hidden], need not be copied to be scaled.
        elif not ctx.looks or grad_output.item() != 1.0:
            for gradient in gradients:
                if gradient is not None:
                    gradient.mul_(grad_output)
        hidden, weight, bias = gradients
        return None if hidden is None else hidden.to(ctx.hidden_dtype), weight, bias, None


def _graph_is_kept() -> bool:
    """Whether the running backward pass was started with ``retain_graph=True``; yes where torch does not say."""
    query = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if query is None else bool(query())


def _compute(job: _Job, hidden: Tensor, wanted: tuple[bool, bool, bool]) -> _Result:
    """Value and wanted gradients (of hidden, weight and bias) of the loss; that of ``hidden`` is still float32."""
    rows = LabelledRows(job.labels, all_labelled=job.all_labelled)
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        student = HeadProducts(job.head, hidden.dtype, job.plan.product)
        hidden_gradient = None
        if wanted[0]:
            make = torch.empty_like if rows.indices is None else torch.zeros_like
            hidden_gradient = make(hidden, dtype=student.dtype, memory_format=torch.contiguous_format)
        head_gradient = HeadGradient(student, with_weight=wanted[1], with_bias=wanted[2])
        values = _run_chunks(job, hidden, rows, student, hidden_gradient, head_gradient if any(wanted[1:]) else None)
        loss, ce, kd, l2 = values[:4].sum(dim=1)
        # The chunks' buffers are gone before the head's gradient is converted.
        return _Result((loss, ce, kd, l2, values[4]), (hidden_gradient, *head_gradient.finish()))


def _run_chunks(
    job: _Job,
    hidden: Tensor,
    rows: LabelledRows,
    student: HeadProducts,
    hidden_gradient: Tensor | None,
    head_gradient: HeadGradient | None,
) -> Tensor:
    """Loss, CE, KL, L2 and entropy of each labelled row [5, rows]; the gradients given are filled."""
    plan, dtype = job.plan, student.dtype
    with_grad = hidden_gradient is not None or head_gradient is not None
    vocab_size = job.head.vocab_size
    teacher = open_source(job.signal, rows, vocab_size, plan, dtype)
    old = None if job.reference is None else DenseSource(job.reference, rows, vocab_size, plan)
    row_loss = open_rows(
        plan, job.head, job.objective, has_signal=job.signal is not None, dtype=dtype, with_grad=with_grad
    )
    raw = hidden.new_empty(min(plan.chunk_tokens, rows.count), vocab_size, dtype=dtype)
    values = hidden.new_empty(5, rows.count, dtype=dtype)
    for start in plan.starts(0, rows.count, plan.chunk_tokens):
        stop = min(start + plan.chunk_tokens, rows.count)
        states = rows.take(hidden, start, stop).to(student.operand_dtype)
        logits = student.raw_logits(states, out=raw[: stop - start])
        for source in (teacher, old):
            if isinstance(source, DenseSource):
                source.load(start, stop)
        # The gradient goes where the products take it from, unless a bias wants it as it is.
        narrow = (
            student.operand_space(logits) if with_grad and not (head_gradient and head_gradient.with_bias) else None
        )
        for first in plan.starts(start, stop, plan.slice_tokens):
            last = min(first + plan.slice_tokens, stop)
            values[:, first:last] = row_loss(
                logits[first - start : last - start],
                rows.labels[first:last],
                None if teacher is None else teacher.slice(first, last),
                None if old is None else old.slice(first, last),
                None if narrow is None else narrow[first - start : last - start],
            )
        if not with_grad:
            continue
        # What were the chunk's logits is now the gradient with respect to them, if it lies nowhere else.
        operand = student.operand(logits) if narrow is None else narrow
        if hidden_gradient is not None:
            rows.put(student.hidden_gradient(operand), hidden_gradient, start, stop)
        if head_gradient is not None:
            head_gradient.add(logits, operand, states)
    return values
