"""Weights that a student starts from: of a run as the run has them, of a Hugging Face model as transformers opens it.

There is one loader: a folder given as ``--resume_gcs_uri`` gives the student that it gives as ``--student``. Names of
older layouts, buffers that are no weights and a head that is not the embedding are what transformers takes them for; a
weight that is absent is never made up.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from liquid_llm import storage
from liquid_llm.checkpoint.resume import ResumeSource, read_student_weights
from liquid_llm.errors import CheckpointError, ModelError
from liquid_llm.models.folder import check_folder
from liquid_llm.models.loading import fill_model
from liquid_llm.models.student import config_file, file_config
from liquid_llm.wiring.places import cache_dir


def open_origin(uri: str) -> ResumeSource:
    """The weights behind ``uri``, under the names that the model of their configuration has.

    Raises:
        CheckpointError, StorageError: as ``read_student_weights``; weights that the configuration asks for are missing.
    """
    if not storage.is_remote(uri):
        _check_local(storage.local_path(uri), uri)
    origin = read_student_weights(uri, cache_dir() / "resume")
    if origin.metadata is not None or origin.config is None:
        return origin  # a run's own, or names and tensors alone: --student says what they are of
    try:
        with config_file(origin.config) as file:
            model = fill_model(file_config(file), origin.state_dict, origin.description)
    except ModelError as error:
        raise _of_checkpoint(error) from error
    tied = {"tie_word_embeddings": getattr(model.config, "tie_word_embeddings", False)}
    return replace(origin, state_dict=model.state_dict(), config={**origin.config, **tied})


def _check_local(path: Path, uri: str) -> None:
    """Refuse what ``--student`` would refuse, in its words, and what only that takes."""
    gguf = [path] if path.suffix == ".gguf" else sorted(path.glob("*.gguf")) if path.is_dir() else []
    if gguf and not (path / "config.json").is_file():
        raise CheckpointError(
            "a .gguf file is a model and no checkpoint", where=uri, remedy=f"name it as --student={gguf[0]}"
        )
    if (path / "config.json").is_file() or (path / "adapter_config.json").is_file():
        try:
            check_folder(path, uri)
        except ModelError as error:
            raise _of_checkpoint(error) from error


def _of_checkpoint(error: ModelError) -> CheckpointError:
    told, remedy = {"got": error.got, "expected": error.expected}, error.remedy
    return CheckpointError(error.problem, where=error.where, remedy=remedy, **told)
