"""The shapes of training whose memory is predicted and measured."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import torch
from benchmarks.gpu.shapes import SLOTS, TEMPERATURE, Scale, compute_dtype, student_config, teacher_config

from liquid_llm.losses.rows.choice import expect_rows
from liquid_llm.memory.shapes import BatchShape, CaptureShape, ModelShape, TrainingShape

# Peak GiB at the reference's shape of an earlier version, with a loss chunk of 96 MiB; for orientation.
EARLIER = {
    "B=8 online, checkpointed, L2": 14.8,
    "B=16 online, checkpointed, L2": 15.5,
    "B=8 online": 21.7,
    "B=8 online, L2": 23.3,
    "B=8 stored, L2": 23.1,
    "B=4 online, L2": 18.6,
}


@dataclass(frozen=True)
class Case:
    """One way to train."""

    rows: int
    stored: bool
    checkpointed: bool
    reference: bool

    @property
    def name(self) -> str:
        words = ["stored" if self.stored else "online"]
        words += ["checkpointed"] * self.checkpointed + ["L2"] * self.reference
        return f"B={self.rows} {', '.join(words)}"


def training_cases(scale: Scale) -> list[Case]:
    """All of them, the reference's own number of rows first."""
    rows = (scale.rows, 2 * scale.rows, scale.rows // 2)
    return [Case(*values) for values in product(rows, (False, True), (True, False), (True, False))]


def training_shape(case: Case, scale: Scale, device: torch.device) -> TrainingShape:
    """What the model of memory is asked about a case."""
    signal = BatchShape(case.rows, scale.time, "sparse", SLOTS) if case.stored else None
    dtype = compute_dtype(device)
    return TrainingShape(
        student=ModelShape.of(student_config(scale)),
        compute_dtype=str(dtype).removeprefix("torch."),
        vocab_size=scale.vocab_size,
        batches=(signal or BatchShape(case.rows, scale.time, "dense"),),
        teacher=ModelShape.of(teacher_config(scale.teacher, scale.vocab_size), dtype),
        reference=case.reference,
        grad_checkpoint=case.checkpointed,
        temperature=TEMPERATURE,
        device=device.type,
        loss_rows=expect_rows(device.type),
    )


def capture_shape(rows: int, time: int, scale: Scale, device: torch.device) -> CaptureShape:
    """What the model of memory is asked about a capture with codec ``tail``."""
    teacher = ModelShape.of(teacher_config(scale.big_teacher, scale.vocab_size), compute_dtype(device))
    return CaptureShape(teacher, rows, time, scale.vocab_size, device=device.type)


def capture_name(rows: int, time: int) -> str:
    return f"peak of capture, {rows} x {time}"
