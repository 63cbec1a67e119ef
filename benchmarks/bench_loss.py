"""How long and how much memory one forward and backward pass of the loss takes, beside what a user would write instead.

    python benchmarks/bench_loss.py                        both tables, a few minutes
    python benchmarks/bench_loss.py --only time --dtype bfloat16
    python benchmarks/bench_loss.py --only memory --hidden 2048 --teacher-hidden 2048
    python benchmarks/bench_loss.py --only time --contestants "T=2 "        every divergence, forward KL first

Time: all contestants in one process, one after the other, round after round, so that a slow moment of the machine hits
them alike; medians, and ratios of medians. Memory: a process for each, the peak of its resident set above what it held
with inputs and weights made.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from liquid_llm.losses import DenseSignal, Objective, OutputHead, SparseSignal, fused_loss
from liquid_llm.losses.signals import HEAD_AND_DRAWS
from liquid_llm.registry import DIVERGENCES

ALPHA = 0.5
SLOTS = 16  # ids a position in the sparse signal
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Shape:
    """Sizes of one comparison."""

    tokens: int
    vocab: int
    hidden: int
    teacher_hidden: int
    dtype: str
    chunk_tokens: int | None = None


@dataclass
class Inputs:
    """Random hidden states and heads; logits with a standard deviation of about 3, as a small trained model has."""

    shape: Shape
    hidden: Tensor = field(init=False)
    weight: Tensor = field(init=False)
    labels: Tensor = field(init=False)
    teacher: DenseSignal = field(init=False)
    old: DenseSignal = field(init=False)
    sparse: SparseSignal = field(init=False)
    sparse_at_1: SparseSignal = field(init=False)

    def __post_init__(self) -> None:
        shape = self.shape
        torch.manual_seed(0)
        self.hidden = _normal(shape.tokens, shape.hidden, 3.0, shape.dtype).requires_grad_()
        self.weight = _normal(shape.vocab, shape.hidden, shape.hidden**-0.5, shape.dtype).requires_grad_()
        self.labels = torch.randint(shape.vocab, (shape.tokens,))
        teacher_weight = _normal(shape.vocab, shape.teacher_hidden, shape.teacher_hidden**-0.5, shape.dtype)
        self.teacher = DenseSignal(
            _normal(shape.tokens, shape.teacher_hidden, 3.0, shape.dtype), OutputHead(teacher_weight)
        )
        self.old = DenseSignal(self.hidden.detach() + 0.1, OutputHead(self.weight.detach()))
        weights = torch.rand(shape.tokens, SLOTS)
        weights /= weights.sum(dim=1, keepdim=True)
        self.sparse = SparseSignal(
            ids=torch.stack([torch.randperm(shape.vocab)[:SLOTS] for _ in range(shape.tokens)]),
            weights=weights,
            log_probs=weights.log(),
            tail_mass=torch.zeros(shape.tokens),
            mask=torch.ones(shape.tokens, dtype=torch.bool),
            temperature=2.0,
            form=HEAD_AND_DRAWS,
            num_exact=torch.full((shape.tokens,), SLOTS // 2),
        )
        self.sparse_at_1 = replace(self.sparse, temperature=1.0)

    @property
    def head(self) -> OutputHead:
        return OutputHead(self.weight)


def _normal(rows: int, columns: int, scale: float, dtype: str) -> Tensor:
    # Row by row, so that making the inputs needs less memory than any contestant.
    out = torch.empty(rows, columns, dtype=DTYPES[dtype])
    for start in range(0, rows, 4096):
        part = out[start : start + 4096]
        part.copy_(torch.randn(part.shape) * scale)
    return out


def plain_ce(data: Inputs) -> Tensor:
    """What plain training does: all logits, cross-entropy in float32."""
    return F.cross_entropy(F.linear(data.hidden, data.weight).float(), data.labels, reduction="sum")


def plain_kd(data: Inputs, temperature: float) -> Tensor:
    """What most distillation code does: all logits of both models, ``kl_div`` and cross-entropy."""
    logits = F.linear(data.hidden, data.weight).float()
    with torch.no_grad():
        teacher_logits = F.linear(data.teacher.hidden, data.teacher.head.weight).float()
        teacher = torch.log_softmax(teacher_logits / temperature, dim=-1)
    student = torch.log_softmax(logits / temperature, dim=-1)
    kd = F.kl_div(student, teacher, reduction="sum", log_target=True) * temperature**2
    return ALPHA * kd + (1 - ALPHA) * F.cross_entropy(logits, data.labels, reduction="sum")


def fused(data: Inputs, **arguments: object) -> Tensor:
    chunk = data.shape.chunk_tokens
    return fused_loss(data.hidden, data.head, data.labels, chunk_tokens=chunk, **arguments).loss  # type: ignore[arg-type]


def _train(loss: Callable[[Inputs], Tensor]) -> Callable[[Inputs], None]:
    def step(data: Inputs) -> None:
        data.hidden.grad = data.weight.grad = None
        loss(data).backward()  # type: ignore[no-untyped-call]

    return step


def _evaluate(data: Inputs) -> None:
    with torch.no_grad():
        fused(data, signal=data.teacher, objective=Objective(ALPHA))


CONTESTANTS: dict[str, Callable[[Inputs], None]] = {
    "plain CE": _train(plain_ce),
    "plain KL + CE, T=1": _train(lambda data: plain_kd(data, 1.0)),
    "plain KL + CE, T=2": _train(lambda data: plain_kd(data, 2.0)),
    "fused CE": _train(fused),
    "fused KL + CE, T=1": _train(lambda data: fused(data, signal=data.teacher, objective=Objective(ALPHA))),
    "fused KL + CE, T=2": _train(lambda data: fused(data, signal=data.teacher, objective=Objective(ALPHA, 2.0))),
    "fused sparse + CE, T=2": _train(lambda data: fused(data, signal=data.sparse, objective=Objective(ALPHA, 2.0))),
    "fused KL + CE + L2, T=2": _train(
        lambda data: fused(data, signal=data.teacher, objective=Objective(ALPHA, 2.0, gamma=0.1), reference=data.old)
    ),
    "fused KL + CE, no gradient": _evaluate,
}


def _divergence(name: str, *, stored: bool = False, min_entropy: float | None = None) -> Callable[[Inputs], None]:
    objective = Objective(ALPHA, 2.0, divergence=name, min_entropy=min_entropy)

    def loss(data: Inputs) -> Tensor:
        sparse = data.sparse if objective.signal_temperature == 2.0 else data.sparse_at_1
        return fused(data, signal=sparse if stored else data.teacher, objective=objective)

    return _train(loss)


CONTESTANTS |= {f"T=2 {name}": _divergence(name) for name in DIVERGENCES}
CONTESTANTS |= {
    f"T=2 stored {name}": _divergence(name, stored=True) for name in ("forward_kl", "decoupled_topk", "tail_aware")
}
CONTESTANTS["T=2 forward_kl, chosen"] = _divergence("forward_kl", min_entropy=5.0)


def machine() -> str:
    """One line on where the figures come from, and on how busy that was with other things."""
    names = [line.split(":")[1].strip() for line in _cpu_lines() if line.startswith("model name")]
    flags = next((line for line in _cpu_lines() if line.startswith("flags")), "")
    amx = "AMX" if "amx_bf16" in flags else "no AMX"
    return (
        f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads, {amx}, "
        f"torch {torch.__version__}, Python {platform.python_version()}, load average {os.getloadavg()[0]:.1f}"
    )


def _cpu_lines() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def time_table(shape: Shape, names: list[str], rounds: int) -> None:
    data = Inputs(shape)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds + 1):
        for name in names:
            start = time.perf_counter()
            CONTESTANTS[name](data)
            if number:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    base = medians[names[0]]
    print(f"\ntime, {_sizes(shape)}, {rounds} rounds\n")
    print(f"{'':28}{'median ms':>10}{'best ms':>10}{'x ' + names[0]:>14}")
    for name in names:
        best = min(seconds[name])
        print(f"{name:28}{medians[name] * 1e3:10.0f}{best * 1e3:10.0f}{medians[name] / base:14.2f}")


def memory_table(shape: Shape, names: list[str]) -> None:
    print(f"\npeak memory above inputs and weights, {_sizes(shape)}\n")
    print(f"{'':28}{'GiB':>10}")
    for name in names:
        command = [sys.executable, __file__, "--child", name, *_arguments(shape)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        figure = f"{int(done.stdout) / 2**30:10.2f}" if done.returncode == 0 else f"{'failed':>10} ({done.returncode})"
        print(f"{name:28}{figure}", flush=True)


def child(shape: Shape, name: str) -> None:
    """Print one contestant's peak in bytes above what was held before it ran."""
    CONTESTANTS[name](Inputs(replace(shape, tokens=32, vocab=64)))  # code and libraries, not counted
    data = Inputs(shape)
    before = _resident_bytes()
    CONTESTANTS[name](data)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(peak - before)


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * resource.getpagesize()


