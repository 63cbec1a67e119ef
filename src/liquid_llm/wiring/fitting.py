"""Whether a run fits into its device's memory, and the choices that follow from it; ``shapes`` has the words.

What ``auto`` stands for is decided from the nominal shape, before the order of the data (which depends on the batch) is
made; the fit of the run is said from the real one. Decisions are kept in checkpoints, so that a run goes on exactly as
it began, on another card too.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from liquid_llm.config import CaptureConfig, RunConfig
from liquid_llm.distributed import Engine
from liquid_llm.errors import ModelError, UsageError
from liquid_llm.formatting import format_bytes
from liquid_llm.losses.plan import CHUNK_BYTES, choose_plan
from liquid_llm.losses.rows.choice import choose_rows
from liquid_llm.memory import MOST_TOKENS, predict_capture, predict_training
from liquid_llm.memory.free import available_bytes
from liquid_llm.memory.prediction import MemoryPrediction
from liquid_llm.memory.shapes import CaptureShape, ModelShape, TrainingShape
from liquid_llm.memory.verdict import Verdict, capture_options, fits, largest_batch, training_options
from liquid_llm.options import AUTO, AUTO_BATCH
from liquid_llm.runtime import Choice, choose_dtype
from liquid_llm.signal_store.codecs import Codec
from liquid_llm.wiring.shapes import (
    Models,
    describe_models,
    nominal_shape,
    open_teachers,
    real_batches,
    real_evaluations,
    shape_of,
)
from liquid_llm.wiring.start import Start
from liquid_llm.wiring.tokenizers import TextTools

if TYPE_CHECKING:
    from liquid_llm.wiring.parts import Parts

log = logging.getLogger(__name__)

# What models raise on tensors without values; that a run's memory cannot be worked out is no reason to end the run.
UNPREDICTABLE = (ModelError, RuntimeError, AssertionError, AttributeError, TypeError, ValueError, LookupError)


LOSS_CHUNK = "loss_chunk_mib"
_LEFT_FREE = 0.1  # a larger chunk saves a few percent of a step, which is not worth a pass that runs out of memory


@dataclass(frozen=True)
class Fit:
    """Whether a run fits.

    Attributes:
        prediction: of its largest micro-batches; None for a model whose memory cannot be worked out.
        available_bytes: what it can have; None where the device does not tell.
        verdict: None where one of the two is not known.
        obstacle: why there is no prediction, or "".
    """

    prediction: MemoryPrediction | None
    available_bytes: int | None
    verdict: Verdict | None
    obstacle: str = ""

    @property
    def line(self) -> str:
        """One line for the log."""
        found = self.prediction
        if found is None:
            return f"memory: whether it fits is not known: {self.obstacle}"
        words = (
            f"memory: {found.peak_batch} take {format_bytes(found.peak_bytes)} at the peak (worked out, not measured)"
        )
        if self.verdict is None:
            return f"{words}; what is free is not known"
        return f"{words}; with allowances {self.verdict.words}"

    def largest(self) -> str:
        """The three largest consumers in words; "" where they are not known."""
        return "" if self.prediction is None else self.prediction.largest()

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        verdict = None if self.verdict is None else self.verdict.as_dict()
        known = {"obstacle": self.obstacle} if self.prediction is None else self.prediction.as_dict()
        return {**known, "available_bytes": self.available_bytes, "verdict": verdict}


# ------------------------------------------------------------------------------------------------------------- choices


def settle(
    config: RunConfig, start: Start, text: TextTools, device: torch.device, token: str | None, engine: Engine
) -> tuple[RunConfig, dict[str, Choice], dict[str, Any]]:
    """Decide what is left to memory, before anything of size is built; a run that goes on keeps what it decided.

    The main rank decides for all: what is free differs between ranks.

    Returns:
        The configuration with every ``auto`` replaced; what was chosen, and why; the same as plain values for the
        checkpoint's ``run["decided"]``, empty where nothing was ``auto``.

    Raises:
        LiquidError: any problem a user can cause.
    """
    if config.data.batch_size != AUTO_BATCH and config.student.grad_checkpoint != AUTO:
        return config, {}, {}
    # Wherever the step goes on: a place in the data is counted in micro-batches.
    metadata = start.origin.metadata
    decided = metadata.run.get("decided") if start.goes_on and metadata is not None else None
    models = describe_models(config, start, text, device, token, engine.world_size)
    available = available_bytes(device)
    free = None if available is None else available - models.held_bytes

    def decide() -> dict[str, Any]:
        settled, choices = resolve_auto(config, models, free, device.type, decided=decided, ranks=engine.world_size)
        for name, choice in choices.items():
            log.info("%s %s: %s", name, choice.value, choice.reason)
        return {
            "values": decisions(config, settled),
            "choices": {name: (choice.value, choice.reason) for name, choice in choices.items()},
        }

    found = engine.share(decide)
    choices = {name: Choice(*choice) for name, choice in found["choices"].items()}
    return _with(config, **found["values"]), choices, found["values"]


def resolve_auto(
    config: RunConfig,
    models: Models,
    available: int | None,
    device: str,
    *,
    decided: Mapping[str, Any] | None = None,
    ranks: int = 1,
) -> tuple[RunConfig, dict[str, Choice]]:
    """The configuration with every ``auto`` that memory decides replaced, and why.

    Args:
        available: bytes that the run can have; None where that is not known.
        device: its type.
        decided: what ``decisions`` kept when the run began; it wins over what would be decided today.
        ranks: how many share the micro-batches of a step.

    Raises:
        UsageError: no micro-batch fits, or tokens a step that no batch of this block size gives.
    """
    if decided:
        config, kept = _take_decided(config, decided)
    else:
        kept = {}
    if config.data.batch_size == AUTO_BATCH:
        config, chosen = _choose_batch(config, models, available, device, ranks)
        return config, {**kept, **chosen}
    if config.student.grad_checkpoint == AUTO:
        choice = _choose_checkpointing(config, models, available, device)
        return _with(config, grad_checkpoint=choice.value == "true"), {**kept, "grad_checkpoint": choice}
    return config, kept


def decisions(before: RunConfig, after: RunConfig) -> dict[str, Any]:
    """What memory decided, as plain values for a checkpoint's metadata."""
    values: dict[str, Any] = {}
    if before.data.batch_size == AUTO_BATCH:
        values |= {"batch_size": after.data.batch_size, "grad_accum": after.optimizer.grad_accum}
    if before.student.grad_checkpoint == AUTO:
        values["grad_checkpoint"] = after.student.grad_checkpoint
    return values


