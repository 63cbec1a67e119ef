"""Where the files of tests lie: in memory, where there is plenty of it.

Everything this project writes it forces to the disk, and tests write tens of thousands of files that nobody reads
after them: on a busy disk each of them waits up to 30 ms. A file system in memory keeps all that a killed process has
left, as a disk does whose machine goes on; what a disk loses without power no test of this suite can see.
"""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

MEMORY = Path("/dev/shm")
LEAST_FREE_BYTES = 10 * 2**30  # several times what a session has at one time
_MEMINFO = Path("/proc/meminfo")


def place_for_files() -> str:
    """``TMPDIR`` where a person has set it; else memory, if it has room and may hold programs; else the usual place."""
    if "TMPDIR" in os.environ or not os.access(MEMORY, os.W_OK) or _room() < LEAST_FREE_BYTES:
        return tempfile.gettempdir()
    return str(MEMORY)


def _room() -> int:
    """Bytes that may be written there."""
    there = os.statvfs(MEMORY)
    available = re.search(r"MemAvailable:\s+(\d+) kB", _MEMINFO.read_text()) if _MEMINFO.exists() else None
    if there.f_flag & os.ST_NOEXEC or available is None:
        return 0
    return min(int(available[1]) * 1024, there.f_bavail * there.f_frsize)
