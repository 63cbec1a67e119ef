"""A student's whole step, cross-entropy alone, beside transformers' Trainer with and without Liger's kernels.

A student of Llama's shape, which Liger has kernels for, and the session's blocks of tokens. The Trainer runs its own
loop; a step is what lies between two of its ``on_step_end``.
"""

from __future__ import annotations

import importlib.util
import time
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from benchmarks.gpu.context import Context
from benchmarks.gpu.memory import set_cap
from benchmarks.gpu.shapes import FULL, Scale, build_student, compute_dtype, endless, lm_batch, scale_for, trainer
from benchmarks.gpu.timing_tools import TIMED, WARM_UP, seconds
from benchmarks.speed.rivals import collate, training_arguments

OURS, PLAIN, LIGER = "this project", "transformers Trainer", "transformers Trainer with Liger"


def run(context: Context) -> None:
    """Rows for each, and how many times as long the others take."""
    scale = scale_for(context.device)
    scale = replace(scale, student="llama-135m" if scale is FULL else "llama-test")
    if context.on_gpu:
        set_cap(None)
    found: dict[str, float] = {}
    for name in (OURS, PLAIN, LIGER):
        row = f"step of a Llama-shaped student, CE: {name}"
        if name == LIGER and importlib.util.find_spec("liger_kernel") is None:
            context.skip(row, "liger-kernel is not installed")
            continue
        if name == LIGER and not context.on_gpu:
            context.skip(row)
            continue
        with context.attempt(row, seconds=8.0):
            took = _ours(context, scale) if name == OURS else _theirs(context, scale, liger=name == LIGER)
            if not context.on_gpu:
                context.ran(row)
                continue
            found[name] = took
            times = f"{took / found[OURS]:.2f} times ours" if name != OURS and OURS in found else ""
            context.row(row, 1e3 * took, "ms", note=times)
    for name in (PLAIN, LIGER):
        if name in found and OURS in found:
            context.row(f"{name} / this project", found[name] / found[OURS], "times", note="asked for: at least 1.2")


def _ours(context: Context, scale: Scale) -> float:
    student = build_student(scale, context.device)
    batches = endless(lm_batch(scale, context.device), None)
    job = trainer(student, batches, compute_dtype(context.device))
    if not context.on_gpu:
        job.step()
        return 0.0
    return seconds(job.step, context.device)


def _theirs(context: Context, scale: Scale, *, liger: bool) -> float:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    on_cpu = not context.on_gpu  # it knows no pretended device
    device = torch.device("cpu") if on_cpu else context.device
    blocks = lm_batch(scale, torch.device("cpu")).input_ids.tolist()
    moments: list[float] = []

    class Note(TrainerCallback):  # type: ignore[misc]
        """When each step ended."""

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if not on_cpu:
                torch.cuda.synchronize()
            moments.append(time.perf_counter())

    arguments = training_arguments(
        str(context.folder / f"trainer-{liger}"), batch_size=scale.rows, bf16=not on_cpu, on_cpu=on_cpu, liger=liger
    )
    steps = 2 if on_cpu else WARM_UP + TIMED
    Trainer(
        build_student(scale, device),
        TrainingArguments(max_steps=steps, **arguments),
        train_dataset=[{"input_ids": block} for block in blocks],
        data_collator=collate,
        callbacks=[Note()],
    ).train()
    return median(later - sooner for sooner, later in zip(moments[-TIMED - 1 :], moments[-TIMED:], strict=False))
