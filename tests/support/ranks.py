"""A pretend world of several processes: one engine in each of several threads."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from liquid_llm.distributed import Engine

T = TypeVar("T")


class World:
    """Ranks in threads. What they exchange, they exchange here; one that fails lets the others go."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.given: list[torch.Tensor | None] = [None] * size
        self.notes: dict[str, str] = {}
        self.barrier = threading.Barrier(size, timeout=60)

    def run(self, work: Callable[[Engine], T]) -> list[T]:
        """``work`` on every rank; what each returned."""
        with ThreadPoolExecutor(self.size) as threads:
            every = [threads.submit(self._run, work, rank) for rank in range(self.size)]
        # One rank's failure breaks the barrier of the others.
        failures = [one.exception() for one in every if one.exception() is not None]
        for failure in sorted(failures, key=lambda one: isinstance(one, threading.BrokenBarrierError)):
            raise failure
        return [one.result() for one in every]

    def _run(self, work: Callable[[Engine], T], rank: int) -> T:
        try:
            return work(ThreadEngine(rank, self))
        except BaseException:
            self.barrier.abort()
            raise


class ThreadEngine(Engine):
    """All that an engine must bring of its own: its place, a sum, and a board for notes."""

    def __init__(self, rank: int, world: World) -> None:
        self.rank, self.world_size, self.world = rank, world.size, world

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        self.world.given[self.rank] = tensor.clone()
        self.world.barrier.wait()
        total = torch.stack(self.world.given).sum(0)
        self.world.barrier.wait()
        return total

    def post(self, name: str, note: str) -> None:
        self.world.notes[name] = note

    def posted(self, name: str) -> str | None:
        return self.world.notes.get(name)
