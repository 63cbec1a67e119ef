"""The line a prepared dataset gets in its manifest.

A manifest may be edited by hand and written by several processes: every other line stays as it is, byte for byte, and a
dataset never gets a second line.
"""

from __future__ import annotations

import contextlib
import json
import posixpath
import time
from typing import Any

from liquid_llm import storage
from liquid_llm.errors import StorageError
from liquid_llm.parsing import ParseError, parse_json
from liquid_llm.preparation.catalog import Dataset, to_absolute

_ATTEMPTS = 5
_PAUSE_SECONDS = 0.2


def write_line(dataset: Dataset) -> bool:
    """Have the dataset's manifest name its shards; whether it had to be changed.

    A line that names the shards, or one of the raw inputs (it is resolved to the shards when it is read), is enough.
    Where the catalog states a weight, a line that names the shards takes it.

    Raises:
        StorageError: the manifest cannot be read or written.
    """
    manifest = dataset.manifest
    assert manifest is not None
    if not storage.is_remote(manifest):
        folder = storage.local_path(manifest).parent
        folder.mkdir(parents=True, exist_ok=True)
        with storage.locked(folder):
            return _update(manifest, dataset)
    for attempt in range(_ATTEMPTS):
        if not _update(manifest, dataset):
            return attempt > 0
        time.sleep(_PAUSE_SECONDS)  # another process may have written what it had read before: look again
    raise StorageError("others keep writing the manifest", where=manifest, remedy="run this command again")


def _update(manifest: str, dataset: Dataset) -> bool:
    before = storage.read_bytes(manifest) if storage.exists(manifest) else b""
    after = _add_line(before, dataset)
    if after != before:
        storage.write_bytes(manifest, after)
    return after != before


def _add_line(content: bytes, dataset: Dataset) -> bytes:
    folder = posixpath.dirname(dataset.manifest or "")
    lines = content.split(b"\n")
    for number, line in enumerate(lines):
        value = _parse(line)
        path = to_absolute(str(value.get("path", "")), folder)
        if value.get("type") != dataset.type or not (dataset.names_shards(path) or dataset.names_input(path)):
            continue
        if path == dataset.shards and dataset.weight not in (None, value.get("weight", 1.0)):
            lines[number] = json.dumps({**value, "weight": dataset.weight}).encode()
        return b"\n".join(lines)
    # relative to the manifest's folder where the shards lie below it, so that both can be moved
    path = dataset.shards.removeprefix(folder.rstrip("/") + "/")
    weight = 1.0 if dataset.weight is None else dataset.weight
    line = json.dumps({"path": path, "type": dataset.type, "weight": weight}).encode()
    return content + (b"\n" if content and not content.endswith(b"\n") else b"") + line + b"\n"


def _parse(line: bytes) -> dict[str, Any]:
    with contextlib.suppress(ParseError):
        value = parse_json(line, "utf-8-sig")
        if isinstance(value, dict):
            return value
    return {}  # whoever reads the manifest says what is wrong with it