def _take_decided(config: RunConfig, decided: Mapping[str, Any]) -> tuple[RunConfig, dict[str, Choice]]:
    reason = "as the run began"
    kept: dict[str, Choice] = {}
    if config.data.batch_size == AUTO_BATCH and {"batch_size", "grad_accum"} <= decided.keys():
        size, accumulation = int(decided["batch_size"]), int(decided["grad_accum"])
        if size * accumulation * config.data.block_size == config.optimizer.tokens_per_step:
            config = _with(config, batch_size=size, grad_accum=accumulation)
            kept |= {"batch_size": Choice(str(size), reason), "grad_accum": Choice(str(accumulation), reason)}
    if config.student.grad_checkpoint == AUTO and "grad_checkpoint" in decided:
        checkpointing = bool(decided["grad_checkpoint"])
        config = _with(config, grad_checkpoint=checkpointing)
        kept["grad_checkpoint"] = Choice(str(checkpointing).lower(), reason)
    return config, kept


def _with(config: RunConfig, **values: Any) -> RunConfig:
    """``config`` with ``batch_size``, ``grad_accum`` or ``grad_checkpoint`` set."""
    groups = {"batch_size": "data", "grad_accum": "optimizer", "grad_checkpoint": "student"}
    for name, value in values.items():
        config = replace(config, **{groups[name]: replace(getattr(config, groups[name]), **{name: value})})
    return config


def _choose_checkpointing(config: RunConfig, models: Models, available: int | None, device: str) -> Choice:
    """Checkpointing where the nominal shape does not fit without it and takes less with it."""
    if available is None:
        return Choice("false", "what is free is not known")
    try:
        without = predict_training(nominal_shape(_with(config, grad_checkpoint=False), models, device))
    except UNPREDICTABLE as error:
        return Choice("false", f"whether it fits is not known: {_in_words(error)}")
    figures = f"{format_bytes(without.needed_bytes)} of {format_bytes(available)}"
    if without.needed_bytes <= available:
        return Choice("false", f"it fits without: {figures}")
    try:
        with_it = predict_training(nominal_shape(_with(config, grad_checkpoint=True), models, device))
    except ModelError as error:
        return Choice("false", f"it does not fit ({figures}), but {error.problem}")
    if with_it.needed_bytes >= without.needed_bytes:
        return Choice("false", f"it would save nothing: {figures} without")
    return Choice("true", f"{figures} without, {format_bytes(with_it.needed_bytes)} with it")


