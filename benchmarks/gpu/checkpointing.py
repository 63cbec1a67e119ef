"""Part 7: how long a checkpoint stops training, and what is done behind it: hashing, writing, forcing to disk."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from benchmarks.gpu.context import Context
from benchmarks.gpu.shapes import (
    GIB,
    build_student,
    compute_dtype,
    endless,
    lm_batch,
    new_optimizer,
    scale_for,
    trainer,
)

from liquid_llm.checkpoint.copies import HostCopies, block_sizes
from liquid_llm.checkpoint.files import write_archive
from liquid_llm.runtime import random_state

_PAPER_BYTES_PER_SECOND = {"to the host": 10e9, "hashing": 1.5e9, "written and hashed": 1.0e9, "forced to disk": 0.24e9}


def run(context: Context) -> None:
    scale = scale_for(context.device)
    student = build_student(scale, context.device)
    optimizer = new_optimizer(student)
    batch = lm_batch(scale, context.device, rows=1)
    trainer(student, endless(batch, None), compute_dtype(context.device), optimizer=optimizer).step()  # makes moments
    state = {"student": student.state_dict(), "optimizer": optimizer.state_dict(), "random": random_state()}
    num_bytes = sum(tensor.nbytes for tensor in _tensors(state))
    context.row("state", num_bytes / GIB, "GiB", note=f"{sum(p.numel() for p in student.parameters()) / 1e6:.0f}M")

    def piece(name: str, work: Callable[[], object]) -> object:
        with context.attempt(name, seconds=8.0 if context.on_gpu else 0.0):
            began = time.perf_counter()
            result = work()
            if context.on_gpu:
                torch.cuda.synchronize()
            if not context.on_gpu:
                context.ran(name)
                return result
            took = time.perf_counter() - began
            paper = num_bytes / _PAPER_BYTES_PER_SECOND[name] if name in _PAPER_BYTES_PER_SECOND else None
            note = f"{num_bytes / took / 1e9:.2f} GB/s"
            context.row(name, took, "s", predicted=paper, basis="on paper" if paper else "", note=note)
            return result
        return None

    host = piece("to the host", lambda: _copied(state)) or state
    piece("hashing", lambda: _hashed(host))
    path = context.folder / "state.pt"
    piece("written and hashed", lambda: write_archive(path, host))  # type: ignore[arg-type]
    piece("forced to disk", lambda: _forced(path))
    path.unlink(missing_ok=True)
    copies = HostCopies(context.device)
    piece("pinned memory taken, once", lambda: copies.prepare(block_sizes(state)))
    piece("a save stops training", lambda: copies.copy(state))
    whole = context.folder / "whole.pt"
    piece("all of it, from the device", lambda: (write_archive(whole, state), _forced(whole)))
    whole.unlink(missing_ok=True)


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        return [tensor for one in value.values() for tensor in _tensors(one)]
    if isinstance(value, (list, tuple)):
        return [tensor for one in value for tensor in _tensors(one)]
    return []


def _copied(value: Any) -> Any:
    """The same with every tensor in memory of the host."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().clone() if value.device.type == "cpu" else value.detach().cpu()
    if isinstance(value, dict):
        return {key: _copied(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_copied(one) for one in value)
    return value


def _hashed(state: Any) -> str:
    digest = hashlib.sha256()
    for tensor in _tensors(state):
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _forced(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
