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
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tests.support.checkpoints import metadata_of, state_of

from liquid_llm.checkpoint.store import CheckpointStore

CALLS = ("replace", "link", "unlink", "fsync", "mkdir", "open", "rename")
CRASHED = 9


def save(folder: Path, step: int, keep_last: int = 2) -> None:
    with CheckpointStore(folder, keep_last, log=lambda _: None) as store:
        store.save(state_of(step), metadata_of(step), also_as=("last", "best"))


def in_child(work: Callable[[], None]) -> int:
    """The child's pid; it never returns from here."""
    pid = os.fork()
    if pid == 0:
        work()
        os._exit(0)
    return pid


def crash_before_call(number: int) -> None:
    """Let the process end, as if killed, right before its ``number``-th file-system call from now on."""
    done = 0

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            nonlocal done
            done += 1
            if done == number:
                os._exit(CRASHED)
            return call(*args, **kwargs)

        return wrapper

    for name in CALLS:
        setattr(os, name, counted(getattr(os, name)))


def every_point(folder: Path, first: int, second: int) -> None:
    number, crashed = 0, True
    before = folder / f"{first}-{second}"
    save(before, first)
    while crashed:
        number += 1
        run = folder / f"{first}-{second}-{number}"
        run.mkdir()
        for path in before.iterdir():
            os.link(path, run / path.name)  # data is replaced, never changed: links to it are as good as copies

        def crash(run: Path = run, number: int = number) -> None:
            crash_before_call(number)
            save(run, second)

        _, status = os.waitpid(in_child(crash), 0)
        crashed = os.waitstatus_to_exitcode(status) == CRASHED
        print(json.dumps({"run": str(run), "least": first if crashed else second, "code": status}), flush=True)


def endless(folder: Path, first: int, acks: int) -> None:
    with CheckpointStore(folder, 2, log=lambda _: None) as store:
        for step in range(first, 10**8):
            names = random.sample(("last", "best", "final"), random.randrange(4))
            store.save(state_of(step, 128), metadata_of(step), also_as=names, kind=random.choice(("step", "time")))
            os.write(acks, f"ACK {step}\n".encode())


def random_moments(folder: Path, rounds: int) -> None:
    first = 1
    for _ in range(rounds):
        pid = in_child(lambda first=first: endless(folder, first, 1))  # type: ignore[misc]
        time.sleep(random.uniform(0.01, 0.12))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.write(1, b"KILLED\n")
        first = int(sys.stdin.readline())


if __name__ == "__main__":
    torch.set_num_threads(1)  # forked children have none of the parent's threads
    if sys.argv[1] == "points":
        every_point(Path(sys.argv[2]), 1, 2)
        every_point(Path(sys.argv[2]), 5, 5)  # the same step again: its snapshot is overwritten
    else:
        random_moments(Path(sys.argv[2]), int(sys.argv[3]))
