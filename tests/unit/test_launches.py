"""How many kernels a step launches, counted on the pretend accelerator: no more than when this was written.

A launch costs the host tens of microseconds in eager code, so a student of small layers waits for it and not for the
card. Students of two layers in bfloat16, a teacher of two; the loss in its eager form, in one chunk.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from benchmarks.gpu.shapes import (
    TINY,
    build_student,
    build_teacher,
    endless,
    lm_batch,
    online_signal,
    sparse_signal,
    stored_signal,
    trainer,
)
from tests.support.accelerator import install

KINDS = ("cross-entropy", "stored", "online")

# student -> launches of a step of one micro-batch for each kind, 19 of them for clipping and update
MOST = {"llama-test": (388, 424, 511), "liquid-test": (399, 435, 522), "gpt2-test": (313, 349, 436)}


@pytest.mark.parametrize("student", MOST)
def test_a_step_launches_no_more_than_it_did(student: str) -> None:
    accelerator, scale = install(), replace(TINY, student=student)
    device = accelerator.device
    teacher, batch = build_teacher(scale.teacher, scale, device), lm_batch(scale, device)
    stored = sparse_signal(batch.num_positions, scale.vocab_size, device)
    for kind, limit in zip(KINDS, MOST[student], strict=True):
        signal = {"cross-entropy": None, "stored": stored_signal(stored), "online": online_signal(teacher)}[kind]
        found = []
        for grad_accum in (1, 2):
            job = trainer(build_student(scale, device), endless(batch, signal), torch.bfloat16)
            job.grad_accum = grad_accum
            job.step()
            with accelerator.record() as log:
                job.step()
            assert log.count("wait") == 1
            found.append(log.count("launch"))
        assert found[0] <= limit, kind
        assert found[1] <= 2 * limit + 1, kind
