"""A capture job in a process of its own, slowed down so that it can be killed in the middle.

    python capture_process.py FOLDER COUNT PAUSE_SECONDS [RANK WORLD_SIZE]

A folder named ``shards`` is of that layout: full at 20 kB, written in parts every 50 ms.

Prints ``written N`` after each record and ``summary JSON`` at the end.
"""

from __future__ import annotations

import json
import sys
import time

from tests.support.teachers import IDENTITY, VOCAB, ListSource, make_samples, tiny_teacher

from liquid_llm.capture.job import capture
from liquid_llm.signal_store.codecs.topk import TopKCodec
from liquid_llm.signal_store.store import StoreWriter


def make_writer(folder: str) -> StoreWriter:
    options = {"layout": "shards", "shard_bytes": 20_000, "part_seconds": 0.05} if folder.endswith("shards") else {}
    return StoreWriter(folder, IDENTITY, TopKCodec(8), vocab_size=VOCAB, **options)


def main(folder: str, count: str, pause_seconds: str, rank: str = "0", world_size: str = "1") -> None:
    teacher = tiny_teacher()
    written = 0

    def progress(tokens: int) -> None:
        nonlocal written
        written += tokens > 0
        print("written", written, flush=True)
        time.sleep(float(pause_seconds))

    summary = capture(
        {"math_tool": [ListSource(make_samples(int(count)))]},
        {"math_tool": make_writer(folder)},
        teacher,
        seq_len=100,
        batch_size=1,
        num_workers=2,
        progress=progress,
        rank=int(rank),
        world_size=int(world_size),
    )
    print("summary", json.dumps(summary.as_dict()), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
