"""What happens when the device's memory does not suffice: cut and go on, or exit 6; nothing is left behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from benchmarks.gpu import shapes
from benchmarks.gpu.capturing import Samples
from tests.support.devices import counters, memory_limit
from tests.support.tiny import Tiny

from liquid_llm.capture.job import capture
from liquid_llm.cli.main import main
from liquid_llm.device import release_memory
from liquid_llm.identity import ModelIdentity
from liquid_llm.models.loading import LoadedModel
from liquid_llm.signal_store.codecs.topk import TopKCodec
from liquid_llm.signal_store.store import StoreWriter, open_store

# On a GPU large enough that what its allocator keeps beside tensors does not matter.
WIDE = replace(
    shapes.TINY,
    vocab_size=8192,
    time=256,
    rows=64,
    student="liquid-16m",
    teacher=shapes.llama(512, 2048, 4, 8, 4, tied=True),
)
SMALL = replace(shapes.TINY, vocab_size=256, rows=32, teacher=shapes.llama(64, 1024, 2, 4, 2, tied=True))


@pytest.fixture
def scale(device: torch.device) -> shapes.Scale:
    return WIDE if device.type == "cuda" else SMALL


def peak_of(device: torch.device, work: Callable[[], object]) -> int:
    """The most that was alive on the device during ``work``."""
    release_memory(device)
    counters(device).reset_peak_memory_stats()
    work()
    return int(counters(device).max_memory_allocated())


@pytest.mark.parametrize("kind", ["online", "stored", "L2"])
def test_a_batch_that_does_not_fit_is_cut_and_gives_the_same_gradient(device, scale, kind, record_property):
    teacher = shapes.build_teacher(scale.teacher, scale, device)
    teacher.model.float()  # with bfloat16 its word on a row depends on the rows beside it
    large, small = (shapes.lm_batch(scale, device, rows) for rows in (scale.rows, scale.rows // 4))

    def feed() -> Iterator[Any]:
        while True:  # the small one's gradient is there when the large one runs out of memory
            for batch in (small, large):
                sparse = shapes.sparse_signal(batch.num_positions, scale.vocab_size, device)
                stored = shapes.stored_signal(sparse) if kind == "stored" else None
                yield batch, stored or shapes.online_signal(teacher)

    def job() -> Any:
        student = shapes.build_student(scale, device)
        reference = shapes.build_student(scale, device).eval().requires_grad_(False) if kind == "L2" else None
        made = shapes.trainer(student, feed(), torch.float32, reference=reference, optimizer=FirstStep(student))
        made.grad_accum = 2
        return made

    whole = job()
    steps: list[Any] = []
    peak = peak_of(device, lambda: steps.append(whole.step()))
    expected = steps.pop()
    gradients = whole.optimizer.gradients
    whole = None
    release_memory(device)
    held = counters(device).memory_allocated()
    cut = job()
    with memory_limit(device, held + int(0.8 * (peak - held))):
        got = cut.step()
    assert cut.progress.passes.max_tokens is not None
    assert len(got.scored) > len(expected.scored) == 2
    record_property("cut to", f"{cut.progress.passes.max_tokens} of {large.input_ids.numel()} tokens")
    assert got.grad_norm == pytest.approx(expected.grad_norm, rel=1e-4)
    losses = [sum(one.output.loss.item() for one in result.scored) for result in (expected, got)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    for mine, theirs in zip(cut.optimizer.gradients, gradients, strict=True):
        assert float((mine - theirs).norm()) <= 1e-3 * float(theirs.norm()) + 1e-7


class FirstStep(torch.optim.SGD):
    """Keeps the gradients of its step on the CPU, and changes no weight."""

    def __init__(self, model: Any) -> None:
        super().__init__(model.parameters(), lr=1e-9)
        self.gradients: list[torch.Tensor] = []

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            self.gradients += [parameter.grad.cpu() for parameter in group["params"] if parameter.grad is not None]


def test_capture_halves_its_batches_and_finishes(device, scale, tmp_path, record_property):
    teacher = shapes.build_teacher(scale.teacher, scale, device).model
    loaded = LoadedModel(teacher, None, ModelIdentity("made-up", "0", "0"))
    samples = Samples(64 if device.type == "cuda" else 32, scale.time, scale.vocab_size)

    def run(folder: Path) -> Any:
        writer = StoreWriter(str(folder), loaded.identity, TopKCodec(8), vocab_size=scale.vocab_size)
        return capture(
            {"math_tool": [samples]}, {"math_tool": writer}, loaded, seq_len=scale.time, batch_size=len(samples)
        )

    peak = peak_of(device, lambda: run(tmp_path / "whole"))
    release_memory(device)
    held = counters(device).memory_allocated()
    with memory_limit(device, held + int(0.7 * (peak - held))):
        summary = run(tmp_path / "cut")
    assert (summary.written, summary.failed) == (len(samples), 0)
    assert summary.padded_tokens > samples.lengths.sum()  # some of it was computed in vain
    record_property("computed", f"{summary.padded_tokens / samples.lengths.sum():.2f} times")
    stores = [open_store(str(tmp_path / name)) for name in ("whole", "cut")]
    found = [store.get_many(samples.samples, [scale.time] * len(samples), 2.0) for store in stores]
    for one, other in zip(*found, strict=True):
        assert one.status == other.status == "usable"
        assert np.mean(one.signal.ids.numpy() == other.signal.ids.numpy()) > 0.99
    for store in stores:
        store.close()
    assert counters(device).memory_allocated() <= held + 2**20


def test_where_nothing_fits_the_command_ends_with_exit_6(tiny: Tiny, device: torch.device, tmp_path, capsys) -> None:
    release_memory(device)
    held = counters(device).memory_reserved()
    student = "liquid-40m" if device.type == "cuda" else tiny.student  # what a GPU keeps free would hold a tiny one
    options = {"max_steps": 2, "student": student, "device": device, "hybrid": "false", "grad_checkpoint": "false"}
    options |= {"mc_teacher_id": None, "math_logits_dir": None, "code_logits_dir": None}
    words = tiny.train_words(tmp_path / "out", **options, precision="float32", teacher_precision="float32")
    room = 2**21 if device.type == "cuda" else 150_000
    with memory_limit(device, held + room):
        assert main(["train", *words]) == 6
    said = capsys.readouterr().err
    assert "error:" in said
    assert "Traceback" not in said
    release_memory(device)
    assert main(["train", *words]) == 0
