"""The local half of the storage seam: plain files, published by rename.

Paths here are local; ``uri`` is what the user wrote and what messages name.
"""

from __future__ import annotations

import contextlib
import glob as patterns
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

from liquid_llm.storage.failures import describe

TEMPORARY_SUFFIX = ".tmp"


@contextlib.contextmanager
def translated(uri: object, *, writing: bool = False) -> Iterator[None]:
    """Turn this machine's own file errors into a StorageError."""
    try:
        yield
    except OSError as error:
        raise describe(error, writing=writing).as_error(uri) from error


@contextlib.contextmanager
def published(target: Path, uri: object = None) -> Iterator[Path]:
    """Yield a temporary name beside ``target``; on success its data is forced to disk and it takes the name.

    A crash leaves the old file or the new one, and at most a stray ``.*.tmp``. Raises StorageError for a full disk, a
    missing permission and the like.
    """
    # the name does not contain the target's: that may already be as long as a name can be
    temporary = target.parent / f".{uuid.uuid4().hex}{TEMPORARY_SUFFIX}"
    with translated(uri or target, writing=True):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            sync(temporary)
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
        sync(target.parent)


def sync(path: Path) -> None:
    """Force a file's data, or a folder's entries, to the disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
def borrowed_folder(folder: Path) -> Iterator[None]:
    """Make ``folder`` for the time of the block where it is missing; remove again what was made and is still empty."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    finally:
        for path in missing:  # deepest first
            with contextlib.suppress(OSError):  # never made, or in use by now
                path.rmdir()
