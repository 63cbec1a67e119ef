"""What ``liquid inspect`` says of a run: its checkpoints with their losses, how far it is, what it was made of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from liquid_llm import storage
from liquid_llm.checkpoint.discovery import DATA_SUFFIX, SIDECAR_SUFFIX, parse_sidecar
from liquid_llm.checkpoint.metadata import IN_PIECES, CheckpointMetadata
from liquid_llm.checkpoint.pieces import folder_name
from liquid_llm.errors import CheckpointError, LiquidError
from liquid_llm.metrics import FILE_NAME
from liquid_llm.parsing import ParseError, parse_json
from liquid_llm.provenance import CONFIG, ENVIRONMENT, OPTIONS
from liquid_llm.report.runs import SUMMARY_FILE
from liquid_llm.storage import FileInfo

_LOSS = "val_loss_student"
_FINAL = "final"


def describe_checkpoint(stem: str) -> dict[str, Any]:
    """What the sidecar of a checkpoint says, as it stands there, and the loss at its step.

    Args:
        stem: its path or URL without a suffix.

    Raises:
        CheckpointError: there is no sidecar, or it is damaged.
    """
    run = stem.rpartition("/")[0] or "."
    found = _read_sidecar(stem + SIDECAR_SUFFIX)
    rows = list(_rows(storage.join(run, FILE_NAME))) if storage.exists(storage.join(run, FILE_NAME)) else []
    info = storage.stat(stem + DATA_SUFFIX)
    own = {"val_loss": _losses(rows).get(found["step"]), "bytes": None if info is None else info.size}
    return {"kind": "checkpoint", **found, **_pieces(run, found), **own}


def describe_run(uri: str, infos: Mapping[str, FileInfo]) -> dict[str, Any]:
    """A run's checkpoints, its last rows, and how far it has come; ``infos``: the files below it."""
    rows = list(_rows(infos[FILE_NAME].uri)) if FILE_NAME in infos else []
    losses, newest = _losses(rows), None
    checkpoints: dict[str, dict[str, Any]] = {}
    for name in sorted(one for one in infos if one.endswith(SIDECAR_SUFFIX) and "/" not in one):
        stem = name.removesuffix(SIDECAR_SUFFIX)
        try:
            metadata = _read_sidecar(infos[name].uri)
        except LiquidError as error:
            checkpoints[stem] = {"damaged": str(error)}
            continue
        if newest is None or metadata["step"] > newest["step"]:
            newest = metadata
        data = infos.get(stem + DATA_SUFFIX)
        checkpoints[stem] = {
            **{key: metadata[key] for key in ("step", "tokens_seen", "block_size")},
            "val_loss": losses.get(metadata["step"]),
            "bytes": None if data is None else data.size,
            **_pieces(uri, metadata),
        }
    found: dict[str, Any] = {"kind": "run", **_progress(rows, newest, infos), "checkpoints": checkpoints}
    for kind in ("train", "eval"):
        last = [row for row in rows if row.get("kind") == kind][-1:]
        if last:
            found[f"last_{kind}"] = last[0]
    if SUMMARY_FILE in infos:
        summary = _json(infos[SUMMARY_FILE].uri)
        if isinstance(summary, dict) and summary.get("sentences"):
            found["sentences"] = summary["sentences"]
    return found


def _progress(rows: list[dict[str, Any]], newest: Any, infos: Mapping[str, FileInfo]) -> dict[str, Any]:
    """Where the run is: its student, the step reached, those it is to take, its loss, whether it has ended."""
    evaluated = [row for row in rows if row.get("kind") == "eval" and isinstance(row.get(_LOSS), int | float)]
    run, student = (_mapping(None if newest is None else newest.get(key)) for key in ("run", "student"))
    return {
        "student": student.get("spec"),
        "step": max((row["step"] for row in rows), default=None if newest is None else newest["step"]),
        "total_steps": run.get("total_steps"),
        "val_loss": evaluated[-1][_LOSS] if evaluated else None,
        "finished": f"{_FINAL}{SIDECAR_SUFFIX}" in infos and any(name.startswith("student/") for name in infos),
        "teachers": run.get("teachers"),
    }


def describe_rows(uri: str) -> dict[str, Any]:
    """A file of rows: how many there are of each kind, and the last of each."""
    rows = list(_rows(uri))
    kinds = Counter(str(row.get("kind", "row")) for row in rows)
    return {
        "kind": "rows",
        "rows": dict(kinds),
        "steps": max((row["step"] for row in rows if isinstance(row.get("step"), int)), default=None),
        **{f"last_{kind}": [row for row in rows if str(row.get("kind", "row")) == kind][-1] for kind in kinds},
    }


def describe_provenance(uri: str, infos: Mapping[str, FileInfo]) -> dict[str, Any]:
    """What a run was made of, in the words of its files."""
    environment = _json(infos[ENVIRONMENT].uri)
    known = _mapping(environment)
    packages = {name: version for name, version in _mapping(known.get("packages")).items() if version is not None}
    earlier, command = known.get("earlier_sessions"), known.get("command")
    found: dict[str, Any] = {
        "kind": "provenance",
        "started_at": known.get("started_at"),
        "sessions": 1 + (len(earlier) if isinstance(earlier, list) else 0),
        "command": " ".join(map(str, command)) if isinstance(command, list) else None,
        "start": known.get("start"),
        "git": known.get("git"),
        "hardware": {
            key: value for key, value in _mapping(known.get("hardware")).items() if not isinstance(value, list | dict)
        },
        "packages": packages,
        "choices": known.get("choices"),
        "again": f"liquid train --config {storage.join(uri, OPTIONS)}" if OPTIONS in infos else None,
    }
    config = _json(infos[CONFIG].uri) if CONFIG in infos else None
    if isinstance(config, dict) and isinstance(config.get("face"), str) and found["again"]:
        found["again"] = found["again"].replace("liquid train", f"liquid {config['face']}")
    return found


# ------------------------------------------------------------------------------------------------------------- reading


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _json(uri: str) -> Any:
    try:
        return parse_json(storage.read_small(uri))
    except (ParseError, LiquidError):
        return None


def _rows(uri: str) -> Iterator[dict[str, Any]]:
    """The rows of a local or remote file, without those that a kill has torn."""
    for line in storage.read_bytes(uri).splitlines(keepends=True):
        try:
            row = parse_json(line) if line.endswith(b"\n") else None
        except ParseError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            yield row


def _losses(rows: list[dict[str, Any]]) -> dict[int, float]:
    """Step -> held-out loss."""
    return {row["step"]: row[_LOSS] for row in rows if row.get("kind") == "eval" and _LOSS in row}


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
