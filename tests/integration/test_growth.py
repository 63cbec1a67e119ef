"""A run of many steps takes no more memory, descriptors, threads and disk at its end than in its middle.

``STEPS`` says how many steps are taken (20,000).
"""

from __future__ import annotations

import os
from pathlib import Path
from statistics import median

import psutil
import pytest
from tests.support.gcs import Bucket
from tests.support.tiny import Tiny

from liquid_llm import storage
from liquid_llm.cli.main import main
from liquid_llm.metrics import read_metrics
from liquid_llm.training import Trainer

pytestmark = [pytest.mark.slow, pytest.mark.soak, pytest.mark.timeout(7200)]
STEPS = int(os.environ.get("STEPS", "20000"))
LOOKS = 40
# What the last quarter of a run may have more than the one before, by their medians.
MOST = {"memory in MiB": 8.0, "descriptors": 1.0, "threads": 0.0, "disk in MiB": 0.1, "bucket in MiB": 0.1}
ROWS = ("metrics.jsonl", "tb/", "samples.jsonl")


def look(work: Path, uri: str) -> dict[str, float]:
    """What the process holds now, and what its output takes beside the rows, which are meant to grow."""
    process = psutil.Process()
    kept = [info.size for info in storage.list_files(str(work)) if not info.name.partition("/")[2].startswith(ROWS)]
    sent = [info.size for info in storage.list_files(uri) if not info.name.startswith(ROWS)]
    return {
        "memory in MiB": process.memory_info().rss / 2**20,
        "descriptors": process.num_fds(),
        "threads": process.num_threads(),
        "disk in MiB": sum(kept) / 2**20,
        "bucket in MiB": sum(sent) / 2**20,
    }


def test_a_long_run_does_not_grow(scored: Tiny, gcs: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, float]] = []
    step, every = Trainer.step, STEPS // LOOKS

    def looking(trainer: Trainer) -> object:
        if trainer.progress.step % every == 0 and trainer.progress.step > 0:
            seen.append(look(tmp_path / "work", f"{gcs.uri}/out/run"))
        return step(trainer)

    monkeypatch.setattr(Trainer, "step", looking)
    small = {"block_size": 16, "batch_size": 1, "eval_tokens": 32, "upload_interval": 1.0, "keep_last": 2}
    often = {"max_steps": STEPS, "eval_every": every, "save_every": every // 2, "metrics_interval": every // 4}
    words = scored.train_words(f"{gcs.uri}/out", local_workdir=tmp_path / "work", **small, **often)
    assert main(["train", *words]) == 0
    assert len(seen) == LOOKS - 1
    quarter = LOOKS // 4
    before, last = (
        {what: median(one[what] for one in part) for what in MOST}
        for part in (seen[-2 * quarter : -quarter], seen[-quarter:])
    )
    print(before, last, sep="\n")
    assert not {what for what in MOST if last[what] - before[what] > MOST[what]}, (before, last)
    (run_dir,) = (tmp_path / "work").iterdir()
    assert [row["step"] for row in read_metrics(run_dir) if row["kind"] == "train"][-1] == STEPS
