"""No amount grows faster than it must: counted at small sizes, in operations, calls and bytes, never in time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from benchmarks.growth import counted, files
from benchmarks.growth.counted import Counted
from benchmarks.growth.term import Growth, Term

CHUNK = 1 << 18  # bytes of a chunk's logits: 128 positions of a vocabulary of 512
SIZES = (256, 1024)


def grow(amount: Callable[[int], float], sizes: tuple[int, ...] = SIZES) -> float:
    return Growth(Term("", "", "", 0, 0, amount), sizes, tuple(map(amount, sizes))).exponent


@pytest.fixture(scope="module", params=["online", "stored"])
def losses(request: pytest.FixtureRequest) -> dict[str, list[Counted]]:
    """The loss at two numbers of positions, and at two vocabularies."""
    of = partial(counted.loss_of, chunk_bytes=CHUNK, stored=request.param == "stored", hidden=16)
    return {"N": [of(size, 512) for size in SIZES], "V": [of(256, size) for size in SIZES]}


@pytest.mark.parametrize("what", ["N", "V"])
def test_the_loss_takes_work_in_proportion_and_memory_of_one_chunk(losses: dict[str, list[Counted]], what: str) -> None:
    small, large = losses[what]
    times = SIZES[1] / SIZES[0]
    assert large.product_operations == pytest.approx(times * small.product_operations, rel=1e-6)
    assert large.calls <= times * small.calls
    grown = large.peak_bytes - small.peak_bytes
    # Beyond the chunk: a few numbers of each position, the slots of its stored signal.
    assert grown <= (SIZES[1] - SIZES[0]) * (600 if what == "N" else 8)


def test_products_of_the_loss_are_those_it_must_have(losses: dict[str, list[Counted]]) -> None:
    one_product = 2 * SIZES[0] * 512 * 16
    assert losses["N"][0].product_operations in (3 * one_product, 4 * one_product)  # without and with a teacher's


def test_a_body_takes_as_many_calls_for_any_length_and_memory_in_proportion() -> None:
    short, long = (counted.body_of(length) for length in (256, 1024))
    assert short.calls == long.calls
    assert long.peak_bytes <= 4.2 * short.peak_bytes
    assert 4 * short.product_operations < long.product_operations < 16 * short.product_operations


def test_more_samples_cost_their_places_in_the_order_and_no_micro_batch_more(tmp_path: Path) -> None:
    streams = [files.begin_stream(files.make_samples(tmp_path / str(n), n)) for n in (500, 4000)]
    held = [files.held_bytes(stream) for stream in streams]
    assert held[1] <= 8.5 * held[0]
    calls = [files.calls_of(lambda stream=stream: stream.micro_batch(3)) for stream in streams]  # type: ignore[misc]
    assert calls[1] <= 2 * calls[0]  # some have more rows than others
    far = [files.calls_of(lambda place=place: streams[0].names(place)) for place in (10**3, 10**12)]  # type: ignore[misc]
    assert far[1] <= 3 * far[0]


def test_rows_of_metrics_cost_no_later_row_more_and_a_page_of_bounded_size(tmp_path: Path) -> None:
    runs = {rows: files.make_run(tmp_path / str(rows), rows) for rows in (400, 4000)}
    sizes = [files.page_bytes(run) for run in runs.values()]
    assert sizes[1] <= 1.2 * sizes[0]
    with (
        files.MetricsWriter(runs[400], resume_step=400) as first,
        files.MetricsWriter(runs[4000], resume_step=4000) as second,
    ):
        calls = [files.calls_of(lambda one=one: files.write_row(one, 5000)) for one in (first, second)]  # type: ignore[misc]
    assert calls[0] == calls[1]


def test_an_amount_that_grows_with_the_square_is_seen() -> None:
    assert grow(lambda n: float(n * n)) == pytest.approx(2.0)
    assert grow(lambda n: 5.0) == 0.0
    term = Term("squares", "", "n", 1, 0.05, lambda n: float(n * n))
    assert not term.grow(SIZES).holds
    assert Term("lines", "", "n", 1, 0.05, float).grow(SIZES).holds
