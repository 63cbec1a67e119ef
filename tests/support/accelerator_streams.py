"""Streams of the pretend accelerator: everything is done at once, and what a real device could get wrong is refused.

A launch on a stream is a tick of it. Of each piece of memory is known on which stream it was made, where it was written
last and up to which tick each stream has used it; of each pair of streams, up to which tick one has waited for the
other. Two things are errors, which CUDA would pass over in silence, with wrong numbers now and then:

- to read or write on one stream what another has written, without having waited for it
- to give memory back to the stream it was made on while another still uses it, unless the first waits for that before
  it makes anything anew
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

MAIN = 0


class Stream:
    """As ``torch.cuda.Stream``."""

    def __init__(self, streams: Streams, number: int) -> None:
        self._streams, self.number = streams, number

    def wait_stream(self, other: Stream) -> None:
        """From now on this one is behind what ``other`` has until now."""
        self._streams.wait(self.number, other.number)


class Event:
    """As ``torch.cuda.Event``: a moment of a stream that the host can wait for."""

    def __init__(self, streams: Streams) -> None:
        self._streams, self._moment = streams, (MAIN, 0)

    def record(self, stream: Stream) -> None:
        """Be what ``stream`` has until now."""
        self._moment = stream.number, self._streams.ticks[stream.number]

    def synchronize(self) -> None:
        """Let the host wait: whatever is launched later, on any stream, comes after."""
        self._streams.wait_for(*self._moment)


class _Use:
    """What is known of a piece of memory."""

    def __init__(self, stream: int) -> None:
        self.made_on, self.written = stream, (stream, 0)
        self.used: dict[int, int] = {}


class Streams:
    """The streams of the device, and who may use what."""

    def __init__(self, note_wait: Callable[[], None] = lambda: None) -> None:
        self.note_wait = note_wait
        self._ticks: Counter[int] = Counter()
        self._waited: Counter[tuple[int, int]] = Counter()
        self._uses: dict[int, _Use] = {}
        self._freed: deque[int] = deque()
        self._owed: list[tuple[int, dict[int, int]]] = []
        self._current = threading.local()
        self._lock = threading.RLock()
        self._count = 0

    @property
    def current(self) -> int:
        """The number of this thread's stream."""
        return int(getattr(self._current, "number", MAIN))

    def new(self) -> Stream:
        """A further stream."""
        self._count += 1
        return Stream(self, self._count)

    @contextlib.contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        """What is launched inside, by this thread, is launched on ``stream``."""
        before, self._current.number = self.current, stream.number
        try:
            yield
        finally:
            self._current.number = before

    def wait(self, waiting: int, other: int) -> None:
        with self._lock:
            if waiting == other:
                return
            self._waited[waiting, other] = self._ticks[other]
            for one in range(self._count + 1):  # what the other has waited for is waited for too
                if one != waiting:
                    seen = max(self._waited[waiting, one], self._waited[other, one])
                    self._waited[waiting, one] = seen

    def wait_for(self, other: int, tick: int) -> None:
        """The host has waited for stream ``other`` up to ``tick``, and so have all streams from now on."""
        self.note_wait()
        with self._lock:
            for waiting in range(self._count + 1):
                if waiting != other:
                    self._waited[waiting, other] = max(self._waited[waiting, other], tick)

    def settle(self) -> None:
        """Let all that was launched be done: nobody has to wait for it any more, and no memory is owed to anyone.

        What a program got wrong is forgotten with it, and does not fail whoever uses the device next.
        """
        with self._lock:
            for kept in (self._ticks, self._waited, self._uses, self._freed, self._owed):
                kept.clear()
            self._current.number = MAIN

    def launch(self, tensors: Iterable[Tensor], written: Iterable[Tensor]) -> None:
        """An operation on the current stream, on these tensors, of which it writes some."""
        with self._lock:
            stream = self.current
            self._ticks[stream] += 1
            for tensor in tensors:
                use = self._uses.get(tensor.untyped_storage().data_ptr())
                if use is None:
                    continue
                by, tick = use.written
                if by != stream and self._waited[stream, by] < tick:
                    raise RuntimeError(f"stream {stream} uses what stream {by} has written, without waiting for it")
                use.used[stream] = self._ticks[stream]
            for tensor in written:
                use = self._uses.get(tensor.untyped_storage().data_ptr())
                if use is not None:
                    use.written = (stream, self._ticks[stream])

    def make(self, storage: Any) -> None:
        """Memory that the current stream has made."""
        with self._lock:
            stream = self.current
            while self._freed:
                use = self._uses.pop(self._freed.popleft(), None)
                if use is not None:
                    self._owed.append((use.made_on, use.used))
            for made_on, used in self._owed:
                late = [one for one, tick in used.items() if one != made_on and self._waited[made_on, one] < tick]
                if late and made_on == stream:
                    raise RuntimeError(f"stream {made_on} takes memory anew that stream {late[0]} may still be using")
            self._owed = [one for one in self._owed if one[0] != stream]
            key = storage.data_ptr()
            if key:
                use = self._uses[key] = _Use(stream)
                use.written = (stream, self._ticks[stream])
                weakref.finalize(storage, self._freed.append, key).atexit = False

    @property
    def ticks(self) -> Counter[int]:
        """What was launched so far, by stream."""
        return Counter(self._ticks)


def torch_names(streams: Streams) -> dict[str, Any]:
    """What ``torch.cuda`` has of streams."""
    main = Stream(streams, MAIN)

    def current_stream(device: torch.device | None = None) -> Stream:
        return main if streams.current == MAIN else Stream(streams, streams.current)

    return {
        "Stream": lambda device=None: streams.new(),
        "Event": lambda: Event(streams),
        "stream": streams.on,
        "current_stream": current_stream,
    }
