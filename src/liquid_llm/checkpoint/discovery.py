"""Which complete checkpoints a folder holds, and reading one.

name       ``step-00002000``, ``time-20260101T000000Z``, ``last``, ``best`` or ``final``
snapshot   a checkpoint named by its step or time; retention counts these
data file  ``NAME.pt``
sidecar    ``NAME.meta.json``, published after the data file
complete   the sidecar is there and its sha256 is that of the data file
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from liquid_llm import storage
from liquid_llm.checkpoint.files import read_archive
from liquid_llm.checkpoint.metadata import IN_PIECES, CheckpointMetadata
from liquid_llm.checkpoint.pieces import KEY, find_damage, folder_name, join_pieces
from liquid_llm.errors import CheckpointError
from liquid_llm.parsing import ParseError, parse_json
from liquid_llm.storage import translate_errors

DATA_SUFFIX = ".pt"
SIDECAR_SUFFIX = ".meta.json"
METADATA_KEY = "metadata"
MOVING_NAMES = ("last", "best", "final")
REPLACED = ".replaced"  # ends the name of a snapshot while another of its name is written
_SNAPSHOT = re.compile(r"^(step-\d{8,}|time-\d{8}T\d{6}Z)$")

Log = Callable[[str], None]
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CheckpointInfo:
    """A complete checkpoint: its data file, its metadata (with the file's sha256) and the names it was also given."""

    path: Path
    metadata: CheckpointMetadata
    also_as: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.path.name.removesuffix(DATA_SUFFIX)

    @property
    def step(self) -> int:
        return self.metadata.step

    @property
    def names(self) -> tuple[str, ...]:
        """Every name this checkpoint was published under, its own first."""
        return (self.name, *self.also_as)


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def time_name(created: str) -> str:
    """The name of a time snapshot, from ``CheckpointMetadata.created`` (ISO 8601, UTC)."""
    return "time-" + datetime.fromisoformat(created.replace("Z", "+00:00")).astimezone(timezone.utc).strftime(
        "%Y%m%dT%H%M%SZ"
    )


def is_snapshot(name: str) -> bool:
    return _SNAPSHOT.match(name) is not None


def is_known(name: str) -> bool:
    """Whether this project gives checkpoints such a name; files of other names in a run directory are never touched."""
    return name in MOVING_NAMES or is_snapshot(name.removesuffix(REPLACED))


def known_names(folder: Path) -> list[str]:
    """Names of the sidecars in a folder, sorted."""
    found = (path.name.removesuffix(SIDECAR_SUFFIX) for path in folder.glob("*" + SIDECAR_SUFFIX))
    return sorted(name for name in found if is_known(name))


def data_path(folder: Path, name: str) -> Path:
    return folder / (name + DATA_SUFFIX)


def sidecar_path(folder: Path, name: str) -> Path:
    return folder / (name + SIDECAR_SUFFIX)


def remove_checkpoint(folder: Path, name: str) -> None:
    """Remove what there is of a checkpoint, its sidecar first: one without data would be taken for complete."""
    sidecar_path(folder, name).unlink(missing_ok=True)
    data_path(folder, name).unlink(missing_ok=True)


def newest_first(found: Mapping[str, CheckpointMetadata]) -> list[str]:
    """Names by falling step; of one step, snapshots first: ``last``, ``best`` and ``final`` may be moved any time."""
    return sorted(found, key=lambda name: (found[name].step, is_snapshot(name), found[name].created), reverse=True)


def parse_sidecar(text: bytes, where: object) -> CheckpointMetadata:
    """The metadata in a sidecar. Raises CheckpointError where it is none, or has no hash."""
    remedy = "choose another checkpoint"
    try:
        metadata = CheckpointMetadata.from_dict(parse_json(text), where)
    except ParseError as error:
        raise CheckpointError("this sidecar is no JSON", where=where, got=error, remedy=remedy) from error
    if metadata.sha256 is None:
        raise CheckpointError("this sidecar has no sha256", where=where, expected="text", remedy=remedy)
    return metadata


def sidecar_text(metadata: CheckpointMetadata) -> bytes:
    return (json.dumps(metadata.to_dict(), indent=1, ensure_ascii=False) + "\n").encode()


def read_sidecar(folder: Path, name: str) -> CheckpointMetadata:
    """Raises CheckpointError, or StorageError where it cannot be read."""
    path = sidecar_path(folder, name)
    return parse_sidecar(storage.read_small(str(path)), path)


def sidecars(folder: Path, log: Log = _log.warning) -> dict[str, CheckpointMetadata]:
    """Name -> metadata of every sidecar with a data file, which is not looked at; an unreadable one is reported."""
    found = {}
    for name in known_names(folder):
        if not data_path(folder, name).is_file():
            continue
        try:
            found[name] = read_sidecar(folder, name)
        except CheckpointError as error:
            log(f"skipped a checkpoint: {error}")
    return found


def remote_sidecars(uri: str, log: Log) -> tuple[dict[str, CheckpointMetadata], set[str]]:
    """As ``sidecars``, of a folder behind a URL, and the names of all files below it. Raises StorageError."""
    present = {info.name for info in storage.list_files(uri)}
    found = {}
    for sidecar in sorted(one for one in present if one.endswith(SIDECAR_SUFFIX) and "/" not in one):
        name, where = sidecar.removesuffix(SIDECAR_SUFFIX), storage.join(uri, sidecar)
        if is_known(name) and name + DATA_SUFFIX in present:
            try:
                found[name] = parse_sidecar(storage.read_small(where), where)
            except CheckpointError as error:
                log(f"skipped a checkpoint: {error}")
    return found, present


def latest_checkpoint(folder: Path, log: Log = _log.warning) -> CheckpointInfo | None:
    """The complete checkpoint with the highest step, or None; a damaged one is reported and an older one taken."""
    found = sidecars(folder, log)
    checked: dict[tuple[int, int], str] = {}  # several names may be links to one file: it is read once
    for name in newest_first(found):
        path = data_path(folder, name)
        with translate_errors(path):
            status = path.stat()
        inode = (status.st_dev, status.st_ino)
        if inode not in checked:
            checked[inode] = storage.sha256(path)
        if checked[inode] == found[name].sha256:
            damage = damaged_pieces(path, found[name])
            if damage is None:
                return CheckpointInfo(path, found[name])
            log(f"skipped a checkpoint: {path}: {damage}; an older one is tried")
            continue
        log(f"skipped a checkpoint: {path} does not have the sha256 its sidecar says; an older one is tried")
    return None


def damaged_pieces(path: Path, metadata: CheckpointMetadata) -> str | None:
    """What is wrong with the pieces of a checkpoint whose data file is whole; None of one without."""
    if metadata.format_version != IN_PIECES:
        return None
    return find_damage(read_archive(path).get(KEY, {}), path.parent / folder_name(metadata))


def read_checkpoint(
    path: Path, expected: CheckpointMetadata | None = None
) -> tuple[dict[str, Any], CheckpointMetadata]:
    """State and metadata of a data file.

    Args:
        expected: metadata of a sidecar already compared with this file's hash; without it a sidecar beside the file is
            read and compared here, and a file without one is taken as it is.

    Raises:
        CheckpointError: truncated, foreign, of another format version, or disagreeing with its sidecar.
        StorageError: it cannot be read.
    """
    content = read_archive(path)
    if not is_checkpoint(content):
        raise CheckpointError(
            "this is not a checkpoint of a run",
            where=path,
            remedy="give it as --resume_gcs_uri to take its weights only",
        )
    return take_apart(content, path, expected or verify_sidecar(path), path.parent)


def is_checkpoint(content: object) -> bool:
    """Whether the content of a ``.pt`` file is one of this project's checkpoints, of whatever version."""
    metadata = content.get(METADATA_KEY) if isinstance(content, dict) else None
    return isinstance(metadata, dict) and "format_version" in metadata


def verify_sidecar(path: Path, where: object = None) -> CheckpointMetadata | None:
    """The sidecar beside a data file, None without one. Raises CheckpointError where the file has another sha256."""
    name = path.name.removesuffix(DATA_SUFFIX)
    if not sidecar_path(path.parent, name).is_file():
        return None
    metadata = read_sidecar(path.parent, name)
    got = storage.sha256(path)
    if got != metadata.sha256:
        raise _disagreement(where or path, f"sha256 {got[:12]}…", f"{str(metadata.sha256)[:12]}…")
    return metadata


def take_apart(
    content: dict[str, Any], where: object, expected: CheckpointMetadata | None, beside: Path
) -> tuple[dict[str, Any], CheckpointMetadata]:
    """State and metadata in the content of a checkpoint file, whose pieces lie ``beside``; see ``read_checkpoint``."""
    metadata = CheckpointMetadata.from_dict(content[METADATA_KEY], where)
    if expected is not None and replace(expected, sha256=None) != metadata:
        raise _disagreement(where, "other metadata inside the file", "that of the sidecar")
    content = join_pieces(content, metadata, beside, where)
    if not isinstance(content.get("student"), dict):
        raise CheckpointError("this checkpoint has no student in it", where=where, remedy="choose another checkpoint")
    return {key: value for key, value in content.items() if key != METADATA_KEY}, metadata


def _disagreement(path: object, got: str, expected: str) -> CheckpointError:
    return CheckpointError(
        "the sidecar does not belong to this file",
        where=path,
        got=got,
        expected=expected,
        remedy="copy both again or choose another checkpoint; delete the sidecar only if you trust the file",
    )
