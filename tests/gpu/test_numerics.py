"""The loss, the codecs and the arithmetic of the device beside the CPU's, and beside float64."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.golden.compare import RECORDED, RUNS, STEPS
from tests.support.autocast import result_dtypes
from tests.support.devices import count_waits
from tests.support.distillation import (
    SIGNALS,
    Problem,
    answer,
    assert_same,
    fused_loss,
    make_dense,
    make_problem,
    make_signal,
    reference_loss,
)
from tests.support.tiny import build
from torch import Tensor

from liquid_llm.cli.main import main
from liquid_llm.data.loader import collate
from liquid_llm.losses import DenseSignal, OutputHead, Signal, SparseSignal
from liquid_llm.metrics import read_metrics
from liquid_llm.signal_store.codecs import get_codec

VOCAB = 29


def moved(value: Any, device: torch.device) -> Any:
    """A dataclass with its tensors on ``device``."""
    import dataclasses

    changes = {}
    for field in dataclasses.fields(value):
        one = getattr(value, field.name)
        if isinstance(one, Tensor):
            changes[field.name] = one.detach().to(device).requires_grad_(one.requires_grad)
        elif dataclasses.is_dataclass(one):
            changes[field.name] = moved(one, device)
    return dataclasses.replace(value, **changes)


@pytest.mark.parametrize("kind", SIGNALS)
@pytest.mark.parametrize("chunk_tokens", [4, 1000])
def test_the_fused_loss_is_the_reference(device: torch.device, kind: str, chunk_tokens: int) -> None:
    problem = moved(make_problem(dtype=torch.float32, bias=True, soft_cap=7.0, scale=0.8), device)
    signal = make_signal(kind, 13, VOCAB, 2.0, dtype=torch.float32)
    old = moved(make_dense(13, VOCAB, dtype=torch.float32, seed=5), device)
    given = {"signal": None if signal is None else moved(signal, device), "alpha": 0.6, "temperature": 2.0}
    given |= {"reference": old, "gamma": 0.3}
    got = answer(lambda *args, **kw: fused_loss(*args, chunk_tokens=chunk_tokens, **kw), problem, **given)
    assert_same(got, answer(reference_loss, problem, **given), rtol=1e-5, atol=1e-5)


BOUNDS = {0.05: 0.01, 0.5: 0.005}  # largest relative error of a gradient, by divergence in nats
SLOTS, POSITIONS = 64, 96


@cache
def states(nats: float, temperature: float, vocab_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states of a teacher and a student that far apart, and their head: bfloat16 numbers, made on the CPU."""
    numbers = torch.Generator().manual_seed(0)
    teacher = 6.0 * torch.randn(POSITIONS, 128, generator=numbers)
    weight = (torch.randn(vocab_size, 128, generator=numbers) / 128**0.5).bfloat16()
    noise = torch.randn(teacher.shape, generator=numbers)
    theirs = torch.log_softmax(teacher.bfloat16().float() @ weight.float().t() / temperature, dim=1)
    scale = 0.3
    for _ in range(20):
        student = (teacher + scale * noise).bfloat16()
        mine = torch.log_softmax(student.float() @ weight.float().t() / temperature, dim=1)
        found = float((theirs.exp() * (theirs - mine)).sum(dim=1).mean())
        if abs(found - nats) < 0.05 * nats:
            return teacher.bfloat16(), student, weight
        scale *= (nats / found) ** 0.5
    raise AssertionError(f"no noise puts the student at {nats} nats")


def signal_of(kind: str, teacher: Tensor, weight: Tensor, temperature: float) -> Signal:
    if kind == "dense":
        return DenseSignal(teacher, OutputHead(weight))
    logits = teacher.double() @ weight.double().t()
    log_probs, ids = torch.log_softmax(logits / temperature, dim=1).topk(SLOTS, dim=1)
    tail = (1.0 - log_probs.exp().sum(dim=1)).clamp(min=0.0)
    everywhere = torch.ones(len(ids), dtype=torch.bool)
    return SparseSignal(ids, log_probs.exp().float(), log_probs.float(), tail.float(), everywhere, temperature)


