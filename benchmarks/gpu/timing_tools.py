"""Seconds of work on a device, and arithmetic on how long it must take at least."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from benchmarks.gpu.context import Context

WARM_UP, TIMED = 3, 8


def seconds(work: Callable[[], object], device: torch.device, *, warm_up: int = WARM_UP, timed: int = TIMED) -> float:
    """Median seconds of ``work``, by the device's own clock where it has one."""
    for _ in range(warm_up):
        work()
    if device.type != "cuda":
        return statistics.median(_wall(work) for _ in range(timed))
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(timed)]
    torch.cuda.synchronize()
    for begin, end in pairs:
        begin.record()
        work()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) / 1e3 for begin, end in pairs)


def _wall(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def matrix_parameters(model: Any) -> int:
    """Parameters that are multiplied with every token, but for the output head: all matrices less the embedding."""
    head = model.get_output_embeddings().weight
    embedding = model.get_input_embeddings().weight
    left = {id(head), id(embedding)}
    return sum(p.numel() for p in model.parameters() if p.dim() >= 2 and id(p) not in left)


def rate(context: Context, name: str) -> float | None:
    """Operations a second that the session measured for a product of this kind."""
    found = context.found("ceilings", name)
    return None if found is None else found * 1e12


def at_rate(operations: float, per_second: float | None) -> float | None:
    """Seconds that ``operations`` take at a measured rate; None where none was measured."""
    return None if per_second is None else operations / per_second
