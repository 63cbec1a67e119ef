"""Student weights from wherever they are: a run's checkpoint, a bare state dict, a Hugging Face folder or its zip.

    bare state dict     a ``.pt`` of names and tensors, also under ``model``, ``state_dict``, ``student``, … and with
                        the prefixes that wrappers of torch put before every name
    Hugging Face folder ``config.json`` with ``model.safetensors`` or ``pytorch_model.bin``, whole or in shards

What lies behind a URL is downloaded into a work folder once, and again when its size or version changes. Nothing is
ever unpickled without ``weights_only=True``.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from liquid_llm import storage
from liquid_llm.checkpoint.discovery import (
    DATA_SUFFIX,
    SIDECAR_SUFFIX,
    is_checkpoint,
    parse_sidecar,
    take_apart,
    verify_sidecar,
)
from liquid_llm.checkpoint.files import read_archive
from liquid_llm.checkpoint.metadata import CheckpointMetadata
from liquid_llm.checkpoint.pieces import fetch_pieces
from liquid_llm.errors import CheckpointError, StorageError
from liquid_llm.parsing import parse_json
from liquid_llm.storage import FileInfo, translate_errors
from liquid_llm.weight_files import find_weight_files

_WRAPPERS = ("model", "state_dict", "student", "model_state_dict", "module", "weights")
_PREFIXES = ("module.", "_orig_mod.", "_fsdp_wrapped_module.")
_FOLDER_SUFFIXES = (".json", ".safetensors", ".bin", ".model", ".txt", ".jinja")
_NOT_WEIGHTS = ("training_args.bin", "optimizer.bin", "scheduler.bin")
_ACCEPTED = "a .pt checkpoint or state dict, a .safetensors file, a Hugging Face folder or a zip of one"


@dataclass(frozen=True)
class ResumeSource:
    """Student weights and what came with them.

    Attributes:
        state_dict: parameter name -> tensor on the CPU, as stored; tied weights may be there once only.
        description: what it is and where it was, in words.
        metadata: of a run's checkpoint, else None.
        config: Hugging Face configuration of the model, where known.
        tokenizer_folder: local folder with the tokenizer that came along, where one did.
        state: the whole state of a run's checkpoint, else None.
    """

    state_dict: Mapping[str, Tensor]
    description: str
    metadata: CheckpointMetadata | None = None
    config: Mapping[str, Any] | None = None
    tokenizer_folder: str | None = None
    state: Mapping[str, Any] | None = None

    @classmethod
    def of_checkpoint(cls, state: Mapping[str, Any], metadata: CheckpointMetadata, description: str) -> ResumeSource:
        """A run's checkpoint as it was read."""
        return cls(state["student"], description, metadata, metadata.student.get("config"), None, state)


def read_student_weights(uri: str, work_dir: Path) -> ResumeSource:
    """Read the weights behind ``uri``.

    Raises:
        CheckpointError: nothing there, truncated, disagreeing with its sidecar, of another format version, or of a kind
            that is not read.
        StorageError: the place cannot be read, or the disk is full.
    """
    found = storage.stat(uri)
    if found is None:
        raise CheckpointError(
            "there is no checkpoint here",
            where=uri,
            expected=_ACCEPTED,
            remedy="check the spelling of --resume_gcs_uri",
        )
    if not found.version:
        return _read_folder(_fetch_folder(uri, work_dir), uri)
    path = _fetch_file(uri, found, work_dir)
    if path.suffix == ".safetensors":
        return ResumeSource(_read_safetensors(path, uri), f"weights of {uri}")
    if _is_folder_archive(path, uri):
        return _read_folder(_unpack(path, found, work_dir), uri)
    return _read_torch_file(path, uri)


# ------------------------------------------------------------------------------------------------------------- getting


def _work_folder(uri: str, work_dir: Path) -> Path:
    return work_dir / hashlib.sha256(uri.encode()).hexdigest()[:16]


def _fetch_file(uri: str, found: FileInfo, work_dir: Path) -> Path:
    """A local path with the file's content and, beside it, its sidecar where it has one."""
    if not storage.is_remote(uri):
        return storage.local_path(uri)
    folder = _work_folder(uri, work_dir)
    path = storage.fetch_once(uri, folder, found)
    if found.name.endswith(DATA_SUFFIX):
        sidecar = storage.stat(uri.removesuffix(DATA_SUFFIX) + SIDECAR_SUFFIX)
        local = folder / (found.name.removesuffix(DATA_SUFFIX) + SIDECAR_SUFFIX)
        if sidecar is not None:
            storage.fetch_once(sidecar.uri, folder, sidecar)
            fetch_pieces(uri.rpartition("/")[0], parse_sidecar(storage.read_small(str(local)), sidecar.uri), folder)
        else:
            storage.remove(str(local))
    return path


def _fetch_folder(uri: str, work_dir: Path) -> Path:
    if not storage.is_remote(uri):
        return storage.local_path(uri)
    folder = _work_folder(uri, work_dir)
    files = [one for one in storage.list_files(uri) if "/" not in one.name]
    if "config.json" not in {one.name for one in files}:
        raise _not_a_model_folder(uri, [one.name for one in files])
    for one in files:
        if one.name.endswith(_FOLDER_SUFFIXES) and one.name not in _NOT_WEIGHTS:
            storage.fetch_once(one.uri, folder, one)
    return folder


