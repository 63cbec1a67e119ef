"""Capture jobs in several processes, killed and run again: a complete store, and nothing damaged in it."""

from __future__ import annotations

import contextlib
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest
from tests.support import capture_process, forked, killed_writers
from tests.support.forked import Forked
from tests.support.teachers import ListSource, make_samples, tiny_teacher

from liquid_llm.capture.job import CaptureSummary, capture
from liquid_llm.signal_store.records import Record
from liquid_llm.signal_store.store import open_store

ROOT = Path(capture_process.__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "OMP_NUM_THREADS": "1"}


@contextlib.contextmanager
def job(folder: Path, count: int, pause: float, *share: int) -> Iterator[Forked]:
    words = ["-m", capture_process.__name__, str(folder), str(count), str(pause), *map(str, share)]
    process = Forked(words, cwd=ROOT, env=ENVIRONMENT, stderr=False)
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
        {"math_tool": capture_process.make_writer(str(folder))},
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
    names = [name for name, _ in store.layout.records()]
    assert len(names) == len(set(names)) == count


def num_whole(folder: Path) -> int:
    """Records there, all of them whole; 0 where there is no store yet."""
    if not any(path.suffix in (".pt", ".safetensors") for path in folder.glob("*")):
        return 0
    found = [record for _, record in open_store(str(folder)).layout.records()]
    assert all(isinstance(record, Record) for record in found)
    return len(found)


@pytest.fixture(params=["pt", "shards"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path / request.param


@pytest.mark.slow
def test_two_at_once_one_of_them_killed(folder: Path) -> None:
    with job(folder, 60, 0.1) as first, job(folder, 60, 0.01) as second:
        await_written(second.stdout, 5)  # the first is slow: it is not near its end, whichever of them started earlier
        first.kill()
        output = second.communicate(timeout=240)[0]
    assert second.returncode == 0
    assert '"failed": 0' in output
    assert_complete(folder, 60)


@pytest.mark.slow
def test_ranks_killed_and_restarted_with_another_world_size(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    with job(folder, 100, 0.02, 0, 2) as first, job(folder, 100, 0.02, 1, 2) as second:
        await_written(first.stdout, random.randint(1, 15))
        first.kill()
        await_written(second.stdout, random.randint(16, 30))
        second.kill()
        first.wait()
        second.wait()
    done = num_whole(folder)
    assert done > 0  # of both the last 50 ms may be lost
    summaries = [resume(folder, 100, rank, 3) for rank in range(3)]
    assert sum(summary.skipped for summary in summaries) == done
    assert sum(summary.written for summary in summaries) == 100 - done
    assert_complete(folder, 100)


@pytest.mark.slow
def test_writers_of_shards_killed_at_any_moment(tmp_path: Path) -> None:
    """What was published stays, nothing half-written shows, and a sample written by several has one record."""
    done = forked.run(["-m", killed_writers.__name__, str(tmp_path), "40"], cwd=ROOT, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["kills"] == 80
    assert seen["states"] >= 5  # it was not always the same moment; a busy machine starts them later
    assert seen["records"] == seen["samples"] == 400
