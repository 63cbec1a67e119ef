"""What the benchmark of scaling works out for GPUs, against numbers worked out by hand."""

from __future__ import annotations

import pytest
from benchmarks.bench_scaling import FLOPS, MACHINES, POSITIONS, STUDENTS
from benchmarks.scaling import internet
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


def page_rows(heading: str) -> list[list[str]]:
    """The cells of the tables of a section of the page, without the lines below heads."""
    page = (REPOSITORY / "docs" / "scaling.md").read_text(encoding="utf-8")
    section = page.split(f"## {heading}")[1].split("\n## ")[0]
    rows = [
        [cell.strip() for cell in line.strip().strip("|").split("|")] for line in section.splitlines() if "|" in line
    ]
    return [row for row in rows if set(row[0]) != {"-"}]


def test_hours_and_bytes_of_the_internet_are_worked_out_from_what_was_measured() -> None:
    assert internet.capture_rate(8.03e9) == pytest.approx(27_600)
    assert internet.gpu_hours(1e9, 27_600) == pytest.approx(10.06, abs=0.01)
    assert internet.capture_rate(16.06e9, "L4") == pytest.approx(27_600 / 2 * 121 / 989)
    sizes = internet.bytes_of(1e9, internet.TEACHERS[0])
    assert sizes["full logits, bfloat16"] == (256.512e12, 256.512e12)
    assert sizes["hidden states, bfloat16"] == (8.192e12, 8.192e12)
    # 64 MB a shard, a data file of 32 million tokens and its marker
    assert internet.requests(64e6, 640e6) == (10 + 2, 10 + 4)
    assert [internet.size(x) for x in (999, 1000, 1.234e12, 5e18)] == ["999 B", "1 kB", "1.23 TB", "5e+03 PB"]
    assert [internet.dollars(x) for x in (0.001, 2.08, 30.19, 265_461)] == ["under $0.01", "$2.1", "$30", "$270,000"]


def test_the_page_has_the_tables_that_the_calculator_prints() -> None:
    said = page_rows("Internet scale")
    rows = internet.table((1e9, 1e12), internet.TEACHERS, internet.Prices())
    assert [[cell.replace("`", "") for cell in row] for row in said[: len(rows)]] == [
        [cell.replace("`", "") for cell in row] for row in rows
    ]
    below = said[next(n for n, row in enumerate(said) if row[0] == "signal") + 1 :]
    reading = {name: internet.size(rate) for name, rate in internet.reading(59_000).items()}
    assert {name.replace("`", ""): rate for name, rate in below} == reading


def test_figures_that_the_calculator_takes_as_measured_are_in_the_log() -> None:
    log = (REPOSITORY / "docs" / "LOG.md").read_text(encoding="utf-8")
    assert f"with encoding {internet.MEASURED_RATE:,.0f} at 16 x 1,024" in log
    assert "103.7 bytes a position on school mathematics" in log
    assert "140.6 on prose" in log
    assert "does 1.1 to 1.2 M tokens/s on GSM8K" in log
