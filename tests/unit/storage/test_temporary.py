"""Folders for one process: gone when it ends, and when it was killed as soon as the next one makes its own."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from liquid_llm import storage
from liquid_llm.errors import StorageError
from liquid_llm.storage import temporary


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@contextmanager
def holding() -> Iterator[int]:
    """A process that has made a folder with something in it, and holds it; killed at the end where it lives."""
    told, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        with storage.scratch("prepare") as folder:
            (folder / "shard").write_bytes(b"much")
            os.write(tell, b".")
            signal.pause()
    try:
        assert os.read(told, 1) == b"."
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(told)
        os.close(tell)


def test_what_a_killed_process_left_goes_and_what_a_living_one_holds_stays(base: Path) -> None:
    with holding():
        pass
    assert len(list(base.glob("liquid-prepare-*/shard"))) == 1
    with holding():
        (held,) = base.glob("liquid-prepare-*/shard")
        with storage.scratch("prepare") as folder:
            assert sorted(base.iterdir()) == sorted([held.parent, folder])
        assert list(base.iterdir()) == [held.parent]


def test_it_goes_with_all_that_is_in_it_after_an_error_too(base: Path) -> None:
    def fail() -> None:
        with storage.scratch("train") as folder:
            (folder / "below").mkdir(mode=0o500)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert not list(base.iterdir())


def test_what_others_made_and_what_a_link_leads_to_are_left_alone(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = base / "mine"
    own.mkdir()
    (base / f"liquid-shards{temporary._machine()}link").symlink_to(own)
    (base / f"liquid-shards{temporary._machine()}file").touch()
    (base / "liquid-shards-01234567-another_machines").mkdir()
    (base / "liquid-prepare-of_an_earlier_release").mkdir()
    before = set(base.iterdir())
    with storage.scratch("shards"):
        pass
    assert set(base.iterdir()) == before
    (base / f"liquid-shards{temporary._machine()}left").mkdir()
    user = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: user + 1)
    with storage.scratch("shards"):
        assert (base / f"liquid-shards{temporary._machine()}left").is_dir(), "of another user"


def test_a_folder_that_was_taken_for_one_that_was_left_is_made_again(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the moment it is there and the moment it is locked another process looks."""
    real, seen = os.open, []

    def late(path: Any, *rest: Any, **named: Any) -> int:
        if not seen:
            seen.append(Path(path))
            Path(path).rmdir()
        return real(path, *rest, **named)

    monkeypatch.setattr(os, "open", late)
    with storage.scratch("train") as folder:
        assert list(base.iterdir()) == [folder]
    assert seen != [folder]
    assert not list(base.iterdir())


def test_nowhere_to_make_one_is_a_storage_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "file" / "below"))
    with pytest.raises(StorageError), storage.scratch("train"):
        pass
