"""The local half of the storage seam: files and folders published by rename, locks, digests.

Paths here are local; ``uri`` is what the user wrote and what messages name.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import glob as patterns
import hashlib
import logging
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from liquid_llm.storage.failures import describe

TEMPORARY_SUFFIX = ".tmp"
_UNFINISHED = re.compile(r"\.([0-9a-f]{32}|(?P<stem>.{1,50})\.[0-9a-f]{12})\.(tmp|(?P<former>old))")
_LEFT_SECONDS = 86400.0
_HASH_BLOCK_BYTES = 4 * 2**20
_SYNC_FILE_RANGE_WRITE = 2
_log = logging.getLogger(__name__)
_tidied: set[Path] = set()


@contextlib.contextmanager
def translate_errors(uri: object, *, writing: bool = False) -> Iterator[None]:
    """Turn this machine's own file errors into a StorageError."""
    try:
        yield
    except OSError as error:
        raise describe(error, writing=writing).as_error(uri) from error


@contextlib.contextmanager
def publish(target: Path, uri: object = None) -> Iterator[Path]:
    """Yield a temporary name beside ``target``; on success its data is forced to disk and it takes the name.

    A crash leaves the old file or the new one, and at most a stray ``.*.tmp``, which goes when another process
    publishes here a day later. Raises StorageError for a full disk, a missing permission and the like.
    """
    # the name does not contain the target's: that may already be as long as a name can be
    temporary = target.parent / f".{uuid.uuid4().hex}{TEMPORARY_SUFFIX}"
    with translate_errors(uri or target, writing=True):
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_unfinished(target.parent)
        try:
            yield temporary
            sync(temporary)
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
        sync(target.parent)


@contextlib.contextmanager
def publish_folder(folder: Path, *, replace: bool = True, alone: bool = False) -> Iterator[Path]:
    """Yield a new folder beside ``folder``; on success its files are forced to disk and it takes the name.

    A crash leaves the old folder or the new one, whole, and strays as ``publish`` does. Files become as readable as the
    folder is: some libraries write theirs for the owner alone.

    Args:
        folder: made with the folders above it.
        replace: put it in the place of an earlier one; otherwise one that is there by then, because another process was
            faster, stays.
        alone: the caller holds a lock on the name, so that what a killed process left of it can be removed.

    Raises:
        StorageError: a full disk, a missing permission and the like; nothing half-written stays behind.
    """
    stem = f".{folder.name[:50]}."  # the whole name may already be as long as a name can be
    fresh = folder.with_name(f"{stem}{uuid.uuid4().hex[:12]}{TEMPORARY_SUFFIX}")
    former = fresh.with_suffix(".old")
    with translate_errors(folder, writing=True):
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_unfinished(folder.parent)
        for left in folder.parent.glob(f"{patterns.escape(stem)}*tmp") if alone else ():
            shutil.rmtree(left, ignore_errors=True)
        try:
            fresh.mkdir()
            yield fresh
            _sync_files(fresh)
            _take_name(fresh, folder, former if replace else None)
            sync(folder.parent)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
            if folder.exists():
                shutil.rmtree(former, ignore_errors=True)


def _remove_unfinished(folder: Path) -> None:
    """Remove what killed processes have left unfinished in ``folder``; once a process, as there may be a million files.

    Who writes something there now cannot be told on all file systems: what has not changed for a day is nobody's.
    """
    if folder in _tidied:
        return
    _tidied.add(folder)
    with contextlib.suppress(OSError):
        names = os.listdir(folder)
        for name in names:
            found = _UNFINISHED.fullmatch(name)
            if found is None or time.time() - _last_change(folder / name) <= _LEFT_SECONDS:
                continue
            if found["former"] and not any(one[:50] == found["stem"] for one in names):
                continue  # all there is of a folder whose name was being taken
            if (folder / name).is_dir():
                shutil.rmtree(folder / name, ignore_errors=True)
            else:
                (folder / name).unlink(missing_ok=True)


def _last_change(path: Path) -> float:
    """When a file, or a folder or anything in it, was changed, renamed or written to."""
    paths = [path, *path.rglob("*")] if path.is_dir() else [path]
    return max(one.lstat().st_ctime for one in paths)


def _sync_files(folder: Path) -> None:
    mode = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)
            sync(path)


def _take_name(fresh: Path, folder: Path, former: Path | None) -> None:
    if former is not None and folder.exists():
        # two renames: there is no portable way to swap two folders; a crash between them leaves both whole
        folder.rename(former)
    try:
        fresh.rename(folder)
    except OSError:
        if former is None and folder.is_dir():
            return
        if former is not None and former.exists():
            former.rename(folder)
        raise


@contextlib.contextmanager
def locked(path: Path, *, on_wait: Callable[[str], None] | None = None) -> Iterator[None]:
    """Hold the lock ``path`` while entered, waiting for whoever holds it; it goes with the process, however that ends.

    A file system without locks is said in a warning, and nothing is held.

    Args:
        path: an existing folder, or a file, which is made where it is missing and names the process that holds it.
        on_wait: told which process holds the lock before it is waited for; what it raises is raised here.
    """
    with contextlib.ExitStack() as stack:
        while True:
            is_folder = path.is_dir()
            descriptor = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR | os.O_CREAT, 0o666)
            stack.callback(os.close, descriptor)
            _hold(descriptor, path, on_wait)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), path.stat()):
                    break
            stack.close()  # whoever held it took the file away meanwhile: another may hold the one that is there now
        if not is_folder:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield


def _hold(descriptor: int, path: Path, on_wait: Callable[[str], None] | None) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if on_wait is not None:
            on_wait("" if path.is_dir() else os.read(descriptor, 32).decode(errors="replace").strip() or "unknown")
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:
        _log.warning("%s: this file system has no locks (%s): do not start two runs here", path, error)


def sha256(path: Path) -> str:
    """Hexadecimal sha256 of a file. Raises StorageError where it cannot be read."""
    digest = hashlib.sha256()
    with translate_errors(path), path.open("rb", buffering=0) as stream:
        while block := stream.read(_HASH_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Force a file's data, or a folder's entries, to the disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def start_writeback(descriptor: int, start: int, num_bytes: int) -> bool:
    """Have the system begin to write a part of a file to the disk, and wait for nothing; whether it does (Linux).

    Unasked it begins after seconds, or when a tenth of memory is to be written: ``sync`` would then wait for all of it.
    """
    try:
        call = ctypes.CDLL(None).sync_file_range
    except (AttributeError, OSError, TypeError):  # another system
        return False
    call.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return bool(call(descriptor, start, num_bytes, _SYNC_FILE_RANGE_WRITE) == 0)


def matching_files(pattern: str) -> list[str]:
    """Files matching a glob pattern; an existing file whose name only looks like a pattern is itself."""
    if os.path.isfile(pattern):
        return [pattern]
    return sorted(found for found in patterns.glob(pattern, recursive=True) if os.path.isfile(found))


def files_below(root: Path) -> Iterator[tuple[str, os.stat_result]]:
    """(name relative to ``root``, status) of every file below it, in no particular order."""
    for folder, _, names in os.walk(root):
        for name in names:
            path = Path(folder, name)
            with contextlib.suppress(FileNotFoundError):  # removed while listing
                yield path.relative_to(root).as_posix(), path.stat()


@contextlib.contextmanager
def borrow_folder(folder: Path) -> Iterator[None]:
    """Make ``folder`` for the time of the block where it is missing; remove again what was made and is still empty."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    finally:
        for path in missing:  # deepest first
            with contextlib.suppress(OSError):  # never made, or in use by now
                path.rmdir()
