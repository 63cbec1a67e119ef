"""How time and memory grow with the size of a job: positions, vocabulary, context, samples, records, parameters, rows.

    python benchmarks/bench_growth.py                       all sizes, up to a million samples; minutes
    python benchmarks/bench_growth.py --small               an eighth of them
    python benchmarks/bench_growth.py --only loss,store

Each row of the table: what it takes at each size, the exponent of its growth from end to end, and the one that it must
have by what it is. Products, operations and bytes of the loss and of the student are counted on tensors that have
shapes and no memory; seconds are the processor's, of one thread, where the exponent may be 0.25 above.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import torch
from benchmarks.growth import counted, files
from benchmarks.growth.term import Growth, Term

EXACT, MEASURED = 0.01, 0.25  # what an exponent may be above what it must be
Terms = Iterator[Growth]


class Sizes:
    """The sizes of each kind, smaller where the table is to be had quickly."""

    def __init__(self, small: bool) -> None:
        self.small = small
        self.positions = self._of(1024, 4096, 16384, 65536)
        self.vocab = self._of(4096, 16384, 65536, 262144)
        self.lengths = self._of(1024, 4096, 16384, 65536)
        self.samples = self._of(8000, 80_000, 800_000)
        self.records = self._of(8000, 80_000, 800_000)
        self.rows = self._of(1000, 8000, 64_000)
        self.parameters = self._of(2_000_000, 8_000_000, 32_000_000)

    def _of(self, *sizes: int) -> tuple[int, ...]:
        return tuple(size // 8 if self.small else size for size in sizes)


def grow(
    name: str, unit: str, of: str, most: float, slack: float, sizes: Sequence[int], amount: Callable[[int], float]
) -> Growth:
    return Term(name, unit, of, most, slack, amount).grow(sizes)


def loss_terms(sizes: Sizes, folder: Path) -> Terms:
    """Counted over positions and over the vocabulary, and timed for real."""
    from benchmarks.bench_loss import CONTESTANTS, Inputs, Shape

    at_v, at_n, chunk = (4096, 512, 1 << 20) if sizes.small else (32768, 4096, 32 << 20)
    for stored in (False, True):
        name = f"loss, {'stored' if stored else 'online'}"
        over = {
            "N": (
                sizes.positions,
                lru_cache(partial(counted.loss_of, vocab_size=at_v, chunk_bytes=chunk, stored=stored)),
            ),
            "V": (sizes.vocab, lru_cache(partial(counted.loss_of, at_n, chunk_bytes=chunk, stored=stored))),
        }
        for of, (those, look) in over.items():
            yield grow(
                f"{name}: products", "GFLOP", of, 1, EXACT, those, lambda n, look=look: look(n).product_operations / 1e9
            )
            yield grow(f"{name}: calls", "calls", of, 1, EXACT, those, lambda n, look=look: look(n).calls)
            yield grow(
                f"{name}: beyond inputs and gradients",
                "MB",
                of,
                0,
                MEASURED,
                those,
                lambda n, look=look: look(n).peak_bytes / 1e6,
            )

    def timed(tokens: int, vocab_size: int) -> float:
        data = Inputs(Shape(tokens, vocab_size, 64, 64, "float32"))
        return files.seconds(lambda: CONTESTANTS["fused KL + CE, T=2"](data), times=2)

    yield grow("loss, online: run, V = 4,096", "s", "N", 1, MEASURED, sizes.positions, lambda n: timed(n, 4096))
    yield grow("loss, online: run, N = 256", "s", "V", 1, MEASURED, sizes.vocab, lambda v: timed(256, v))


def body_terms(sizes: Sizes, folder: Path) -> Terms:
    """The student's body over its context: attention's products grow with the square of a text's length."""
    one = lru_cache(counted.body_of)
    many = lru_cache(lambda length: counted.body_of(length, rows=sizes.lengths[-1] // length))
    yield grow(
        "body, one text: products", "GFLOP", "T", 2, EXACT, sizes.lengths, lambda n: one(n).product_operations / 1e9
    )
    yield grow("body, one text: calls", "calls", "T", 0, EXACT, sizes.lengths, lambda n: one(n).calls)
    yield grow("body, one text: memory", "MB", "T", 1, 0.05, sizes.lengths, lambda n: one(n).peak_bytes / 1e6)
    yield grow(
        "body, as many tokens: products",
        "GFLOP",
        "T",
        1,
        EXACT,
        sizes.lengths,
        lambda n: many(n).product_operations / 1e9,
    )
    yield grow("body, as many tokens: memory", "MB", "T", 0, EXACT, sizes.lengths, lambda n: many(n).peak_bytes / 1e6)


def data_terms(sizes: Sizes, folder: Path) -> Terms:
    """Tokenised samples: to begin with them, to get one micro-batch, to jump, what is held of them."""
    made = {samples: files.make_samples(folder / f"samples-{samples}", samples) for samples in sizes.samples}
    streams = {samples: files.begin_stream(dataset) for samples, dataset in made.items()}
    yield grow(
        "data: before the first micro-batch",
        "s",
        "samples",
        1,
        MEASURED,
        sizes.samples,
        lambda n: files.seconds(lambda: files.begin_stream(made[n])),
    )
    yield grow(
        "data: held of order and buckets",
        "MB",
        "samples",
        1,
        EXACT,
        sizes.samples,
        lambda n: files.held_bytes(streams[n]) / 1e6,
    )
    yield grow(
        "data: a micro-batch",
        "us",
        "samples",
        0,
        MEASURED,
        sizes.samples,
        lambda n: 1e4 * files.seconds(lambda: [streams[n].micro_batch(k) for k in range(100)], times=5),
    )
    stream = streams[sizes.samples[0]]
    yield grow(
        "data: calls of a micro-batch",
        "calls",
        "place",
        0,
        0.05,
        (10**3, 10**6, 10**9, 10**12),
        lambda place: files.calls_of(lambda: stream.names(place)),
    )


def store_terms(sizes: Sizes, folder: Path) -> Terms:
    """A store of signal: to open it, to find a record."""
    from benchmarks.bench_store import make_big_store

    from liquid_llm.signal_store.store import open_store

    for records in sizes.records:
        (folder / f"store-{records}").mkdir()
        make_big_store(folder / f"store-{records}", records)
    places = {records: str(folder / f"store-{records}") for records in sizes.records}
    yield grow(
        "store: to open it",
        "s",
        "records",
        1,
        MEASURED,
        sizes.records,
        lambda n: files.seconds(lambda: open_store(places[n]), times=2),
    )
    yield grow(
        "store: its index", "MB", "records", 1, EXACT, sizes.records, lambda n: files.index_bytes(Path(places[n])) / 1e6
    )
    stores = {records: open_store(place) for records, place in places.items()}
    yield grow(
        "store: to find 1,000 records",
        "ms",
        "records",
        0,
        MEASURED,
        sizes.records,
        lambda n: 1e3 * files.seconds(lambda: files.find_some(stores[n], n), times=3),
    )


def file_terms(sizes: Sizes, folder: Path) -> Terms:
    """What a run writes: a row of metrics, its report, its checkpoints."""
    runs = {rows: files.make_run(folder / f"run-{rows}", rows) for rows in sizes.rows}
    yield grow(
        "metrics: 200 more rows", "ms", "rows", 0, MEASURED, sizes.rows, lambda n: 1e3 * files.append_rows(runs[n], n)
    )
    yield grow("metrics: to go on after them", "s", "rows", 1, MEASURED, sizes.rows, lambda n: files.reopen(runs[n], n))
    yield grow(
        "report: to make it",
        "s",
        "rows",
        1,
        MEASURED,
        sizes.rows,
        lambda n: files.seconds(lambda: files.page_bytes(runs[n])),
    )
    yield grow("report: its page", "kB", "rows", 0, MEASURED, sizes.rows, lambda n: files.page_bytes(runs[n]) / 1e3)
    saved = lru_cache(lambda n: files.save(folder / f"saved-{n}", n))
    yield grow("checkpoint: to write it", "s", "parameters", 1, MEASURED, sizes.parameters, lambda n: saved(n)[0])
    yield grow("checkpoint: its bytes", "MB", "parameters", 1, EXACT, sizes.parameters, lambda n: saved(n)[1] / 1e6)


PARTS: dict[str, Callable[[Sizes, Path], Terms]] = {
    "loss": loss_terms,
    "body": body_terms,
    "data": data_terms,
    "store": store_terms,
    "files": file_terms,
}


def show(growth: Growth) -> str:
    """One row."""
    sizes = f"{growth.sizes[0]:,} to {growth.sizes[-1]:,} {growth.term.of}"
    amounts = " ".join(f"{amount:>10,.4g}" for amount in growth.amounts)
    said = "" if growth.holds else "  GROWS TOO FAST"
    return (
        f"{growth.term.name:>40} {sizes:>34} {amounts:>43} {growth.term.unit:<6}"
        f"{growth.exponent:>6.2f} {growth.term.most:>5g}{said}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="an eighth of all sizes")
    parser.add_argument("--only", default=",".join(PARTS), help="comma-separated parts")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    print(f"{platform.machine()}, {platform.platform()}, torch {torch.__version__}, load average {load:.1f}")
    print(f"\n{'':>40} {'from, to':>34} {'amounts':>43} {'':<6}{'found':>6} {'must':>5}", flush=True)
    for name in arguments.only.split(","):
        with tempfile.TemporaryDirectory() as folder:
            for growth in PARTS[name](Sizes(arguments.small), Path(folder)):
                print(show(growth), flush=True)


if __name__ == "__main__":
    main()
