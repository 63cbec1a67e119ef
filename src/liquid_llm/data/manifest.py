"""The manifest: which files make up the training data, of which type, drawn how often.

manifest: JSONL; each line ``{"path": glob, "type": word, "weight": number}``, and ``"license": words`` for a student's
card; blank lines allowed; entry: one line.

A path may be any fsspec URL. A relative one is relative to the manifest's own folder, so that a folder of data can
be moved or uploaded as it is.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import posixpath
import re
from typing import Any

from liquid_llm import storage
from liquid_llm.data.types import ManifestEntry
from liquid_llm.errors import DataError, StorageError
from liquid_llm.parsing import MAX_JSON_BYTES, ParseError, parse_json
from liquid_llm.sources import is_type
from liquid_llm.storage.streams import lines, unpack

_MOST = 1e100  # sums of weights stay numbers
_KEYS = ("path", "type", "weight")
_MAX_ENTRIES = 1_000_000


def read_manifest(uri: str) -> list[ManifestEntry]:
    """The entries of the manifest at ``uri``, in their order there.

    Raises:
        DataError: with file and line: not JSON, a key missing or misspelt, a type that is no word, a weight that is not
            a positive number; no entry at all. Whether a path matches a file is for ``entry_files`` to find out.
        StorageError: the manifest cannot be read.
    """
    entries: list[ManifestEntry] = []
    with storage.open_read(uri) as stream:
        for number, line in enumerate(lines(unpack(stream, None), MAX_JSON_BYTES), start=1):
            if line is None or len(entries) == _MAX_ENTRIES:
                got = "a line without an end" if line is None else f"more than {_MAX_ENTRIES:,} entries"
                raise DataError("this is no manifest", where=f"{uri}:{number}", got=got, expected=_example())
            if line.strip():
                entries.append(_entry(line, f"{uri}:{number}", uri))
    if not entries:
        raise DataError("the manifest has no entry", where=uri, expected=_example())
    return entries


def entry_files(entry: ManifestEntry) -> list[str]:
    """The files an entry's path matches, sorted by URI.

    Raises:
        DataError: the path matches nothing.
    """
    files = storage.glob(entry.path)
    if not files:
        raise DataError(
            "the path matches no file",
            where=entry.where,
            got=entry.path,
            remedy="correct the path or write the files first",
        )
    return files


def shard_name(file: str, manifest: str) -> str:
    """What a data file is called in a store of units: its own name, and a hash of its place.

    The place is that below the manifest's folder where it lies there, so that both may be moved together. The name is
    safe on any file system and object store.
    """
    folder = posixpath.dirname(_absolute(manifest)).rstrip("/") + "/"
    place = _absolute(file).removeprefix(folder)
    digest = hashlib.blake2b(place.encode("utf-8", "surrogatepass"), digest_size=6).hexdigest()
    return f"{re.sub(r'[^A-Za-z0-9._-]', '_', posixpath.basename(place))[-80:].lstrip('.')}-{digest}"


def _absolute(uri: str) -> str:
    return uri if storage.is_remote(uri) else os.path.abspath(storage.local_path(uri))


def _entry(line: bytes, where: str, manifest_uri: str) -> ManifestEntry:
    try:
        value = parse_json(line, "utf-8-sig")
    except ParseError as error:
        raise DataError(f"not a JSON object ({error})", where=where, expected=_example()) from error
    if not isinstance(value, dict):
        raise DataError("not a JSON object", where=where, got=_shorten(value), expected=_example())
    missing = [key for key in ("path", "type") if key not in value]
    if missing:
        raise DataError(f"no {' and no '.join(missing)}", where=where, expected=_example())
    for key in value:
        # other tools' extra keys are none of our business, but a misspelt weight must not become 1.0
        close = difflib.get_close_matches(key.lower(), _KEYS, n=1, cutoff=0.7) if key not in _KEYS else []
        if close:
            raise DataError("unknown key", where=where, got=_shorten(key), expected=close[0])
    path, type, weight = value["path"], value["type"], value.get("weight", 1.0)
    if not isinstance(path, str) or not path.strip():
        raise DataError("path is not a non-empty string", where=where, got=_shorten(path))
    if not is_type(type):
        expected = "lm, math_tool, code or another word of letters, digits, _ and -"
        raise DataError("not a type's name", where=where, got=_shorten(type), expected=expected)
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight <= _MOST:
        raise DataError("weight is not a positive number", where=where, got=_shorten(weight))
    try:
        resolved = storage.resolve(path.strip(), posixpath.dirname(manifest_uri))
    except StorageError as error:
        raise DataError(error.problem, where=where, got=path, expected=error.expected, remedy=error.remedy) from None
    licence = value.get("license")
    if licence is not None and not isinstance(licence, str):
        raise DataError("license is not a string", where=where, got=_shorten(licence))
    return ManifestEntry(resolved, type, float(weight), where, licence)


def _shorten(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."


def _example() -> str:
    return '{"path": "lm/*.jsonl", "type": "lm", "weight": 1.0}'
