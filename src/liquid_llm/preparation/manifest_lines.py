"""The line a prepared dataset gets in its manifest.

A manifest may be edited by hand and written by several processes: every other line stays as it is, byte for byte, and a
dataset never gets a second line.
"""

from __future__ import annotations

import contextlib
import json
import posixpath
import time
from collections.abc import Iterator
from typing import Any

from liquid_llm import storage
from liquid_llm.errors import StorageError
from liquid_llm.preparation.catalog import Dataset, absolute

_ATTEMPTS = 5
_PAUSE_SECONDS = 0.2


def write_line(dataset: Dataset) -> bool:
    """Have the dataset's manifest name its shards; whether it had to be changed.

    A line that names the shards, or one of the raw inputs (it is resolved to the shards when it is read), is enough.
    Where the catalog states a weight, a line that names the shards takes it.

    Raises:
        StorageError: the manifest cannot be read or written.
    """
    assert dataset.manifest is not None
    with _alone(dataset.manifest):
        for attempt in range(_ATTEMPTS):
            before = storage.read_bytes(dataset.manifest) if storage.stat(dataset.manifest) is not None else b""
            after = _with_line(before, dataset)
            if after == before:
                return attempt > 0
            storage.write_bytes(dataset.manifest, after)
            if not storage.is_remote(dataset.manifest):
                return True
            time.sleep(_PAUSE_SECONDS)  # another process may have written what it had read before: look again
    raise StorageError("others keep writing the manifest", where=dataset.manifest, remedy="run this command again")


@contextlib.contextmanager
def _alone(manifest: str) -> Iterator[None]:
    """While entered, no other process of this machine is in here for a manifest of the same folder."""
    if storage.is_remote(manifest):
        yield
        return
    folder = storage.local_path(manifest).parent
    folder.mkdir(parents=True, exist_ok=True)
    with storage.locked(folder):
        yield


def _with_line(content: bytes, dataset: Dataset) -> bytes:
    lines = content.split(b"\n")
    for number, line in enumerate(lines):
        value = _parsed(line)
        path = _absolute(str(value.get("path", "")), dataset)
        if value.get("type") != dataset.type or not (dataset.names_shards(path) or dataset.names_input(path)):
            continue
        if path == dataset.shards and dataset.weight not in (None, value.get("weight", 1.0)):
            lines[number] = json.dumps({**value, "weight": dataset.weight}).encode()
        return b"\n".join(lines)
    weight = 1.0 if dataset.weight is None else dataset.weight
    line = json.dumps({"path": _shown(dataset), "type": dataset.type, "weight": weight}).encode()
    return content + (b"\n" if content and not content.endswith(b"\n") else b"") + line + b"\n"


def _parsed(line: bytes) -> dict[str, Any]:
    with contextlib.suppress(ValueError):
        value = json.loads(line.decode("utf-8-sig"))
        if isinstance(value, dict):
            return value
    return {}  # whoever reads the manifest says what is wrong with it


def _absolute(path: str, dataset: Dataset) -> str:
    return absolute(storage.resolve(path, posixpath.dirname(dataset.manifest or "")))


def _shown(dataset: Dataset) -> str:
    """The shards' glob, relative to the manifest's folder where they lie below it, so that both can be moved."""
    folder = posixpath.dirname(dataset.manifest or "").rstrip("/") + "/"
    return dataset.shards.removeprefix(folder)
