"""The student of a run: built or loaded, fitted to the context length, checked against the tokenizer."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from liquid_llm import storage
from liquid_llm.checkpoint.resume import ResumeSource
from liquid_llm.config import RunConfig
from liquid_llm.data.loader import TrainingStream
from liquid_llm.device import find_not_finite
from liquid_llm.errors import CheckpointError, LiquidError, ModelError, UsageError
from liquid_llm.framing import Framing
from liquid_llm.models.heads import check_documents
from liquid_llm.models.importance import Text, mean_loss
from liquid_llm.models.lora import LoraSpec, add_adapter, has_adapter, has_transposed, load_adapter, merge_adapter
from liquid_llm.models.positions import (
    Stretch,
    fit_positions,
    match_table,
    max_positions,
    plan_stretch,
    positional_embedding,
)
from liquid_llm.models.sources import resolve
from liquid_llm.models.spec import parse_student
from liquid_llm.models.student import (
    build_student,
    config_file,
    config_values,
    enable_gradient_checkpointing,
    is_configuration,
    student_config,
    vocabulary_in,
)
from liquid_llm.models.taking import TakenStudent, describe_source, take_student
from liquid_llm.wiring.course import hash_weights
from liquid_llm.wiring.origins import open_origin
from liquid_llm.wiring.start import Start
from liquid_llm.wiring.tokenizers import TextTools

log = logging.getLogger(__name__)

_CALIBRATION_TOKENS = 2048


@dataclass(frozen=True)
class BuiltStudent:
    """A student ready to train.

    Attributes:
        model: float32 parameters, dropout off.
        positional_embedding: ``learned``, ``rotary`` or ``none``.
        description: plain values a checkpoint keeps to build it again.
        stretch: what was done to its learned positions since the checkpoint, if anything.
    """

    model: nn.Module
    positional_embedding: str
    description: dict[str, Any]
    stretch: Stretch | None = None


def takes_weights(config: RunConfig, start: Start) -> bool:
    """Whether the student is made of a teacher's weights, for which text of the run is needed; one goes on without."""
    fresh = start.origin.config is None and not start.origin.state_dict
    return fresh and parse_student(config.student.spec).teacher is not None


def calibration_text(stream: TrainingStream) -> list[Text]:
    """The first sequences that the run is going to train on, some thousand tokens: a function of its seed."""
    found: list[Text] = []
    tokens = 0
    for index in itertools.count():
        batch = stream.micro_batch(index)
        for ids, labels, length in zip(batch.input_ids, batch.labels, batch.lengths.tolist(), strict=True):
            if tokens >= _CALIBRATION_TOKENS:
                return found
            length = min(length, _CALIBRATION_TOKENS)
            found.append((ids[:length], labels[:length]))
            tokens += length
    raise AssertionError("a stream has no end")


def check_shape(config: RunConfig, text: TextTools, token: str | None) -> None:
    """Refuse a student that cannot be made of its teacher, from configurations alone; raises as ``make_student``."""
    student_config(config.student.spec, **_vocabulary(text, text.vocab_size), token=token)


def _vocabulary(text: TextTools, vocab_size: int) -> dict[str, int]:
    """What a student's shape is told of its tokens."""
    framing = text.framings.student
    return {"vocab_size": vocab_size, "bos_id": framing.bos_id, "eos_id": framing.end_id}


