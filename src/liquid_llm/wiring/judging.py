"""What students are judged on, and beside whom: the configuration of an evaluation, its texts and its teachers."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from liquid_llm import storage
from liquid_llm.config import BARE, NOWHERE, RunConfig, Sources, build_run_config
from liquid_llm.data.types import ManifestEntry, MicroBatch
from liquid_llm.distributed import Engine
from liquid_llm.errors import DataError, UsageError
from liquid_llm.models.loading import load_tokenizer
from liquid_llm.models.positions import max_positions
from liquid_llm.models.tokenizers import require_same_tokenizer
from liquid_llm.sources import NONE, is_type, order_types, read_spec
from liquid_llm.wiring.framing import Speaker, choose_framings
from liquid_llm.wiring.inputs import Inputs, validation_sets
from liquid_llm.wiring.opening import OpenedStudent, run_options
from liquid_llm.wiring.order import needs_files
from liquid_llm.wiring.parts import read_inputs, require_same_texts
from liquid_llm.wiring.teachers import RunTeachers, check_teachers, make_teachers
from liquid_llm.wiring.tokenizers import TextTools

log = logging.getLogger(__name__)

# What of a run's options says which texts it held out, in which caches, how a model sees them, and who taught them.
_OF_RUN = """
    hybrid hybrid_strict teacher_mode teacher_name lm_teacher_id mc_teacher_id math_logits_dir code_logits_dir sources
    teacher_precision teacher_quantize precision dataset_name dataset_config dataset_manifest datasets_yaml data_cache
    block_size seq_len batch_size order document_mask val_fraction begin_token learn chat_template eval_ctx_lens
    eval_tokens divergence kd_temperature T temp_schedule
"""
_DATA = ("dataset_manifest", "dataset_name", "records")


@dataclass(frozen=True)
class Judgement:
    """What students are judged on.

    Attributes:
        sets: context length -> type -> held-out micro-batches.
        length: the context length whose figures come first.
    """

    config: RunConfig
    text: TextTools
    inputs: Inputs
    sets: dict[int, dict[str, list[MicroBatch]]]
    teachers: RunTeachers
    length: int


def evaluation_config(given: Mapping[str, Any], students: Sequence[OpenedStudent]) -> RunConfig:
    """The configuration of an evaluation: what is given, behind it what the first student of a run was trained with.

    Args:
        given: option name -> value, those of ``liquid evaluate``.

    Raises:
        UsageError: nothing names the texts, or options do not go together.
    """
    named = _named_texts(given)
    of_run = next((one for one in students if one.run is not None), None)
    face, options = BARE, dict[str, Any]()
    if of_run is not None and (not named or "teacher" not in given):
        try:
            face, options = run_options(of_run)
        except UsageError:
            if not named:
                raise
    if not named and of_run is None:
        raise UsageError(
            "nothing says which texts to evaluate on",
            where=", ".join(one.name for one in students),
            expected="--dataset_manifest, --dataset_name or --records; a run has held out some itself",
        )
    inherited = None
    if of_run is not None and of_run.metadata is not None:
        inherited = {"block_size": of_run.metadata.block_size, "eval_ctx_lens": of_run.metadata.eval_ctx_lens}
    return _configure(given, face, options, inherited)


def planned_evaluation(given: Mapping[str, Any], run: RunConfig) -> RunConfig:
    """The configuration that evaluating a run will have, before the run is begun; see ``evaluation_config``."""
    face, options = run.face, dict(run.given)
    if _named_texts(given) and "teacher" in given:
        face, options = BARE, {}
    lengths = {"block_size": run.data.block_size, "eval_ctx_lens": run.evaluation.context_lengths}
    return _configure(given, face, options, lengths)


def _named_texts(given: Mapping[str, Any]) -> list[str]:
    """The one option that names texts of the evaluation's own, if any."""
    named = [name for name in _DATA if given.get(name)]
    if len(named) > 1:
        raise UsageError("the texts are named twice", got=" and ".join(f"--{one}" for one in named), remedy="keep one")
    return named


def _configure(
    given: Mapping[str, Any], face: str, options: Mapping[str, Any], inherited: Mapping[str, Any] | None
) -> RunConfig:
    """What is given, behind it a run's ``options``."""
    named = _named_texts(given)
    kept = {name: value for name, value in options.items() if name in _OF_RUN.split()}
    if named:
        kept = {name: value for name, value in kept.items() if not name.startswith("dataset")}
    own = {name: value for name, value in given.items() if name in (*_OF_RUN.split(), *_PLAIN) and name != "sources"}
    if given.get("records"):
        own["dataset_manifest"] = NOWHERE
    everything = bool(given.get("records")) or own.get("val_fraction") == 1
    if everything:
        own["val_fraction"] = 0.0  # a run that trains could not hold out all
    config = build_run_config(face, {**kept, **own}, inherited)
    if everything:
        config = replace(config, data=replace(config.data, val_fraction=1.0))
    # Who asks for an evaluation asks for the teacher, whatever it weighed in training.
    config = replace(config, evaluation=replace(config.evaluation, teacher=True))
    return _with_teachers(config, given.get("teacher"), given.get("sources") or {})


def plain_config(given: Mapping[str, Any]) -> RunConfig:
    """Which device, and where the Hugging Face token is: what the options say before any student is opened."""
    named = {name: given[name] for name in _PLAIN if name in given}
    return build_run_config(BARE, {"dataset_manifest": NOWHERE, **named})


_PLAIN = ("device", "num_workers", "hf_token_file", "hf_token_uri", "hf_token_secret")


