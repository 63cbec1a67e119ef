"""Two writers of shards at a time, killed again and again, and what is in their folder after each time.

    python killed_writers.py FOLDER ROUNDS

Each round forks two writers that begin with the samples that are not there yet, one from either end, and kills them by
SIGKILL within 60 ms. Whatever is in the folder then must be whole, right, and no less than before. One more writer is
left alone at the end. Prints one line of JSON with what was seen.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch

from liquid_llm.data.types import Sample
from liquid_llm.identity import ModelIdentity
from liquid_llm.signal_store.codecs.full import FullCodec
from liquid_llm.signal_store.records import Record
from liquid_llm.signal_store.store import StoreWriter, open_store

SAMPLES = [Sample(f"s/{n}", "code", np.arange(n, n + 60, dtype=np.int32)) for n in range(400)]
PAYLOAD_BYTES = 500


def writer(folder: str) -> StoreWriter:
    identity = ModelIdentity("org/teacher", "r", "t")
    return StoreWriter(
        folder, identity, FullCodec(), vocab_size=300, layout="shards", shard_bytes=20_000, part_seconds=0.01
    )


def payload(sample: Sample) -> dict[str, torch.Tensor]:
    return {"logits": torch.full((PAYLOAD_BYTES // 2,), float(sample.input_ids[0]), dtype=torch.float16)}


def write(folder: str, backwards: bool) -> None:
    store = writer(folder)
    for sample in reversed(SAMPLES) if backwards else SAMPLES:
        if not store.has(sample.sample_id):
            store.write(sample, 60, payload(sample))
            time.sleep(0.002)
    store.finish()


def killed(folder: str, after_seconds: float) -> None:
    pids = []
    for backwards in (False, True):
        pid = os.fork()
        if pid == 0:
            write(folder, backwards)
            os._exit(0)
        pids.append(pid)
    time.sleep(after_seconds)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    for pid in pids:
        os.waitpid(pid, 0)


def records_there(folder: Path) -> int:
    if not any(folder.glob("shard-*.safetensors")):
        return 0
    store = open_store(str(folder))
    known = {sample.sample_id: sample for sample in SAMPLES}
    seen = set()
    for name, found in store.layout.records():
        if not isinstance(found, Record):
            raise SystemExit(f"{name}: {found}")
        if name in seen or not torch.equal(found.payload["logits"], payload(known[name])["logits"]):
            raise SystemExit(f"{name} is there twice or wrong")
        seen.add(name)
    if store.layout.listing.problems():  # type: ignore[attr-defined]
        raise SystemExit(str(store.layout.listing.problems()))  # type: ignore[attr-defined]
    return len(seen)


def main(folder: str, rounds: str) -> None:
    torch.set_num_threads(1)
    done, states = 0, set()
    for _ in range(int(rounds)):
        killed(folder, random.uniform(0, 0.06))
        there = records_there(Path(folder))
        if there < done:
            raise SystemExit(f"{done} records before, {there} now")
        done = there
        states.add((there, len(list(Path(folder).glob("*")))))
    write(folder, backwards=False)
    seen = {"kills": 2 * int(rounds), "states": len(states), "records": records_there(Path(folder))}
    print(json.dumps({**seen, "samples": len(SAMPLES)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
