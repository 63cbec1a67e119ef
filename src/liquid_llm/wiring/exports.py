"""A run's student as a Hugging Face folder: at the run's end, and from any of its checkpoints."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from liquid_llm import storage
from liquid_llm.checkpoint.discovery import (
    DATA_SUFFIX,
    SIDECAR_SUFFIX,
    is_known,
    newest_first,
    remote_sidecars,
    sidecars,
    step_name,
)
from liquid_llm.checkpoint.metadata import CheckpointMetadata
from liquid_llm.checkpoint.resume import ResumeSource
from liquid_llm.errors import CheckpointError, ModelError, StorageError, UsageError
from liquid_llm.models.export import save_student
from liquid_llm.models.loading import load_tokenizer, quiet_transformers
from liquid_llm.models.spec import parse_student
from liquid_llm.parsing import ParseError, parse_yaml
from liquid_llm.provenance import FOLDER, OPTIONS
from liquid_llm.wiring.cards import declared_context, make_card
from liquid_llm.wiring.framing import framings_of
from liquid_llm.wiring.students import build_from_config, load_weights, whole_weights
from liquid_llm.wiring.templates import stop_at_turns
from liquid_llm.wiring.tokenizers import TextTools

log = logging.getLogger(__name__)

STUDENT = "student"
_STEP = "step-"
TOKENIZER = f"{FOLDER}/tokenizer"
_NAMING = ("lm_teacher_id", "teacher_name", "mc_teacher_id")  # options that name a model with a tokenizer


def save_with_card(
    model: Any,
    tokenizer: Any,
    metadata: CheckpointMetadata,
    folder: Path,
    weights: Mapping[str, torch.Tensor] | None = None,
    *,
    run: str | None = None,
    license: str | None = None,
) -> None:
    """Write ``model``, the student that ``metadata`` is of, with its tokenizer and a card that says what it is.

    Args:
        tokenizer: the student's own; it is told how long a text the student is meant for.
        weights: its state dict, where the model has only a part of each.
        run: the run directory, path or URL, for what it says of itself.
        license: the student's, as the hub names it, where a person states one.

    Raises:
        StorageError: the disk is full, or the place cannot be written.
    """
    stop_at_turns(model, tokenizer)
    tokenizer.model_max_length = declared_context(model, metadata)
    with quiet_transformers():
        save_student(model, tokenizer, folder, make_card(model, metadata, run, license), weights)


def keep_tokenizer(tokenizer: Any, run_dir: Path) -> None:
    """Put the run's tokenizer beside its provenance, once: an export then needs no teacher.

    Raises:
        StorageError: the disk is full, or the place cannot be written.
    """
    folder = run_dir / TOKENIZER
    if not folder.is_dir():
        with quiet_transformers(), storage.publish_folder(folder) as fresh:
            tokenizer.save_pretrained(fresh)


def rebuild(origin: ResumeSource, text: TextTools) -> Any:
    """The student of a run's checkpoint, as it was trained, on the CPU; an adapter is merged.

    Raises:
        CheckpointError: its weights are not those of the model it names.
        ModelError: such a model cannot be built.
    """
    assert origin.config is not None
    model = build_from_config(origin.config, text, origin.description)
    load_weights(model, whole_weights(origin, text), origin.description)
    return model.eval()


def find_tokenizer(metadata: CheckpointMetadata, run: str, named: str | None, work_dir: Path) -> TextTools:
    """The tokenizer that a checkpoint was trained with, told from others by its hash.

    Args:
        run: the run directory of the checkpoint, path or URL.
        named: the model a person named for it; else what the run kept, its exported student, and the models its options
            name are tried in turn.
        work_dir: where downloads are kept.

    Raises:
        ModelError: ``named`` has another one, or none of them has it.
    """
    tried = []
    for name in [named] if named is not None else _candidates(run, work_dir):
        try:
            text = _text_tools(load_tokenizer(name), metadata)
        except ModelError as error:
            if named is not None:
                raise
            tried.append(f"{name}: {error.problem}")
            continue
        if text.hash == metadata.tokenizer_hash:
            return text
        tried.append(f"{name}: another one, {text.hash[:12]}")
    raise ModelError(
        "the tokenizer of this checkpoint is not found",
        where=run,
        got="; ".join(tried) or f"no {TOKENIZER} and no {OPTIONS} beside it",
        expected=f"one with the hash {metadata.tokenizer_hash[:12]}",
        remedy="name a model that has it with --tokenizer: the teacher, for example",
    )


def _text_tools(tokenizer: Any, metadata: CheckpointMetadata) -> TextTools:
    tokenizer.chat_template = metadata.run.get("chat_template")
    return TextTools.of(tokenizer, framings_of(metadata, tokenizer))


def _candidates(run: str, work_dir: Path) -> Iterator[str]:
    for part in (TOKENIZER, STUDENT):
        found = [one for one in storage.list_files(storage.join(run, part)) if "/" not in one.name]
        if found:
            folder = work_dir / found[0].key[:16]
            paths = [storage.fetch_once(one.uri, folder, one) for one in found if not _is_weights(one.name)]
            yield str(paths[0].parent)
    options = storage.join(run, FOLDER, OPTIONS)
    if storage.exists(options):
        yield from _models(options)


def _is_weights(name: str) -> bool:
    return name.endswith((".safetensors", ".bin", ".pt"))


def _models(options: str) -> list[str]:
    """The models that a run's options name."""
    try:
        given = parse_yaml(storage.read_small(options))
    except (ParseError, StorageError) as error:
        log.warning("%s cannot be read and is left out: %s", options, error)
        return []
    if not isinstance(given, Mapping):
        return []
    names = [given[name] for name in _NAMING if isinstance(given.get(name), str)]
    if isinstance(given.get("student"), str):
        student = parse_student(given["student"])
        names.append(student.teacher or student.base)
    sources = given.get("sources")
    teachers = [one.get("teacher") for one in sources.values()] if isinstance(sources, Mapping) else []
    online = [str(one).removeprefix("online:") for one in teachers if str(one).startswith("online:")]
    return list(dict.fromkeys([*names, *online]))


