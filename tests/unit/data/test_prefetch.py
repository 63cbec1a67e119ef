from __future__ import annotations

import threading
import time

import pytest

from liquid_llm.data.prefetch import Prefetcher


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("depth", [1, 3, 20])
def test_results_come_in_order(workers: int, depth: int) -> None:
    def square(index: int) -> int:
        time.sleep((index * 7 % 5) / 1000)
        return index * index

    with Prefetcher(square, 4, depth, stop=40, workers=workers) as results:
        assert list(results) == [index * index for index in range(4, 40)]


def test_endless_without_a_stop() -> None:
    with Prefetcher(lambda index: index, 10**6, 2) as results:
        assert [next(results) for _ in range(100)] == list(range(10**6, 10**6 + 100))


def test_nothing_to_do() -> None:
    with Prefetcher(lambda index: index, 5, 2, stop=5) as results:
        assert list(results) == []


def test_work_is_ahead_but_bounded() -> None:
    begun: list[int] = []
    with Prefetcher(lambda index: begun.append(index) or index, 0, 3) as results:
        deadline = time.monotonic() + 10
        while len(begun) < 3 and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.02)
        assert begun == [0, 1, 2]
        next(results)
        while len(begun) < 4 and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.02)
        assert begun == [0, 1, 2, 3]


def test_an_exception_is_raised_in_its_turn() -> None:
    def fails_at_two(index: int) -> int:
        if index == 2:
            raise LookupError("two")
        return index

    results = Prefetcher(fails_at_two, 0, 5)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(LookupError, match="two"):
        next(results)
    assert list(results) == []
    assert no_threads_left()


def test_closing_drops_what_is_not_begun() -> None:
    release, done = threading.Event(), []

    def wait(index: int) -> int:
        release.wait(10)
        done.append(index)
        return index

    results = Prefetcher(wait, 0, 8)
    threading.Timer(0.05, release.set).start()
    results.close()
    assert done in ([], [0])
    assert list(results) == []
    assert no_threads_left()


def test_waiting_is_measured() -> None:
    now = [0.0]
    gate = threading.Event()

    def fetch(index: int) -> int:
        if index == 1:
            gate.wait(10)
        return index

    def clock() -> float:
        now[0] += 1.5
        gate.set()
        return now[0]

    with Prefetcher(fetch, 0, 1, stop=2, clock=clock) as results:
        deadline = time.monotonic() + 10
        while not results._pending[0].done() and time.monotonic() < deadline:
            time.sleep(0.001)
        assert next(results) == 0
        assert results.wait_seconds == 0.0  # it was ready
        assert next(results) == 1
        assert results.wait_seconds == 1.5


@pytest.mark.parametrize(("depth", "workers"), [(0, 1), (1, 0)])
def test_sizes_must_be_positive(depth: int, workers: int) -> None:
    with pytest.raises(ValueError, match="positive"):
        Prefetcher(lambda index: index, 0, depth, workers=workers)


def no_threads_left() -> bool:
    return not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]
