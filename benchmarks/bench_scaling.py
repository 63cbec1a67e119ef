"""How much of the speed of one process each of two has that train together, over gloo on the CPU.

    python benchmarks/bench_scaling.py                                     llama-16m, steps of 2 x 128 tokens a process
    python benchmarks/bench_scaling.py --student llama-test --rounds 2     in seconds
    python benchmarks/bench_scaling.py --passes 4                          with --grad_accum of four a process

One thread a process. Each round takes the same number of steps in each way, one after the other:

alone        one process, while the other waits
apart        both at the same time, each for itself: what the machine gives two processes, its caches and memory shared
together     both as ranks of one run, gradients summed while backward runs
afterwards   the same, gradients summed when backward has ended: what it would be without

Shares are of each round, medians over the rounds. ``of 2 x alone`` is the share of the ideal; ``of apart`` leaves out
what the machine itself takes. ``waited`` is the part of a step in which a rank waits for a sum or for the other rank.

Then what arithmetic says of GPUs: see ``scaling/arithmetic.py``. None of that is measured.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import socket
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.scaling.arithmetic import Job, Machine, pass_seconds, share_of_ideal, sum_seconds
from torch import Tensor

from liquid_llm.data.loader import collate
from liquid_llm.data.types import MicroBatch
from liquid_llm.distributed import Engine, ProcessEngine, Ranks
from liquid_llm.models.student import student_config
from liquid_llm.optimizers import build_optimizer
from liquid_llm.schedules import Constant, StepSchedules
from liquid_llm.training import Progress, Student, Trainer

RANKS, VOCAB = 2, 16384
WAYS = ("alone", "apart", "together", "afterwards")
# What makers say of one direction of a link, and a network of 400 Gbit/s; 100 Gbit/s for the L4s.
MACHINES = (Machine("8 H200 a host, NVLink", 8, 450e9, 50e9), Machine("8 L4 a host, PCIe", 8, 12e9, 12.5e9))
FLOPS = (400e12, 40e12)  # 40 % of an H200's, a third of an L4's
STUDENTS = {"419M": (419e6, 65e6), "1.2B": (1.2e9, 131e6)}  # parameters, of them the tied embedding's
POSITIONS = 8 * 1024


class Watched(ProcessEngine):
    """Notes how long sums are waited for; begins them when they are waited for, if it is told to."""

    waited = 0.0
    at_once = True

    def sum(self, tensor: Tensor) -> Tensor:
        began = time.perf_counter()
        total = super().sum(tensor)
        self.waited += time.perf_counter() - began
        return total

    def begin_sum(self, tensor: Tensor) -> Callable[[], None]:
        begin = super().begin_sum
        begun = begin(tensor) if self.at_once else None

        def wait() -> None:
            began = time.perf_counter()
            (begun or begin(tensor))()
            self.waited += time.perf_counter() - began

        return wait


def endless_batches(rank: int, rows: int, length: int) -> Iterator[tuple[MicroBatch, None]]:
    generator = torch.Generator().manual_seed(rank)
    while True:
        ids = torch.randint(1, VOCAB, (rows, length), generator=generator)
        yield collate("lm", list(ids.numpy())), None


def make_trainer(engine: Engine, options: argparse.Namespace) -> Trainer:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = student_config(options.student, vocab_size=VOCAB, bos_id=1, eos_id=2)
    model = AutoModelForCausalLM.from_config(config)
    schedules = StepSchedules(Constant(0.0), Constant(1.0), Constant(0.0), Constant(1e-4))
    optimizer = build_optimizer(model, lr=1e-4, weight_decay=0.1, betas=(0.9, 0.95))
    batches = endless_batches(engine.rank, options.rows, options.length)
    passes = options.passes * engine.world_size
    student = Student(model, torch.float32)
    return Trainer(student, optimizer, schedules, batches, Progress(), 1, passes, 1.0, engine=engine)


def be_a_rank(rank: int, port: int, options: argparse.Namespace) -> None:
    """Measure all ways, in step with the other rank; the first prints."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(RANKS))
    torch.set_num_threads(1)
    with Watched(Ranks.read(), torch.device("cpu")) as engine:
        alone, together = make_trainer(Engine(), options), make_trainer(engine, options)
        rounds: list[dict[str, tuple[float, float]]] = []
        for number in range(options.rounds + 1):
            found = {}
            for way in WAYS if number % 2 else WAYS[::-1]:
                engine.wait_for_all()
                engine.at_once, engine.waited = way != "afterwards", 0.0
                trainer = alone if way in ("alone", "apart") else together
                began = time.perf_counter()
                for _ in range(options.steps if way != "alone" or engine.is_main else 0):
                    trainer.step()
                seconds, waited = time.perf_counter() - began, engine.waited
                found[way] = (max(engine.gather(seconds)), sum(engine.gather(waited)) / RANKS)
            rounds += [found] * (number > 0)  # the first warms up
        if engine.is_main:
            size = sum(one.numel() for one in together.student.parameters())
            print_measured(rounds, size, options)


