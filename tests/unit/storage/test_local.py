"""Locks, digests and whole folders of this machine's file system."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
import threading
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from liquid_llm import storage
from liquid_llm.errors import StorageError
from liquid_llm.storage import local


def content(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


# ------------------------------------------------------------------------------------------------------- whole folders


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("replace", [False, True])
def test_a_folder_takes_its_name_when_it_is_whole(tmp_path: Path, existing: bool, replace: bool) -> None:
    folder = tmp_path / "deep" / "student"
    if existing:
        folder.mkdir(parents=True)
        (folder / "old").write_text("former")
    with storage.publish_folder(folder, replace=replace) as fresh:
        (fresh / "below").mkdir()
        (fresh / "below" / "new").write_text("new")
        (fresh / "below" / "new").chmod(0o600)
        assert folder.exists() is existing
    kept = existing and not replace
    assert content(folder) == ({"old": "former"} if kept else {"below/new": "new"})
    assert [path.name for path in folder.parent.iterdir()] == ["student"]
    if not kept:  # as readable as the folder, whoever wrote it
        assert (folder / "below" / "new").stat().st_mode & 0o777 == folder.stat().st_mode & 0o666


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize(
    ("error", "seen", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), StorageError, "no space left on the disk"),
        (OSError(errno.EIO, "I/O"), StorageError, "input/output error"),
        (KeyboardInterrupt("stop"), KeyboardInterrupt, "stop"),
    ],
)
def test_a_failure_half_way_leaves_the_former_folder(
    tmp_path: Path, existing: bool, error: BaseException, seen: type[BaseException], message: str
) -> None:
    folder = tmp_path / "student"
    if existing:
        folder.mkdir()
        (folder / "config.json").write_text("former")

    def fill() -> None:
        with storage.publish_folder(folder) as fresh:
            (fresh / "config.json").write_text("new")
            raise error

    with pytest.raises(seen, match=message) as caught:
        fill()
    assert seen is KeyboardInterrupt or str(folder) in str(caught.value)
    assert content(tmp_path) == ({"student/config.json": "former"} if existing else {})
    assert [path.name for path in tmp_path.iterdir()] == (["student"] if existing else [])


def test_a_rename_that_fails_gives_the_former_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "student"
    folder.mkdir()
    (folder / "config.json").write_text("former")
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.suffix == ".tmp":
            raise OSError(errno.EACCES, "denied")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(StorageError, match="permission denied"), storage.publish_folder(folder) as fresh:
        (fresh / "config.json").write_text("new")
    assert content(tmp_path) == {"student/config.json": "former"}


def test_who_comes_second_keeps_what_is_there(tmp_path: Path) -> None:
    with storage.publish_folder(tmp_path / "x", replace=False) as slow:
        (slow / "name").write_text("slow")
        with storage.publish_folder(tmp_path / "x", replace=False) as quick:
            (quick / "name").write_text("quick")
    assert content(tmp_path) == {"x/name": "quick"}


def test_only_the_holder_of_the_name_clears_what_was_left(tmp_path: Path) -> None:
    for left in (".data.0123.tmp", ".data.tmp", ".database.0123.tmp"):
        (tmp_path / left).mkdir()
    for alone, num_left in ((False, 3), (True, 1)):
        with storage.publish_folder(tmp_path / "data", alone=alone):
            pass
        assert len(list(tmp_path.glob("*.tmp"))) == num_left
    assert (tmp_path / ".database.0123.tmp").is_dir()


@pytest.mark.parametrize("seconds", [-1.0, 86400.0])
def test_what_was_left_unfinished_goes_after_a_day(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    """Of what a process was writing that was killed; whose file may still be written to nobody can tell."""
    monkeypatch.setattr(local, "_LEFT_SECONDS", seconds)
    letters = "0123456789abcdef"
    left = [f".{letters * 2}.tmp", f".student.{letters[:12]}.tmp", f".student.{letters[:12]}.old"]
    kept = ["student", f".lost.{letters[:12]}.old", ".notes.tmp", f"{letters * 2}.tmp", f".{letters}.tmp"]
    for name in left + kept:
        if name.endswith("old") or "student" in name:
            (tmp_path / name / "below").mkdir(parents=True)
        else:
            (tmp_path / name).touch()
    storage.write_bytes(str(tmp_path / "new"), b"new")
    expected = kept if seconds < 0 else left + kept
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["new", *expected])


@pytest.mark.parametrize("name", ["x" * 255, "ü" * 127])
def test_the_longest_name_can_be_published(tmp_path: Path, name: str) -> None:
    with storage.publish_folder(tmp_path / name) as fresh:
        (fresh / "a").write_text("1")
    assert content(tmp_path) == {f"{name}/a": "1"}


def test_a_place_below_a_file_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="a part of the path is a file"), storage.publish_folder(tmp_path / "file/x"):
        pass


# --------------------------------------------------------------------------------------------------------------- locks

HOLD = """
import sys, time
from pathlib import Path
from liquid_llm import storage
with storage.locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("is_folder", [False, True])
def test_a_lock_goes_with_its_process_and_names_it(tmp_path: Path, is_folder: bool) -> None:
    path = tmp_path if is_folder else tmp_path / ".lock"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"

        def refuse(holder: str) -> None:
            raise StorageError(f"held by {holder}")

        expected = "" if is_folder else str(other.pid)
        with pytest.raises(StorageError, match=f"held by {expected}"), storage.locked(path, on_wait=refuse):
            pass
        other.kill()
        with storage.locked(path, on_wait=refuse if other.wait() is None else None):
            assert is_folder or path.read_text() == f"{os.getpid()}\n"


