"""Saves behind the steps: in order, one at a time, whole or not there, and never failing in silence."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.checkpoints import metadata_of, state_of
from tests.support.limits import largest_file

from liquid_llm import storage
from liquid_llm.checkpoint import discovery
from liquid_llm.checkpoint.background import BackgroundSaver, Saved
from liquid_llm.checkpoint.copies import HostCopies
from liquid_llm.checkpoint.store import CheckpointInfo, CheckpointStore
from liquid_llm.errors import StorageError

CPU = torch.device("cpu")


class SlowStore(CheckpointStore):
    """A store whose saves wait at a gate before their first byte, unless they are given up."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.gate = threading.Event()
        self.gate.set()

    def save(self, *arguments: Any, given_up: Callable[[], bool] = lambda: False, **options: Any) -> CheckpointInfo:
        deadline = time.monotonic() + 60
        while not self.gate.wait(0.005) and not given_up():
            assert time.monotonic() < deadline, "nobody opened the gate"
        return super().save(*arguments, given_up=given_up, **options)


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SlowStore]:
    with SlowStore(tmp_path / "run", keep_last=2, log=print) as opened:
        yield opened


@pytest.fixture
def saved() -> list[Saved]:
    return []


@pytest.fixture
def saver(store: SlowStore, saved: list[Saved], said: list[str]) -> Iterator[BackgroundSaver]:
    with BackgroundSaver(store, CPU, saved.append, log=said.append) as opened:
        yield opened
        store.gate.set()


def save(saver: BackgroundSaver, step: int, *also_as: str, size: int = 64, **options: Any) -> None:
    saver.save(state_of(step, size), metadata_of(step), also_as=also_as, **options)


def steps_in(folder: Path) -> dict[str, int]:
    """Names whose sidecar and data agree, and the step of each."""
    found = discovery.sidecars(folder)
    assert all(storage.sha256(discovery.data_path(folder, name)) == one.sha256 for name, one in found.items())
    return {name: one.step for name, one in found.items()}


# -------------------------------------------------------------------------------------------------------------- writing


def test_the_run_goes_on_while_a_save_is_written_and_what_it_changes_is_not_in_it(
    saver: BackgroundSaver, store: SlowStore, saved: list[Saved]
) -> None:
    state, metadata = state_of(1), metadata_of(1, run={"decided": {"batch_size": 4}})
    store.gate.clear()
    saver.save(state, metadata, also_as=("last",))
    assert saver.busy
    assert not saved
    state["student"]["w"].zero_()
    state["optimizer"]["state"][0]["step"] += 1
    metadata.run["decided"]["batch_size"] = 5
    store.gate.set()
    done = saver.wait()
    assert [done] == saved
    read, inside = store.load(done.info)
    assert torch.equal(read["student"]["w"], torch.ones(64, 64))
    assert read["optimizer"]["state"][0]["step"] == 1.0
    assert inside.run == {"decided": {"batch_size": 4}}
    assert done.stopped_seconds < done.seconds


def test_files_are_those_of_a_save_that_is_waited_for(tmp_path: Path, saver: BackgroundSaver, store: SlowStore) -> None:
    with CheckpointStore(tmp_path / "other", keep_last=2) as other:
        for step in (1, 2, 3):
            other.save(state_of(step), metadata_of(step), also_as=("last", *(["best"] if step == 2 else [])))
            save(saver, step, "last", *(["best"] if step == 2 else []))
        saver.wait()
        files = {path.name: path.read_bytes() for path in other.run_dir.iterdir() if path.name != ".lock"}
    assert {path.name: path.read_bytes() for path in store.run_dir.iterdir() if path.name != ".lock"} == files


def test_until_a_save_is_whole_the_one_before_has_all_its_names(saver: BackgroundSaver, store: SlowStore) -> None:
    save(saver, 1, "last", "best")
    saver.wait()
    store.gate.clear()
    save(saver, 2, "last", "best")
    assert steps_in(store.run_dir) == {"step-00000001": 1, "last": 1, "best": 1}
    store.gate.set()
    saver.wait()
    assert steps_in(store.run_dir) == {"step-00000001": 1, "step-00000002": 2, "last": 2, "best": 2}