def print_measured(rounds: list[dict[str, tuple[float, float]]], size: int, options: argparse.Namespace) -> None:
    tokens = options.rows * options.length * options.passes
    print(f"{options.student}, {size / 1e6:.1f}M parameters, {tokens} tokens a process and step, {len(rounds)} rounds")
    print(f"{'':>11} {'s a step':>9} {'of 2 x alone':>13} {'of apart':>9} {'waited':>7}   (least to most of 2 x alone)")

    def middle(values: Iterator[float]) -> float:
        return statistics.median(values)

    for way in WAYS:
        shares = [one["alone"][0] / one[way][0] for one in rounds]
        print(
            f"{way:>11} {middle(one[way][0] / options.steps for one in rounds):>9.3f} "
            f"{'' if way == 'alone' else f'{middle(iter(shares)):.0%}':>13} "
            f"{middle(one['apart'][0] / one[way][0] for one in rounds) if way in WAYS[2:] else 1:>9.0%} "
            f"{middle(one[way][1] / one[way][0] for one in rounds):>7.0%}   {min(shares):.0%} to {max(shares):.0%}"
        )


def print_arithmetic() -> None:
    print(f"\nArithmetic, not measured: share of the ideal, {POSITIONS} positions a GPU and pass")
    gpus = (1, 2, 4, 8, 16, 32, 64)
    print(f"{'':>38} {'passes':>6} " + " ".join(f"{count:>5}" for count in gpus) + "   sum at 64")
    for machine, flops in zip(MACHINES, FLOPS, strict=True):
        for name, (parameters, last) in STUDENTS.items():
            for passes in (1, 4):
                job = Job(parameters, last, pass_seconds(parameters, POSITIONS, flops), passes)
                shares = " ".join(f"{share_of_ideal(job, machine, count):>5.0%}" for count in gpus)
                summed = sum_seconds(parameters, machine, gpus[-1])
                print(f"{name + ', ' + machine.name:>38} {passes:>6} {shares}   {summed * 1000:,.0f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="llama-16m", help="a preset")
    parser.add_argument("--rows", type=int, default=2, help="of a micro-batch")
    parser.add_argument("--length", type=int, default=128, help="of a row, in tokens")
    parser.add_argument("--passes", type=int, default=1, help="micro-batches a process and step")
    parser.add_argument("--steps", type=int, default=3, help="of each way in each round")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    load = os.getloadavg()[0]
    print(f"{platform.machine()}, {platform.platform()}, torch {torch.__version__}, load average {load:.1f}")
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=be_a_rank, args=(rank, port, options)) for rank in range(RANKS)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    if any(rank.exitcode for rank in ranks):
        raise SystemExit(f"the ranks have ended with {[rank.exitcode for rank in ranks]}")
    print_arithmetic()


if __name__ == "__main__":
    main()