@pytest.mark.parametrize("kind", ["dense", "sparse"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("nats", BOUNDS)
def test_bfloat16_gradients_are_those_of_float64(device, kind, temperature, nats, record_property):
    teacher, student, weight = states(nats, temperature, 49_152 if device.type == "cuda" else 4096)
    given = {"alpha": 1.0, "temperature": temperature}
    labels = torch.zeros(POSITIONS, dtype=torch.int64)
    problem = Problem(student.requires_grad_(), weight.float().requires_grad_(), None, labels)
    signal = signal_of(kind, teacher, weight, temperature)
    # The truth is computed on the CPU, in float64, of the same bfloat16 numbers.
    _, exact = answer(reference_loss, problem.to(torch.float64), signal=signal, **given)
    output, got = answer(
        lambda *args, **kw: fused_loss(*args, all_labelled=True, **kw),
        moved(problem, device),
        factor=1.0 / POSITIONS,  # the mean is taken in the backward pass
        signal=moved(signal, device),
        **given,
    )
    assert math.isfinite(output.loss.item())
    apart = [
        float((POSITIONS * mine.cpu().double() - true).norm() / true.norm())
        for mine, true in zip(got, exact, strict=True)
    ]
    record_property("error of the gradient of hidden states and head", ", ".join(f"{one:.2%}" for one in apart))
    assert max(apart) < BOUNDS[nats]


@pytest.mark.parametrize("name", ["tail", "full", "topk", "sampled"])
def test_a_codec_makes_the_same_bytes_of_the_same_logits(device, name, record_property) -> None:
    codec = get_codec(name)
    numbers = torch.Generator().manual_seed(1)
    logits = 4.0 * torch.randn(500 if device.type == "cuda" else 60, 4096, generator=numbers)
    encoded = [codec.encode(where, 12345, 3) for where in (logits.clone(), logits.to(device))]
    here, there = ({key: rows.cpu() for key, rows in one.items()} for one in encoded)
    assert here.keys() == there.keys()
    equal = torch.ones(len(logits), dtype=torch.bool)
    for key, rows in here.items():
        assert rows.dtype == there[key].dtype
        same = rows == there[key]
        equal &= same.flatten(1).all(dim=1) if same.dim() > 1 else same
    records = [{key: one.numpy().tobytes() for key, one in bits(codec.pack(rows)).items()} for rows in (here, there)]
    share, identical = float(equal.float().mean()), records[0] == records[1]
    record_property("positions with equal bytes", f"{share:.2%}{', the record too' if identical else ''}")
    # A GPU's exponential differs from the CPU's in its last bit, which now and then falls across a step of a code.
    assert share > 0.95 if device.type == "cuda" else identical


def bits(payload: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor.contiguous().view(torch.uint8) for key, tensor in payload.items()}


def test_golden_losses(device: torch.device, tmp_path, record_property) -> None:
    """The golden run on CPU and device, by this machine's libraries: other versions of tokenizers make other tokens."""
    run, (codec, begin_token) = next(iter(RUNS.items()))
    same = {"teacher_precision": "float32", "begin_token": begin_token}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the recorded losses were
    try:
        tiny = build(tmp_path / "tiny", teacher_steps=150)
        assert main(["capture", *tiny.capture_words(**same, codec=codec, device="cpu")]) == 0
        given = {**same, "precision": "float32", "eval_every": 0, "save_every": 0}
        rows = {}
        for place in ("cpu", str(device)):
            words = tiny.train_words(tmp_path / place.partition(":")[0], max_steps=STEPS, device=place, **given)
            assert main(["train", *words]) == 0
            metrics = read_metrics(tmp_path / place.partition(":")[0] / "run")
            rows[place] = [row["loss"] for row in metrics if row["kind"] == "train"]
    finally:
        torch.set_num_threads(threads)
    here, there = rows.values()
    apart = [abs(new / old - 1.0) for new, old in zip(there, here, strict=True)]
    recorded = [row["loss"] for row in json.loads(RECORDED.read_text())[run]]
    record_property("largest difference in the first 5 steps and in all", f"{max(apart[:5]):.1e}, {max(apart):.1e}")
    off = max(abs(a / b - 1.0) for a, b in zip(here, recorded, strict=True))
    record_property("the CPU's from those recorded", f"{off:.1e}")
    assert max(apart[:5]) < 1e-3
    assert max(apart) < 1e-2  # steps carry what rounding differs by


@pytest.mark.parametrize("kind", ["none", "dense", "sparse"])
def test_a_step_waits_for_the_device_once(device: torch.device, kind: str) -> None:
    from benchmarks.gpu import shapes

    scale = shapes.TINY
    student = shapes.build_student(scale, device)
    batch = shapes.lm_batch(scale, device)
    teacher = shapes.build_teacher(scale.teacher, scale, device)
    sparse = shapes.sparse_signal(batch.num_positions, scale.vocab_size, device)
    signals = {"none": None, "dense": shapes.online_signal(teacher), "sparse": shapes.stored_signal(sparse)}
    job = shapes.trainer(student, shapes.endless(batch, signals[kind]), torch.bfloat16)
    for _ in range(3):  # libraries set themselves up in the first
        job.step()
    with count_waits(device) as waits:
        job.step()
    assert len(waits) == 1, waits
    assert "training.py" in waits[0]


def test_a_batch_goes_to_the_device_without_a_wait(device: torch.device) -> None:
    batch = collate("lm", [torch.arange(40).numpy(), torch.arange(31).numpy()])
    with count_waits(device) as waits:
        there = batch.to(device)
        assert there.num_positions == 69
    assert not waits
    assert torch.equal(there.targets.cpu(), batch.targets)


def test_autocast_has_the_lists_that_are_pretended(card: torch.device) -> None:
    words = [sys.executable, "-m", "tests.support.autocast"]
    root = Path(__file__).resolve().parents[2]
    path = os.pathsep.join([str(root / "src"), str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    pretended, real = json.loads(done.stdout), result_dtypes(card)
    assert {name: (pretended[name], real[name]) for name in real if pretended[name] != real[name]} == {}
