"""What the benchmark of scaling works out for GPUs, against numbers worked out by hand."""

from __future__ import annotations

import pytest
from benchmarks.bench_scaling import FLOPS, MACHINES, POSITIONS, STUDENTS
from benchmarks.scaling.arithmetic import Job, Machine, pass_seconds, share_of_ideal, step_seconds, sum_seconds
from tests.support.readme import REPOSITORY

HOSTS = Machine("two hosts of 4", gpus=4, link=4e9, network=1e9)


def test_one_gpu_sums_nothing_and_a_ring_is_as_fast_as_its_slowest_link() -> None:
    assert sum_seconds(1e9, HOSTS, 1) == 0
    assert sum_seconds(1e9, HOSTS, 2) == pytest.approx(1.0)  # 4 GB, each half once there and once back
    assert sum_seconds(1e9, HOSTS, 4) == pytest.approx(1.5)
    assert sum_seconds(1e9, HOSTS, 8) == pytest.approx(7.0)  # over the network


def test_what_backward_does_not_hide_is_added_to_the_step() -> None:
    assert pass_seconds(1e9, 8192, 400e12) == pytest.approx(0.1229, abs=1e-4)
    hidden = Job(1e9, last=0.1e9, pass_seconds=3.0)
    assert step_seconds(hidden, HOSTS, 1) == 3.0
    assert step_seconds(hidden, HOSTS, 4) == pytest.approx(3.15)  # 1.35 s beside 2 s of backward, then the last 0.15 s
    assert step_seconds(hidden, HOSTS, 8) == pytest.approx(1 + 6.3 + 0.7)
    assert share_of_ideal(hidden, HOSTS, 8) == pytest.approx(3 / 8)


def test_more_passes_a_step_come_nearer_to_the_ideal() -> None:
    shares = [share_of_ideal(Job(1e9, 0.1e9, 3.0, passes), HOSTS, 8) for passes in (1, 2, 4, 8)]
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(24 / (22 + 7))


def test_the_page_on_scaling_has_what_arithmetic_gives() -> None:
    page = (REPOSITORY / "docs" / "scaling.md").read_text()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if "a host, " in line]
    said = {(row[0], int(row[1])): row[2:] for row in rows}
    worked_out = {}
    for machine, flops in zip(MACHINES, FLOPS, strict=True):
        for name, (parameters, last) in STUDENTS.items():
            for passes in (1, 8):
                job = Job(parameters, last, pass_seconds(parameters, POSITIONS, flops), passes)
                shares = [f"{share_of_ideal(job, machine, gpus):.2f}" for gpus in (2, 4, 8, 16, 32, 64)]
                worked_out[f"{name}, {machine.name}", passes] = shares
    assert said == worked_out
