"""What shapes alone say of the memory that parts measure; made on the CPU beside them."""

from __future__ import annotations

import subprocess

import torch
from benchmarks.gpu.cases import capture_name, capture_shape, training_cases, training_shape
from benchmarks.gpu.context import Context
from benchmarks.gpu.shapes import FULL, GIB, TINY

from liquid_llm.memory.training import work_out_training

BASIS = "worked out from shapes"
CAPTURES = ((16, 1024), (88, 180))


def run(context: Context) -> None:
    # This process is kept off the card, so another way to ask whether there is one.
    device = torch.device("cuda") if _has_gpu() else context.device
    scale = FULL if device.type == "cuda" else TINY
    cases = training_cases(scale)
    for case in cases if scale is FULL else cases[:8]:
        found = work_out_training(training_shape(case, scale, device))
        context.recorder.predict("memory", case.name, found.peak_bytes / GIB, BASIS)
    if device.type == "cuda":
        from liquid_llm.memory.capture import work_out_capture

        for rows, time in CAPTURES:
            found = work_out_capture(capture_shape(rows, time, scale, device))
            context.recorder.predict("capturing", capture_name(rows, time), found.peak_bytes / GIB, BASIS)


def _has_gpu() -> bool:
    try:
        return subprocess.run(["nvidia-smi", "-L"], capture_output=True, timeout=30, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False
