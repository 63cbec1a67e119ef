"""What several tests begin with and none changes: made once a session, by whichever process comes first."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

from filelock import FileLock

FOLDER = "LIQUID_TESTS_FOLDER"
"""A variable that names the folder which this session of tests and its processes share, and which goes at its end."""


def once(name: str, make: Callable[[Path], object]) -> Path:
    """A file or folder, made by ``make`` at a place that is not there yet where nobody in this session has made it."""
    place = _folder() / name
    with FileLock(f"{place}.lock"):
        if not place.exists():
            part = place.with_name(f"{name}.part")
            make(part)
            part.rename(place)
    return place


@cache
def _folder() -> Path:
    """The session's; of a program that is none, a folder of its own, which it leaves behind as other temporary ones."""
    return Path(os.environ.get(FOLDER) or tempfile.mkdtemp(prefix="liquid-tests-"))
