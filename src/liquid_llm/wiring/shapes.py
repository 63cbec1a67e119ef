"""What a run's memory is worked out from: its models without weights, and its largest micro-batches.

nominal shape   the largest micro-batch that options alone allow: ``batch_size`` full blocks
real shape      the largest micro-batches that the data has, once it is read
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from liquid_llm.config import RunConfig
from liquid_llm.errors import LiquidError
from liquid_llm.losses.rows.choice import expect_rows
from liquid_llm.memory.fake import weight_bytes
from liquid_llm.memory.shapes import BatchShape, ModelShape, SignalKind, TrainingShape
from liquid_llm.models.loading import open_config
from liquid_llm.models.sources import resolve
from liquid_llm.models.student import file_config, student_config
from liquid_llm.runtime import choose_dtype
from liquid_llm.signal_store.codecs import Codec, get_codec, usual_codec
from liquid_llm.signal_store.description import read_store_file
from liquid_llm.sources import BLOCKS
from liquid_llm.teachers.online import PASS_TOKENS
from liquid_llm.wiring.start import Start
from liquid_llm.wiring.tokenizers import TextTools

if TYPE_CHECKING:
    from liquid_llm.wiring.parts import Parts


@dataclass(frozen=True)
class Models:
    """What is known of a run's models before they are built.

    Attributes:
        student: in float32.
        teacher: the online teacher, the largest of several; or None.
        compute_dtype: name of the dtype of the student's products.
        vocab_size: tokens of the shared tokenizer.
        codec: of stored signal.
        held_bytes: weights of other online teachers: they only lie there while one is asked.
        ranks: processes that train.
    """

    student: ModelShape
    teacher: ModelShape | None
    compute_dtype: str
    vocab_size: int
    codec: Codec = field(default_factory=lambda: usual_codec("tail", 0))
    held_bytes: int = 0
    ranks: int = 1


def describe_models(
    config: RunConfig, start: Start, text: TextTools, device: torch.device, token: str | None, ranks: int = 1
) -> Models:
    """The models that a run is going to build, from their configurations.

    Raises:
        ModelError: one of them cannot be read.
    """
    student: ModelShape
    if start.origin.config is not None:
        student = ModelShape(start.origin.config)
    else:
        framing = text.framings.student
        made = student_config(
            config.student.spec,
            vocab_size=text.vocab_size,
            bos_id=framing.bos_id,
            eos_id=framing.end_id,
            token=token,
        )
        student = ModelShape.of(with_positions(made, config))
    teacher, held_bytes = open_teachers(config, choose_dtype(config.teacher.precision, device).value, token, ranks)
    compute_dtype = choose_dtype(config.student.precision, device).value
    return Models(student, teacher, compute_dtype, text.vocab_size, stored_codec(config), held_bytes, ranks)


def open_teachers(config: RunConfig, dtype: str, token: str | None, ranks: int = 1) -> tuple[ModelShape | None, int]:
    """The largest online teacher, or None, and the bytes of the others' weights: those that are on this rank.

    Raises:
        ModelError: one of them cannot be read.
    """
    teachers = [open_shape(model_id, dtype, token, config.teacher.quantisation) for model_id in config.asked_online]
    if len(teachers) < 2:
        return next(iter(teachers), None), 0
    if config.teacher.ranks:
        return max(teachers, key=weight_bytes), 0
    sizes = [weight_bytes(teacher) for teacher in teachers]
    return teachers[sizes.index(max(sizes))], (sum(sizes) - max(sizes)) // (ranks if config.teacher.is_dealt_out else 1)


def open_shape(model_id: str, dtype: str, token: str | None, quantisation: str | None = None) -> ModelShape:
    """A model from its configuration: that of its id, or a ``.json`` file itself."""
    if model_id.endswith(".json"):
        return ModelShape.of(file_config(model_id), dtype, quantisation)
    return ModelShape.of(open_config(resolve(model_id, token=token), model_id, token), dtype, quantisation)


def with_positions(student: Any, config: RunConfig) -> Any:
    """A student's configuration with the positions that it is going to be given: a learned table has a row for each."""
    longest = config.longest_context
    text = student.get_text_config(decoder=True)
    if 0 < (getattr(text, "max_position_embeddings", None) or longest) < longest:
        text.max_position_embeddings = longest
    return student


def stored_codec(config: RunConfig) -> Codec:
    """The codec of the run's stores, the larger where they differ; the usual one where no store tells yet."""
    found: list[Codec] = []
    for folder in config.source.stores:
        with contextlib.suppress(LiquidError):  # said in words where the store is opened
            identity = read_store_file(folder).identity
            found.append(get_codec(identity.codec, options=identity.codec_options))
    return max(found, key=lambda one: one.most_ids or math.inf, default=usual_codec("tail", 0))


