"""One holder at a time, on a real bucket: who waits, who is refused, and what one learns that was thought dead."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from tests.support.failing_disk import fail_with, watch
from tests.support.faults import LOST, STALE, FaultyProxy, faulty_proxy
from tests.support.gcs import Bucket
from tests.support.plain_stores import Overwriting, Refusing, register

from liquid_llm import storage
from liquid_llm.errors import StorageError
from liquid_llm.storage.lease import EXPIRES_SECONDS, FOLDER, Lease, LeaseLost


@dataclass
class Machines:
    """Leases of one place; time passes where one of them waits, and ``meanwhile`` is what the others do then."""

    place: str
    folder: Path
    stack: ExitStack
    now: float = 1000.0
    meanwhile: Callable[[], None] = lambda: None
    said: list[str] = field(default_factory=list)

    def lease(self, name: str) -> Lease:
        def sleep(seconds: float) -> None:
            self.now += seconds
            self.meanwhile()

        # its own thread is kept out of this: tests beat by hand
        return Lease(
            self.place,
            self.folder / name,
            beat_seconds=10_000,
            clock=lambda: self.now,
            sleep=sleep,
            log=self.said.append,
        )

    def take(self, name: str) -> Lease:
        return self.stack.enter_context(self.lease(name))

    def numbers(self) -> list[str]:
        return [info.name for info in storage.list_files(f"{self.place}/{FOLDER}")]


@pytest.fixture(params=["gs", "memory", "path"])
def machines(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Machines]:
    if request.param == "gs":
        bucket: Bucket = request.getfixturevalue("gcs")
        place = f"{bucket.uri}/out"
    else:
        place = {"memory": f"memory://{tmp_path.name}/out", "path": str(tmp_path / "out")}[request.param]
    with ExitStack() as stack:
        yield Machines(place, tmp_path, stack)


def test_a_second_is_refused_while_the_first_lives_and_begins_at_once_when_it_has_ended(machines: Machines) -> None:
    with machines.lease("a") as first:
        first.check()
        machines.meanwhile = first.beat
        began = machines.now
        with pytest.raises(StorageError, match=r"another run is writing to this output; got process \d+ on") as caught:
            machines.take("b")
        assert caught.value.exit_code == 4
        assert machines.now - began < 10
        first.check()
    began = machines.now
    machines.take("b").check()
    assert machines.now == began
    assert machines.numbers() == ["00000002.json"], "of all that were, one is left behind"
    assert not (machines.folder / "a").exists()


def test_one_that_ends_while_it_is_waited_for_lets_the_next_begin(machines: Machines) -> None:
    first = machines.lease("a")
    first.__enter__()
    machines.meanwhile = lambda: first.__exit__(None, None, None)
    began = machines.now
    machines.take("b").check()
    assert machines.now - began < 5


def test_one_that_was_killed_is_waited_for_and_not_for_a_minute(machines: Machines) -> None:
    machines.take("a")  # and nothing is heard of it any more
    began = machines.now
    machines.take("b").check()
    assert EXPIRES_SECONDS <= machines.now - began <= 60
    assert machines.numbers() == ["00000002.json"]
    assert any("waiting up to 40 s" in line for line in machines.said)


def test_the_same_directory_does_not_wait_for_its_own_dead_process(machines: Machines) -> None:
    machines.take("a")
    began = machines.now
    machines.take("a").check()
    assert machines.now == began


def test_one_that_cannot_leave_its_mark_keeps_nobody_waiting(machines: Machines) -> None:
    """The disk of the run directory is full: the run ends, and so does its lease."""
    full = machines.folder / "full"
    full.mkdir()
    with watch(full, fail_with(1, errno.ENOSPC)), pytest.raises(StorageError, match="no space left on the disk"):
        machines.take("full/mark")
    began = machines.now
    machines.take("b").check()
    assert machines.now == began


@pytest.mark.parametrize("successor_ends", [False, True])
@pytest.mark.parametrize("asks_first", ["check", "beat", "leaves"])
def test_one_that_was_thought_dead_finds_that_out(machines: Machines, asks_first: str, successor_ends: bool) -> None:
    """Whatever it does first when it wakes; a beat and its end write its own number, which counts for nothing."""
    first, second = machines.take("a"), machines.lease("b")
    first.require()
    second.__enter__()
    if successor_ends:
        second.__exit__(None, None, None)
    if asks_first == "leaves":
        first.__exit__(None, None, None)
    else:
        with pytest.raises(LeaseLost, match="another run has taken this output over"):
            getattr(first, asks_first)()
        for ask in (first.check, first.require, first.beat):
            with pytest.raises(LeaseLost, match="another run has taken this output over"):
                ask()
    if not successor_ends:
        second.check()
        second.__exit__(None, None, None)
    began = machines.now
    machines.take("c").check()
    assert machines.now == began
    assert machines.numbers() == ["00000003.json"]


@pytest.mark.parametrize("moment", ["write_bytes", "list_files"])
def test_a_pause_within_a_beat_does_not_bring_a_lost_lease_back(
    machines: Machines, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another comes and goes before the write, which makes the old lease anew, or before the look that follows."""
    first, plain = machines.take("a"), getattr(storage, moment)

    def pause(*given: Any) -> Any:
        monkeypatch.setattr(storage, moment, plain)
        with machines.lease("b"):
            pass
        return plain(*given)

    monkeypatch.setattr(storage, moment, pause)
    for ask in (first.beat, first.check):
        with pytest.raises(LeaseLost):
            ask()