def make_student(
    config: RunConfig,
    start: Start,
    text: TextTools,
    device: torch.device,
    token: str | None,
    calibration: Sequence[Text] = (),
) -> BuiltStudent:
    """Build the student a run starts from.

    Args:
        calibration: text of the run, where ``takes_weights``.

    Raises:
        CheckpointError: the weights are of another architecture or vocabulary.
        ModelError: the architecture's head is not one the loss understands, or documents cannot be kept apart in it.
        UsageError: an evaluation length past what the student supports.
    """
    taken = _take(config, text, device, token, calibration) if takes_weights(config, start) else None
    model = _build(config, start, text, token) if taken is None else taken.model
    metadata = start.origin.metadata
    adapter = _fill(model, config, start, text, token)
    trained = None if metadata is None else metadata.student.get("trained_positions")
    longest = max(config.data.block_size, config.data.seq_len)
    stretch = plan_stretch(model, longest, trained)
    if adapter is not None and stretch is not None:
        raise UsageError(
            "an adapter trains no positions, and this student has too few",
            where=f"--block_size={longest}",
            expected=f"at most {max_positions(model)}",
            remedy="take a shorter --block_size, or train all of the student, without --lora_r",
        )
    log.info("%s", fit_positions(model, longest, config.student.rope_scale, trained_positions=trained))
    _require_positions(model, config.evaluation.context_lengths)
    if adapter is not None and not has_adapter(model):
        assert config.student.lora is not None
        add_adapter(model, config.student.lora, config.seed)
    if config.student.grad_checkpoint is True:
        enable_gradient_checkpointing(model)
    model.to(device)
    if config.data.document_mask:
        check_documents(model)
    kind = positional_embedding(model)
    trained = longest if start.kind == "fresh" else max(longest, trained or max_positions(model) or longest)
    description = {"spec": _spec(config, start), "config": config_values(model.config), "trained_positions": trained}
    if taken is not None:
        log.info("%s", _say_taken(taken, mean_loss(model, calibration)))
        description["taken"] = taken.facts
    elif metadata is not None:
        description |= {key: metadata.student[key] for key in ("taken", "base") if key in metadata.student}
    elif not start.origin.state_dict and not is_configuration(config.student.spec):
        description["base"] = describe_source(resolve(config.student.spec, token=token))
    if adapter is not None:
        description["lora"] = adapter
        log.info("%s", _say_adapter(model, adapter))
    return BuiltStudent(model, kind, description, stretch)


def _fill(model: Any, config: RunConfig, start: Start, text: TextTools, token: str | None) -> dict[str, Any] | None:
    """Give a new student the weights that it starts from; what a checkpoint says of the adapter that is trained.

    Raises:
        ModelError: an adapter is asked for of a student that has no weights.
        UsageError: the run so far has trained another one, or none.
    """
    origin, lora = start.origin, config.student.lora
    known = _known_adapter(origin)
    goes_on = start.kind == "continue" or start.goes_on
    if goes_on:
        _require_same_adapter(lora, known, origin.description)
    if known is not None:
        resumed = config.student.resume_uri if start.kind == "continue" else None
        named = config.student.spec if "student" in config.given else None
        where = {"resume": resumed} if resumed is not None else {"student": named} if named is not None else None
        fill_adapted(model, known, origin, text, token, where)
        if goes_on:
            return dict(known)
        log.info(
            "the adapter of %s is merged: all weights of that student are what this one begins with", origin.description
        )
        merge_adapter(model)
    elif origin.state_dict:
        load_weights(model, origin.state_dict, origin.description)
    if lora is None:
        return None
    if not origin.state_dict and is_configuration(config.student.spec):
        raise ModelError(
            "an adapter of weights that nothing has trained learns little",
            where=f"--student={config.student.spec} --lora_r={lora.rank}",
            expected="a student that has weights: a Hugging Face id or folder, or --resume_gcs_uri",
            remedy="leave --lora_r out to train a new student whole",
        )
    uri = config.student.resume_uri
    base = {"student": _absolute(config.student.spec)} if uri is None else {"resume": _absolute(uri)}
    transposed = has_transposed(model)
    return {**lora.plain(), "transposed": transposed, "base": base, "sha256": hash_weights(model.state_dict())}


def _absolute(where: str) -> str:
    """A place as it is found from any folder of this machine; an id, a package or a URL as it is."""
    path = None if storage.is_remote(where) else storage.local_path(where)
    return str(path.resolve()) if path is not None and path.exists() else where