def _choose_batch(
    config: RunConfig, models: Models, available: int | None, device: str, ranks: int
) -> tuple[RunConfig, dict[str, Choice]]:
    tokens, block = config.optimizer.tokens_per_step, config.data.block_size
    assert tokens is not None
    if tokens // block % ranks:
        raise UsageError(
            "the blocks of a step cannot be dealt out among the ranks",
            where=f"--tokens_per_step={tokens}",
            got=f"{tokens // block} blocks of {block} tokens for {ranks} ranks",
            expected=f"a multiple of {ranks * block}",
        )
    if available is None:
        raise UsageError(
            "what is free is not known, so no batch can be chosen", where="--batch_size=auto", remedy="give a number"
        )
    automatic = config.student.grad_checkpoint == AUTO
    tried = (False, True) if automatic else (config.student.grad_checkpoint is True,)

    def build(size: int, accumulation: int, checkpointing: bool) -> TrainingShape:
        changed = _with(config, batch_size=size, grad_accum=accumulation * ranks, grad_checkpoint=checkpointing)
        return nominal_shape(changed, models, device)

    found = largest_batch(
        build,
        predict_training,
        blocks_per_step=tokens // block // ranks,
        most_blocks=max(1, MOST_TOKENS // block),
        free_bytes=available,
        checkpointing=tried,
    )
    if found is None:
        least = predict_training(build(1, tokens // block // ranks, tried[-1]))
        raise UsageError(
            "not even a single block fits into memory",
            where="--batch_size=auto",
            got=f"{format_bytes(least.needed_bytes)} of {format_bytes(available)}; most is taken by {least.largest()}",
            remedy="use a smaller student or teacher, a shorter --block_size or a larger device",
        )
    figures = f"{format_bytes(found.needed_bytes)} of {format_bytes(available)}"
    whole = "the whole step" if ranks == 1 else "a rank's whole part of the step"
    reason = f"{whole}, which fits: {figures}" if found.grad_accum == 1 else f"the most that fits: {figures}"
    grad_accum = found.grad_accum * ranks
    choices = {
        "batch_size": Choice(str(found.batch_size), reason),
        "grad_accum": Choice(str(grad_accum), f"{tokens} tokens a step"),
    }
    if automatic:
        words = "not even one block fits without" if found.grad_checkpoint else "it fits without"
        choices["grad_checkpoint"] = Choice(str(found.grad_checkpoint).lower(), words)
    chosen = {"batch_size": found.batch_size, "grad_accum": grad_accum, "grad_checkpoint": found.grad_checkpoint}
    return _with(config, **chosen), choices


# ----------------------------------------------------------------------------------------------------------- the check


def _real_shape(config: RunConfig, parts: Parts) -> tuple[TrainingShape, int | None]:
    """The run's real shapes, and what its device can give.

    Called when the models are on the device: what they take is part of both sides of the comparison.
    """
    device = parts.device
    # Another teacher's weights are neither predicted nor given back: they lie on the device already.
    teacher: Any = max(parts.teachers.models, key=_size, default=None)
    if config.teacher.ranks:
        dtype = choose_dtype(config.teacher.precision, device.type).value
        teacher_shape, _ = open_teachers(config, dtype, parts.token)
    else:
        narrow = config.teacher.quantisation
        teacher_shape = None if teacher is None else ModelShape.of(teacher.config, _dtype_of(teacher), narrow)
    models = Models(
        ModelShape.of(parts.built.model.config),
        teacher_shape,
        str(parts.student.compute_dtype).removeprefix("torch."),
        parts.text.vocab_size,
        ranks=parts.engine.world_size,
    )
    batches = real_batches(parts)
    shape = shape_of(config, models, device.type, batches, real_evaluations(parts, batches))
    cut = parts.progress.passes.max_tokens is not None  # then a pass finds the gradients of the one before it
    shape = replace(shape, reference=parts.student.reference is not None, accumulates=shape.accumulates or cut)
    held = [parts.built.model, parts.student.reference, teacher]
    # Models that are to be dealt out lie on the host until then, and come to the device in parts.
    here = [model for model in held if model is not None and next(model.parameters()).device.type == device.type]
    taken = sum(map(_size, here)) + parts.teachers.head_bytes
    available = available_bytes(device, taken)
    chunk = parts.decided.get(LOSS_CHUNK)
    return shape if chunk is None else replace(shape, chunk_bytes=int(chunk) << 20), available


def check_fit(config: RunConfig, parts: Parts) -> Fit:
    """Work out the memory of the run's real shapes and compare it with what its device can give."""
    shape, available = _real_shape(config, parts)
    try:
        return judge(config, shape, available)
    except UNPREDICTABLE as error:
        return Fit(None, available, None, _in_words(error))


def settle_loss(config: RunConfig, parts: Parts, start: Start) -> None:
    """Decide how the loss goes about it on an accelerator, once the models are on it; said, and kept with the run.

    A run that goes on keeps its chunk, so that its sums are taken in the same order. The main rank decides for all.
    """
    device = parts.device
    if device.type == "cpu":
        return
    before = (start.run_so_far or {}).get("decided")

    def decide() -> tuple[str, str]:
        if before and LOSS_CHUNK in before:
            return str(before[LOSS_CHUNK]), "as the run began"
        choice = choose_chunk(*_real_shape(config, parts))
        return choice.value, choice.reason

    chunk, rows = Choice(*parts.engine.share(decide)), choose_rows(device)
    log.info("logits of the loss in chunks of %s MiB: %s", chunk.value, chunk.reason)
    log.info("rows of the loss %s: %s", rows.value, rows.reason)
    parts.decided[LOSS_CHUNK] = int(chunk.value)
    parts.choices.update({LOSS_CHUNK: chunk, "loss_rows": rows})
    parts.student.plan = choose_plan(device, parts.student.head.vocab_size, chunk_bytes=int(chunk.value) << 20)


def choose_chunk(shape: TrainingShape, available: int | None) -> Choice:
    """MiB of a chunk of the loss's logits: the most with which a tenth of what is free stays so."""
    usual = CHUNK_BYTES[-1]
    if available is None:
        return Choice(str(usual >> 20), "what is free is not known")
    for size in CHUNK_BYTES[:-1]:
        try:
            needed = predict_training(replace(shape, chunk_bytes=size)).needed_bytes
        except UNPREDICTABLE as error:
            return Choice(str(usual >> 20), f"what it takes is not known: {_in_words(error)}")
        if needed <= available * (1.0 - _LEFT_FREE):
            return Choice(str(size >> 20), f"it fits: {format_bytes(needed)} of {format_bytes(available)}")
    return Choice(str(usual >> 20), f"more leaves too little free of {format_bytes(available)}")


def check_capture_fit(config: CaptureConfig, teacher: Any, codec: Codec, longest: int, vocab_size: int) -> Fit:
    """The same for a capture, whose teacher is on its device already."""
    held = next(teacher.parameters())
    # Samples shorter than a window are more in a batch: padded tokens are what is limited.
    time = max(2, min(config.data.seq_len, longest))
    shape = CaptureShape(
        teacher=ModelShape.of(teacher.config, _dtype_of(teacher), config.teacher.quantisation),
        rows=max(1, config.data.batch_size * config.data.seq_len // time),
        time=time,
        vocab_size=vocab_size,
        codec=codec.name,
        options=dict(codec.options),
        device=held.device.type,
    )
    available = available_bytes(held.device, _size(teacher))
    try:
        return judge_capture(shape, config.data.batch_size, available)
    except UNPREDICTABLE as error:
        return Fit(None, available, None, _in_words(error))


def judge_capture(shape: CaptureShape, batch_size: int, available: int | None) -> Fit:
    """What a capture takes, and the verdict on it with the options that make it fit.

    Raises:
        ModelError: it cannot be worked out.
    """
    prediction = predict_capture(shape)
    if available is None:
        return Fit(prediction, None, None)
    options = partial(capture_options, shape, batch_size, available, predict_capture)
    return Fit(prediction, available, fits(prediction, available, options))


def judge(config: RunConfig, shape: TrainingShape, available: int | None) -> Fit:
    """What a training job takes, and the verdict on it with the options that make it fit; raises likewise."""
    prediction = predict_training(shape)
    if available is None:
        return Fit(prediction, None, None)
    batch_size, grad_accum = config.data.batch_size, config.optimizer.grad_accum
    options = partial(training_options, shape, batch_size, grad_accum, available, predict_training)
    return Fit(prediction, available, fits(prediction, available, options))


def say_fit(fit: Fit, device: torch.device) -> None:
    """One line in the log; a warning where an accelerator is too small (what runs out is cut and goes on)."""
    short = fit.verdict is not None and not fit.verdict.fits
    log.log(logging.WARNING if short and device.type != "cpu" else logging.INFO, "%s", fit.line)


def _in_words(error: Exception) -> str:
    return str(error) if isinstance(error, ModelError) else f"{type(error).__name__}: {error}"


def _dtype_of(model: Any) -> torch.dtype:
    """Of the weights that are no whole numbers."""
    dtype: torch.dtype = next(model.get_input_embeddings().parameters()).dtype
    return dtype


def _size(model: Any) -> int:
    return sum(one.numel() * one.element_size() for one in model.parameters())
