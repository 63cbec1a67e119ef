"""Work done ahead of need: ``fn(start), fn(start + 1), …`` in order, some of them already under way in threads."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetcher(Iterator[T], Generic[T]):
    """Yields ``fn(index)`` for ``index`` from ``start`` on; an exception of ``fn`` is raised when its turn comes.

    To be used in ``with``, or closed: only then do its threads end before the process does.

    Args:
        fn: called once for each index, from another thread.
        start: first index.
        depth: results held or under way at most, so that memory is bounded.
        stop: index to end before; None goes on for ever.
        workers: threads that call ``fn``. Several are of use where it waits for storage.
        clock: seconds, for ``wait_seconds``.

    Attributes:
        wait_seconds: how long the consumer has waited so far for results that were not ready.
    """

    def __init__(
        self,
        fn: Callable[[int], T],
        start: int,
        depth: int,
        *,
        stop: int | None = None,
        workers: int = 1,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if depth < 1 or workers < 1:
            raise ValueError(f"depth and workers must be positive, got {depth} and {workers}")
        self.wait_seconds = 0.0
        self._fn = fn
        self._next = start
        self._depth = depth
        self._stop = stop
        self._clock = clock
        self._pending: deque[Future[T]] = deque()
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="prefetch")
        self._closed = False
        self._fill()

    def __next__(self) -> T:
        if not self._pending:
            raise StopIteration
        future = self._pending.popleft()
        began = None if future.done() else self._clock()
        try:
            result = future.result()
        except BaseException:
            self.close()
            raise
        if began is not None:
            self.wait_seconds += self._clock() - began
        self._fill()
        return result

    def close(self) -> None:
        """Drop what is not begun, wait for what is, end the threads. The iterator is exhausted from then on."""
        self._closed = True
        self._pending.clear()
        self._threads.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Prefetcher[T]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _fill(self) -> None:
        while not self._closed and len(self._pending) < self._depth and (self._stop is None or self._next < self._stop):
            self._pending.append(self._threads.submit(self._fn, self._next))
            self._next += 1
