"""``liquid inspect``: what a checkpoint, run directory, signal store or manifest holds, as one JSON object."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from liquid_llm import storage
from liquid_llm.checkpoint.discovery import DATA_SUFFIX, SIDECAR_SUFFIX, parse_sidecar
from liquid_llm.checkpoint.metadata import IN_PIECES, CheckpointMetadata
from liquid_llm.checkpoint.pieces import folder_name
from liquid_llm.data.manifest import entry_files, read_manifest
from liquid_llm.errors import CheckpointError, LiquidError, UsageError
from liquid_llm.masking import process_masker
from liquid_llm.metrics import FILE_NAME, read_metrics
from liquid_llm.parsing import parse_json
from liquid_llm.signal_store.description import STORE_FILE
from liquid_llm.signal_store.store import open_store


def inspect(uri: str) -> int:
    """Print what ``uri`` holds; returns the exit code.

    Raises:
        UsageError: there is nothing there this project writes or reads.
        LiquidError: it is there and cannot be read.
    """
    print(json.dumps(process_masker().urls(describe(uri)), indent=2, sort_keys=True, default=str))
    return 0


def describe(uri: str) -> dict[str, Any]:
    """The same as a mapping whose ``kind`` says what was found."""
    if uri.endswith(DATA_SUFFIX):
        found = _read_sidecar(uri.removesuffix(DATA_SUFFIX) + SIDECAR_SUFFIX)
        return {"kind": "checkpoint", **found, **_pieces(uri.rpartition("/")[0] or ".", found)}
    if uri.endswith((".jsonl", ".manifest")):
        return _manifest(uri)
    names = {info.name: info for info in storage.list_files(uri)}
    if STORE_FILE in names:
        return {"kind": "store", **open_store(uri).describe()}
    sidecars = sorted(name for name in names if name.endswith(SIDECAR_SUFFIX) and "/" not in name)
    if sidecars or FILE_NAME in names:
        return _run(uri, sidecars)
    raise UsageError(
        "nothing to inspect here",
        where=uri,
        expected="a run directory, a .pt checkpoint, a signal store or a .jsonl manifest",
    )


def _pieces(run: str, sidecar: dict[str, Any]) -> dict[str, Any]:
    """Of a checkpoint whose tensors lie in a folder beside it, that folder."""
    if sidecar.get("format_version") != IN_PIECES:
        return {}
    folder = folder_name(CheckpointMetadata.from_dict(sidecar, run))
    files = storage.list_files(storage.join(run, folder))
    return {"pieces": {"folder": folder, "files": len(files), "bytes": sum(one.size for one in files)}}


def _read_sidecar(uri: str) -> dict[str, Any]:
    """What a sidecar says, as it stands there. Raises CheckpointError where there is none or it is damaged."""
    if not storage.exists(uri):
        raise CheckpointError(
            "this checkpoint has no sidecar",
            where=uri,
            remedy="liquid doctor says whether its data is whole; a run that goes on from it writes the sidecar again",
        )
    text = storage.read_small(uri)
    parse_sidecar(text, uri)  # raises
    found: dict[str, Any] = parse_json(text)
    return found


def _manifest(uri: str) -> dict[str, Any]:
    entries = read_manifest(uri)
    files = {entry.path: len(entry_files(entry)) for entry in entries}
    rows = [{**entry.plain(), "files": files[entry.path]} for entry in entries]
    return {"kind": "manifest", "entries": rows, "types": dict(Counter(entry.type for entry in entries))}


def _run(uri: str, sidecars: list[str]) -> dict[str, Any]:
    checkpoints: dict[str, dict[str, Any]] = {}
    for name in sidecars:
        try:
            metadata = _read_sidecar(storage.join(uri, name))
            row = {key: metadata[key] for key in ("step", "tokens_seen", "block_size")} | _pieces(uri, metadata)
        except LiquidError as error:
            row = {"damaged": str(error)}
        checkpoints[name.removesuffix(SIDECAR_SUFFIX)] = row
    found: dict[str, Any] = {"kind": "run", "checkpoints": checkpoints}
    if not storage.is_remote(uri):
        rows = read_metrics(storage.local_path(uri))
        for kind in ("train", "eval"):
            last = [row for row in rows if row.get("kind") == kind][-1:]
            if last:
                found[f"last_{kind}"] = last[0]
    return found
