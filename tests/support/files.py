"""Where the files of tests lie: in memory, where there is plenty of it.

Everything this project writes it forces to the disk, and tests write tens of thousands of files that nobody reads
after them: on a busy disk each of them waits up to 30 ms. A file system in memory keeps all that a killed process has
left, as a disk does whose machine goes on; what a disk loses without power no test of this suite can see.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import IO

MEMORY = Path("/dev/shm")
LEAST_FREE_BYTES = 10 * 2**30  # several times what a session has at one time
_MEMINFO = Path("/proc/meminfo")
_PREFIX, _LOCK = "liquid-tests-", "session.lock"


def place_for_files() -> str:
    """``TMPDIR`` where a person has set it; else memory, if it has room and may hold programs; else the usual place."""
    if "TMPDIR" in os.environ or not os.access(MEMORY, os.W_OK) or _room() < LEAST_FREE_BYTES:
        return tempfile.gettempdir()
    return str(MEMORY)


def begin_folder(outside: str) -> tuple[str, IO[str]]:
    """A new folder of a session, and what holds it while it is open; those that killed sessions have left are removed:
    in memory they would fill it."""
    for left in Path(outside).glob(f"{_PREFIX}*/{_LOCK}"):
        # Another uses it, or another removes it.
        with contextlib.suppress(BlockingIOError, FileNotFoundError), left.open() as held:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(left.parent, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=outside))
    holding = (folder / "lock.part").open("w")
    fcntl.flock(holding, fcntl.LOCK_EX)
    (folder / "lock.part").rename(folder / _LOCK)  # nobody has met it unlocked
    return str(folder), holding


def _room() -> int:
    """Bytes that may be written there."""
    there = os.statvfs(MEMORY)
    available = re.search(r"MemAvailable:\s+(\d+) kB", _MEMINFO.read_text()) if _MEMINFO.exists() else None
    if there.f_flag & os.ST_NOEXEC or available is None:
        return 0
    return min(int(available[1]) * 1024, there.f_bavail * there.f_frsize)
