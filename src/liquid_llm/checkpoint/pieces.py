"""A checkpoint whose tensors are too many for one file and one process: each rank writes those it has.

    pieces     a folder beside ``NAME.pt`` with a ``.safetensors`` file of each rank, as torch.distributed.checkpoint
               writes and reads them; named by step and time, so that every name of a checkpoint leads to it
    the rest   is in ``NAME.pt``, with the size and sha256 of each file of the folder: its sidecar vouches for them all

What torch would keep beside other formats of its own is a pickle, which is never read; safetensors need none. The
folder is there before ``NAME.pt`` is, and goes when no name leads to it any more.

Each rank writes its file behind the steps, piece by piece from a copy, where torch's own writer would take the memory
once more. No thread takes part in an exchange: ranks leave each other notes of what they have written, and the
checkpoint is there when the main rank has found all of them.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from liquid_llm import storage
from liquid_llm.checkpoint.files import HashingWriter, write_hashed
from liquid_llm.checkpoint.metadata import IN_PIECES, CheckpointMetadata
from liquid_llm.distributed import Engine
from liquid_llm.errors import CheckpointError, StorageError
from liquid_llm.sharding import join_tensors, read_tensors
from liquid_llm.storage import sync, translate_errors

KEY = "pieces"
PIECES_PATTERN = "pieces-*"
_NAME = re.compile(r"^pieces-\d{8,}-\d{14,20}$")
_LOOK_SECONDS = 0.05  # between two looks for the others' notes
_DTYPES = {  # as safetensors call them
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


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


@dataclass
class PieceWriter:
    """One checkpoint's pieces: writes this rank's and, on the main one, learns what the others have written.

    A context manager: the folder takes its name when it ends without an error, and is gone otherwise.

    Attributes:
        folder: takes the pieces, under a name for the time being; every rank sees it.
        offsets: where in the whole this rank's part of each tensor begins.
        published: what gives the folder its name; empty on all ranks but the main one.
    """

    engine: Engine
    folder: Path
    offsets: Mapping[str, tuple[int, ...]]
    published: ExitStack

    def __enter__(self) -> PieceWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.published.__exit__(kind, error, traceback)

    def write(self, tensors: Mapping[str, Tensor], given_up: Callable[[], bool]) -> None:
        """Write this rank's parts; they survive a power cut when the others hear of it.

        Raises:
            StorageError: full disk, no permission, given up.
        """
        path = self.folder / f"shard-{self.engine.rank + 1:05d}-model-00001-of-00001.safetensors"
        with translate_errors(path, writing=True):
            digest = write_piece(path, tensors, self.offsets, given_up)
            sync(path)
            note = json.dumps([path.name, path.stat().st_size, digest])
        self.engine.post(self._note_of(self.engine.rank), note)

    def collect(self, given_up: Callable[[], bool]) -> dict[str, list[Any]]:
        """What ``NAME.pt`` says of its pieces, once all ranks have written theirs: file -> [bytes, sha256].

        Raises:
            StorageError: given up before that.
        """
        found = {}
        for rank in range(self.engine.world_size):
            while (note := self.engine.posted(self._note_of(rank))) is None:
                if given_up():
                    raise StorageError(f"given up before rank {rank} had written its part", where=self.folder)
                time.sleep(_LOOK_SECONDS)
            name, size, digest = json.loads(note)
            found[name] = [size, digest]
        return found

    def _note_of(self, rank: int) -> str:
        return f"{self.folder.name}/{rank}"


def write_piece(
    path: Path, tensors: Mapping[str, Tensor], offsets: Mapping[str, tuple[int, ...]], given_up: Callable[[], bool]
) -> str:
    """Write parts of tensors as torch.distributed.checkpoint reads them, in no more memory; returns the sha256.

    Args:
        path: must not exist.
        tensors: this rank's parts, wherever they lie.
        offsets: where in the whole each part begins.
        given_up: whether nobody wants the file any more.

    Raises:
        OSError: the disk is full, …; ``ECANCELED``: given up.
    """
    # The largest elements first, as safetensors has them: each begins at a multiple of its size. A part without rows
    # would take the place of another's that begins where it does.
    having = [(name, one) for name, one in tensors.items() if one.numel()]
    ordered = sorted(having, key=lambda one: (-one[1].element_size(), one[0]))
    sharding = {name: {"saved_offsets": list(offsets[name])} for name, _ in ordered}
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "DCP_VERSION": "1.0"}}
    header["__metadata__"]["DCP_SHARDING_INFO"] = json.dumps(sharding)
    end = 0
    for name, one in ordered:
        begin, end = end, end + one.nbytes
        header[name] = {"dtype": _DTYPES[one.dtype], "shape": list(one.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    def fill(writer: HashingWriter) -> None:
        writer.write(len(text).to_bytes(8, "little") + text)
        for _, one in ordered:
            writer.write(one.cpu().contiguous().view(-1).view(torch.uint8).numpy())

    return write_hashed(path, fill, given_up)


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