def _known_adapter(origin: ResumeSource) -> Mapping[str, Any] | None:
    """What a checkpoint says of its adapter; None of one that has whole weights."""
    return None if origin.metadata is None else origin.metadata.student.get("lora")


def _require_same_adapter(lora: LoraSpec | None, known: Mapping[str, Any] | None, source: str) -> None:
    was = None if known is None else LoraSpec.of(known)
    if lora != was:
        raise UsageError(
            "a run trains the same weights to its end",
            where=source,
            got=_spell_adapter(lora),
            expected=_spell_adapter(was),
            remedy="give the options that it began with, or begin a run of its own with --restart or another output",
        )


def _spell_adapter(lora: LoraSpec | None) -> str:
    if lora is None:
        return "no --lora_r, so all weights"
    return f"--lora_r={lora.rank} --lora_alpha={lora.alpha:g} --lora_target_modules={lora.target_modules}"


def _say_adapter(model: nn.Module, adapter: Mapping[str, Any]) -> str:
    trained = sum(one.numel() for one in model.parameters() if one.requires_grad)
    every = sum(one.numel() for one in model.parameters())
    where = next(iter(adapter["base"].values()))
    return f"an adapter of rank {adapter['rank']} is trained: {trained:,} of {every:,} parameters; its base is {where}"


def fill_adapted(
    model: Any,
    known: Mapping[str, Any],
    origin: ResumeSource,
    text: TextTools,
    token: str | None,
    where: Mapping[str, str] | None = None,
) -> None:
    """Give a model of the base's architecture the base's weights, and the adapter of a checkpoint.

    Args:
        known: what the checkpoint says of its adapter.
        where: the base as it is named today; None takes the place where it was.

    Raises:
        CheckpointError: the base is not found, or is not what the adapter was trained on.
    """
    where = where or known["base"]
    place = next(iter(where.values()))
    remedy = "put back what was there, or name a copy of it with --student"
    try:
        load_weights(model, _read_base(where, text, token), place)
    except LiquidError as error:
        raise CheckpointError(
            "the model that this adapter was trained on cannot be opened",
            where=origin.description,
            got=f"{place}: {error}".rstrip("."),
            remedy=remedy,
        ) from error
    found = hash_weights(model.state_dict())
    if found != known["sha256"]:
        raise CheckpointError(
            "the model that this adapter was trained on has changed",
            where=origin.description,
            got=f"{place} with hash {found[:12]}",
            expected=f"hash {str(known['sha256'])[:12]}",
            remedy=remedy,
        )
    add_adapter(model, LoraSpec.of(known), 0)
    load_adapter(model, origin.state_dict, origin.description)


def _read_base(where: Mapping[str, str], text: TextTools, token: str | None) -> Mapping[str, torch.Tensor]:
    if "student" in where:
        weights: Mapping[str, torch.Tensor] = _build_spec(
            where["student"], text, text.vocab_size, 2, 0, token
        ).state_dict()
        return weights
    return whole_weights(open_origin(where["resume"]), text, token)


def whole_weights(origin: ResumeSource, text: TextTools, token: str | None = None) -> Mapping[str, torch.Tensor]:
    """The weights of a student, those of one with an adapter merged; raises as ``fill_adapted``."""
    known = _known_adapter(origin)
    if known is None:
        return origin.state_dict
    assert origin.config is not None
    model = build_from_config(origin.config, text, origin.description)
    fill_adapted(model, known, origin, text, token)
    merge_adapter(model)
    merged: Mapping[str, torch.Tensor] = model.state_dict()
    return merged


def _take(
    config: RunConfig, text: TextTools, device: torch.device, token: str | None, calibration: Sequence[Text]
) -> TakenStudent:
    said = "%s is made of its teacher's weights, which are measured on %d of the run's texts"
    log.info(said, config.student.spec, len(calibration))
    return take_student(
        config.student.spec,
        **_vocabulary(text, text.vocab_size),
        block_size=config.longest_context,
        seed=config.seed,
        device=device,
        text=calibration,
        token=token,
    )


