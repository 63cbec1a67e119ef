"""Part 5: what capture costs beside the teacher's bare forward pass: an 8B teacher, long and short samples.

bare      the body alone: hidden states
+ head    and float32 logits, chunk by chunk, thrown away
+ encode  and codec ``tail`` with few draws, as capture does it, at several chunk sizes; with torch's own operations in
          the place of the kernel; and the other codecs. Packing and writing are not in it
capture   the whole job, codec ``tail`` as a new store has it: packing and writing too
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from tempfile import TemporaryDirectory

import numpy as np
import torch
from benchmarks.gpu.cases import capture_name
from benchmarks.gpu.context import Context
from benchmarks.gpu.shapes import GIB, build_teacher, scale_for
from benchmarks.gpu.timing_tools import at_rate, matrix_parameters, rate, seconds
from tests.support.teachers import ListSource

from liquid_llm.capture import scoring
from liquid_llm.capture.job import capture
from liquid_llm.capture.plan import Window
from liquid_llm.data.types import Sample
from liquid_llm.device import prepare_allocator
from liquid_llm.models.loading import LoadedModel
from liquid_llm.signal_store.codecs import get_codec, usual_codec
from liquid_llm.signal_store.store import StoreWriter
from liquid_llm.teachers.online import OnlineTeacher

CHUNK_MIB = (None, 64, 256, 1024)  # None: what capture takes
FORECAST = {"bare": "H200 measured 35,600", "encode": "H200 predicted 31,900 (27,600 and 17,700 before)"}
OTHERS = ("tail", "topk", "full", "sampled")
WITHIN = 0.05


class Samples(ListSource):
    """Made-up samples of equal length."""

    def __init__(self, count: int, length: int, vocab_size: int) -> None:
        ids = np.random.default_rng(0).integers(0, vocab_size, (count, length), dtype=np.int32)
        super().__init__(Sample(f"s/{number}", "math_tool", row) for number, row in enumerate(ids))

    def items(self) -> list[Window]:
        return [
            Window(self, number, sample.sample_id, sample.type, len(sample.input_ids))
            for number, sample in enumerate(self.samples)
        ]


def run(context: Context) -> None:
    prepare_allocator()
    scale = scale_for(context.device)
    teacher = _teacher(context)
    if teacher is None:
        return
    tokens = (16 if context.on_gpu else 2) * scale.time
    for length in (scale.time, scale.short):
        count = max(1, tokens // length // 8 * 8) if length < scale.time else tokens // length
        _samples(context, teacher, Samples(count, length, scale.vocab_size), length)


def _teacher(context: Context) -> OnlineTeacher | None:
    """The 8B teacher, or the 3B one where the card is too small for it."""
    scale = scale_for(context.device)
    for name, settings in (("8B", scale.big_teacher), ("3B", scale.teacher)):
        with context.attempt(f"teacher of {name}", seconds=5.0):
            teacher = build_teacher(settings, scale, context.device)
            size = sum(p.numel() for p in teacher.model.parameters())
            context.row(f"teacher of {name}", size / 1e9, "1e9 parameters")
            return teacher
    return None


def _samples(context: Context, teacher: OnlineTeacher, samples: Samples, length: int) -> None:
    items = samples.items()
    label = f"{len(items)} x {length}"
    tokens = len(items) * length
    ids = scoring.padded_ids([sample.input_ids for sample in samples.samples]).to(context.device)
    times: dict[str, float] = {}

    def time(name: str, work: Callable[[], object], operations: float | None = None, note: str = "") -> None:
        with context.attempt(f"{name}, {label}", seconds=3.0):
            if not context.on_gpu:
                work()
                context.ran(f"{name}, {label}")
                return
            took = times[name] = seconds(work, context.device, warm_up=1, timed=3)
            floor = None if operations is None else at_rate(operations, rate(context, "bf16"))
            bare = times.get("bare")
            share = f"{took / bare - 1:+.1%} beside bare" if bare and bare is not took else ""
            context.row(
                f"{name}, {label}",
                tokens / took,
                "tokens/s",
                predicted=None if floor is None else tokens / floor,
                basis="operations at the measured bf16 rate" if floor else "",
                note="; ".join(filter(None, [share, note])),
            )

    body = 2.0 * tokens * matrix_parameters(teacher.model)
    head = 2.0 * tokens * teacher.head.weight.numel()
    time("bare", lambda: teacher.hidden(ids), body, FORECAST["bare"])
    time("+ head", lambda: _logits(teacher, ids), body + head)
    codec = {"math_tool": get_codec("tail")}
    usual = scoring._CHUNK_BYTES, scoring._MAX_CHUNK_ROWS
    for size in CHUNK_MIB if context.on_gpu else CHUNK_MIB[:1]:
        if size is not None:
            scoring._CHUNK_BYTES, scoring._MAX_CHUNK_ROWS = size * 2**20, 2**40
        if context.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        scratch = scoring.Scratch()
        time(
            "+ encode" if size is None else f"+ encode, chunk {size} MiB",
            lambda scratch=scratch: list(scoring.score(teacher, items, codec, scratch)),  # type: ignore[misc]
            body + head,
            FORECAST["encode"] if size is None else "",
        )
        if size is None:
            _peak(context, len(items), length)
    scoring._CHUNK_BYTES, scoring._MAX_CHUNK_ROWS = usual
    with eager_rows():
        time("+ encode, no kernel", lambda: list(scoring.score(teacher, items, codec, scoring.Scratch())), body + head)
    for name in OTHERS if context.on_gpu else OTHERS[:1]:
        given, scratch = {"math_tool": usual_codec(name, 1)}, scoring.Scratch()
        time(
            f"+ encode, usual {name}",
            lambda given=given, scratch=scratch: list(scoring.score(teacher, items, given, scratch)),  # type: ignore[misc]
            body + head,
        )
    with TemporaryDirectory() as folder:
        writer = StoreWriter(
            folder, teacher.identity, usual_codec("tail", 1), vocab_size=len(teacher.head.weight), layout="shards"
        )
        loaded = LoadedModel(teacher.model, None, teacher.identity)
        sizes = {"seq_len": length, "batch_size": len(items)}
        time(
            "capture",
            lambda: capture({"math_tool": [samples]}, {"math_tool": writer}, loaded, overwrite=True, **sizes),
            body + head,
        )


@contextmanager
def eager_rows() -> Iterator[None]:
    """Torch's own operations in the place of kernels."""
    before = os.environ.get("LIQUID_LOSS_ROWS")
    os.environ["LIQUID_LOSS_ROWS"] = "eager"
    try:
        yield
    finally:
        del os.environ["LIQUID_LOSS_ROWS"]
        if before is not None:
            os.environ["LIQUID_LOSS_ROWS"] = before


def _logits(teacher: OnlineTeacher, ids: torch.Tensor) -> None:
    """Logits of all positions, in the chunks capture takes, into memory that is used again."""
    scratch = scoring.Scratch()
    with torch.inference_mode():
        hidden = teacher.hidden(ids)
        rows = hidden.reshape(-1, hidden.shape[-1])
        most = scoring.chunk_rows(teacher.head.vocab_size, rows.device)
        for start in range(0, rows.shape[0], most):
            scratch.logits(teacher.head, rows[start : start + most])


def _peak(context: Context, rows: int, length: int) -> None:
    name = capture_name(rows, length)
    if context.on_gpu:
        context.row(name, torch.cuda.max_memory_allocated() / GIB, "GiB", within=WITHIN)
    else:
        context.skip(name)
