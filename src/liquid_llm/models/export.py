"""Writing a finished model as a Hugging Face folder, in one step or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from liquid_llm.errors import StorageError


def save_student(model: Any, tokenizer: Any, folder: str | Path) -> Path:
    """Save ``model`` and ``tokenizer`` so that ``AutoModelForCausalLM`` and ``AutoTokenizer`` open ``folder`` anywhere.

    The folder appears complete or stays as it was; an earlier one is replaced. Weights keep their dtype.

    Raises:
        StorageError: the disk is full, or the place cannot be written.
    """

    def write(place: Path) -> None:
        model.save_pretrained(place)
        tokenizer.save_pretrained(place)

    return write_folder(Path(folder), write)


def write_folder(folder: Path, write: Callable[[Path], None]) -> Path:
    """Have ``write`` fill a new folder beside ``folder``, make it durable, and put it in the place of ``folder``.

    Raises:
        StorageError: as :func:`save_student`; nothing half-written stays behind.
    """
    folder = Path(folder)
    fresh = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
    former = fresh.with_suffix(".old")
    try:
        fresh.mkdir(parents=True)
        write(fresh)
        _sync(fresh)
        if folder.exists():
            # Two renames: there is no portable way to swap two folders. A crash between them leaves both complete.
            folder.rename(former)
        try:
            fresh.rename(folder)
        except OSError:
            if former.exists():
                former.rename(folder)
            raise
    except OSError as error:
        raise _storage_error(folder, error) from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        if folder.exists():
            shutil.rmtree(former, ignore_errors=True)
    return folder


def _sync(folder: Path) -> None:
    """Flush every file of ``folder`` to the disk, so that the rename never outlives the content.

    Files become as readable as the folder: safetensors creates its own for the owner alone.
    """
    mode = folder.stat().st_mode & 0o666
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            file.chmod(mode)
            descriptor = os.open(file, os.O_RDWR)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def _storage_error(folder: Path, error: OSError) -> StorageError:
    if error.errno == errno.ENOSPC:
        return StorageError("no space left on the disk", where=folder, remedy="free some space and save again")
    return StorageError("the model cannot be saved", where=folder, got=error.strerror or str(error))
