"""A checkpoint whose tensors are too many for one file and one process: each rank writes those it has.

    pieces     a folder beside ``NAME.pt`` with a ``.safetensors`` file of each rank, as torch.distributed.checkpoint
               writes them; named by step and time, so that every name of a checkpoint leads to it
    the rest   is in ``NAME.pt``, with the size and sha256 of each file of the folder: its sidecar vouches for them all

What torch would keep beside other formats of its own is a pickle, which is never read; safetensors need none. The
folder is there before ``NAME.pt`` is, and goes when no name leads to it any more.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from liquid_llm import storage
from liquid_llm.checkpoint.metadata import IN_PIECES, CheckpointMetadata
from liquid_llm.distributed import Engine, deal
from liquid_llm.errors import CheckpointError, StorageError
from liquid_llm.sharding import join_tensors, read_tensors

KEY = "pieces"
PIECES_PATTERN = "pieces-*"
_NAME = re.compile(r"^pieces-\d{8,}-\d{14,20}$")


def folder_name(metadata: CheckpointMetadata) -> str:
    """The folder that a checkpoint's tensors lie in, beside it: two saves of one step, a blink apart, have two."""
    return f"pieces-{metadata.step:08d}-{re.sub(r'[^0-9]', '', metadata.created.partition('+')[0])}"


def require_folder(folder: Path) -> None:
    """Raise StorageError where this rank does not see the folder that the main rank has made."""
    if not folder.is_dir():
        raise StorageError(
            "a process does not see the run directory that the others write to",
            where=folder,
            remedy="a student too large for one checkpoint file needs a run directory on a disk that all hosts share: "
            "name one with the output or --local_workdir",
        )


def digest_files(folder: Path, engine: Engine) -> dict[str, str]:
    """The sha256 of each file of a folder that all ranks see: each rank hashes some; all call this."""
    names = sorted(path.name for path in folder.iterdir())
    digests = torch.zeros(len(names), 32, dtype=torch.int64)
    for number in deal(range(len(names)), engine):
        digests[number] = torch.tensor(list(bytes.fromhex(storage.sha256(folder / names[number]))))
    return {name: bytes(row).hex() for name, row in zip(names, engine.sum(digests).tolist(), strict=True)}


def describe(folder: Path, digests: Mapping[str, str]) -> dict[str, Any]:
    """What ``NAME.pt`` says of its pieces: file -> [bytes, sha256]."""
    return {name: [(folder / name).stat().st_size, digest] for name, digest in digests.items()}


def find_damage(listed: Mapping[str, Any], folder: Path) -> str | None:
    """What is wrong with the pieces in ``folder``, of those that ``NAME.pt`` lists; None where they are whole."""
    for name, (size, digest) in listed.items():
        path = folder / Path(name).name
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != size:
            return f"{path} has {path.stat().st_size} bytes instead of {size}"
        if storage.sha256(path) != digest:
            return f"{path} does not have the sha256 that was written down"
    return None


def join_pieces(content: dict[str, Any], metadata: CheckpointMetadata, beside: Path, where: object) -> dict[str, Any]:
    """The content of a ``.pt`` with the tensors that lie in its folder; any other as it is.

    Raises:
        CheckpointError: a file of the folder is missing or damaged.
    """
    if KEY not in content:
        return content
    folder = beside / folder_name(metadata)
    damage = find_damage(content[KEY], folder)
    if damage is not None:
        raise CheckpointError(
            "a part of this checkpoint is not what was written",
            where=where,
            got=damage,
            remedy="copy the folder again, or choose another checkpoint",
        )
    tensors: dict[str, Tensor] = read_tensors(folder)
    joined: dict[str, Any] = join_tensors({key: value for key, value in content.items() if key != KEY}, tensors)
    return joined


def piece_files(run_dir: Path, metadata: CheckpointMetadata) -> dict[str, Path]:
    """The files of a checkpoint's pieces, by their names relative to the run directory; none of one without."""
    if metadata.format_version != IN_PIECES:
        return {}
    folder = run_dir / folder_name(metadata)
    return {f"{folder.name}/{path.name}": path for path in sorted(folder.glob("*.safetensors"))}


def find_unused(names: Iterable[str], known: Iterable[CheckpointMetadata]) -> list[str]:
    """Those of ``names``, of files relative to a run directory, that are pieces to which no checkpoint leads."""
    used = _folders(known)
    tops = {name: name.partition("/")[0] for name in names if "/" in name}
    return [name for name, top in tops.items() if _NAME.match(top) and top not in used]


def _folders(known: Iterable[CheckpointMetadata]) -> set[str]:
    """Those that checkpoints lead to."""
    return {folder_name(metadata) for metadata in known if metadata.format_version == IN_PIECES}


def fetch_pieces(run_uri: str, metadata: CheckpointMetadata, folder: Path) -> None:
    """Bring the pieces of a checkpoint of the run at a URL into ``folder``, beside its file. Raises StorageError."""
    if metadata.format_version != IN_PIECES:
        return
    name = folder_name(metadata)
    for one in storage.list_files(storage.join(run_uri, name)):
        if "/" not in one.name:
            storage.fetch_once(one.uri, folder / name, one)


def drop_unused(run_dir: Path, known: Iterable[CheckpointMetadata]) -> None:
    """Remove the folders that no checkpoint leads to: ``known`` are the run's, every one."""
    used = _folders(known)
    for path in run_dir.glob(PIECES_PATTERN):
        if _NAME.match(path.name) and path.name not in used:
            shutil.rmtree(path, ignore_errors=True)