def _say_taken(taken: TakenStudent, loss: float) -> str:
    """What was taken and what the student makes of the run's text before it is trained, on one line."""
    parameters = sum(parameter.numel() for parameter in taken.model.parameters())
    known = "" if taken.teacher_loss is None else f", that model's {taken.teacher_loss:.4f}"
    return f"student: {describe_taken(taken.facts)}; {parameters:,} parameters; loss untrained {loss:.4f}{known}"


def describe_taken(facts: Mapping[str, Any]) -> str:
    """What a checkpoint's ``taken`` says, in words."""
    if "embedding" in facts:
        narrow, wide = facts["embedding"]
        return f"embedding of {facts['model']}, {wide} channels projected to {narrow} ({facts['kept']:.0%} kept)"
    sizes = {name: pair for name, pair in facts["sizes"].items() if pair[0] != pair[1]}
    layers, all_layers = facts["sizes"]["layers"]
    words = [f"{layers} of {all_layers} layers of {facts['model']}"]
    if layers < all_layers:
        words[0] += f" ({'+'.join(map(str, facts['layers']))})"
    words += [f"{name} {ours} of {all}" for name, (ours, all) in sizes.items() if name != "layers"]
    return ", ".join(words)


def _spec(config: RunConfig, start: Start) -> str:
    """What the student is called: as it was asked for, else as its checkpoint calls it, else where it was read."""
    if "student" in config.given or start.origin.config is None:
        return config.student.spec
    metadata = start.origin.metadata
    called = config.student.resume_uri if metadata is None else metadata.student.get("spec")
    return str(called or config.student.spec)


def _build(config: RunConfig, start: Start, text: TextTools, token: str | None) -> Any:
    """The architecture: the checkpoint's own where it says, else ``--student`` with the tokenizer's vocabulary."""
    if start.origin.config is None:
        if parse_student(config.student.spec).teacher is not None:  # weights that are there already fill it
            return _build_shape(config.student.spec, text, text.vocab_size, config.seed, token, {})
        longest = config.longest_context if config.student.lora is None else 2  # an adapter trains no new positions
        return _build_spec(config.student.spec, text, text.vocab_size, longest, config.seed, token)
    known = None if start.origin.metadata is None else start.origin.metadata.student.get("spec")
    if "student" in config.given and config.student.spec != known and _known_adapter(start.origin) is None:
        vocab_size = vocabulary_in(start.origin.config) or text.vocab_size
        expected = _build_shape(config.student.spec, text, vocab_size, config.seed, token, start.origin.config)
        require_weights_of(expected, start.origin.state_dict, start.origin.description)
    return build_from_config(start.origin.config, text, start.origin.description, config.seed)


def _build_shape(
    spec: str, text: TextTools, vocab_size: int, seed: int, token: str | None, like: Mapping[str, Any]
) -> Any:
    """A student as ``spec`` asks for it, whose weights count for nothing.

    Of a cut the blocks that importance chose are unknown, so they are taken to be of the kinds that ``like`` has.
    """
    if parse_student(spec).teacher is None:
        return _build_spec(spec, text, vocab_size, 2, seed, token)
    config = student_config(spec, **_vocabulary(text, vocab_size), token=token)
    values = {**config_values(config), "model_type": config.model_type}
    kinds = like.get("layer_types")
    if kinds is not None and len(kinds) == values.get("num_hidden_layers"):
        values["layer_types"] = kinds
    return build_from_config(values, text, f"--student={spec}", seed)


def build_from_config(config: Mapping[str, Any], text: TextTools, source: str, seed: int = 0) -> Any:
    """The architecture that a Hugging Face configuration describes, with random weights.

    Args:
        source: whose configuration it is, for messages.

    Raises:
        CheckpointError: its vocabulary is smaller than the tokenizer's.
        ModelError: no model can be built from it.
    """
    vocab_size = vocabulary_in(config) or text.vocab_size
    if vocab_size < text.vocab_size:
        raise CheckpointError(
            "the weights are of a smaller vocabulary than the tokenizer's",
            where=source,
            got=vocab_size,
            expected=f"at least {text.vocab_size}",
            remedy="use the tokenizer the student was trained with",
        )
    with config_file(config) as file:
        return _build_spec(file, text, vocab_size, 2, seed)


