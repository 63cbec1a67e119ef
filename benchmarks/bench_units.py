"""What units cost as a corpus grows to a billion samples: claimed by a task, opened for training, put in order.

    python benchmarks/bench_units.py                     up to 50,000 data files of 20,000 samples each; some minutes
    python benchmarks/bench_units.py --small

Each figure is of a process of its own: seconds of the processor, and megabytes at the peak above those of the imports.

claim     a task finds its five units of a manifest that lists all files, or that has one pattern for all
open      a store with a marker for each file, and after a record of each of 100 units has been read
order     a micro-batch far into an epoch is found: shuffled as a whole, and a few files at a time. What a run knows of
          each sample anyway (its length and file) is there before
train     what a run does with its texts from the start to its hundredth micro-batch, the first 20 and 80 of some place
          far into an epoch: a cache of all files, shuffled as a whole, and a cache for each, a few at a time; of whole
          samples, and of documents joined into blocks. Text is tokenised before; the memory of maps, which a machine
          takes back when it needs it, is told apart
The files of the corpus are empty and their records are simulated: names and markers are true, and 100 units of them.
Caches of tokens are true: that of one file stands for all where each has its own.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from liquid_llm.data.many_files import Cut, ManyFiles

SAMPLES = 20_000  # a data file
READ = 100  # units that are read
TOKENS = 500  # a sample, on average


def megabytes(name: str = "VmHWM") -> float:
    """Memory of this process so far: at its peak, or (``VmRSS``) now."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) / 1024


def measure(work: Callable[[], object]) -> dict[str, object]:
    """Seconds of the processor and megabytes that ``work`` takes in this process, of maps too, and what it gives."""
    import liquid_llm.data.loader  # noqa: F401 what brings torch along is not the work's

    before, started = megabytes("VmRSS"), time.process_time()
    mapped = megabytes("RssFile")
    found = work()
    return {
        "mapped": megabytes("RssFile") - mapped,
        "seconds": time.process_time() - started,
        "megabytes": max(0.0, megabytes() - before),
        "found": found,
    }


# ------------------------------------------------------------------------------------------------------------ the parts


