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
from liquid_llm.losses._heads import HeadGradient, HeadProducts, choose_product_dtype
from liquid_llm.losses._rows import RowLoss, SparseRows
from liquid_llm.losses._sources import DenseSource, LabelledRows, LogitsSource, SparseSource, TeacherSource
from liquid_llm.losses.signals import DenseSignal, LogitsSignal, LossOutput, OutputHead, Signal, SparseSignal

_CHUNK_BYTES = 96 << 20  # of one chunk's logits in float32
_MIN_CHUNK_TOKENS, _MAX_CPU_CHUNK_TOKENS = 16, 384  # a CPU's products are no faster on more rows
_SLICE_ELEMENTS = 1 << 20  # 4 MiB of float32 on a CPU; elsewhere a chunk is one slice


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
    product_dtype: torch.dtype | None = None,
) -> LossOutput:
    """Composite distillation loss summed over labelled positions; equal to ``reference_loss``, a chunk at a time.

    Softmax arithmetic and the accumulation of weight gradients are in float32, or float64 if ``hidden`` is. Under
    autocast pass hidden states in the dtype wanted: autocast itself is switched off inside. Where no gradient is asked
    for none is computed. Gradients reach ``hidden``, ``head.weight`` and ``head.bias``; the teacher and the reference
    student get none. Differentiating twice raises ``RuntimeError``.

    Args:
        hidden: [positions, hidden], the student's states right before its output head.
        head: the student's output head.
        labels: [positions] int64, already shifted; rows with ``IGNORE_INDEX`` are dropped before any product.
        signal: the teacher's word on each row of ``hidden``, or None for plain cross-entropy.
        kd_alpha: weight of the KD term in [0, 1], where there is a signal.
        kd_temperature: T of teacher and student alike.
        reference: hidden states and head of the frozen student, aligned with ``hidden``, or None for no L2 term.
        l2_gamma: weight of the L2 term.
        chunk_tokens: positions per chunk; None chooses. The result does not depend on it.
        product_dtype: of matrix products; None is the dtype of the hidden states multiplied, but for the exceptions in
            ``_heads.choose_product_dtype``.

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
        chunk_tokens = choose_chunk_tokens(head.vocab_size, hidden.device)
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
        product_dtype=product_dtype,
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


def choose_chunk_tokens(vocab_size: int, device: torch.device) -> int:
    """Positions per chunk: enough for products at full speed, logits of at most about 96 MiB in float32."""
    fitting = max(_MIN_CHUNK_TOKENS, _CHUNK_BYTES // (4 * vocab_size))
    return min(fitting, _MAX_CPU_CHUNK_TOKENS) if device.type == "cpu" else fitting


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
    product_dtype: torch.dtype | None

    def products(self, hidden: Tensor) -> torch.dtype:
        return self.product_dtype or choose_product_dtype(hidden)


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
    """Value and wanted gradients (of hidden, weight and bias) of the loss."""
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    hidden_gradient = torch.zeros_like(hidden) if wanted[0] else None
    head_gradient = HeadGradient(job.head, dtype, with_weight=wanted[1], with_bias=wanted[2])
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        loss, ce, kd, l2 = _run_chunks(job, hidden, dtype, hidden_gradient, head_gradient if any(wanted[1:]) else None)
        # The chunks' buffers are gone before the head's gradient is converted.
        return _Result((loss, ce, kd, l2), (hidden_gradient, *head_gradient.finish()))


def _run_chunks(
    job: _Job, hidden: Tensor, dtype: torch.dtype, hidden_gradient: Tensor | None, head_gradient: HeadGradient | None
) -> Tensor:
    """Sums [4] of loss, CE, KL and L2; the gradients given are filled."""
    rows = LabelledRows(job.labels)
    vocab_size = job.head.vocab_size
    slice_tokens = max(1, _SLICE_ELEMENTS // vocab_size) if hidden.device.type == "cpu" else job.chunk_tokens
    student = HeadProducts(job.head, job.products(hidden))
    teacher = _source(job, job.signal, rows, dtype)
    old = None if job.reference is None else _dense_source(job, job.reference, rows)
    row_loss = RowLoss(
        job.head,
        kd_alpha=job.kd_alpha,
        kd_temperature=job.kd_temperature,
        l2_gamma=job.l2_gamma,
        dtype=dtype,
        with_grad=hidden_gradient is not None or head_gradient is not None,
    )
    raw = hidden.new_empty(min(job.chunk_tokens, rows.count), vocab_size, dtype=student.dtype)
    values = hidden.new_empty(4, rows.count, dtype=dtype)
    for start in range(0, rows.count, job.chunk_tokens):
        stop = min(start + job.chunk_tokens, rows.count)
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
        # What were the chunk's logits is now the gradient with respect to them.
        if hidden_gradient is not None:
            hidden_gradient[rows.indices[start:stop]] = student.hidden_gradient(logits).to(hidden.dtype)
        if head_gradient is not None:
            head_gradient.add(logits, states)
    return values.sum(dim=1)


def _dense_source(job: _Job, signal: DenseSignal, rows: LabelledRows) -> DenseSource:
    return DenseSource(
        signal,
        rows,
        chunk_tokens=job.chunk_tokens,
        vocab_size=job.head.vocab_size,
        product_dtype=job.products(signal.hidden),
    )


def _source(job: _Job, signal: Signal | None, rows: LabelledRows, dtype: torch.dtype) -> TeacherSource | None:
    """Where the teacher's rows come from, its vocabulary cut to the student's; None without a signal."""
    if signal is None:
        return None
    if isinstance(signal, DenseSignal):
        return _dense_source(job, signal, rows)
    if isinstance(signal, LogitsSignal):
        return LogitsSource(signal, rows, job.head.vocab_size)
    return SparseSource(SparseRows.of(signal, rows.indices, dtype))
