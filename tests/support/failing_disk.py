"""A disk that goes wrong under a real command, at any of its writes.

    write   a file opened for writing, a name made (rename, link) or a folder made, below a folder that is watched
    full    from the chosen write on there is no room: really, where the test may mount a small file system of its own,
            else by the error that the kernel would give
    broken  from the chosen write on each fails with a given error

Python tells of each write before it is done (``sys.addaudithook``), whatever library does it; what native code opens by
itself (safetensors) it does not tell of, and a real disk is as full for that.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_NAMING = {"os.rename": 1, "os.link": 1, "os.mkdir": 0, "os.symlink": 1}  # event -> which argument is the new name
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


@dataclass
class Watch:
    """What is written below ``root`` while it is the current one."""

    root: Path
    act: Callable[[int], None] = lambda number: None
    writes: list[str] = field(default_factory=list)
    _renamed: dict[str, str] = field(default_factory=dict)
    _lock: threading.RLock = field(default_factory=threading.RLock)
    _acting: bool = False

    def see(self, event: str, arguments: tuple[Any, ...]) -> None:
        path = _written_path(event, arguments)
        if path is None or not path.startswith(f"{self.root}{os.sep}"):
            return
        with self._lock:
            if self._acting:
                return
            self._acting = True
            try:
                name = os.path.relpath(path, self.root)
                if event == "os.rename":
                    self._renamed[os.path.relpath(os.fsdecode(arguments[0]), self.root)] = name
                self.writes.append(f"{event} {name}")
                self.act(len(self.writes))
            finally:
                self._acting = False

    @property
    def kinds(self) -> dict[str, int]:
        """Kind of write -> the number of its first: a temporary name counts as what it became; figures do not count."""
        found: dict[str, int] = {}
        for number, write in enumerate(self.writes, start=1):
            event, _, name = write.partition(" ")
            folder, _, last = self._renamed.get(name, name).rpartition("/")
            shown = re.sub(r"[0-9a-f]{12,}|\d+", "N", f"{folder}/{last}".lstrip("/"))
            found.setdefault(f"{event} {shown}", number)
        return found


_current: list[Watch] = []


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _current and (event == "open" or event in _NAMING):
        _current[-1].see(event, arguments)


_installed = False


@contextlib.contextmanager
def watch(root: Path, act: Callable[[int], None] = lambda number: None) -> Iterator[Watch]:
    """Have ``act`` told the number of each write below ``root`` before it is done; what it raises, the write raises."""
    global _installed
    if not _installed:
        sys.addaudithook(_hook)  # for as long as the process lives
        _installed = True
    watching = Watch(root, act)
    _current.append(watching)
    try:
        yield watching
    finally:
        _current.remove(watching)


def _written_path(event: str, arguments: tuple[Any, ...]) -> str | None:
    if event == "open":
        path, _, flags = arguments
        if not isinstance(path, str | bytes) or not (isinstance(flags, int) and flags & _WRITING):
            return None
        return os.path.abspath(os.fsdecode(path))
    path = arguments[_NAMING[event]]
    if not isinstance(path, str | bytes | os.PathLike) or (event == "os.mkdir" and os.path.isdir(path)):
        return None  # a folder that is there is said to be there, however full the disk
    return os.path.abspath(os.fsdecode(path))


def fail_with(number: int, code: int) -> Callable[[int], None]:
    """Each write from the ``number``-th on fails with this error of the system."""

    def act(now: int) -> None:
        if now >= number:
            raise OSError(code, os.strerror(code))

    return act


@dataclass(frozen=True)
class Disk:
    """A place for files that can be full. ``real``: a file system of its own."""

    folder: Path
    real: bool

    def fill_at(self, number: int) -> Callable[[int], None]:
        """There is no room from the ``number``-th write on."""
        if not self.real:
            return fail_with(number, errno.ENOSPC)
        return lambda now: self.fill() if now == number else None

    def fill(self) -> None:
        with contextlib.suppress(OSError), (self.folder / "filler").open("ab", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    def free(self) -> None:
        (self.folder / "filler").unlink(missing_ok=True)


@contextlib.contextmanager
def small_disk(folder: Path, num_bytes: int = 64 * 2**20) -> Iterator[Disk]:
    """``folder`` as a disk: mounted where this process may mount, else a folder whose writes can be refused."""
    folder.mkdir(parents=True, exist_ok=True)
    mounting = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(folder)]
    try:
        real = subprocess.run(mounting, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        real = False
    try:
        yield Disk(folder, real)
    finally:
        if real:
            subprocess.run(["umount", "-l", str(folder)], check=True)
