"""Jobs killed at random moments of their whole course, run again: what they leave is what they leave undisturbed.

``KILLS`` says how many moments are tried (50), ``KILL_SEED`` which; what a failure names runs it again.
"""

from __future__ import annotations

import os
import random
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from tests.support import processes
from tests.support.gcs import Bucket
from tests.support.tiny import Tiny
from tests.support.undisturbed import Job, jobs

from liquid_llm import storage
from liquid_llm.distributed import MEETING_TIME

pytestmark = [pytest.mark.slow, pytest.mark.soak, pytest.mark.timeout(3600)]
KILLS = int(os.environ.get("KILLS", "50"))
SEED = int(os.environ.get("KILL_SEED", str(random.SystemRandom().randrange(10**6))))
LIQUID = "liquid_llm.cli.main"


def run(words: Sequence[str], folder: Path, ranks: int) -> float:
    """To a good end; how many seconds that took."""
    began = time.monotonic()
    processes.run(LIQUID, words, folder, ranks)
    return time.monotonic() - began


def kill_at(words: Sequence[str], folder: Path, ranks: int, seconds: float, only: int | None) -> float | None:
    """Run and kill after so long, all ranks or one of them; how long it took where it had ended by then."""
    running, began = processes.launch(LIQUID, words, folder, ranks), time.monotonic()
    for rank in running:
        rank.process.join(max(0.0, began + seconds - time.monotonic()))
    took = None if any(rank.process.is_alive() for rank in running) else time.monotonic() - began
    for number, rank in enumerate(running):
        if only is None or number == only:
            rank.process.kill()
    # Who is killed before all have met is waited for as long as one that is late.
    codes = processes.wait(running, 120 + MEETING_TIME.total_seconds())
    assert None not in codes, f"a rank is left waiting for one that is gone: {codes}"
    return took


def leave_alone(job: Job, folder: Path, ranks: int) -> tuple[Path, float]:
    """What the job leaves, and how long it takes when it is run as often as it is in these tests."""
    run(job.words(str(folder / "first"), folder), folder / "say", ranks)
    return folder / "first" / job.left, run(job.words(str(folder / "again"), folder), folder / "say", ranks)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", ["hybrid", "annealing", "capture", "capture of .pt files", "preparation"])
def test_a_job_killed_at_any_moment_and_run_again_leaves_the_same(
    name: str, ranks: int, scored: Tiny, tmp_path: Path
) -> None:
    if ranks == 2 and name not in ("hybrid", "capture"):
        pytest.skip("what ranks share is the same for both faces, and preparation has none")
    job, draw, killed = jobs(scored)[name], random.Random(f"{SEED} {name}"), 0
    expected, seconds = leave_alone(job, tmp_path / "undisturbed", ranks)
    patience = max(240.0, 30 * seconds)  # a machine that is busy is so for both; one that is waited for is found
    for number in range(3 * KILLS):
        moment, only = draw.uniform(0.0, seconds), draw.choice([None, *range(ranks)])
        output = tmp_path / f"killed-{number}"
        words = job.words(str(output), output)
        took = kill_at(words, tmp_path / "say", ranks, moment, only)
        killed += took is None
        seconds = min(seconds, took or seconds)  # the machine is quicker by now
        said = f"KILL_SEED={SEED}, kill {number} of {name} on {ranks} at {moment:.2f} of {seconds:.2f} s, rank {only}"
        ranks_again = processes.launch(LIQUID, words, tmp_path / "say", ranks)
        codes = processes.wait(ranks_again, patience)
        assert codes == [0] * ranks, f"{said}\n" + "\n".join(rank.said for rank in ranks_again)
        try:
            job.require_same(str(expected), str(output / job.left))
        except AssertionError as error:
            raise AssertionError(f"{said}, in {output}: {error}") from error
        shutil.rmtree(output)
        if killed == KILLS:
            break
    print(f"KILL_SEED={SEED}: {name} on {ranks}: killed {killed} times within {seconds:.2f} s")
    assert killed == KILLS


def test_the_successor_of_a_machine_that_was_killed_begins_within_a_minute(
    scored: Tiny, gcs: Bucket, tmp_path: Path
) -> None:
    """With the times that leases really have; on a machine that has nothing of the first one's."""
    job = jobs(scored)["annealing"]
    expected, seconds = leave_alone(job, tmp_path / "undisturbed", 1)
    output = f"{gcs.uri}/out"
    # the server that processes are forked from may be older than the bucket's
    env = {"STORAGE_EMULATOR_HOST": gcs.base}
    first = processes.launch(LIQUID, job.words(output, tmp_path / "a"), tmp_path / "say", 1, env=env)
    end = time.monotonic() + 120
    while not storage.list_files(f"{output}/.lease"):
        assert time.monotonic() < end, first[0].said
        time.sleep(0.05)
    first[0].process.kill()
    processes.wait(first)
    began = time.monotonic()
    second = processes.launch(LIQUID, job.words(output, tmp_path / "b"), tmp_path / "say", 1, env=env)
    assert processes.wait(second) == [0], second[0].said
    assert 40 <= time.monotonic() - began < 60 + 5 * seconds
    (run_dir,) = (tmp_path / "b").iterdir()
    job.require_same(str(expected), str(run_dir))
