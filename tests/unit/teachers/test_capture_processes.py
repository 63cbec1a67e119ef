"""Capture jobs in several processes, killed and run again: a complete store, and nothing damaged in it."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest
from tests.support import capture_process
from tests.support.teachers import VOCAB, ListSource, make_samples, tiny_teacher

from liquid_llm.teachers.capture import CaptureSummary, capture
from liquid_llm.teachers.codecs import TopKCodec
from liquid_llm.teachers.records import from_bytes
from liquid_llm.teachers.store import StoreWriter, open_store

ROOT = Path(capture_process.__file__).parents[2]


@contextlib.contextmanager
def job(folder: Path, count: int, pause: float, *share: int) -> Iterator[subprocess.Popen[str]]:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", capture_process.__name__, str(folder), str(count), str(pause), *map(str, share)]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def await_written(stream: IO[str] | None, count: int) -> None:
    assert stream is not None
    for line in stream:
        if line.strip() == f"written {count}":
            return
    raise AssertionError("the job ended before that many records")


def resume(folder: Path, count: int, rank: int = 0, world_size: int = 1) -> CaptureSummary:
    teacher = tiny_teacher()
    return capture(
        {"math_tool": [ListSource(make_samples(count))]},
        {"math_tool": StoreWriter(str(folder), teacher.identity, TopKCodec(8), vocab_size=VOCAB)},
        teacher,
        seq_len=100,
        batch_size=1,
        rank=rank,
        world_size=world_size,
    )


def assert_complete(folder: Path, count: int) -> None:
    store = open_store(str(folder))
    assert len(store) == count
    assert {store.get(sample, 100, 2.0).status for sample in make_samples(count)} == {"usable"}


@pytest.mark.slow
def test_two_at_once_one_of_them_killed(tmp_path: Path) -> None:
    with job(tmp_path, 60, 0.01) as first, job(tmp_path, 60, 0.01) as second:
        await_written(first.stdout, 10)
        first.kill()
        output = second.communicate(timeout=240)[0]
    assert second.returncode == 0
    assert '"failed": 0' in output
    assert_complete(tmp_path, 60)


@pytest.mark.slow
def test_ranks_killed_and_restarted_with_another_world_size(tmp_path: Path) -> None:
    with job(tmp_path, 100, 0.005, 0, 2) as first, job(tmp_path, 100, 0.005, 1, 2) as second:
        await_written(first.stdout, random.randint(1, 15))
        first.kill()
        await_written(second.stdout, random.randint(16, 30))
        second.kill()
        first.wait()
        second.wait()
    done = list(tmp_path.glob("*.pt"))
    assert len(done) >= 17
    for path in done:
        from_bytes(path.read_bytes())  # whatever is there is whole
    summaries = [resume(tmp_path, 100, rank, 3) for rank in range(3)]
    assert sum(summary.skipped for summary in summaries) == len(done)
    assert sum(summary.written for summary in summaries) == 100 - len(done)
    assert_complete(tmp_path, 100)