def nominal_shape(config: RunConfig, models: Models, device: str) -> TrainingShape:
    """The largest micro-batches that the options allow; ``device`` is its type."""
    rows, time = config.data.batch_size, config.data.block_size
    signal: SignalKind = "none" if models.teacher is None else "dense"
    own = config.objective.divergence
    divergence = config.source("lm").divergence or own
    batches = [BatchShape(rows, time, signal, documents=config.data.document_mask, divergence=divergence)]
    if config.source.stores:
        window = min(time, config.data.seq_len)
        batches.append(stored_batch(rows * time // window, window, models.codec.most_ids, own))
    longest = max(config.evaluation.context_lengths, default=0)
    evaluations: tuple[BatchShape, ...] = ()
    if longest > rows * time:  # others have no more tokens than a micro-batch, and take less
        evaluations = (replace(batches[0], rows=1, time=longest),)
    elif config.evaluation.measures:  # which may take more than a step on as many tokens
        evaluations = tuple(batches)
    return shape_of(config, models, device, tuple(batches), evaluations)


def stored_batch(rows: int, time: int, most_ids: int, divergence: str = "forward_kl") -> BatchShape:
    """A micro-batch whose signal has so many ids a position; 0: whole logits.

    Of the ids of a sparse signal every divergence takes as little as the forward KL.
    """
    if most_ids:
        return BatchShape(rows, time, "sparse", most_ids)
    return BatchShape(rows, time, "logits", divergence=divergence)


def shape_of(
    config: RunConfig,
    models: Models,
    device: str,
    batches: tuple[BatchShape, ...],
    evaluations: tuple[BatchShape, ...],
) -> TrainingShape:
    """The job of ``config`` with these micro-batches."""
    return TrainingShape(
        student=models.student,
        compute_dtype=models.compute_dtype,
        vocab_size=models.vocab_size,
        batches=batches,
        evaluations=evaluations,
        teacher=models.teacher,
        teacher_pass_tokens=None if device == "cpu" or config.teacher.is_dealt_out else PASS_TOKENS,
        teacher_elsewhere=config.teacher.ranks > 0,
        teacher_beside=config.teacher.stream,
        ranks=models.ranks,
        student_dealt_out=config.student.is_dealt_out,
        teacher_dealt_out=config.teacher.is_dealt_out,
        reference=config.objective.gamma > 0,
        grad_checkpoint=config.student.grad_checkpoint is True,
        accumulates=config.optimizer.grad_accum > models.ranks,
        # One that is scheduled is not 1 all the time.
        temperature=config.objective.temperature if config.objective.temp_schedule is None else 2.0,
        lora=config.student.lora,
        optimizer=config.optimizer.kind,
        measures=config.evaluation.measures,
        device=device,
        loss_rows=expect_rows(device),
    )


def real_batches(parts: Parts) -> tuple[BatchShape, ...]:
    """Of each kind of signal, the micro-batch with the most padded tokens and the one with the longest row.

    Where passes had to be cut before, as the checkpoint tells, they are the passes.
    """
    found = []
    most = parts.progress.passes.max_tokens
    for order, part in zip(parts.stream.orders, parts.inputs.mixture, strict=True):
        for rows, time in order.shapes():
            in_a_pass = rows if most is None else min(rows, max(1, most // time))
            apart = parts.config.data.document_mask and part.dataset.layout == BLOCKS
            found.append(replace(_with_signal(parts, part.dataset.type, in_a_pass, time), documents=apart))
    return _largest(found)


def real_evaluations(parts: Parts, batches: Iterable[BatchShape]) -> tuple[BatchShape, ...]:
    """The same of the validation batches that can take more than ``batches``: those with more tokens, and all of them
    where further measures are asked for."""
    trained: dict[str, int] = {}
    for batch in batches:
        trained[batch.signal] = max(batch.tokens, trained.get(batch.signal, 0))
    found = _largest(
        replace(_with_signal(parts, type, *batch.input_ids.shape), documents=batch.places is not None)
        for by_type in parts.evaluator.sets.values()
        for type, those in by_type.items()
        for batch in those
    )
    everything = parts.evaluator.measures
    return tuple(one for one in found if everything or one.tokens > trained.get(one.signal, 0))


def _with_signal(parts: Parts, type: str, rows: int, time: int) -> BatchShape:
    teacher = parts.teachers.router.get(type)
    if teacher is None:
        return BatchShape(rows, time, "none")
    divergence = parts.config.source(type).divergence or parts.config.objective.divergence
    if teacher.most_ids is None:
        return BatchShape(rows, time, "dense", divergence=divergence)
    return stored_batch(rows, time, teacher.most_ids, divergence)


def _largest(shapes: Iterable[BatchShape]) -> tuple[BatchShape, ...]:
    by_signal: dict[tuple[str, int, bool, str], list[BatchShape]] = {}
    for shape in shapes:
        by_signal.setdefault((shape.signal, shape.slots, shape.documents, shape.divergence), []).append(shape)
    chosen: dict[BatchShape, None] = {}
    for those in by_signal.values():
        chosen[max(those, key=lambda one: (one.tokens, one.rows))] = None
        chosen[max(those, key=lambda one: (one.time, one.rows))] = None
    return tuple(chosen)