def claim_units(folder: str, manifest: str, count: int) -> dict[str, object]:
    from liquid_llm.capture.units import claim, list_units
    from liquid_llm.data.manifest import read_manifest

    place = str(Path(folder) / manifest)

    def work() -> int:
        return claim(list_units(read_manifest(place), place), (3, max(1, count // 5)))[1]

    return measure(work)


def open_units(folder: str, read: int) -> dict[str, object]:
    from liquid_llm.data.types import Sample
    from liquid_llm.signal_store.store import open_store

    ids = np.arange(2, 20, dtype=np.int32)

    def work() -> int:
        store = open_store(str(Path(folder) / "store"))
        for number in range(read):
            found = store.get(Sample(f"s{number}", "lm", ids, None, name_of(number)), 1024, 2.0)
            assert found.status == "usable", found
        return store.layout.num_open  # type: ignore[attr-defined]

    return measure(work)


def find_in_order(count: int, way: str) -> dict[str, object]:
    from liquid_llm.data.buckets import WholePlan, WindowedPlan
    from liquid_llm.data.two_levels import WINDOW_TOKENS, KnownLengths, Shards, Windows

    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.lognormal(np.log(TOKENS * 0.8), 0.6, count).astype(np.int64) + 2, 1024)
    files = np.arange(count, dtype=np.int32) // SAMPLES

    def work() -> int:
        plan: WholePlan | WindowedPlan
        if way == "whole":
            plan = WholePlan(lengths, 8, 1024, (1, 0))
        else:
            shards = Shards.of(lengths, files, WINDOW_TOKENS)
            plan = WindowedPlan(KnownLengths(lengths, shards), 8, 1024, Windows(shards, (1, 0)), (1, 0))
        plan.samples(3 * plan.num_micro_batches // 2)
        return plan.num_micro_batches

    return measure(work)


def tokens_of(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Lengths of so many samples, and where each begins."""
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.lognormal(np.log(TOKENS * 0.8), 0.6, count).astype(np.int64) + 2, 4096)
    return lengths, np.cumsum(lengths) - lengths


def write_cache(folder: Path, count: int, type: str = "math_tool") -> None:
    """A cache of so many samples, whose tokens are a hole in a file."""
    from liquid_llm.data.token_writer import META, DatasetMeta, write_hashes

    folder.mkdir(parents=True)
    lengths, starts = tokens_of(count)
    digits = len(f"s{count}")
    columns = {
        "starts": starts,
        "lengths": lengths,
        "id_starts": np.arange(count) * digits,
        "id_lengths": np.full(count, digits),
        "fates": np.random.default_rng(1).integers(0, 2**64, count, np.uint64),
    }
    for name, values in columns.items():
        values.tofile(folder / name)
    with (folder / "ids").open("wb") as stream:
        stream.writelines(f"s{number}".zfill(digits).encode() for number in range(count))
    with (folder / "tokens").open("wb") as stream:
        stream.truncate(2 * int(lengths.sum()))
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    meta = DatasetMeta(1, type, "<u2", 0, 0, sizes)
    (folder / META).write_text(json.dumps(meta.plain()))
    if count <= SAMPLES:
        write_hashes(folder, meta)


def train_on(mixture: object, windows: dict[str, int]) -> float:
    """Take a hundred micro-batches; the seconds of the processor that they took."""
    from liquid_llm.data.loader import TrainingStream, WeightedDataset

    sizes = {"block_size": 1024, "batch_size": 8, "seed": 1}
    stream = TrainingStream([WeightedDataset(mixture, 1.0)], window_tokens=windows, **sizes)  # type: ignore[arg-type]
    far = 3 * stream.orders[0].num_micro_batches // 4
    started = time.process_time()
    for number in (*range(20), *range(far, far + 80)):
        stream.at(number)
    return time.process_time() - started


def train_on_one(folder: str, count: int) -> dict[str, object]:
    from liquid_llm.data.token_writer import read_meta
    from liquid_llm.data.tokens import TokenDataset, split
    from liquid_llm.framing import Framing

    def work() -> float:
        place = Path(folder) / "one"
        meta = read_meta(place)
        assert meta is not None
        train, _ = split(TokenDataset(place, meta, Framing(None, 0)), 0.05)
        return train_on(train, {})

    return measure(work)


def train_on_many(folder: str, count: int, type: str) -> dict[str, object]:
    from liquid_llm.data.two_levels import WINDOW_TOKENS

    def work() -> float:
        return train_on(read_many(Path(folder), count, type), {type: WINDOW_TOKENS})

    return measure(work)


def cut_of(type: str) -> Cut:
    from liquid_llm.data.many_files import Cut

    return Cut(1024, 0.05, None, 16_384, 0, 1024 if type == "lm" else None)


def read_many(folder: Path, count: int, type: str) -> ManyFiles:
    from liquid_llm.data.many_files import FileCaches, ManyFiles
    from liquid_llm.framing import Framing
    from liquid_llm.sources import default_layout

    files = [str(folder / "data" / f"part-{number:06d}.jsonl") for number in range(count)]
    how = {"framing": Framing(None, 0), "layout": default_layout(type)}
    caches = FileCaches(type, None, "hash", folder / "tokens", **how)  # type: ignore[arg-type]
    return ManyFiles.read(caches, cut_of(type), files, [name_of(number) for number in range(count)])


def write_caches(folder: Path, count: int, type: str) -> None:
    """The cache of one data file under the names of all."""
    from liquid_llm import storage
    from liquid_llm.data.many_files import Survey, write_survey
    from liquid_llm.data.tokens import cache_folders, open_cache
    from liquid_llm.framing import Framing
    from liquid_llm.sources import default_layout

    framing, cut = Framing(None, 0), cut_of(type)
    tokens = folder / "tokens"
    real = tokens / f"real-{type}"
    write_cache(real, SAMPLES, type)
    dataset = open_cache(real, framing)
    assert dataset is not None
    write_survey(real, cut, Survey.of(dataset, cut))
    for number in range(count):
        info = storage.stat(str(folder / "data" / f"part-{number:06d}.jsonl"))
        assert info is not None
        key = [[info.uri, info.size, info.version]]
        place, _ = cache_folders(key, type, "hash", tokens, framing=framing, layout=default_layout(type))
        place.symlink_to(real)
        for kind in (f"{cut.name}.json", "sha256"):
            os.link(tokens / f".{real.name}.{kind}", place.with_name(f".{place.name}.{kind}"))


PARTS: dict[str, Callable[..., dict[str, object]]] = {
    "claim": claim_units,
    "open": open_units,
    "order": find_in_order,
    "one": train_on_one,
    "many": train_on_many,
}


# ------------------------------------------------------------------------------------------------------------ the world


def name_of(number: int) -> str:
    return f"part-{number:06d}.jsonl-000000000000"


def make_world(folder: Path, count: int) -> None:
    """Empty data files with two manifests, and a store with a marker for each of which a few have records."""
    from liquid_llm.identity import ModelIdentity
    from liquid_llm.signal_store.codecs import get_codec
    from liquid_llm.signal_store.store import StoreWriter

    (folder / "data").mkdir()
    for number in range(count):
        (folder / "data" / f"part-{number:06d}.jsonl").touch()
    lines = [{"path": f"data/part-{number:06d}.jsonl", "type": "lm"} for number in range(count)]
    (folder / "lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "pattern.jsonl").write_text(json.dumps({"path": "data/*.jsonl", "type": "lm"}))
    import torch

    from liquid_llm.data.types import Sample

    codec = get_codec("topk", options={"k": 4})
    rows = codec.pack(codec.encode(torch.randn(17, 300), 1, 0))
    for number in range(min(READ, count)):
        identity = ModelIdentity("org/teacher", "commit", "tokenizer")
        writer = StoreWriter(
            str(folder / "store"), identity, codec, vocab_size=300, layout="units", unit=name_of(number)
        )
        writer.write(Sample(f"s{number}", "lm", np.arange(2, 20, dtype=np.int32)), 18, rows)
        writer.finish()
    (folder / "store" / "done").mkdir()
    for number in range(count):
        (folder / "store" / "done" / f"{name_of(number)}.json").touch()


def in_a_process(part: str, *arguments: object) -> dict[str, object]:
    words = [sys.executable, __file__, "--part", part, json.dumps(arguments)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


def show(name: str, found: dict[str, object], more: str = "") -> None:
    print(f"  {name:<34} {found['seconds']:8.2f} s {found['megabytes']:9.1f} MB  {more}".rstrip(), flush=True)


def said(found: dict[str, object]) -> str:
    return f"{found['mapped']:.0f} MB of them mapped; {found['found']:.2f} s in 100 micro-batches"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="up to 500 data files, and a million samples in order")
    parser.add_argument("--part", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.part:
        print(json.dumps(PARTS[asked.part[0]](*json.loads(asked.part[1]))))
        return
    print(f"{platform.machine()}, {platform.system()}, Python {platform.python_version()}")
    for count in (100, 500) if asked.small else (5, 500, 5_000, 50_000):
        print(f"{count:,} data files, {count * SAMPLES:,} samples")
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            make_world(folder, count)
            show("claim, a line for each", in_a_process("claim", name, "lines.jsonl", count))
            show("claim, one pattern", in_a_process("claim", name, "pattern.jsonl", count))
            show("open", in_a_process("open", name, 0))
            found = in_a_process("open", name, READ)
            show(f"open, {READ} units read", found, f"{found['found']} open at the end")
            for type, what in (("math_tool", "train, a cache for each"), ("lm", "train in blocks, a cache for each")):
                write_caches(folder, count, type)
                found = in_a_process("many", name, count, type)
                show(what, found, said(found))
    for count in (100_000, 1_000_000) if asked.small else (100_000, 1_000_000, 10_000_000):
        print(f"order of {count:,} samples in {-(-count // SAMPLES)} files")
        for way in ("whole", "shards"):
            found = in_a_process("order", count, way)
            show(way, found, f"{found['found']:,} micro-batches")
        for type, what in (("math_tool", "train, one cache"), ("lm", "train in blocks, one cache")):
            with tempfile.TemporaryDirectory() as name:
                write_cache(Path(name) / "one", count, type)
                found = in_a_process("one", name, count)
                show(what, found, said(found))


if __name__ == "__main__":
    main()