def _build_spec(
    spec: str, text: TextTools, vocab_size: int, block_size: int, seed: int, token: str | None = None
) -> Any:
    return build_student(spec, **_vocabulary(text, vocab_size), block_size=block_size, seed=seed, token=token)


def name_tokens(model: Any, framing: Framing) -> None:
    """Let a student's configurations name the tokens around the texts that it is really trained on."""
    for one in filter(None, (model.config, getattr(model, "generation_config", None))):
        one.bos_token_id, one.eos_token_id = framing.bos_id, framing.end_id


def load_weights(model: nn.Module, weights: Mapping[str, torch.Tensor], source: str) -> None:
    """Load a state dict; nothing but tied weights may be absent, nothing may be left over.

    Raises:
        CheckpointError: names or shapes differ, a head that is tied is there with other values than the embedding, or a
            weight is not finite; the message says which.
    """
    not_finite = find_not_finite({name: weights[name] for name, _ in model.named_parameters() if name in weights})
    if not_finite is not None:
        raise CheckpointError(
            "the weights are not finite",
            where=source,
            got=f"NaN or infinity in {not_finite}",
            remedy="choose a checkpoint of an earlier step; --restart begins a run afresh and keeps this one aside",
        )
    require_weights_of(model, weights, source)
    model.load_state_dict(dict(weights), strict=False)


def require_weights_of(model: nn.Module, weights: Mapping[str, torch.Tensor], source: str) -> None:
    """Raise CheckpointError unless ``weights`` are those of ``model``, whose learned positions become as many."""
    match_table(model, weights)
    expected = model.state_dict(keep_vars=True)  # tied weights are one object there
    names: dict[int, list[str]] = {}
    for name, value in expected.items():
        names.setdefault(id(value), []).append(name)
    missing = [name for name, value in expected.items() if not any(one in weights for one in names[id(value)])]
    unknown = [name for name in weights if name not in expected]
    shapes = [
        f"{name} {tuple(weights[name].shape)} instead of {tuple(value.shape)}"
        for name, value in expected.items()
        if name in weights and weights[name].shape != value.shape
    ]
    if missing or unknown or shapes:
        parts = [f"{len(missing)} missing ({missing[0]})"] if missing else []
        parts += [f"{len(unknown)} unknown ({unknown[0]})"] if unknown else []
        parts += [f"{len(shapes)} of another shape ({shapes[0]})"] if shapes else []
        raise CheckpointError(
            "the weights are of another architecture or vocabulary",
            where=source,
            got=", ".join(parts),
            expected=f"those of {type(model).__name__}",
            remedy="give the --student they were trained as, or leave it out if the checkpoint names it",
        )
    for group in names.values():
        there = [name for name in group if name in weights]
        other = [name for name in there[1:] if not torch.equal(weights[name], weights[there[0]])]
        if other:
            raise CheckpointError(
                "weights that are one in this model have two values",
                where=source,
                got=f"{other[0]} is not {there[0]}",
                expected="the same numbers, or tie_word_embeddings: false in config.json",
                remedy="correct config.json, or save the model again",
            )


def _require_positions(model: nn.Module, lengths: tuple[int, ...]) -> None:
    limit = max_positions(model)
    beyond = [length for length in lengths if limit is not None and length > limit]
    if beyond:
        raise UsageError(
            "the student has no positions that far",
            where=f"--eval_ctx_lens={','.join(map(str, lengths))}",
            got=max(beyond),
            expected=f"at most {limit}",
            remedy="leave the longer lengths out, or train with a larger --block_size, which grows the table",
        )
