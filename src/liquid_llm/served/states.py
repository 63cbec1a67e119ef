"""Hidden states that a server leaves in files: those of vLLM's ``ExampleHiddenStatesConnector`` (vLLM 0.33.0).

The server answers a request with the path of a safetensors file, which it may still be writing: ``hidden_states``
[tokens, layers, hidden], the layers that it was started to extract in rising order, and ``token_ids`` [tokens]. A file
``PATH.lock`` beside it is locked until the file is whole. The states are of the residual stream before the final norm.

Of what a server says of a path only the name counts: it is looked for in the one folder that the user has named, which
is where the server's folder is seen from here.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

from liquid_llm.errors import StorageError
from liquid_llm.parsing import parse_json
from liquid_llm.served.client import Abandoned
from liquid_llm.served.protocol import BadAnswer

_SECONDS = 60.0  # in which a file must be whole, once the server has answered
_LOOK_SECONDS = 0.02
_MOST_HEADER_BYTES = 2**20


def read_states(
    folder: Path,
    told: str | None,
    ids: list[int],
    hidden_size: int,
    *,
    seconds: float = _SECONDS,
    stopping: Callable[[], bool] = lambda: False,
) -> Any:
    """The last layer's states [tokens, hidden] of the text ``ids`` in the dtype they were written in; the file is
    removed, as it was left for nobody else.

    Raises:
        BadAnswer: the file is not of these tokens, or not of this size.
        StorageError: there is none, or it is not finished in time.
        Abandoned: ``stopping`` says that nobody waits for it any more.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    name = PurePosixPath(told).name if told else ""
    if not name.endswith(".safetensors") or not name.isprintable():  # a zero byte or half a pair names no file
        raise StorageError(
            "the server says of no file that its hidden states are in it",
            where=folder,
            got=repr(told),
            remedy="start it with the connector that writes them (docs/capture.md), or leave --hidden_states_dir out",
        )
    path = folder / name
    _wait(path, _largest(len(ids), hidden_size), seconds, stopping)
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise BadAnswer(f"{name} is no safetensors file") from error
    finally:
        for one in (path, _lock_of(path)):
            one.unlink(missing_ok=True)
    states, tokens = tensors.get("hidden_states"), tensors.get("token_ids")
    if states is None or tokens is None or states.ndim != 3 or not states.is_floating_point():
        raise BadAnswer(f"{name} holds no hidden states")
    if tokens.tolist() != ids or states.shape[0] != len(ids):
        raise BadAnswer("its hidden states are of other tokens than were sent")
    if states.shape[2] != hidden_size:
        raise BadAnswer(f"its hidden states are of size {states.shape[2]}, the model's are of {hidden_size}")
    last = states[:, -1].contiguous()
    if not bool(last.isfinite().all()) or not bool(last.any(dim=1).all()):
        raise BadAnswer("its hidden states are not finite, or nothing but zeros")
    return last


def _lock_of(path: Path) -> Path:
    return path.with_name(path.name + ".lock")


def _largest(num_tokens: int, hidden_size: int) -> int:
    """Bytes that no file of so many tokens exceeds: eight layers in float32."""
    return _MOST_HEADER_BYTES + num_tokens * (8 + 8 * 4 * hidden_size)


def _wait(path: Path, most_bytes: int, seconds: float, stopping: Callable[[], bool]) -> None:
    """Until the file is whole. Raises StorageError, Abandoned, and BadAnswer for a file that is far too large."""
    ends = time.monotonic() + seconds
    while not (_is_unlocked(_lock_of(path)) and _is_whole(path, most_bytes)):
        if stopping():
            raise Abandoned
        if time.monotonic() > ends:
            raise StorageError(
                "the file with the server's hidden states is not there",
                where=path,
                remedy="name the folder that the server writes to (shared_storage_path) as it is seen from here",
            )
        time.sleep(_LOOK_SECONDS)


def _is_unlocked(lock: Path) -> bool:
    """Whether nobody holds the lock; True where there is none, as a server can be told to make none."""
    try:
        with open(lock) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


def _is_whole(path: Path, most_bytes: int) -> bool:
    """Whether the file has all bytes that its header tells of. Raises BadAnswer where they are far too many."""
    try:
        with open(path, "rb", opener=_open_plain) as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            header = (
                parse_json(file.read(length), most=_MOST_HEADER_BYTES)
                if 0 < length <= min(size, _MOST_HEADER_BYTES)
                else {}
            )
            ends = [one["data_offsets"][1] for name, one in header.items() if name != "__metadata__"]
            whole = bool(ends) and size == 8 + length + max(ends)
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError):
        return False
    if size > most_bytes:
        raise BadAnswer(f"{path.name} has {size:,} bytes")
    return whole


def _open_plain(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW)
