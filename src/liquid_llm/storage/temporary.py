"""Folders for what only this process needs, and what is left of them by processes that were killed.

They lie where the system has its temporary files (TMPDIR). Each is locked by the process that made it, for as long as
that lives: whoever makes one removes those that nobody holds. Else a job that is killed and run again, as one on spot
machines is, would leave a model, or gigabytes of shards, each time.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

from liquid_llm.storage.local import translate_errors


@contextlib.contextmanager
def scratch(kind: str, base: Path | None = None) -> Iterator[Path]:
    """A new folder, removed at the end with all that is in it; of a process that was killed, by the next one.

    Args:
        kind: a word of its name, for whoever finds it.
        base: where it is made, and what was left is removed; made where it is missing. None: as the system has it.

    Raises:
        StorageError: it cannot be made, as the disk is full for one.
    """
    base = base or Path(tempfile.gettempdir())
    _remove_left(base)
    with contextlib.ExitStack() as stack:
        with translate_errors(base, writing=True):
            base.mkdir(parents=True, exist_ok=True)
            folder = None
            while folder is None:
                folder = _make(base, kind, stack)
        yield folder


def _make(base: Path, kind: str, stack: contextlib.ExitStack) -> Path | None:
    """A folder that is locked; None where another process took it for one that was left, before the lock was there."""
    made = tempfile.TemporaryDirectory(prefix=f"liquid-{kind}{_machine()}", dir=base, ignore_cleanup_errors=True)
    folder = Path(stack.enter_context(made))
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        stack.callback(os.close, descriptor)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return folder if os.path.samestat(os.fstat(descriptor), folder.stat()) else None
    except (FileNotFoundError, BlockingIOError):
        return None
    except OSError:  # a file system without locks: whoever looks has none either, and leaves all alone
        return folder


def _remove_left(base: Path) -> None:
    """Remove the folders of this user, made on this machine, whose lock nobody holds."""
    with contextlib.suppress(OSError):
        for entry in os.scandir(base):
            if _machine() in entry.name and entry.name.startswith("liquid-"):
                with contextlib.suppress(OSError):
                    _remove_unless_held(entry.path)


def _remove_unless_held(path: str) -> None:
    # no link is followed: in a folder that all may write to, anybody may have put one
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        if os.fstat(descriptor).st_uid == os.getuid():
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
    finally:
        os.close(descriptor)


@functools.cache
def _machine() -> str:
    """This machine's part of a name: where several share a folder, one may not see another's locks."""
    return f"-{hashlib.blake2b(socket.gethostname().encode(), digest_size=4).hexdigest()}-"