def find_checkpoint(source: str, which: str | None) -> tuple[str, str]:
    """The run directory and the checkpoint's data file; neither has been opened.

    Raises:
        CheckpointError: there is none, or not the one that is asked for.
        UsageError: ``which`` is no name of a checkpoint, or goes with one.
    """
    if source.endswith(DATA_SUFFIX):
        if which is not None:
            raise UsageError("--which chooses from a run directory, and this is one checkpoint", where=source)
        return source.rpartition("/")[0] or ".", source
    found = (
        remote_sidecars(source, log.warning)[0] if storage.is_remote(source) else sidecars(storage.local_path(source))
    )
    if not found:
        raise _nothing(source)
    name = _choose(found, which, source)
    log.info("%s: %s of step %d", source, name, found[name].step)
    return source, storage.join(source, name + DATA_SUFFIX)


def _choose(found: Mapping[str, CheckpointMetadata], which: str | None, source: str) -> str:
    if which is None:
        return "best" if "best" in found else newest_first(found)[0]
    number = which.removeprefix(_STEP)
    name = step_name(int(number)) if which.startswith(_STEP) and number.isdecimal() else which
    if not is_known(name):
        raise UsageError(
            "this is no name of a checkpoint",
            where=f"--which={which}",
            expected="best, last, final, step-N or a time-... that is there",
        )
    if name not in found:
        raise CheckpointError(
            "the run has no such checkpoint",
            where=source,
            got=f"--which={which}",
            expected=f"one of {', '.join(sorted(found))}",
        )
    return name


def _nothing(source: str) -> CheckpointError:
    below = {one.name.rpartition("/")[0] for one in storage.list_files(source) if one.name.endswith(SIDECAR_SUFFIX)} - {
        ""
    }
    runs = [storage.join(source, name) for name in sorted(below)]
    return CheckpointError(
        "there is no complete checkpoint here",
        where=source,
        expected="a run directory with one, or a .pt file",
        remedy=f"name one of the runs in it: {', '.join(runs[:4])}" if runs else "check the spelling of the path",
    )
