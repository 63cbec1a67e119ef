"""Part 4: loss and step beside what others would use instead, where their packages are there: time and peak memory.

All get the same hidden states, heads and labels, in bfloat16 on a GPU. "KD" is the divergence alone, "CE" the
cross-entropy alone, "KD+CE" both in one pass. Out of memory is a result.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from benchmarks.gpu import rivals
from benchmarks.gpu.context import Context
from benchmarks.gpu.memory import set_cap
from benchmarks.gpu.shapes import (
    ALPHA,
    CAP_BYTES,
    GIB,
    TEMPERATURE,
    compute_dtype,
    scale_for,
    sparse_signal,
)
from benchmarks.gpu.timing_tools import seconds
from torch import Tensor
from torch.nn import functional as F

from liquid_llm.device import prepare_allocator, release_memory
from liquid_llm.losses.fused import fused_loss
from liquid_llm.losses.objective import Objective
from liquid_llm.losses.signals import DenseSignal, OutputHead, Signal

_SPREAD = 3.0  # standard deviation of logits


class Inputs:
    """Hidden states [positions, hidden] of a student and a teacher, their heads, and labels."""

    def __init__(self, context: Context) -> None:
        scale, device, dtype = scale_for(context.device), context.device, compute_dtype(context.device)
        self.positions = scale.rows * scale.time
        widths = build_student_width(scale), scale.teacher["hidden_size"]
        torch.manual_seed(0)

        def normal(rows: int, columns: int, spread: float) -> Tensor:
            return (torch.randn(rows, columns, device=device) * spread).to(dtype)

        self.hidden = normal(self.positions, widths[0], _SPREAD).requires_grad_()
        self.weight = normal(scale.vocab_size, widths[0], widths[0] ** -0.5).requires_grad_()
        self.teacher_hidden = normal(self.positions, widths[1], _SPREAD)
        self.teacher_weight = normal(scale.vocab_size, widths[1], widths[1] ** -0.5)
        self.labels = torch.randint(scale.vocab_size, (self.positions,), device=device)
        self.dense = DenseSignal(self.teacher_hidden, OutputHead(self.teacher_weight))
        self.sparse = sparse_signal(self.positions, scale.vocab_size, device)

    def step(self, loss: Callable[[Inputs], Tensor]) -> None:
        """Forward and backward; gradients are dropped."""
        self.hidden.grad = self.weight.grad = None
        loss(self).backward()  # type: ignore[no-untyped-call]


def build_student_width(scale: Any) -> int:
    from benchmarks.gpu.shapes import student_config

    return int(student_config(scale).hidden_size)


def run(context: Context) -> None:
    prepare_allocator()
    data = Inputs(context)
    if context.on_gpu:
        set_cap(CAP_BYTES)
    first: dict[str, float] = {}
    for name, loss in contestants(context).items():
        with context.attempt(name, seconds=35.0 if " compiled" in name and context.on_gpu else 2.5):
            _one(context, data, name, loss, first)
            data.hidden.grad = data.weight.grad = None
    del data
    rivals.run(context)


def _one(context: Context, data: Inputs, name: str, loss: Callable[[Inputs], Tensor], first: dict[str, float]) -> None:
    value = float(loss(data).detach())
    if not context.on_gpu:
        data.step(loss)
        context.ran(name)
        return
    kind = name.split(":")[0]
    data.hidden.grad = data.weight.grad = None
    release_memory(context.device)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    data.step(loss)
    peak = (torch.cuda.max_memory_allocated() - before) / GIB
    took = seconds(lambda: data.step(loss), context.device)
    ours = first.setdefault(kind, took)
    memory = f"peak {peak:.2f} GiB above inputs"
    beside = "" if took is ours else f"; {took / ours:.2f} times ours"
    context.row(name, 1e3 * took, "ms", note=f"{memory}; value {value:.6g}{beside}", more={"peak_gib": peak})


def contestants(context: Context) -> dict[str, Callable[[Inputs], Tensor]]:
    """By name; the first of each kind (before the colon) is this project's."""
    found: dict[str, Callable[[Inputs], Tensor]] = {
        "KD+CE: fused_loss, T=2": lambda data: _fused(data, data.dense, ALPHA),
        "KD: fused_loss, T=2": lambda data: _fused(data, data.dense, 1.0) / TEMPERATURE**2,
        "CE: fused_loss": lambda data: _fused(data, None, 0.0),
        "KD+CE stored: fused_loss, T=2": lambda data: _fused(data, data.sparse, ALPHA),
        "KD+CE: plain logits + kl_div, T=2": _plain_kd,
        "CE: plain logits": _plain_ce,
    }
    for name, load in (("TRL", _trl), ("Liger", _liger)):
        try:
            found |= load()
        except Exception as error:  # noqa: BLE001  # another project's import may fail in any way
            context.skip(name, f"{type(error).__name__}: {str(error)[:120]}")
    return found


