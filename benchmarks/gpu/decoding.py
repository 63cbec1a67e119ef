"""Part 6: stored signal decoded in threads beside steps that consume it: how much of the time steps wait for it."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from benchmarks.gpu.context import Context
from benchmarks.gpu.shapes import (
    TEMPERATURE,
    Scale,
    build_student,
    compute_dtype,
    new_optimizer,
    scale_for,
    trainer,
)

from liquid_llm.data.loader import collate
from liquid_llm.data.prefetch import Prefetcher
from liquid_llm.data.types import MicroBatch, Sample
from liquid_llm.device import prepare_allocator
from liquid_llm.identity import ModelIdentity
from liquid_llm.models.student import enable_gradient_checkpointing
from liquid_llm.signal_store.codecs import get_codec
from liquid_llm.signal_store.store import StoreWriter, open_store
from liquid_llm.teachers.stored import StoredTeacher

WORKERS = (1, 2, 4)
STEPS = 8
_SPREAD = 3.5
_DECODED_PER_SECOND = 159_000  # tokens a core, measured on a CPU with codec tail


def run(context: Context) -> None:
    prepare_allocator()
    scale = scale_for(context.device)
    samples = _samples(scale)
    with context.attempt("a store of made-up signal", seconds=8.0):
        folder = str(context.folder / "store")
        _write(folder, samples, scale, context.device)
        student = build_student(scale, context.device)
        enable_gradient_checkpointing(student)
        optimizer = new_optimizer(student)
        for workers in WORKERS:
            with context.attempt(_name(workers), seconds=4.0):
                _measure(context, scale, samples, folder, workers, student, optimizer)


def _name(workers: int) -> str:
    return f"waiting for signal, {workers} thread{'s' if workers > 1 else ''}"


def _samples(scale: Scale) -> list[Sample]:
    ids = np.random.default_rng(0).integers(0, scale.vocab_size, (scale.rows, scale.time), dtype=np.int32)
    return [Sample(f"s/{number}", "math_tool", row) for number, row in enumerate(ids)]


def _write(folder: str, samples: list[Sample], scale: Scale, device: torch.device) -> None:
    """Signal of random logits; the encoder runs on the device."""
    codec = get_codec("tail")
    store = StoreWriter(folder, ModelIdentity("made-up", "0", "0"), codec, vocab_size=scale.vocab_size, layout="shards")
    torch.manual_seed(0)
    for number, sample in enumerate(samples):
        rows = len(sample.input_ids) - 1
        logits = torch.randn(rows, scale.vocab_size, device=device) * _SPREAD
        encoded = {name: tensor.cpu() for name, tensor in codec.encode(logits, number, 0).items()}
        store.write(sample, len(sample.input_ids), codec.pack(encoded))
    store.finish()


def _measure(
    context: Context,
    scale: Scale,
    samples: list[Sample],
    folder: str,
    workers: int,
    student: Any,
    optimizer: torch.optim.Optimizer,
) -> None:
    reader = open_store(folder)
    teacher = StoredTeacher(reader, strict=True)

    def fetch(_: int) -> tuple[MicroBatch, Any]:
        batch = collate("math_tool", [sample.input_ids for sample in samples], tuple(samples))
        return batch.to(context.device), teacher.prepare(batch, TEMPERATURE)

    with Prefetcher(fetch, 0, depth=2 * workers, workers=workers) as feed:

        def batches() -> Any:
            for batch, prepared in feed:
                yield batch, lambda part, positions, prepared=prepared: teacher.signal(part, prepared.part(positions))

        job = trainer(student, batches(), compute_dtype(context.device), optimizer=optimizer)
        if not context.on_gpu:
            job.step()
            context.ran(_name(workers))
            return
        for _ in range(2 * workers + 1):  # the first come ready made
            job.step()
        waited, began = feed.wait_seconds, time.perf_counter()
        for _ in range(STEPS):
            job.step()
        took = time.perf_counter() - began
        waited = feed.wait_seconds - waited
    tokens = STEPS * scale.rows * scale.time
    ahead = tokens / (workers * _DECODED_PER_SECOND)
    expected = max(0.0, ahead - (took - waited)) / took
    note = f"{tokens / took:,.0f} tokens/s"
    context.row(_name(workers), waited / took, "of the time", predicted=expected, basis="decoding on paper", note=note)
    reader.close()
