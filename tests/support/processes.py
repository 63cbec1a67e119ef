"""The real command in several processes that find each other as torchrun lets them: by what is in the environment.

They are forked from a server that has the libraries loaded already: a launch takes a blink instead of seconds.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

from tests.support.servers import EVERYTHING

Fault = Callable[[], None]
"""What is done to a process before its command begins; a function of a module, as it is sent there by name."""


@dataclass
class Rank:
    """A running process and what it says."""

    process: BaseProcess
    log: Path

    @property
    def said(self) -> str:
        return self.log.read_text()

    @property
    def said_wrong(self) -> str:
        """What it has said on its second stream, where that was asked for."""
        return self.log.with_suffix(".err").read_text()


def launch(
    face: str,
    words: Sequence[str] | Sequence[Sequence[str]],
    folder: Path,
    size: int = 2,
    *,
    fault: tuple[int | None, Fault] | None = None,
    apart: bool = False,
    env: dict[str, str] | None = None,
    two_streams: bool = False,
) -> list[Rank]:
    """Start ``face`` (a module with ``main``) on ``size`` ranks.

    Args:
        words: of all ranks, or those of each.
        folder: takes what they say.
        fault: a rank, and what goes wrong there; None is every rank.
        apart: as if each were on a host of its own, with its own folder to work in and its own cache.
        two_streams: keep what they say on standard output and on standard error apart.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    ranks = []
    for rank in range(size):
        own = words if isinstance(words[0], str) else words[rank]
        place = folder / f"host-{rank}" if apart else folder
        place.mkdir(exist_ok=True)
        variables = {
            "RANK": rank,
            "WORLD_SIZE": size,
            "LOCAL_RANK": 0 if apart else rank,
            "LOCAL_WORLD_SIZE": 1 if apart else size,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "OMP_NUM_THREADS": 1,
            "HF_HUB_OFFLINE": 1,
            "XDG_CACHE_HOME": place / "cache",
            **(env or {}),
        }
        log = folder / f"rank-{rank}.log"
        broken = fault[1] if fault is not None and fault[0] in (rank, None) else None
        texts = {name: str(value) for name, value in variables.items()}
        given = (face, list(own), texts, log, place, broken, two_streams)
        process = EVERYTHING.Process(target=_be_a_rank, args=given)
        process.start()
        ranks.append(Rank(process, log))
    return ranks


def wait(ranks: Sequence[Rank], seconds: float = 240) -> list[int | None]:
    """Their exit codes; None for one that did not end in time, which is then killed."""
    until = time.monotonic() + seconds
    for rank in ranks:
        rank.process.join(max(0.0, until - time.monotonic()))
    codes = [rank.process.exitcode for rank in ranks]
    for rank in ranks:
        if rank.process.is_alive():
            rank.process.kill()
            rank.process.join()
    return codes


def end_all() -> None:
    """End what is still running, as a failed test leaves it."""
    for process in multiprocessing.active_children():
        process.kill()
        process.join()


def run(face: str, words: Sequence[str], folder: Path, size: int = 2) -> None:
    """All of them to a good end."""
    ranks = launch(face, words, folder, size)
    assert wait(ranks) == [0] * size, "\n".join(rank.said for rank in ranks)


def _be_a_rank(
    face: str,
    words: list[str],
    variables: dict[str, str],
    log: Path,
    place: Path,
    fault: Fault | None,
    two_streams: bool,
) -> None:
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
    os.dup2(os.open(log.with_suffix(".err"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC) if two_streams else 1, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    os.environ.update(variables)
    os.chdir(place)
    import torch

    torch.set_num_threads(1)
    if fault is not None:
        fault()
    code = importlib.import_module(face).main(words)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
