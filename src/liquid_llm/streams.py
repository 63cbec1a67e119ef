"""Work on a stream of its own, beside the device's main one (leaf).

    stream   a queue of the device: what stands in one is done in order, and beside what stands in another
    wait     of one stream for another: what is queued from then on begins when the other has done what it had by then

Both ways are waited for, which makes memory safe too. The allocator keeps a stream's freed memory for that stream: what
the side stream made and the main one has read is used again by side work alone, which begins behind a wait for the main
stream; what the main stream made and the side one has read is used again by main work, behind the wait at the end.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch

T = TypeVar("T")


def has_streams(device: torch.device) -> bool:
    """Whether work on ``device`` can be queued beside other work."""
    return device.type != "cpu" and hasattr(torch.get_device_module(device), "Stream")


class SideStream:
    """A second stream of a device; raises ``AttributeError`` where a device has none (``has_streams``)."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._module: Any = torch.get_device_module(device)
        self._stream: Any = self._module.Stream(device=device)

    @contextlib.contextmanager
    def beside(self, work: Callable[[], T]) -> Iterator[Callable[[], T]]:
        """Queue ``work`` now, beside what the caller queues meanwhile; called, what is given gives its result.

        To be called as late as can be: from then on the main stream waits for the work. At the end it does in any
        case, with an error too.
        """
        main = self._module.current_stream(self._device)
        self._stream.wait_stream(main)
        try:
            with self._module.stream(self._stream):
                result = work()

            def take() -> T:
                main.wait_stream(self._stream)
                return result

            yield take
        finally:
            main.wait_stream(self._stream)