def test_one_at_a_time_gets_in(tmp_path: Path) -> None:
    inside, most, waited = 0, 0, []

    def work() -> None:
        nonlocal inside, most
        with storage.locked(tmp_path / "lock", on_wait=waited.append):
            inside += 1
            most = max(most, inside)
            threading.Event().wait(0.02)
            inside -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert waited
    # The file is there an instant before the name of who holds it is in it.
    assert set(waited) <= {str(os.getpid()), "unknown"}


def test_a_lock_that_was_taken_away_meanwhile_is_not_the_one_that_is_held(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    waiting, entered, done = threading.Event(), threading.Event(), threading.Event()

    def wait_for_it() -> None:
        with storage.locked(path, on_wait=lambda _: waiting.set()):
            entered.set()
            done.wait(20)

    with storage.locked(path):
        waiter = threading.Thread(target=wait_for_it)
        waiter.start()
        assert waiting.wait(20)
        path.unlink()
    assert entered.wait(20)

    def refuse(_: str) -> None:
        raise StorageError("held")

    with pytest.raises(StorageError, match="held"), storage.locked(path, on_wait=refuse):
        pass
    done.set()
    waiter.join()


def test_a_file_system_without_locks_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOTSUP, "not supported")

    monkeypatch.setattr("fcntl.flock", refuse)
    with storage.locked(tmp_path / "lock"):
        assert "has no locks" in caplog.text


# ---------------------------------------------------------------------------------------------------------------- zips


@pytest.mark.parametrize(
    ("num_bytes", "free", "max_bytes", "fits"),
    [
        (2**22, 2**40, None, False),  # zeros pack a thousand-fold
        (2**20, 2**40, None, True),
        (2**20, 2**40, 2**20 - 1, False),
        (2**20, 2**20 - 1, None, False),
    ],
)
def test_a_zip_that_holds_far_too_much_is_refused_before_it_is_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_bytes: int, free: int, max_bytes: int | None, fits: bool
) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as opened:
        opened.writestr("x", bytes(num_bytes))
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=free))
    if fits:
        storage.unpack_zip(tmp_path / "a.zip", tmp_path / "out", max_bytes=max_bytes)
        assert (tmp_path / "out" / "x").stat().st_size == num_bytes
        return
    with pytest.raises(StorageError, match=rf"gs://b: .*far more.*{num_bytes:,} bytes.*expected at most"):
        storage.unpack_zip(tmp_path / "a.zip", tmp_path / "out", max_bytes=max_bytes, where="gs://b")
    assert [path.name for path in tmp_path.iterdir()] == ["a.zip"]


def test_a_zip_of_too_many_members_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as opened:
        for number in range(20_001):
            opened.writestr(f"{number}", b"")
    with pytest.raises(StorageError, match=r"20,001 members .* at most 20,000 members"):
        storage.unpack_zip(tmp_path / "a.zip", tmp_path / "out")


# ------------------------------------------------------------------------------------------------------------- digests


@pytest.mark.parametrize("size", [0, 1, 4 * 2**20, 4 * 2**20 + 1])
def test_the_digest_of_a_file_is_that_of_its_bytes(tmp_path: Path, size: int) -> None:
    (tmp_path / "x").write_bytes(data := os.urandom(size))
    assert storage.sha256(tmp_path / "x") == hashlib.sha256(data).hexdigest()


# ----------------------------------------------------------------------------------------------------------- fetch once


def test_a_remote_file_is_fetched_once_for_each_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = f"memory://{tmp_path.name}/wheel.whl"
    fetched: list[str] = []
    download = storage.download
    monkeypatch.setattr(storage, "download", lambda uri, path: (fetched.append(uri), download(uri, path)))
    for data, num_fetched in ((b"one", 1), (b"one", 1), (b"three", 2)):
        if not storage.exists(uri) or storage.read_bytes(uri) != data:
            storage.write_bytes(uri, data)
        path = storage.fetch_once(uri, tmp_path)
        assert (path.name, path.read_bytes(), len(fetched)) == ("wheel.whl", data, num_fetched)
    path.write_bytes(b"cut")  # of another size than was fetched
    assert storage.fetch_once(uri, tmp_path).read_bytes() == b"three"
    other = f"memory://{tmp_path.name}/other/wheel.whl"
    storage.write_bytes(other, b"third")
    assert storage.fetch_once(other, tmp_path).read_bytes() == b"third"
    with pytest.raises(StorageError, match="not found"):
        storage.fetch_once(f"memory://{tmp_path.name}/none", tmp_path)


def test_a_local_file_is_used_where_it_lies(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"1")
    assert storage.fetch_once(f"file://{tmp_path}/x", tmp_path / "copies") == tmp_path / "x"
    assert not (tmp_path / "copies").exists()


@pytest.mark.parametrize(
    ("path", "folder", "expected"),
    [
        ("a/*.jsonl", "gs://b/m", "gs://b/m/a/*.jsonl"),
        ("a.jsonl", "/m", "/m/a.jsonl"),
        ("a.jsonl", "", "a.jsonl"),
        ("/a.jsonl", "/m", "/a.jsonl"),
        ("file:///a", "/m", "file:///a"),
        ("s3://c/a", "gs://b", "s3://c/a"),
    ],
)
def test_what_a_path_in_a_folder_names(path: str, folder: str, expected: str) -> None:
    assert storage.resolve(path, folder) == expected


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux can be asked")
def test_the_system_is_asked_to_begin_writing_and_refuses_what_is_no_file(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb", buffering=0) as file:
        file.write(b"x" * 100_000)
        assert storage.start_writeback(file.fileno(), 0, 100_000)
    reader, writer = os.pipe()
    assert not storage.start_writeback(writer, 0, 10)
    os.close(reader)
    os.close(writer)
