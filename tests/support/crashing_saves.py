"""Processes that die while they save; run as a script by the checkpoint tests, so that torch is imported once.

crashing_saves.py points FOLDER    kill one save before each of its file-system calls in turn; a line of JSON for each
crashing_saves.py random FOLDER N  N times: save as fast as possible until killed at a random moment; "ACK step" lines
                                   go to stdout, and the next round waits for a line on stdin
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from tests.support.checkpoints import metadata_of, state_of
from tests.support.dying import die_before_call

from liquid_llm.checkpoint.store import CheckpointStore

CALLS = ("replace", "link", "unlink", "fsync", "mkdir", "open", "rename")
CRASHED = 9


def save(folder: Path, step: int, also_as: Sequence[str]) -> None:
    with CheckpointStore(folder, 2, log=lambda _: None) as store:
        # no two saves have the same bytes, as two runs of one step never quite have
        store.save(state_of(step) | {"process": os.getpid()}, metadata_of(step), also_as=also_as)


def open_only(folder: Path) -> None:
    CheckpointStore(folder, 2, log=lambda _: None).close()


def in_child(work: Callable[[], None]) -> int:
    """The child's pid; it never returns from here."""
    pid = os.fork()
    if pid == 0:
        work()
        os._exit(0)
    return pid


def crashing_runs(before: Path, work: Callable[[Path], None]) -> Iterator[tuple[Path, bool]]:
    """For each file-system call of ``work``: a copy of ``before`` in which it died right before that call.

    Yields the folder and whether ``work`` died; the last one lived.
    """
    number, crashed = 0, True
    while crashed:
        number += 1
        run = before.with_name(f"{before.name}.{number}")
        run.mkdir()
        for path in before.iterdir():
            os.link(path, run / path.name)  # data is replaced, never changed: links to it are as good as copies

        def crash(run: Path = run, number: int = number) -> None:
            die_before_call(number, CALLS, lambda: os._exit(CRASHED))
            work(run)

        _, status = os.waitpid(in_child(crash), 0)
        code = os.waitstatus_to_exitcode(status)
        if code not in (0, CRASHED):
            raise SystemExit(f"{run}: the child ended with {code}")
        crashed = code == CRASHED
        yield run, crashed


def every_point(before: Path, first: int, second: int, also_as: Sequence[str], recovery: bool) -> None:
    """Kill the saving of step ``second``; with ``recovery``, kill also what tidies up after each of those."""
    before.mkdir()
    save(before, first, also_as)
    for run, crashed in crashing_runs(before, lambda folder: save(folder, second, also_as)):
        least = first if crashed else second
        if recovery and crashed:
            for again, _ in crashing_runs(run, open_only):
                report(again, least)
        report(run, least)


def report(run: Path, least: int) -> None:
    print(json.dumps({"run": str(run), "least": least}), flush=True)


def endless(folder: Path, first: int, acks: int) -> None:
    with CheckpointStore(folder, 2, log=lambda _: None) as store:
        for step in range(first, 10**8):
            names = random.sample(("last", "best", "final"), random.randrange(4))
            store.save(state_of(step, 128), metadata_of(step), also_as=names, kind=random.choice(("step", "time")))
            os.write(acks, f"ACK {step}\n".encode())


def seconds_of_a_save(folder: Path) -> float:
    """Of a save in a process of its own, here and now: a busy machine takes its time, and is given it."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as elsewhere:
        begun = time.monotonic()
        os.waitpid(in_child(lambda: save(Path(elsewhere), 1, ("last",))), 0)
        return time.monotonic() - begun


def random_moments(folder: Path, rounds: int) -> None:
    first, one_save = 1, seconds_of_a_save(folder)
    for _ in range(rounds):
        pid = in_child(lambda first=first: endless(folder, first, 1))  # type: ignore[misc]
        time.sleep(random.uniform(0.2, 4.0) * one_save)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.write(1, b"KILLED\n")
        first = int(sys.stdin.readline())


if __name__ == "__main__":
    torch.set_num_threads(1)  # forked children have none of the parent's threads
    if sys.argv[1] == "points":
        folder = Path(sys.argv[2])
        every_point(folder / "next", 1, 2, ("last", "best"), recovery=False)
        every_point(folder / "again", 5, 5, ("last",), recovery=False)  # the snapshot of the same step is overwritten
        every_point(folder / "alone", 7, 7, (), recovery=True)  # and it is the only one
    else:
        random_moments(Path(sys.argv[2]), int(sys.argv[3]))
