"""What a part of the session is given: a device, its time, and where its findings go."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from benchmarks.gpu.results import FAILED, MEASURED, NO_GPU, NO_ROOM, NO_TIME, RAN, SKIPPED, Recorder, Row


def find_device() -> torch.device:
    """The GPU; without one the pretend accelerator of the tests, and without those the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", 0)
    try:
        from tests.support.accelerator import install

        return install().device
    except Exception as error:  # noqa: BLE001  # another torch may have no place for it
        print(f"no pretend accelerator: {type(error).__name__}: {error}", flush=True)
        return torch.device("cpu")


class OutOfTime(Exception):
    """A part has used its time."""


@dataclass
class Context:
    """Attributes:
    part: its name.
    device: to measure on.
    recorder: takes what it finds.
    deadline: ``time.monotonic`` by which it should be done.
    folder: for files of its own, thrown away later.
    earlier: rows that other parts found before.
    select: which tests are run, as pytest's ``-k`` takes it; "" for all.
    """

    part: str
    device: torch.device
    recorder: Recorder
    deadline: float
    folder: Path
    earlier: list[Row] = field(default_factory=list)
    select: str = ""
    _failed: bool = False

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def counters(self) -> Any:
        """What counts the device's memory: ``torch.cuda``, or what the pretend accelerator has in its place."""
        return torch.get_device_module(self.device)

    @property
    def left(self) -> float:
        """Seconds left."""
        return self.deadline - time.monotonic()

    def row(self, name: str, measured: float | None = None, unit: str = "", **others: Any) -> None:
        """Record one row; a figure that is not finite is a failure."""
        status = others.pop("status", MEASURED)
        if measured is not None and not math.isfinite(measured):
            status, others["note"], measured = FAILED, f"measured {measured}", None
        self.recorder.add(Row(self.part, name, status, measured, unit, **others))

    def skip(self, name: str, reason: str = NO_GPU) -> None:
        """Record that something was not measured, and why."""
        self.recorder.add(Row(self.part, name, SKIPPED, note=reason))

    def ran(self, name: str) -> None:
        """Record that something works, where its figure would say nothing."""
        self.recorder.add(Row(self.part, name, RAN, note=NO_GPU))

    def found(self, part: str, name: str) -> float | None:
        """What another part measured."""
        return next((row.measured for row in self.earlier if (row.part, row.name) == (part, name)), None)

    @contextmanager
    def attempt(self, name: str, seconds: float = 3.0) -> Iterator[None]:
        """Run the body, or record why there is no figure: no time left (it needs ``seconds``), no room, or an error.

        What is caught here ends neither the part nor the session.
        """
        self._tidy()
        try:
            if self.left < seconds:
                raise OutOfTime
            yield
        except OutOfTime:
            self.skip(name, NO_TIME)
        except Exception as error:  # noqa: BLE001  # a session goes on whatever one measurement meets
            self._failed = True
            lines = str(error).strip().splitlines() or [""]
            status = NO_ROOM if isinstance(error, torch.OutOfMemoryError) else FAILED
            self.recorder.add(Row(self.part, name, status, note=f"{type(error).__name__}: {lines[0][:160]}"))

    def _tidy(self) -> None:
        """Give back what a failed measurement held; only now has its traceback let go of it."""
        if self._failed:
            gc.collect()
            if self.device.type != "cpu":
                self.counters.empty_cache()
        self._failed = False