def _with_teachers(config: RunConfig, teacher: str | None, by_type: Mapping[str, Mapping[str, Any]]) -> RunConfig:
    """The same with ``teacher`` for every type, and others ``by_type``; the layouts stay as they are."""
    source = config.source
    if teacher is not None:
        spec = teacher if teacher == NONE else _spec(teacher)
        named = {type: replace(one, teacher=spec) for type, one in source.named.items()}
        source = Sources(named, spec)
        config = replace(config, teacher=replace(config.teacher, hybrid=False, mode="online"))
    changed = {type: replace(source(type), teacher=str(fields["teacher"])) for type, fields in by_type.items()}
    return replace(config, source=Sources({**source.named, **changed}, source.other_teacher))


def _spec(teacher: str) -> str:
    """A teacher's spec: a bare word is a model that is asked, as ``package:NAME`` is."""
    spec = read_spec(teacher)
    return f"online:{teacher}" if spec == f"store:{teacher}" else spec


def records_entries(given: str) -> list[ManifestEntry]:
    """Files of records as a manifest names them: ``FILE`` (of type lm) or ``TYPE=FILE``, comma-separated."""
    entries = []
    for one in filter(None, (part.strip() for part in given.split(","))):
        type, equals, path = one.partition("=")
        if not equals or not is_type(type):
            type, path = "lm", one
        entries.append(
            ManifestEntry(
                path if storage.is_remote(path) else str(storage.local_path(path).absolute()), type, 1.0, "--records"
            )
        )
    return entries


def choose_text(config: RunConfig, students: Sequence[OpenedStudent], token: str | None) -> TextTools:
    """The one tokenizer of all students and teachers; framed as the first student of a run was trained with.

    Raises:
        ModelError: two of them differ (naming both).
    """
    own = next((one for one in students if one.text is not None), students[0])
    for one in students:
        require_same_tokenizer(own.tokenizer, f"the student {own.name}", one.tokenizer, f"the student {one.name}")
    speakers = {
        name: Speaker(f"the teacher {name}", load_tokenizer(name, token=token)) for name in config.source.online
    }
    for speaker in speakers.values():
        require_same_tokenizer(own.tokenizer, f"the student {own.name}", speaker.tokenizer, speaker.name)
    text = own.text
    if text is None:
        speaker = Speaker(f"the student {own.name}", own.tokenizer)
        framings = choose_framings(config.data.begin_token, config.source, speakers, speaker)
        text = TextTools.of(own.tokenizer, framings)
    others = [one for one in students if one.text is not None and one.text.framings != text.framings]
    for one in others:
        log.warning("%s was trained on texts that are framed otherwise than those of %s", one.name, own.name)
    return text.learn(config.data, token)


def judge_on(
    config: RunConfig,
    students: Sequence[OpenedStudent],
    entries: Sequence[ManifestEntry],
    device: torch.device,
    token: str | None,
    engine: Engine,
) -> Judgement:
    """Read the texts, then open the teachers.

    Raises:
        DataError: no text is held out, or ranks have read different ones.
        LiquidError: any other problem a user can cause.
    """
    text = choose_text(config, students, token)
    check_teachers(config, token)
    _require_positions(students, config)
    inputs, sets = engine.host_first(lambda: hold_out(config, text, token, entries))
    require_same_texts(inputs, engine)
    text = replace(text, framings=text.framings.of(inputs.types))
    teachers = make_teachers(config, inputs, text, device, token)
    return Judgement(config, text, inputs, sets, teachers, config.data.block_size)


def hold_out(
    config: RunConfig, text: TextTools, token: str | None, entries: Sequence[ManifestEntry]
) -> tuple[Inputs, dict[int, dict[str, list[MicroBatch]]]]:
    """The texts that students are judged on, and their batches by context length and type.

    Raises:
        DataError: no text is held out.
    """
    types = order_types(entry.type for entry in entries)
    apart = [type for type in types if needs_files(config, type)]
    inputs = read_inputs(config, text, token, entries, training=False, apart=apart)
    lengths = sorted({config.data.block_size, *config.evaluation.context_lengths})
    sets = validation_sets(inputs, lengths, config.data, config.evaluation.max_tokens)
    if not sets[config.data.block_size]:
        raise DataError(
            "no text is held out, so there is nothing to evaluate on",
            where=config.data.manifest if config.data.manifest != NOWHERE else "--records",
            got=f"--val_fraction={config.data.val_fraction:g}",
            remedy="raise --val_fraction (1 takes everything), or name other texts",
        )
    return inputs, sets


def require_same_students(students: Sequence[OpenedStudent], engine: Engine) -> None:
    """Give every rank the main one's weights: a host may have an older copy.

    Raises:
        DataError: its copy is of another shape.
    """
    shapes = [[[*one.shape] for one in student.model.state_dict().values()] for student in students]
    if shapes != engine.share(lambda: shapes):
        raise DataError(
            "the processes have opened different students",
            where=f"rank {engine.rank}",
            got=", ".join(student.description for student in students),
            expected="the same as on rank 0",
            remedy="give every host the same files, or a URL that all of them read",
        )
    engine.copy_from_main(tensor for student in students for tensor in student.model.state_dict().values())


def _require_positions(students: Sequence[OpenedStudent], config: RunConfig) -> None:
    for student in students:
        limit = max_positions(student.model)
        if limit is not None and limit < config.longest_context:
            raise UsageError(
                "the student has no positions that far",
                where=student.name,
                got=config.longest_context,
                expected=f"at most {limit}",
                remedy="give a shorter --block_size and --eval_ctx_lens",
            )
