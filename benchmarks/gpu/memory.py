"""Part 2: the memory that training takes at the reference's shape, under what a 24 GB card gives, and as predicted.

A case that does not fit under the cap is measured again without it: whether that was foreseen is the question.
"""

from __future__ import annotations

from typing import Any

import torch
from benchmarks.gpu.cases import EARLIER, Case, training_cases
from benchmarks.gpu.context import Context
from benchmarks.gpu.results import NO_ROOM
from benchmarks.gpu.shapes import (
    CAP_BYTES,
    GIB,
    build_student,
    build_teacher,
    compute_dtype,
    endless,
    lm_batch,
    new_optimizer,
    online_signal,
    scale_for,
    sparse_signal,
    stored_signal,
    trainer,
)

from liquid_llm.device import is_out_of_memory, prepare_allocator, release_memory
from liquid_llm.errors import DeviceError
from liquid_llm.models.student import enable_gradient_checkpointing

WITHIN = 0.05
STEPS = 3  # the first makes the moments; the last is measured


def run(context: Context) -> None:
    prepare_allocator()
    if context.on_gpu and not _cap_holds():
        torch.cuda.memory._set_allocator_settings("expandable_segments:False")
        context.row(
            "the cap", note="has no effect on expandable segments: they are off here" if _cap_holds() else "no effect"
        )
    rig = Rig(context)
    cases = training_cases(rig.scale)
    for case in cases if context.on_gpu else cases[:8]:
        with context.attempt(case.name, seconds=2.5):
            _measure(context, rig, case)


class Rig:
    """Models that all cases share."""

    def __init__(self, context: Context) -> None:
        self.device = context.device
        self.scale = scale_for(context.device)
        self.dtype = compute_dtype(context.device)
        self.teacher = build_teacher(self.scale.teacher, self.scale, context.device)
        self.student = build_student(self.scale, context.device)
        self.optimizer = new_optimizer(self.student)

    def steps(self, case: Case, reference: Any) -> None:
        """Take the steps of a case; the peak is that of the last one. An allocation that fails is raised."""
        if case.checkpointed:
            enable_gradient_checkpointing(self.student)
        else:
            self.student.gradient_checkpointing_disable()
        batch = lm_batch(self.scale, self.device, case.rows, "math_tool" if case.stored else "lm")
        if case.stored:
            signal_of = stored_signal(sparse_signal(batch.num_positions, self.scale.vocab_size, self.device))
        else:
            signal_of = online_signal(self.teacher)
        job = trainer(
            self.student, endless(batch, signal_of), self.dtype, reference=reference, optimizer=self.optimizer
        )
        for _ in range(STEPS):
            if self.device.type != "cpu":
                torch.get_device_module(self.device).reset_peak_memory_stats()
            job.step()
            if job.progress.passes.max_tokens is not None:  # it was cut to fit
                raise torch.OutOfMemoryError(f"cut to {job.progress.passes.max_tokens} tokens")


def set_cap(limit: int | None) -> None:
    """Give this process ``limit`` bytes of the card, or all of it. A setting of the process, not of the card."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(1.0 if limit is None else min(1.0, limit / total))


def _cap_holds() -> bool:
    """Whether this process is refused memory beyond the cap."""
    set_cap(CAP_BYTES)
    held: list[torch.Tensor] = []
    try:
        while len(held) * GIB < CAP_BYTES:
            held.append(torch.empty(GIB, dtype=torch.uint8, device="cuda"))
        held.append(torch.empty(GIB, dtype=torch.uint8, device="cuda"))
    except torch.OutOfMemoryError:
        return True
    finally:
        held.clear()
        torch.cuda.empty_cache()
        set_cap(None)
    return False


def _measure(context: Context, rig: Rig, case: Case) -> None:
    fits = True
    for cap in (CAP_BYTES, None):
        release_memory(rig.device)
        if context.on_gpu:
            set_cap(cap)
        reference = build_student(rig.scale, rig.device).eval().requires_grad_(False) if case.reference else None
        try:
            rig.steps(case, reference)
            break
        except (RuntimeError, DeviceError) as error:
            if cap is None or not (isinstance(error, DeviceError) or is_out_of_memory(error)):
                raise
        del reference
        rig.optimizer.zero_grad(set_to_none=True)
        fits = False
    if context.device.type == "cpu":
        context.skip(case.name)
        return
    allocated, reserved = context.counters.max_memory_allocated(), context.counters.max_memory_reserved()
    words = f"{'fits' if fits else NO_ROOM + ' under'} {CAP_BYTES / GIB:.0f} GiB; reserved {reserved / GIB:.2f}"
    if case.name in EARLIER:
        words += f"; {EARLIER[case.name]} with an earlier version"
    context.row(
        case.name,
        allocated / GIB,
        "GiB",
        within=WITHIN,
        note=words if context.on_gpu else "counted on a pretend device; not measured: no GPU",
        more={"reserved_bytes": reserved, "fits": fits},
    )
