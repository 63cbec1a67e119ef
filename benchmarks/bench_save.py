"""How long a save stops training, and what training loses while one is written behind it.

    python benchmarks/bench_save.py                            states of 1, 10 and 50 million parameters
    python benchmarks/bench_save.py --millions 419 --rounds 2  takes 11 GB of memory and 15 GB of disk

The state is a student's of that size and AdamW's moments. Each round, one after the other:

memory copy   the state into memory that is in use already: the measure of all else
stop          of a save: how long ``BackgroundSaver.save`` keeps the run. Asked for: at most 3 copies
in the step   the same save by ``CheckpointStore.save``: what training would wait for without the thread
on the disk   until the save is whole, with nothing trained meanwhile
hash, write, fsync: where that time goes, by clock and by processor

With ``--steps``: a loop of products on the same cores, in steps a second, while nothing and while something is saved.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from liquid_llm.checkpoint.background import BackgroundSaver
from liquid_llm.checkpoint.copies import block_sizes
from liquid_llm.checkpoint.files import plain_content, write_archive
from liquid_llm.checkpoint.metadata import CheckpointMetadata
from liquid_llm.checkpoint.store import CheckpointStore
from liquid_llm.optimizers import build_optimizer
from liquid_llm.runtime import random_state
from liquid_llm.storage import sync

_HIDDEN, _LAYERS = 1024, 12
_TARGET_BYTES = 2**30  # of the copy that all else is measured by: more than any cache, and less than a state


def make_state(millions: float) -> dict[str, Any]:
    """Weights, moments and random states: an embedding, a quarter of the parameters, and matrices and norms."""
    rows = round(millions * 1e6 / 4 / _HIDDEN)
    model = torch.nn.ModuleDict({"embed": torch.nn.Embedding(rows, _HIDDEN)})
    for number in range(_LAYERS):
        model[f"matrix{number}"] = torch.nn.Linear(_HIDDEN, 3 * rows // _LAYERS, bias=False)
        model[f"norm{number}"] = torch.nn.LayerNorm(_HIDDEN)
    optimizer = build_optimizer(model, lr=1e-3, weight_decay=0.1, betas=(0.9, 0.95))
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {"student": model.state_dict(), "optimizer": optimizer.state_dict(), "random": random_state()}


def metadata(step: int) -> CheckpointMetadata:
    return CheckpointMetadata(
        step=step,
        tokens_seen=0,
        block_size=1,
        kd_alpha=0.5,
        kd_temperature=1.0,
        alpha_schedule=None,
        temp_schedule=None,
        schedule_state={},
        grad_accum=1,
        warmup_steps=0,
        lr=1e-3,
        lr_peak=None,
        positional_embedding="rotary",
        rope_scale=None,
        eval_ctx_lens=(),
        student={},
        tokenizer_hash="",
        data_position=0,
        best_val_loss=None,
        created="2026-01-01T00:00:00+00:00",
    )


def tensors(state: Mapping[str, Any]) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    plain_content(state, lambda tensor: (found.append(tensor), tensor)[1])
    return found


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds by clock and by processor, the whole process's."""
    began, busy = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - began, time.process_time() - busy


def compare(millions: float, rounds: int, folder: Path) -> None:
    state = make_state(millions)
    size = sum(size * count for size, count in block_sizes(state).items())
    source = tensors(state)
    target = torch.empty(min(size, _TARGET_BYTES), dtype=torch.uint8)
    columns: dict[str, list[tuple[float, float]]] = {}

    def measure(name: str, work: Callable[[], object]) -> None:
        columns.setdefault(name, []).append(timed(work))

    def memory_copy() -> None:
        for tensor in source:
            for piece in torch.split(tensor.reshape(-1).view(torch.uint8), len(target)):
                target[: len(piece)].copy_(piece)

    memory_copy()
    with CheckpointStore(folder / "run", keep_last=1) as store, BackgroundSaver(store, torch.device("cpu")) as saver:
        saver.prepare(state)
        saver.wait()
        for number in range(1, 2 * rounds, 2):
            measure("memory copy", memory_copy)
            stop = timed(lambda step=number: saver.save(state, metadata(step), also_as=("last",)))  # type: ignore[misc]
            columns.setdefault("stop", []).append(stop)
            wait = timed(saver.wait)
            columns.setdefault("on the disk", []).append((stop[0] + wait[0], stop[1] + wait[1]))
            measure("in the step", lambda step=number: store.save(state, metadata(step + 1), also_as=("last",)))  # type: ignore[misc]
            measure("  hash", lambda: _hash(source))
            path = folder / "state.pt"
            measure("  write and hash", lambda path=path: write_archive(path, state))  # type: ignore[misc]
            measure("  fsync", lambda path=path: sync(path))  # type: ignore[misc]
            path.unlink()
    print(f"\n{millions:g}M parameters, {size / 1e6:,.0f} MB, medians of {rounds}")
    for name, found in columns.items():
        clock, busy = (statistics.median(column) for column in zip(*found, strict=True))
        ratio = statistics.median(one / copy for (one, _), (copy, _) in zip(found, columns["memory copy"], strict=True))
        print(f"{name:>18} {clock:>9.3f} s  processor {busy:>8.3f} s  {ratio:>8.1f} copies")


def _hash(state: list[torch.Tensor]) -> None:
    digest = hashlib.sha256()
    for tensor in state:
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())


def steps_meanwhile(millions: float, folder: Path, rounds: int) -> None:
    """Steps a second of a loop of products, while nothing is saved and while saves follow one another."""
    state = make_state(millions)
    weights = [torch.randn(_HIDDEN, _HIDDEN) for _ in range(4)]
    rows = torch.randn(256, _HIDDEN)

    def step() -> None:
        hidden = rows
        for weight in weights:
            hidden = torch.tanh(hidden @ weight)

    def rate(going_on: Callable[[], bool]) -> float:
        began, done = time.perf_counter(), 0
        while going_on():
            step()
            done += 1
        return done / (time.perf_counter() - began)

    quiet, busy, saves = [], [], []
    with CheckpointStore(folder / "run", keep_last=1) as store, BackgroundSaver(store, torch.device("cpu")) as saver:
        saver.prepare(state)
        saver.wait()
        for number in range(1, rounds + 1):
            end = time.perf_counter() + 3.0
            quiet.append(rate(lambda end=end: time.perf_counter() < end))  # type: ignore[misc]
            saver.save(state, metadata(number))
            busy.append(rate(lambda: saver.busy))
            saves.append(saver.wait())
    share = statistics.median(one / other for one, other in zip(busy, quiet, strict=True))
    seconds = statistics.median(one.seconds for one in saves if one is not None)
    before, meanwhile = statistics.median(quiet), statistics.median(busy)
    print(
        f"{before:>18.1f} steps/s, {meanwhile:.1f} while a save is written ({share:.0%}), which takes {seconds:.2f} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=float, nargs="+", default=[1, 10, 50], help="parameters of the students")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", action="store_true", help="measure what training loses meanwhile, too")
    parser.add_argument("--folder", help="on the disk that is meant; the system's temporary one by default")
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    print(f"{platform.machine()}, {platform.platform()}, torch {torch.__version__}, load average {load:.1f}")
    for millions in arguments.millions:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
            compare(millions, arguments.rounds, Path(name))
        if arguments.steps:
            with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
                steps_meanwhile(millions, Path(name), arguments.rounds)


if __name__ == "__main__":
    main()
