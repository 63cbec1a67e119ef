"""Reading and writing one checkpoint file.

A checkpoint file is a torch archive of tensors and plain values: it is only ever opened with ``weights_only=True``, so
reading one cannot run code (CVE-2025-32434 and CVE-2026-24747 are why torch 2.10 is the least version).
"""

from __future__ import annotations

import errno
import hashlib
import io
import pickle
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from liquid_llm.errors import CheckpointError
from liquid_llm.storage import TORCH_DAMAGE, start_writeback, translate_errors, unpacks_far

_PIECE_BYTES = 4 * 2**20  # hashed while it is in the processor's cache
_WRITEBACK_BYTES = 32 * 2**20


class HashingWriter:
    """A write-only file that hashes what passes.

    Hashing in a second thread was tried and gave nothing on two busy cores (0.26 to 0.5 s against 0.27 s for 200 MB).

    Args:
        stream: takes the bytes.
        before_piece: called before each few MiB; what it raises ends the writing.
    """

    def __init__(self, stream: io.RawIOBase, before_piece: Callable[[], None] = lambda: None) -> None:
        self._stream = stream
        self._before_piece = before_piece
        self._hash = hashlib.sha256()

    def write(self, block: Any) -> int:
        view = memoryview(block).cast("B")
        for start in range(0, view.nbytes, _PIECE_BYTES):
            self._before_piece()
            left = view[start : start + _PIECE_BYTES]
            self._hash.update(left)
            while left:  # the system may take less than it is given
                left = left[self._stream.write(left) or 0 :]
        return view.nbytes

    def flush(self) -> None:
        self._stream.flush()

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def write_archive(path: Path, content: Mapping[str, Any], given_up: Callable[[], bool] = lambda: False) -> str:
    """Write ``content`` to a new file; returns its sha256. The caller forces it to disk and gives it its name.

    The disk begins at once, so that forcing it later waits for little.

    Args:
        path: must not exist.
        content: tensors and plain values, nested in dicts, lists and tuples. A tensor that is a view of part of a
            larger storage is written alone; tensors that share a storage still share it after loading.
        given_up: whether nobody wants the file any more; from then on writing fails.

    Raises:
        TypeError: something in ``content`` is neither a tensor nor a plain value: it could not be read back.
        OSError: the disk is full, …; ``ECANCELED``: given up.
    """
    plain = plain_content(content)

    def fill(writer: HashingWriter) -> None:
        try:
            torch.save(plain, writer)  # type: ignore[arg-type]  # it needs no more than write and flush
        except RuntimeError as error:
            # torch's writer wraps the full disk's OSError, and finishing the archive fails once more
            raise _first_os_error(error) or error from None

    return write_hashed(path, fill, given_up)


def write_hashed(path: Path, fill: Callable[[HashingWriter], None], given_up: Callable[[], bool]) -> str:
    """Have ``fill`` write a new file, of which the disk begins to take what is there already; returns its sha256.

    Raises:
        OSError: the disk is full, …; ``ECANCELED``: given up.
    """
    with path.open("xb", buffering=0) as stream:
        begun = 0

        def before_piece() -> None:
            nonlocal begun
            if given_up():
                raise OSError(errno.ECANCELED, "given up")
            if (written := stream.tell()) - begun >= _WRITEBACK_BYTES:
                start_writeback(stream.fileno(), begun, written - begun)
                begun = written

        writer = HashingWriter(stream, before_piece)
        fill(writer)
        return writer.hexdigest()


def _first_os_error(error: BaseException | None) -> OSError | None:
    while error is not None:
        if isinstance(error, OSError):
            return error
        error = error.__cause__ or error.__context__
    return None


def stands_alone(tensor: Tensor) -> bool:
    """Whether a tensor is all there is in its storage."""
    return tensor.layout != torch.strided or tensor.untyped_storage().nbytes() <= tensor.numel() * tensor.element_size()


def plain_content(
    value: Any,
    of_tensor: Callable[[Tensor], Tensor] = lambda tensor: tensor if stands_alone(tensor) else tensor.clone(),
    where: str = "checkpoint",
) -> Any:
    """What is written of ``value``: new containers, plain values as they are, ``of_tensor`` of each detached tensor.

    Raises:
        TypeError: something in it is neither a tensor nor a plain value: ``weights_only`` loading would refuse it.
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Tensor):
        return of_tensor(value.detach())
    if isinstance(value, Mapping):
        for key in value:
            if type(key) not in (str, int):
                raise TypeError(f"{where}: a key of type {type(key).__name__}")
        return {key: plain_content(one, of_tensor, f"{where}[{key!r}]") for key, one in value.items()}
    if type(value) in (list, tuple):
        return type(value)(plain_content(one, of_tensor, f"{where}[{index}]") for index, one in enumerate(value))
    raise TypeError(f"{where} is a {type(value).__name__}: a checkpoint holds tensors and plain values only")


def read_archive(path: Path, where: object = None) -> Any:
    """What a ``.pt`` file holds, tensors on the CPU. ``where`` is what messages name, the path unless given.

    Raises:
        CheckpointError: truncated, no torch file, or holding more than tensors and plain values.
        StorageError: the file is missing or cannot be read.
    """
    where = where or path
    with translate_errors(where), path.open("rb"):
        pass
    if unpacks_far(path):
        raise CheckpointError(
            "this file unpacks to far more than it should; it was not opened",
            where=where,
            got=f"{path.stat().st_size:,} bytes",
            remedy="save it again with torch.save, which packs nothing",
        )
    try:
        with warnings.catch_warnings():
            # another protocol than torch's own is refused below or read correctly: nothing a user could act on
            warnings.filterwarnings("ignore", message="Detected pickle protocol", category=UserWarning)
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0] if str(error) else "not a torch file"
        raise CheckpointError(
            "this file holds more than tensors and plain values, or is no torch file; it was not opened",
            where=where,
            got=f"{reason[:120]!r}",
            remedy="save a plain state dict with torch.save, or a Hugging Face folder with safetensors",
        ) from error
    except TORCH_DAMAGE as error:
        raise CheckpointError(
            "this file is truncated, damaged or no torch file",
            where=where,
            got=f"{path.stat().st_size} bytes",
            remedy="copy it again, or choose another checkpoint",
        ) from error