@pytest.mark.parametrize(
    "content", [b"", b"[1]", b"\xff{", b'{"expires_seconds": 1e9}', b'{"expires_seconds": "long"}']
)
def test_a_lease_that_nobody_can_read_runs_out_as_well(machines: Machines, content: bytes) -> None:
    storage.write_bytes(f"{machines.place}/{FOLDER}/00000005.json", content)
    began = machines.now
    machines.take("a").check()
    assert machines.now - began <= 62
    assert machines.numbers() == ["00000006.json"]


@pytest.mark.parametrize("kind", ["gs", "path"])
def test_of_many_that_come_at_once_one_is_let_in(kind: str, gcs: Bucket, tmp_path: Path) -> None:
    place = f"{gcs.uri}/x" if kind == "gs" else str(tmp_path / "x")
    with ThreadPoolExecutor(8) as threads:
        told: list[Any] = list(threads.map(lambda n: storage.create(f"{place}/one", b"%d" % n), range(8)))
    assert told.count(True) == 1
    assert storage.read_bytes(f"{place}/one") == b"%d" % told.index(True)


@pytest.fixture
def proxy(gcs: Bucket, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    before = storage.set_retry_policy(storage.RetryPolicy(attempts=4, first_seconds=0.01, max_seconds=0.02))
    with faulty_proxy(gcs.base) as running:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", running.base)
        yield running
    storage.set_retry_policy(before)


def test_answers_that_are_lost_cost_nobody_the_lease(gcs: Bucket, proxy: FaultyProxy, tmp_path: Path) -> None:
    proxy.fail(LOST, times=1, path="/upload/")
    with Lease(f"{gcs.uri}/out", tmp_path / "a", beat_seconds=10_000) as lease:
        assert not storage.create(f"{gcs.uri}/out/{FOLDER}/00000001.json", b"another's")
        for fault in (LOST, 503, 429):
            proxy.fail(fault, times=2, path="/upload/")
            lease.beat()
            lease.check()


def test_a_listing_that_lacks_the_newest_lease_lets_nobody_in(gcs: Bucket, proxy: FaultyProxy, tmp_path: Path) -> None:
    with Lease(f"{gcs.uri}/out", tmp_path / "a", beat_seconds=0.05) as first:
        first.check()
        proxy.fail(STALE, times=5, path="/o?")
        with pytest.raises(StorageError, match="another run is writing to this output"):
            Lease(f"{gcs.uri}/out", tmp_path / "b", look_seconds=0.3).__enter__()
        assert proxy.counts[STALE] == 5
        first.check()


def test_of_two_that_take_a_dead_one_over_the_later_is_refused(
    machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both have seen it dead; one makes the next number just before the other would."""
    machines.take("a")
    create, others = storage.create, []

    def late(uri: str, data: bytes) -> bool:
        monkeypatch.setattr(storage, "create", create)
        others.append(machines.take("c"))
        machines.meanwhile = others[0].beat
        return create(uri, data)

    monkeypatch.setattr(storage, "create", late)
    with pytest.raises(StorageError, match="another run is writing to this output"):
        machines.take("b")
    others[0].check()


@pytest.mark.parametrize("kind", [Overwriting, Refusing])
def test_a_store_that_cannot_refuse_a_name_has_no_leases_and_that_is_said(
    kind: type[MemoryFileSystem], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = f"{register(kind)}://{tmp_path.name}/out"
    storage.write_bytes(f"{place}/x", b"kept")
    with pytest.raises(storage.NoExclusionError, match="no way to make a file only where there is none"):
        storage.create(f"{place}/x", b"another")
    assert storage.read_bytes(f"{place}/x") == b"kept"
    with Lease(place, tmp_path / "a") as first, Lease(place, tmp_path / "b") as second:
        for lease in (first, second):
            lease.check()
            lease.require()
            lease.beat()
    assert caplog.text.count("do not start two runs with this output") == 2
    assert [info.name for info in storage.list_files(place)] == ["x"]
    assert list(tmp_path.iterdir()) == []
