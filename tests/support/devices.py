"""The device that tests of ``tests/gpu`` run on: a GPU where there is one, else the pretend accelerator."""

from __future__ import annotations

import contextlib
import traceback
import warnings
from collections.abc import Iterator
from typing import Any

import torch

from liquid_llm.device import release_memory


def find_device() -> torch.device:
    """The GPU, or the pretend accelerator, installed by this call."""
    if torch.cuda.is_available():
        return torch.device("cuda", 0)
    from tests.support.accelerator import install

    return install().device


def counters(device: torch.device) -> Any:
    """``torch.cuda``, or what the pretend accelerator has in its place."""
    return torch.get_device_module(device)


@contextlib.contextmanager
def memory_limit(device: torch.device, nbytes: int) -> Iterator[None]:
    """No more than ``nbytes`` of the device's memory for this process, what it holds now included."""
    release_memory(device)
    if device.type != "cuda":
        from tests.support.accelerator import install

        with install().memory_limit(nbytes):
            yield
        return
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, nbytes / total), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
        release_memory(device)


@contextlib.contextmanager
def count_waits(device: torch.device) -> Iterator[list[str]]:
    """Where the host waits for the device meanwhile, ``file:line`` each time."""
    waits: list[str] = []
    if device.type != "cuda":
        from tests.support.accelerator import install

        with install().record() as log:
            yield waits
        waits += [f"{event.site} {event.operation}" for event in log if event.kind == "wait"]
        return

    def note(message: Any, *_: Any, **__: Any) -> None:
        if "called a synchronizing" in str(message):  # not the notice that this mode is a prototype
            own = [one for one in traceback.extract_stack() if "/liquid_llm/" in one.filename]
            waits.append(f"{own[-1].filename.rpartition('/src/')[2]}:{own[-1].lineno}" if own else "elsewhere")

    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield waits
        finally:
            torch.cuda.set_sync_debug_mode(before)
