"""``liquid export --adapter``: the adapter of a checkpoint as peft opens it, without the model that it goes with."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping

from liquid_llm import storage
from liquid_llm.checkpoint.resume import read_student_weights
from liquid_llm.errors import CheckpointError, UsageError
from liquid_llm.models.lora import ADAPTER_FILES, LoraSpec, save_adapter
from liquid_llm.runtime import torch_dtype
from liquid_llm.terminal import setup_logging
from liquid_llm.wiring.exports import find_checkpoint
from liquid_llm.wiring.places import cache_dir

log = logging.getLogger(__name__)
_TAKEN = ("source", "folder", "which", "dtype", "force")


def run_adapter_export(given: Mapping[str, object]) -> int:
    """Write the adapter of a checkpoint; prints the folder and returns the exit code.

    Args:
        given: ``source``, ``folder``, ``which``, ``dtype`` and ``force``, as for the whole student.

    Raises:
        CheckpointError: there is no such checkpoint, or it has no adapter.
        UsageError: another option was given, the folder holds something, or peft is not installed.
        StorageError: a place cannot be read or written.
    """
    setup_logging("INFO")
    source, folder = str(given["source"]), str(given["folder"])
    others = sorted(set(given) - set(_TAKEN))
    if others:
        raise UsageError(
            "an adapter alone is written as it is",
            where="--adapter",
            got=", ".join(f"--{name}" for name in others),
            remedy="leave it out, or leave --adapter out: the student is then written whole, with its adapter merged",
        )
    if importlib.util.find_spec("peft") is None:
        raise UsageError(
            "the package peft is not installed", where="--adapter", remedy="pip install 'liquid-llm[lora]'"
        )
    _require_room(folder, force=bool(given.get("force")))
    which = given.get("which")
    _, uri = find_checkpoint(source, None if which is None else str(which))
    origin = read_student_weights(uri, cache_dir() / "resume")
    known = None if origin.metadata is None else origin.metadata.student.get("lora")
    if known is None:
        raise CheckpointError(
            "this checkpoint has no adapter",
            where=uri,
            expected="one of a run with --lora_r",
            remedy="leave --adapter out: the student is then written whole",
        )
    with storage.scratch("export") as here:
        fresh = here / "adapter" if storage.is_remote(folder) else storage.local_path(folder)
        base = next(iter(known["base"].values()))
        dtype = torch_dtype(str(given.get("dtype", "float32")))
        save_adapter(
            LoraSpec.of(known), origin.state_dict, fresh, base=base, dtype=dtype, transposed=bool(known["transposed"])
        )
        if storage.is_remote(folder):
            for name in ADAPTER_FILES:
                storage.upload(fresh / name, storage.join(folder, name))
    log.info("the adapter of %s; it goes with %s", origin.description, base)
    print(folder)
    return 0


def _require_room(folder: str, *, force: bool) -> None:
    found = storage.stat(folder)
    names = [one.name for one in storage.list_files(folder)] if found is None or not found.version else [folder]
    foreign = [name for name in names if name not in ADAPTER_FILES]
    if foreign or (names and not force):
        raise UsageError(
            "an adapter is written to a new or empty folder",
            where=folder,
            got=", ".join(names[:4]),
            remedy="name another" if foreign else "name another, or replace it with --force",
        )
