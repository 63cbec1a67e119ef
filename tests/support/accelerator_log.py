"""What happened on the pretend accelerator, and where in the code."""

from __future__ import annotations

import sys
import threading
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch

_OWN = tuple(str(path) for path in Path(__file__).parent.glob("accelerator*.py"))
_TORCH = str(Path(torch.__file__).parent)
_ROOT = str(Path(__file__).parents[2])


class Event(NamedTuple):
    """Something that happened on the device.

    ``kind`` is ``launch``, ``wait`` (the host waited for the device), ``to_device`` or ``to_host`` (a copy of
    ``nbytes``). ``site`` is ``file:line`` of the innermost code that is not torch's; ``autograd`` where torch's own
    backward pass called.
    """

    kind: str
    operation: str
    site: str
    nbytes: int = 0
    thread: str = ""


class Log(list[Event]):
    """What happened while recording, in order, in all threads."""

    def count(self, kind: str) -> int:
        """How often ``kind`` happened."""
        return sum(event.kind == kind for event in self)

    def nbytes(self, kind: str) -> int:
        """Bytes moved by copies of ``kind``."""
        return sum(event.nbytes for event in self if event.kind == kind)

    def sites(self, kind: str) -> Counter[str]:
        """Where ``kind`` happened, and how often."""
        return Counter(f"{event.site} {event.operation}" for event in self if event.kind == kind)


def site() -> str:
    """``file:line`` of the innermost code that is neither torch's nor the pretence's, else ``autograd``."""
    frame = sys._getframe(2)
    while frame is not None:
        path = frame.f_code.co_filename
        if path not in _OWN and not path.startswith((_TORCH, "<")) and path != threading.__file__:
            for root in ("/site-packages/", "/src/", f"{_ROOT}/"):
                path = path.rpartition(root)[2]
            return f"{path}:{frame.f_lineno}"
        frame = frame.f_back
    return "autograd"
