"""A student to be judged, from wherever it is: a run, one of its checkpoints, a Hugging Face model, a packed file."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from liquid_llm import storage
from liquid_llm.checkpoint.discovery import DATA_SUFFIX, SIDECAR_SUFFIX
from liquid_llm.checkpoint.metadata import CheckpointMetadata
from liquid_llm.checkpoint.resume import read_student_weights
from liquid_llm.errors import CheckpointError, UsageError
from liquid_llm.framing import Framing, Framings
from liquid_llm.models.loading import load_teacher, load_tokenizer
from liquid_llm.models.tokenizers import end_of_text_id
from liquid_llm.options import Option, options_of
from liquid_llm.parsing import ParseError
from liquid_llm.provenance import FOLDER, OPTIONS, parse_kept_options
from liquid_llm.sources import NONE, read_sources
from liquid_llm.wiring.exports import find_checkpoint, find_tokenizer, rebuild
from liquid_llm.wiring.origins import open_origin
from liquid_llm.wiring.places import cache_dir
from liquid_llm.wiring.students import build_from_config, load_weights
from liquid_llm.wiring.tokenizers import TextTools

log = logging.getLogger(__name__)

_CONFIG = "config.json"
_NAME_TEXTS = "name the held-out texts: --dataset_manifest, --dataset_name or --records"
_EXPECTED = "a run directory, a .pt file in one, or a Hugging Face folder"


@dataclass(frozen=True)
class OpenedStudent:
    """A student in evaluation mode, float32, on the CPU.

    Attributes:
        name: as it was named.
        tokenizer: its own.
        description: what it is, in words.
        text: the tokenizer with the framing that a checkpoint was trained with; None where it is of no run.
        run: the run directory it is of, path or URL.
        is_run: whether the run directory itself was named.
        metadata: of its checkpoint.
    """

    name: str
    model: Any
    tokenizer: Any
    description: str
    text: TextTools | None = None
    run: str | None = None
    is_run: bool = False
    metadata: CheckpointMetadata | None = None


def open_student(
    name: str, *, which: str | None = None, tokenizer: str | None = None, token: str | None = None
) -> OpenedStudent:
    """Open a student.

    Args:
        name: a run directory, a ``.pt`` in one, a Hugging Face folder or a zip of one, each local or a URL; a Hugging
            Face id, a ``.gguf`` file or ``package:NAME``.
        which: the checkpoint, where it is a run directory; None takes the best, else the newest.
        tokenizer: a model with the student's tokenizer, where it does not come along.

    Raises:
        LiquidError: nothing is there, or it cannot be used.
    """
    if name.endswith(DATA_SUFFIX):
        return open_checkpoint(name, None, tokenizer, _EXPECTED)
    if _is_run(name):
        return open_checkpoint(name, which, tokenizer, _EXPECTED)
    folder = storage.local_path(name) if not storage.is_remote(name) else None
    if folder is not None and folder.is_dir() and not (folder / _CONFIG).is_file():
        find_checkpoint(name, None)  # raises, naming the runs in it
    if storage.is_remote(name) or name.endswith(".zip"):
        return _open_elsewhere(name, tokenizer)
    loaded = load_teacher(name, dtype=torch.float32, device="cpu", token=token)
    own = loaded.tokenizer if tokenizer is None else load_tokenizer(tokenizer, token=token)
    return OpenedStudent(name, loaded.model.eval(), own, f"model {loaded.identity.id}")


def _is_run(name: str) -> bool:
    if not storage.is_remote(name) and not storage.local_path(name).is_dir():
        return False
    return any(one.name.endswith(SIDECAR_SUFFIX) and "/" not in one.name for one in storage.list_files(name))


def open_checkpoint(name: str, which: str | None, tokenizer: str | None, expected: str) -> OpenedStudent:
    """Open the student of a run's checkpoint; the arguments are those of ``open_student``, and

    Args:
        expected: what may be named, for the message that a file is no checkpoint of a run.

    Raises:
        LiquidError: there is none, or it cannot be used.
    """
    run, uri = find_checkpoint(name, which)
    work_dir = cache_dir() / "resume"
    origin = read_student_weights(uri, work_dir)
    if origin.metadata is None or origin.config is None:
        raise CheckpointError(
            "this is not a checkpoint of a run, so nothing says which model it is",
            where=uri,
            remedy=f"name {expected}",
        )
    text = find_tokenizer(origin.metadata, run, tokenizer, work_dir)
    model = rebuild(origin, text)
    return OpenedStudent(name, model, text.tokenizer, origin.description, text, run, run == name, origin.metadata)


def _open_elsewhere(name: str, tokenizer: str | None) -> OpenedStudent:
    origin = open_origin(name)
    called = tokenizer or origin.tokenizer_folder
    if origin.config is None or called is None:
        lacks = "a tokenizer" if origin.config is not None else "a configuration"
        raise CheckpointError(f"this model comes without {lacks}", where=name, remedy="name one with --tokenizer")
    own = load_tokenizer(called)
    usual = Framing(None, end_of_text_id(own))  # what the model's configuration says of tokens is not looked at
    model = build_from_config(origin.config, TextTools.of(own, Framings(usual, {})), origin.description)
    load_weights(model, origin.state_dict, origin.description)
    return OpenedStudent(name, model.eval(), own, origin.description)


def run_options(student: OpenedStudent) -> tuple[str, dict[str, Any]]:
    """The command that a student's run was asked for with, and the options that were given to it.

    Raises:
        UsageError: the run does not say.
    """
    assert student.run is not None
    assert student.metadata is not None
    place = storage.join(student.run, FOLDER, OPTIONS)
    face = student.metadata.run.get("face")
    try:
        found = parse_kept_options(storage.read_small(place)) if storage.exists(place) else None
    except ParseError as error:
        raise UsageError("the run's options cannot be used", where=place, got=error, remedy=_NAME_TEXTS) from error
    if not isinstance(face, str) or not isinstance(found, Mapping):
        raise UsageError(
            "the run does not say what it was trained on",
            where=place,
            remedy=_NAME_TEXTS,
        )
    known = {option.name: option for option in options_of(face)}
    given = {str(name): _read(known[name], value) for name, value in found.items() if name in known}
    if isinstance(found.get("sources"), Mapping):
        given["sources"] = read_sources(found["sources"])
    return face, given


def _read(option: Option, value: Any) -> Any:
    """A value as the command line gives it; the file has lists for tuples and a word for an empty one."""
    if option.kind in ("ints", "floats", "names"):
        return () if value == NONE else tuple(value) if isinstance(value, list) else value
    return value