def _sizes(shape: Shape) -> str:
    return (
        f"N={shape.tokens} V={shape.vocab} H={shape.hidden} teacher H={shape.teacher_hidden} {shape.dtype}"
        f" chunk={shape.chunk_tokens or 'auto'}"
    )


def _arguments(shape: Shape) -> list[str]:
    named = {
        "tokens": shape.tokens,
        "vocab": shape.vocab,
        "hidden": shape.hidden,
        "teacher-hidden": shape.teacher_hidden,
        "dtype": shape.dtype,
        "chunk-tokens": shape.chunk_tokens,
    }
    return [word for name, value in named.items() if value is not None for word in (f"--{name}", str(value))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["time", "memory"], help="one table instead of both")
    parser.add_argument("--tokens", type=int, help="positions N")
    parser.add_argument("--vocab", type=int, help="vocabulary V")
    parser.add_argument("--hidden", type=int, help="student's width H")
    parser.add_argument("--teacher-hidden", type=int, help="teacher's width")
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="of hidden states and heads")
    parser.add_argument("--chunk-tokens", type=int, help="positions in a chunk of the fused loss")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds")
    parser.add_argument("--contestants", help="comma-separated parts of names; default all")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    given = {
        name: value
        for name in ("tokens", "vocab", "hidden", "teacher_hidden", "dtype", "chunk_tokens")
        if (value := getattr(options, name)) is not None
    }
    timed = replace(Shape(2048, 49_152, 256, 576, "float32"), **given)
    weighed = replace(Shape(4096, 128_256, 512, 512, "bfloat16"), **given)
    if options.child:
        child(weighed, options.child)
        return
    wanted = options.contestants.split(",") if options.contestants else [""]
    names = [name for name in CONTESTANTS if any(part in name for part in wanted)]
    print(machine())
    if options.only != "memory":
        dtypes = [timed.dtype] if "dtype" in given else list(DTYPES)
        for dtype in dtypes:
            time_table(replace(timed, dtype=dtype), names, options.rounds)
    if options.only != "time":
        memory_table(weighed, names)


if __name__ == "__main__":
    main()
