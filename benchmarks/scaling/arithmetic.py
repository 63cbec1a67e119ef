"""How a step's time grows with the number of GPUs: arithmetic, of which nothing is measured.

A rank computes ``passes`` micro-batches a step. In the last one's backward the gradients begin to be summed, all but
the last bucket: behind that no work is left to hide. A ring over N ranks moves 2 (N - 1) / N of the gradients' bytes
over each of its links, and is as fast as the slowest: inside one host that of its GPUs, else what a host has to the
network, which each ring crosses once. Latency, slower and faster ranks and other traffic are left out, so the truth is
below.
"""

from __future__ import annotations

from dataclasses import dataclass

BYTES = 4  # of a gradient: float32


@dataclass(frozen=True)
class Machine:
    """Hosts with so many GPUs each; what a link between two of them, and a host's network, carry, in bytes/s."""

    name: str
    gpus: int
    link: float
    network: float


@dataclass(frozen=True)
class Job:
    """A student and what a rank computes with it in a step.

    Attributes:
        parameters: of the student.
        last: those of the last bucket, whose sum begins when backward has ended: the embedding, where it is tied.
        pass_seconds: of one micro-batch, forward and backward, on one GPU.
        passes: micro-batches a rank and step.
    """

    parameters: float
    last: float
    pass_seconds: float
    passes: int = 1


def pass_seconds(parameters: float, positions: float, flops: float) -> float:
    """Forward and backward of so many positions: 6 operations a parameter and position, at ``flops`` a second."""
    return 6 * parameters * positions / flops


def sum_seconds(parameters: float, machine: Machine, gpus: int) -> float:
    """How long summing so many gradients takes by itself."""
    slowest = machine.link if gpus <= machine.gpus else min(machine.link, machine.network)
    return 2 * (gpus - 1) / gpus * parameters * BYTES / slowest


def step_seconds(job: Job, machine: Machine, gpus: int) -> float:
    """A step of ``gpus`` ranks with as much work each, whatever their number."""
    hidden = sum_seconds(job.parameters - job.last, machine, gpus)
    backward = job.pass_seconds * 2 / 3
    before = job.passes * job.pass_seconds - backward
    return before + max(backward, hidden) + sum_seconds(job.last, machine, gpus)


def share_of_ideal(job: Job, machine: Machine, gpus: int) -> float:
    """Of ``gpus`` times one GPU's speed, how much is left."""
    return step_seconds(job, machine, 1) / step_seconds(job, machine, gpus)