def _fused(data: Inputs, signal: Signal | None, alpha: float) -> Tensor:
    return fused_loss(
        data.hidden,
        OutputHead(data.weight),
        data.labels,
        signal=signal,
        objective=Objective(alpha, TEMPERATURE),
        all_labelled=True,
    ).loss


def _plain_ce(data: Inputs) -> Tensor:
    return F.cross_entropy(F.linear(data.hidden, data.weight).float(), data.labels, reduction="sum")


def _plain_kd(data: Inputs) -> Tensor:
    logits = F.linear(data.hidden, data.weight).float()
    with torch.no_grad():
        teacher = torch.log_softmax(F.linear(data.teacher_hidden, data.teacher_weight).float() / TEMPERATURE, dim=-1)
    student = torch.log_softmax(logits / TEMPERATURE, dim=-1)
    kd = F.kl_div(student, teacher, reduction="sum", log_target=True) * TEMPERATURE**2
    return ALPHA * kd + (1 - ALPHA) * F.cross_entropy(logits, data.labels, reduction="sum")


def _trl() -> dict[str, Callable[[Inputs], Tensor]]:
    """TRL's chunked divergence; its package is opened file by file: its ``__init__`` wants libraries of its own."""
    spec = importlib.util.find_spec("trl")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("trl is not installed")
    folder = next(iter(spec.submodule_search_locations))
    for name, path in (("trl", folder), ("trl.kernels", f"{folder}/kernels"), ("trl.trainer", f"{folder}/trainer")):
        package = types.ModuleType(name)
        package.__path__ = [path]
        sys.modules[name] = package
    tools: Any = types.ModuleType("trl.trainer.utils")
    tools.maybe_gather_lm_head_ctx = lambda *_: contextlib.nullcontext()  # for ZeRO 3, which nothing here uses
    sys.modules["trl.trainer.utils"] = tools
    divergence = importlib.import_module("trl.kernels.chunked_divergence").ChunkedDivergenceFunction

    def kd(data: Inputs) -> Tensor:
        found, _ = divergence.apply(
            data.hidden, data.weight, None, data.teacher_hidden, data.teacher_weight, None, 0.0, TEMPERATURE
        )
        return found.sum()  # type: ignore[no-any-return]

    return {"KD: TRL chunked divergence, T=2": kd}


def _liger() -> dict[str, Callable[[Inputs], Tensor]]:
    """Liger's fused cross-entropy, its fused divergence, and its chunked distillation loss."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

    ce = LigerFusedLinearCrossEntropyLoss(reduction="sum")
    jsd = LigerFusedLinearJSD(jsd_beta=0.0, temperature=TEMPERATURE)
    both = LigerFusedLinearJSDLoss(
        weight_hard_loss=1 - ALPHA, weight_soft_loss=ALPHA, beta=0.0, temperature=TEMPERATURE, compiled=False
    )
    compiled = LigerFusedLinearJSDLoss(
        weight_hard_loss=1 - ALPHA, weight_soft_loss=ALPHA, beta=0.0, temperature=TEMPERATURE, compiled=True
    )

    def divergence(data: Inputs) -> Tensor:
        return jsd(data.hidden, data.weight, data.teacher_hidden, data.teacher_weight, None) * data.positions

    def distillation(module: Any) -> Callable[[Inputs], Tensor]:
        return lambda data: module(data.hidden, data.weight, data.teacher_hidden, data.teacher_weight, data.labels)

    return {
        "CE: Liger fused linear": lambda data: ce(data.weight, data.hidden, data.labels),
        "KD: Liger fused linear JSD, beta 0, T=2": divergence,
        "KD+CE: Liger chunked, mean, eager, T=2": distillation(both),
        "KD+CE: Liger chunked, mean, compiled, T=2": distillation(compiled),
    }
