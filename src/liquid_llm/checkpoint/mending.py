"""What is left of checkpoints that are not complete: a sidecar is made again beside data that is whole.

whole      a torch archive whose every part has the checksum that the archive names, with a checkpoint of ours in it
remains    files under the names of checkpoints, whatever state they are in

Data holds its own metadata, so a sidecar that is lost, empty or garbage loses nothing. One that can be read and says
another hash is believed: the data is then not what was saved.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from liquid_llm import storage
from liquid_llm.checkpoint.discovery import (
    DATA_SUFFIX,
    METADATA_KEY,
    SIDECAR_SUFFIX,
    Log,
    data_path,
    is_checkpoint,
    is_known,
    read_sidecar,
    sidecar_path,
    sidecar_text,
)
from liquid_llm.checkpoint.files import read_archive
from liquid_llm.checkpoint.metadata import IN_PIECES, CheckpointMetadata
from liquid_llm.checkpoint.pieces import KEY, find_damage, folder_name
from liquid_llm.errors import CheckpointError
from liquid_llm.parsing import ParseError, parse_json


def read_whole(data: Path) -> CheckpointMetadata | None:
    """The metadata of data that is whole, with its hash; None where it is damaged or no checkpoint of this release."""
    try:
        with storage.zip_errors(), zipfile.ZipFile(data) as archive:
            if archive.testzip() is not None:
                return None
        content = read_archive(data)
        if not is_checkpoint(content):
            return None
        metadata = CheckpointMetadata.from_dict(content[METADATA_KEY], data)
        if KEY in content:
            if find_damage(content[KEY], data.parent / folder_name(metadata)) is not None:
                return None
        elif not isinstance(content.get("student"), dict):
            return None
    except (zipfile.BadZipFile, CheckpointError):
        return None
    return replace(metadata, sha256=storage.sha256(data))


def lacks_sidecar(folder: Path, name: str) -> bool:
    """Whether a checkpoint has no sidecar, or one that is garbage. One of a newer release is what that wrote."""
    try:
        values = parse_json(sidecar_path(folder, name).read_bytes())
        version = values.get("format_version") if isinstance(values, dict) else None
        if isinstance(version, int) and version > IN_PIECES:
            return False
        read_sidecar(folder, name)
    except (OSError, ParseError, CheckpointError):
        return True
    return False


def mend_sidecar(folder: Path, name: str, log: Log) -> None:
    """Make the sidecar of a checkpoint again, where it has none that can be read and its data is whole."""
    sidecar = sidecar_path(folder, name)
    was = "lost" if not sidecar.exists() else "damaged"
    metadata = read_whole(data_path(folder, name))
    if metadata is not None:
        storage.write_bytes(str(sidecar), sidecar_text(metadata))
        log(f"{sidecar} was {was} and is made again: {name}{DATA_SUFFIX} of step {metadata.step} is whole")


def remains(names: Iterable[str]) -> list[str]:
    """Those of a folder's file names that are of checkpoints, sorted: not data and sidecar of one as two."""
    stems = {
        name.removesuffix(suffix)
        for name in names
        for suffix in (DATA_SUFFIX, SIDECAR_SUFFIX)
        if name.endswith(suffix) and "/" not in name
    }
    return sorted(stem + DATA_SUFFIX for stem in stems if is_known(stem))