def test_one_save_at_a_time_the_next_waits_and_memory_holds_one_copy(
    saver: BackgroundSaver, store: SlowStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied: list[int] = []
    copy = HostCopies.copy
    monkeypatch.setattr(HostCopies, "copy", lambda one, state: (copied.append(state["step"]), copy(one, state))[1])
    store.gate.clear()
    save(saver, 1, "last", "best")
    second = threading.Thread(target=save, args=(saver, 2, "last"))
    second.start()
    time.sleep(0.1)
    assert second.is_alive()
    assert copied == [1]
    store.gate.set()
    second.join(20)
    saver.wait()
    assert copied == [1, 2]
    assert steps_in(store.run_dir) == {"step-00000001": 1, "step-00000002": 2, "best": 1, "last": 2}


def test_what_must_be_there_before_comes_before_the_first_byte(saver: BackgroundSaver, store: SlowStore) -> None:
    seen: list[list[str]] = []
    save(saver, 1, first=lambda: seen.append([path.name for path in store.run_dir.iterdir()]))
    saver.wait()
    assert seen == [[".lock"]]


def test_a_save_is_given_further_names_once_it_is_whole(saver: BackgroundSaver, store: SlowStore) -> None:
    assert saver.give_names(("final",)) is None
    store.gate.clear()
    save(saver, 3, "last")
    threading.Timer(0.1, store.gate.set).start()
    info = saver.give_names(("final",))
    assert info is not None
    assert info.names == ("step-00000003", "last", "final")
    assert steps_in(store.run_dir) == {"step-00000003": 3, "last": 3, "final": 3}


def test_the_end_waits_for_the_save_under_way(store: SlowStore) -> None:
    store.gate.clear()
    with BackgroundSaver(store, CPU) as saver:
        save(saver, 1, "last")
        threading.Timer(0.1, store.gate.set).start()
    assert steps_in(store.run_dir) == {"step-00000001": 1, "last": 1}
    assert not [one.name for one in threading.enumerate() if one.name.startswith("saver")]


# -------------------------------------------------------------------------------------------------------------- failing


@pytest.mark.parametrize("asked", ["check", "save", "wait", "give_names", "end"])
def test_a_full_disk_is_told_where_the_run_asks_next_and_costs_no_checkpoint(
    store: SlowStore, said: list[str], asked: str
) -> None:
    def run() -> None:
        with BackgroundSaver(store, CPU, log=said.append) as saver:
            save(saver, 1, "last")
            saver.wait()
            with largest_file(20_000):
                save(saver, 2, "last", size=256)
                while saver.busy:
                    time.sleep(0.005)
            if asked == "check":
                saver.check()
            elif asked == "save":
                save(saver, 3, "last")
            elif asked == "wait":
                saver.wait()
            elif asked == "give_names":
                saver.give_names(("final",))

    with pytest.raises(StorageError, match=r"step-00000002\.pt: .*larger.*Free some space"):
        run()
    assert steps_in(store.run_dir) == {"step-00000001": 1, "last": 1}
    assert not said  # one error, told once
    assert not list(store.run_dir.glob(".*tmp"))


def test_asking_does_not_wait(saver: BackgroundSaver, store: SlowStore) -> None:
    store.gate.clear()
    save(saver, 1)
    saver.check()
    assert saver.busy


def test_a_run_that_fails_otherwise_still_ends_with_its_last_save(store: SlowStore, said: list[str]) -> None:
    def run(step: int, size: int, most_bytes: int) -> None:
        store.gate.clear()
        with largest_file(most_bytes), BackgroundSaver(store, CPU, log=said.append) as saver:
            save(saver, step, "last", size=size)
            threading.Timer(0.1, store.gate.set).start()
            raise KeyError

    with pytest.raises(KeyError):
        run(1, 64, 10**9)
    assert steps_in(store.run_dir) == {"step-00000001": 1, "last": 1}
    with pytest.raises(KeyError):
        run(2, 256, 20_000)
    assert len(said) == 1
    assert "the last save failed too" in said[0]
    assert "step-00000002.pt" in said[0]


def test_a_second_interrupt_is_not_kept_waiting(store: SlowStore) -> None:
    def run() -> None:
        with BackgroundSaver(store, CPU) as saver:
            save(saver, 1, "last")
            raise KeyboardInterrupt

    store.gate.clear()  # and nobody opens it
    with pytest.raises(KeyboardInterrupt):
        run()
    assert [path.name for path in store.run_dir.iterdir()] == [".lock"]


# -------------------------------------------------------------------------------------------------------- being stopped


@pytest.mark.parametrize(
    ("seconds", "elapsed", "names", "given_up"),
    [
        (21.0, 5.0, ("last",), True),  # 16 + 21 is more than 30, 21 is not
        (21.0, 20.0, ("last",), False),  # nearly done: both fit
        (21.0, 5.0, ("last", "best"), False),  # no later state is the best one
        (40.0, 20.0, ("last",), False),  # another one would be too late anyway
        (2.0, 0.0, ("last",), False),
    ],
)
def test_a_save_is_given_up_only_where_another_one_is_in_time_without_it(
    store: SlowStore, seconds: float, elapsed: float, names: tuple[str, ...], given_up: bool
) -> None:
    now = [0.0]
    with BackgroundSaver(store, CPU, clock=lambda: now[0]) as saver:
        saver.save(state_of(1), metadata_of(1), also_as=("last",), first=lambda: now.__setitem__(0, seconds))
        saver.wait()
        assert saver.expected_seconds == seconds
        store.gate.clear()
        save(saver, 2, *names)
        now[0] += elapsed
        assert saver.stands_in_the_way(30.0) == given_up
        if given_up:
            saver.give_up()
        assert saver.busy != given_up
        if given_up:
            assert steps_in(store.run_dir) == {"step-00000001": 1, "last": 1}
        store.gate.set()
        save(saver, 3, "last")
    assert steps_in(store.run_dir)["last"] == 3
    assert ("step-00000002" in steps_in(store.run_dir)) != given_up
    assert not list(store.run_dir.glob(".*tmp"))


def test_a_save_that_is_given_up_stops_within_its_data(store: SlowStore) -> None:
    asked: list[int] = []
    with pytest.raises(StorageError), CheckpointStore(store.run_dir / "other", keep_last=1) as other:
        other.save(state_of(1, 2048), metadata_of(1), given_up=lambda: bool(asked.append(1)) or len(asked) > 6)
    assert len(asked) == 7  # the file has 16 MiB; a tensor is asked about every 4 of them
    assert not (store.run_dir / "other" / "step-00000001.pt").exists()


# --------------------------------------------------------------------------------------------------------------- memory


def test_without_room_for_a_copy_the_run_waits_and_says_so(
    saver: BackgroundSaver, store: SlowStore, said: list[str], saved: list[Saved]
) -> None:
    state = state_of(1)
    saver.prepare(state, room_bytes=16_000)
    save(saver, 1, "last")
    assert not saver.busy
    assert steps_in(store.run_dir) == {"step-00000001": 1, "last": 1}
    assert saved[0].stopped_seconds == saved[0].seconds
    (words,) = said
    assert words.startswith("the host's memory has no room for a copy of 16 KiB (it has 15.6 KiB to spare): each save")
    assert words.endswith("stops training until it is on the disk, about 0.0 s")


@pytest.mark.parametrize("method", ["prepare", "copy"])
def test_memory_that_cannot_be_had_after_all_is_done_without(
    saver: BackgroundSaver, store: SlowStore, said: list[str], monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    def refused(*_: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 5 bytes")

    monkeypatch.setattr(HostCopies, method, refused)
    saver.prepare(state_of(1), room_bytes=10**9)
    for step in (1, 2):
        save(saver, step, "last")
        assert not saver.busy
    assert steps_in(store.run_dir)["last"] == 2
    assert len(said) == 1
    assert "can't allocate memory" in said[0]


def test_how_long_a_save_takes_is_known_before_the_first_at_the_speed_assumed(saver: BackgroundSaver) -> None:
    saver.prepare({"student": {"w": torch.empty(240_000_000 // 4)}}, room_bytes=0)
    assert saver.expected_seconds == 1.0