def _is_folder_archive(path: Path, uri: str) -> bool:
    """Whether this is a zip of a folder; torch files are zips too, with a ``data.pkl`` in them."""
    if not zipfile.is_zipfile(path):
        return False
    try:
        with translate_errors(path), storage.zip_errors(), zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile as error:
        raise CheckpointError("this zip is damaged", where=uri, got=str(error), remedy="copy it again") from error
    return not any(name.rsplit("/", 1)[-1] == "data.pkl" for name in names)


def _unpack(path: Path, found: FileInfo, work_dir: Path) -> Path:
    """The model folder of an archive, unpacked once for each version of it."""
    folder = work_dir / found.key[:16]
    if not folder.is_dir():
        storage.unpack_zip(path, folder)
    configs = sorted(folder.rglob("config.json"), key=lambda one: (len(one.parts), one))
    if not configs:
        raise _not_a_model_folder(str(path), sorted(one.name for one in folder.iterdir()))
    return configs[0].parent


# ------------------------------------------------------------------------------------------------------------- reading


def _read_torch_file(path: Path, uri: str) -> ResumeSource:
    content = read_archive(path, uri)
    if not is_checkpoint(content):
        return ResumeSource(_bare_state_dict(content, uri), f"weights of {uri}", config=_config_beside(content))
    state, metadata = take_apart(content, uri, verify_sidecar(path, uri), path.parent)
    state = {**state, "student": _bare_state_dict(state["student"], uri)}
    return ResumeSource.of_checkpoint(state, metadata, f"checkpoint {uri} of step {metadata.step}")


def _config_beside(content: object) -> Mapping[str, Any] | None:
    """The Hugging Face configuration a foreign trainer kept next to the weights, as ``config``."""
    config = content.get("config") if isinstance(content, Mapping) else None
    return config if isinstance(config, Mapping) and "model_type" in config else None


def _bare_state_dict(content: object, uri: str) -> dict[str, Tensor]:
    while isinstance(content, Mapping) and not any(isinstance(value, Tensor) for value in content.values()):
        inner = [content[key] for key in _WRAPPERS if isinstance(content.get(key), Mapping)]
        if not inner:
            break
        content = inner[0]
    if not isinstance(content, Mapping) or not content:
        raise _no_weights(uri, type(content).__name__ if not isinstance(content, Mapping) else "an empty dictionary")
    weights = {}
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise _no_weights(uri, f"{name!r:.80}: {type(value).__name__}")
        weights[name] = value
    return _without_prefixes(weights)


def _without_prefixes(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names without what DistributedDataParallel, torch.compile and FSDP put before all of them."""
    for _ in range(8):  # wrappers may be nested, in any order
        prefix = next((one for one in _PREFIXES if all(name.startswith(one) for name in weights)), None)
        if prefix is None:
            break
        weights = {name.removeprefix(prefix): value for name, value in weights.items()}
    return weights


def _read_folder(folder: Path, uri: str) -> ResumeSource:
    names = sorted(one.name for one in folder.iterdir()) if folder.is_dir() else []
    if "config.json" not in names:
        raise _not_a_model_folder(uri, names)
    try:
        with translate_errors(folder):
            config = parse_json(storage.read_small(str(folder / "config.json")))
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise CheckpointError("config.json holds no JSON object", where=uri, remedy="save the model again")
    weights: dict[str, Tensor] = {}
    files = find_weight_files(folder, names, uri, CheckpointError)
    if files is None:
        raise _not_a_model_folder(uri, names)
    for name in files:
        read = _read_safetensors if name.endswith(".safetensors") else read_archive
        weights.update(read(folder / name, storage.join(uri, name)))
    has_tokenizer = any(name in names for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model"))
    tokenizer_folder = str(folder) if has_tokenizer else None
    return ResumeSource(_bare_state_dict(weights, uri), f"Hugging Face model {uri}", None, config, tokenizer_folder)


def _read_safetensors(path: Path, where: str) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        with translate_errors(path):
            weights: dict[str, torch.Tensor] = load_file(path)
            return _without_prefixes(weights)
    except SafetensorError as error:
        raise CheckpointError(
            "this file is truncated, damaged or not safetensors",
            where=where,
            got=f"{path.stat().st_size} bytes",
            remedy="copy it again, or choose another checkpoint",
        ) from error


def _no_weights(uri: str, got: str) -> CheckpointError:
    return CheckpointError("this file holds no state dict", where=uri, got=got, expected="names and tensors")


def _not_a_model_folder(uri: str, names: list[str]) -> StorageError:
    checkpoints = [name for name in names if name.endswith(DATA_SUFFIX)]
    remedy = f"name one of the checkpoints in it: {', '.join(checkpoints[:4])}" if checkpoints else None
    return CheckpointError(
        "this folder is no Hugging Face model",
        where=uri,
        got=", ".join(names[:6]) or "no files",
        expected="config.json with model.safetensors or pytorch_model.bin",
        remedy=remedy,
    )
