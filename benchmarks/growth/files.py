"""Made-up data, stores and runs of any size, and what it takes to begin with them and to go on."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.bench_save import make_state, metadata

from liquid_llm.checkpoint.store import CheckpointStore
from liquid_llm.data.buckets import WholePlan
from liquid_llm.data.loader import SampleOrder, TrainingStream, WeightedDataset
from liquid_llm.data.token_writer import COLUMNS, FORMAT_VERSION, DatasetMeta
from liquid_llm.data.tokens import TokenDataset, split
from liquid_llm.framing import Framing
from liquid_llm.metrics import MetricsWriter
from liquid_llm.report import write_report
from liquid_llm.signal_store.shards.folder import INDEX_FILE
from liquid_llm.signal_store.store import StoreReader

STORE_NAMES = "gsm8k/train/%08d"
_TOKENS = 12  # of a sample on average: what is looked at is the number of samples


def seconds(work: Callable[[], Any], times: int = 1) -> float:
    """Least of the processor's seconds that ``work`` took."""
    found = []
    for _ in range(times):
        began = time.process_time()
        work()
        found.append(time.process_time() - began)
    return min(found)


def calls_of(work: Callable[[], Any]) -> int:
    """Calls of functions, of Python and of C, that ``work`` makes the second time."""
    work()
    found = 0

    def note(_frame: Any, event: str, _what: Any) -> None:
        nonlocal found
        found += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(before)
    return found


# ------------------------------------------------------------------------------------------------------------- samples


def make_samples(folder: Path, samples: int) -> TokenDataset:
    """A tokenised dataset with that many samples, written column by column, of lengths between 4 and 20."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    lengths = rng.integers(4, 2 * _TOKENS - 4, samples)
    ids = np.char.mod("made-up/%09d", np.arange(samples)).astype("S")
    width = ids.dtype.itemsize
    columns = {
        "starts": np.cumsum(lengths) - lengths,
        "lengths": lengths,
        "id_starts": np.arange(samples) * width,
        "id_lengths": np.full(samples, width),
        "fates": rng.integers(0, 2**63, samples, dtype=np.uint64) * np.uint64(2),
    }
    sizes = {}
    files = {name: columns[name].astype(dtype) for name, dtype in COLUMNS.items()}
    for name, values in {**files, "tokens": np.zeros(int(lengths.sum()), "<u2"), "ids": ids}.items():
        values.tofile(folder / name)
        sizes[name] = (folder / name).stat().st_size
    meta = DatasetMeta(FORMAT_VERSION, "math_tool", "<u2", 0, 0, sizes, 1, "samples", ["text"], 0)
    return TokenDataset(folder, meta, Framing(None, 0))


def begin_stream(dataset: TokenDataset) -> TrainingStream:
    """What a run does before its first micro-batch: hold out a share, plan buckets, order the first epoch."""
    train, _ = split(dataset, 0.01)
    stream = TrainingStream([WeightedDataset(train, 1.0)], block_size=16, batch_size=8, seed=0)
    stream.micro_batch(0)
    return stream


def held_bytes(stream: TrainingStream) -> int:
    """Arrays that a stream keeps: its plan, and the order of an epoch."""
    (order,) = stream.orders
    assert isinstance(order, SampleOrder)
    plan = order._plan
    assert isinstance(plan, WholePlan)
    arrays = [plan._plan.bucket_of, plan._plan.bounds, *plan._order(0)]
    return sum(array.nbytes for array in arrays)


# --------------------------------------------------------------------------------------------------------------- store


def index_bytes(store: Path) -> int:
    """The size of a store's index."""
    return (store / INDEX_FILE).stat().st_size


def find_some(store: StoreReader, records: int) -> None:
    """Look up a thousand of its records, spread over it."""
    assert all(store.has(STORE_NAMES % n) for n in np.linspace(0, records - 1, 1000).astype(int).tolist())


# ------------------------------------------------------------------------------------------------- what a run writes


def make_run(folder: Path, rows: int) -> Path:
    """A run directory with that many rows of metrics, written as a run writes them."""
    folder.mkdir()
    with MetricsWriter(folder, resume_step=None) as writer:
        for step in range(1, rows + 1):
            write_row(writer, step)
    (folder / "provenance").mkdir()
    (folder / "provenance" / "config.json").write_text(json.dumps({"max_steps": rows}))
    return folder


def write_row(writer: MetricsWriter, step: int) -> None:
    loss = 2.0 + 1.0 / step + 0.1 * np.sin(step)
    values = {"loss": loss, "ce": loss, "kd": loss / 2, "l2": 0.0, "tokens": 1000, "positions": 1000, "seconds": 1.0}
    writer.write("train", step, {**values, "tokens_per_second": 1000.0, "lr": 1e-4, "grad_norm": 1.0})


def page_bytes(run: Path) -> int:
    """The size of a run's report."""
    return Path(write_report(str(run))).stat().st_size


def append_rows(run: Path, rows: int, more: int = 200) -> float:
    """Seconds to write ``more`` rows behind those that are there."""
    with MetricsWriter(run, resume_step=rows) as writer:
        return seconds(lambda: [write_row(writer, rows + n) for n in range(1, more + 1)])


def reopen(run: Path, rows: int) -> float:
    """Seconds to open a run's rows anew, those after the checkpoint dropped."""
    return seconds(lambda: MetricsWriter(run, resume_step=rows).close())


def save(folder: Path, parameters: int) -> tuple[float, int]:
    """Seconds to write a checkpoint, weights and both moments, and its bytes."""
    state = make_state(parameters / 1e6)
    with CheckpointStore(folder, keep_last=1) as store:
        took = seconds(lambda: store.save(state, metadata(1)))
    return took, max(path.stat().st_size for path in folder.rglob("*.pt"))
