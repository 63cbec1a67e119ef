"""The parts of a training job, built in the order in which they can fail: cheap checks first."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from liquid_llm.checkpoint.resume import ResumeSource
from liquid_llm.config import RunConfig, build_schedules, schedule_remarks
from liquid_llm.data.loader import TrainingStream
from liquid_llm.data.prefetch import Prefetcher
from liquid_llm.data.types import ManifestEntry, MicroBatch
from liquid_llm.device import forget_peak
from liquid_llm.distributed import Engine
from liquid_llm.distributed_link import TrainingLink
from liquid_llm.errors import DataError
from liquid_llm.evaluation import Evaluator
from liquid_llm.formatting import format_counts
from liquid_llm.metrics import StepAccumulator
from liquid_llm.models.token_bytes import token_bytes
from liquid_llm.optimizers import build_optimizer, load_optimizer
from liquid_llm.passes import SignalOf
from liquid_llm.runtime import (
    Choice,
    choose_device,
    choose_dtype,
    keep_freed_memory,
    seed_everything,
    set_random_state,
    torch_dtype,
)
from liquid_llm.schedules import StepSchedules
from liquid_llm.selection import PositionSelection
from liquid_llm.sources import BLOCKS, FIRST_TYPES, order_types
from liquid_llm.streams import SideStream
from liquid_llm.teachers.router import TeacherRouter
from liquid_llm.terminal import Stage
from liquid_llm.training import Progress, SkippedSteps, Student
from liquid_llm.wiring.course import (
    goes_on_with_moments,
    hash_weights,
    order_of,
    require_same_order,
    say_changes,
    say_jumps,
)
from liquid_llm.wiring.fitting import settle
from liquid_llm.wiring.inputs import (
    HeldOut,
    Inputs,
    read_dataset_inputs,
    read_manifest_inputs,
    tokenise_share,
    validation_sets,
)
from liquid_llm.wiring.noise import learnt_positions, say_noise
from liquid_llm.wiring.order import choose_apart, choose_windows, needs_files, say_left_behind, say_scattered
from liquid_llm.wiring.origins import open_origin
from liquid_llm.wiring.repeat import begin_choice
from liquid_llm.wiring.speech import Prompt, Speech, make_speech, read_prompts
from liquid_llm.wiring.start import Start, choose_group, require_division
from liquid_llm.wiring.students import (
    BuiltStudent,
    calibration_text,
    check_shape,
    load_weights,
    make_student,
    name_tokens,
    takes_weights,
    whole_weights,
)
from liquid_llm.wiring.teachers import RunTeachers, check_teachers, make_teachers, teacher_spec
from liquid_llm.wiring.tokenizers import TextTools, choose_tokenizer
from liquid_llm.wiring.tokens import read_token

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Basis:
    """What of a training job needs no data: whatever can be wrong with it is found before data is touched.

    Attributes:
        config: the run's, with nothing left to be decided by memory.
        decided: what memory decided, for checkpoints.
        built: the student; None where it is made of a teacher's weights, which takes text of the run.
        dtype: of the student's products.
        prompts: of the samples that a person asked for.
    """

    config: RunConfig
    decided: dict[str, Any]
    token: str | None
    text: TextTools
    built: BuiltStudent | None
    device: torch.device
    dtype: torch.dtype
    choices: dict[str, Choice]
    prompts: Sequence[Prompt]


@dataclass(frozen=True)
class Parts(Basis):
    """What a training job is made of; see each class.

    Attributes:
        group_size, windows: of the order of the data: micro-batches of a group, and by type the tokens that are
            shuffled together; see ``TrainingStream``.
        order: what the order of the run is a function of, for checkpoints; see ``course``.
        teacher_stream: see ``Trainer``.
    """

    built: BuiltStudent
    engine: Engine
    inputs: Inputs
    teachers: RunTeachers
    student: Student
    optimizer: torch.optim.Optimizer
    schedules: StepSchedules
    evaluator: Evaluator
    speech: Speech
    stream: TrainingStream
    group_size: int
    windows: dict[str, int]
    order: dict[str, Any]
    progress: Progress
    accumulator: StepAccumulator
    teacher_stream: SideStream | None = None


def build_basis(config: RunConfig, start: Start, engine: Engine) -> Basis:
    """Build what a run needs beside data, from its configuration and what it starts from.

    Raises:
        LiquidError: any problem a user can cause.
    """
    device_choice = choose_device(config.device)
    device = torch.device(device_choice.value)
    if device.type == "cpu":
        keep_freed_memory()
    forget_peak(device)
    dtype = choose_dtype(config.student.precision, device.type)
    log.info("student in %s: %s", dtype.value, dtype.reason)
    seed_everything(config.seed)
    token = read_token(config.teacher)
    text = choose_tokenizer(config, start, token)
    prompts = read_prompts(config.evaluation.sample_prompts, text)
    config, choices, decided = settle(config, start, text, device, token, engine)
    require_division(config, engine.world_size)
    built = None
    if takes_weights(config, start):
        check_shape(config, text, token)
    else:
        built = make_student(config, start, text, _place(config, device), token)
    check_teachers(config, token)
    return Basis(
        config=config,
        decided=decided,
        token=token,
        text=text,
        built=built,
        device=device,
        dtype=torch_dtype(dtype.value),
        choices={"device": device_choice, "student_dtype": dtype, **begin_choice(text.framings), **choices},
        prompts=prompts,
    )


def _place(config: RunConfig, device: torch.device) -> torch.device:
    """Where a student is built: one that is dealt out later may be larger than what a device holds."""
    return torch.device("cpu") if config.student.is_dealt_out else device


def build_parts(basis: Basis, start: Start, entries: Sequence[ManifestEntry], engine: Engine) -> Parts:
    """Build the rest of what a run needs, with the entries of its manifest (none where its data is a named dataset).

    Raises:
        LiquidError: any problem a user can cause.
    """
    config, text = basis.config, basis.text
    for type in order_types(entry.type for entry in entries):
        teacher_spec(config, type)  # a type that nothing teaches is refused before its texts are read
    types = order_types(entry.type for entry in entries) or [FIRST_TYPES[0]]
    windows, ordered = choose_windows(config, start, types)
    say_scattered(windows, entries)
    apart = choose_apart(config, start, windows)
    if apart and engine.world_size > 1:
        engine.together(lambda: _tokenise_share(config, text, entries, apart, engine))
    inputs = engine.host_first(lambda: read_inputs(config, text, basis.token, entries, apart=apart))
    require_same_texts(inputs, engine)
    text = replace(text, framings=text.framings.of(inputs.types))
    group_size = choose_group(config, start, engine.world_size)
    stream = _make_stream(config, inputs, engine, group_size, windows)
    say_left_behind(inputs.mixture)
    built = basis.built
    if built is None:
        calibration = calibration_text(_make_stream(config, inputs, Engine(), group_size, windows))
        built = make_student(config, start, basis.text, _place(config, basis.device), basis.token, calibration)
    if text.framings.student != basis.text.framings.student:
        name_tokens(built.model, text.framings.student)
    _say_unknown_types(config, inputs.types)
    text.keep_chat_template(inputs.has_chat)
    if config.data.document_mask and not any(part.dataset.layout == BLOCKS for part in inputs.mixture):
        log.warning("--document_mask changes nothing here: no texts are joined into blocks")
    schedules = build_schedules(config)
    first = _first_weights(config, start, schedules, engine, lambda origin: whole_weights(origin, text, basis.token))
    near = _hash_reference(config, start, schedules, built, first)
    order = _compare(config, start, inputs, schedules, near)
    link = engine.link if isinstance(engine.link, TrainingLink) else None
    teachers = make_teachers(config, inputs, text, basis.device, basis.token, link)
    for remark in schedule_remarks(config, start.step):
        log.warning("%s", remark)
    optimizer = make_optimizer(config, built.model)
    parts = Parts(
        **{**vars(basis), "text": text, "built": built, "choices": {**basis.choices, **teachers.choices, **ordered}},
        engine=engine,
        inputs=inputs,
        teachers=teachers,
        student=Student(built.model, basis.dtype, _reference(config, start, schedules, built.model, first)),
        optimizer=optimizer,
        schedules=schedules,
        evaluator=_make_evaluator(config, inputs, text, teachers, engine),
        stream=stream,
        group_size=group_size,
        windows=windows,
        order=order,
        speech=make_speech(config.evaluation, basis.prompts, text, inputs.validation, engine, config.seed),
        progress=Progress(
            selection=_selection(config, inputs, text), skipped=SkippedSteps(config.optimizer.skip_bad_steps)
        ),
        accumulator=StepAccumulator(inputs.types, engine),
    )
    _restore(parts, start)
    counted = partial(learnt_positions, parts.stream, inputs.mixture)
    say_noise(config, schedules, teachers.router, counted, parts.progress.step)
    return parts


def make_optimizer(config: RunConfig, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of a run, of the parameters that ``model`` has now."""
    asked = config.optimizer
    betas = asked.betas[0], asked.betas[1]
    return build_optimizer(model, lr=asked.peak, weight_decay=asked.weight_decay, betas=betas, kind=asked.kind)


def _make_evaluator(
    config: RunConfig, inputs: Inputs, text: TextTools, teachers: RunTeachers, engine: Engine
) -> Evaluator:
    lengths = sorted({config.data.block_size, *config.evaluation.context_lengths})
    return Evaluator(
        validation_sets(inputs, lengths, config.data, config.evaluation.max_tokens),
        config.data.block_size,
        config.evaluation.context_lengths,
        TeacherRouter({}) if config.evaluation.teacher is False else teachers.evaluation,
        engine=engine,
        measures=config.evaluation.measures,
        token_bytes=token_bytes(text.tokenizer, text.vocab_size) if config.evaluation.measures else None,
    )


def _make_stream(
    config: RunConfig, inputs: Inputs, engine: Engine, group_size: int, windows: Mapping[str, int]
) -> TrainingStream:
    return TrainingStream(
        inputs.mixture,
        block_size=config.data.block_size,
        batch_size=config.data.batch_size,
        seed=config.seed,
        sample_tokens=config.data.seq_len,
        document_mask=config.data.document_mask,
        rank=engine.rank,
        world_size=engine.world_size,
        group_size=group_size,
        window_tokens=windows,
    )


def require_same_texts(inputs: Inputs, engine: Engine) -> None:
    """Raise DataError where this rank has read other texts than the main one: a host may have an older copy."""
    own = json.dumps(inputs.readiness(), sort_keys=True)
    main = engine.share(lambda: own)
    if own != main:
        raise DataError(
            "the processes of this run read different texts",
            where=f"rank {engine.rank}",
            got=own,
            expected=f"as on rank 0: {main}",
            remedy="give every host the same files, or a URL that all of them read",
        )


def _say_unknown_types(config: RunConfig, types: Sequence[str]) -> None:
    """Warn of a type that is named and that no text has: a slip of the pen, as a rule."""
    for type in sorted(set(config.source.named) - {*types, *FIRST_TYPES}):
        log.warning("%s: something is said of this type and no text has it; there are %s", type, ", ".join(types))


def _selection(config: RunConfig, inputs: Inputs, text: TextTools) -> PositionSelection | None:
    share = config.objective.distilled_share
    return None if share == 1.0 else PositionSelection(share, inputs.types, text.vocab_size)


def read_inputs(
    config: RunConfig,
    text: TextTools,
    token: str | None,
    entries: Sequence[ManifestEntry],
    *,
    training: bool = True,
    apart: Collection[str] = (),
) -> Inputs:
    """The texts of a configuration, tokenised: of a manifest's entries, or of a named dataset.

    Args:
        training: whether any are trained on: the log says how many.
        apart: types whose data files are read one by one.
    """
    with Stage("tokenise", unit="tokens", total=None) as stage:
        progress = partial(_tell, stage)
        if config.data.manifest is None:
            layout = config.source("lm").layout
            inputs = read_dataset_inputs(config.data, text, layout, token=token, progress=progress)
        else:
            inputs = read_manifest_inputs(
                config.data,
                text,
                entries,
                lambda type: config.source(type).layout,
                progress=progress,
                by_file=partial(needs_files, config),
                apart=dict.fromkeys(apart, _held_out(config)),
            )
    for type, row in inputs.readiness().items():
        shown = {name: count for name, count in row.items() if training or not name.startswith("train")}
        if not shown.get("left_out_nothing_learnt", 1):
            del shown["left_out_nothing_learnt"]
        log.info("%s: %s", type, format_counts(shown).replace("left out nothing", "left out, as nothing of them is"))
    return inputs


def _tokenise_share(
    config: RunConfig, text: TextTools, entries: Sequence[ManifestEntry], apart: Collection[str], engine: Engine
) -> None:
    """What ``read_inputs`` would tokenise of files that are read one by one, as far as it is this rank's to do."""
    held = dict.fromkeys(apart, _held_out(config))
    with Stage("tokenise", unit="tokens", total=None) as stage:
        progress = partial(_tell, stage)
        tokenise_share(config.data, text, entries, lambda type: config.source(type).layout, held, engine, progress)


def _held_out(config: RunConfig) -> HeldOut:
    return HeldOut(config.evaluation.max_tokens, config.evaluation.answers or 0)


def _tell(stage: Stage, fraction: float, num_tokens: int) -> None:
    stage.advance(num_tokens)
    stage.note(f"{fraction:.0%} of this source")


def _compare(
    config: RunConfig, start: Start, inputs: Inputs, schedules: StepSchedules, reference: str | None
) -> dict[str, Any]:
    """What the order of the run is a function of; where it is continued, that of its checkpoint, or accepted."""
    metadata = start.origin.metadata
    order = order_of(config, inputs.sources, reference)
    if start.kind == "continue" and start.goes_on and metadata is not None:
        require_same_order(metadata, order, config, start.origin.description)
        say_jumps(metadata, schedules, config)
    return order


def _first_weights(
    config: RunConfig,
    start: Start,
    schedules: StepSchedules,
    engine: Engine,
    weights_of: Callable[[ResumeSource], Mapping[str, torch.Tensor]],
) -> Mapping[str, torch.Tensor] | None:
    """What the run began with, even when it is continued, while the keep-old-logits term asks for it; else None."""
    if schedules.gamma.value(start.step) == 0 or config.student.lora is not None:
        return None
    if start.kind != "continue":
        return weights_of(start.origin)
    uri = config.student.resume_uri
    assert uri is not None
    return engine.share(lambda: dict(weights_of(open_origin(uri))))


def _hash_reference(
    config: RunConfig,
    start: Start,
    schedules: StepSchedules,
    built: BuiltStudent,
    first: Mapping[str, torch.Tensor] | None,
) -> str | None:
    """A hash of what the keep-old-logits term stays near; None without one. Of an adapter that is its base."""
    if config.student.lora is not None and schedules.gamma.value(start.step) > 0:
        return str(built.description["lora"]["sha256"])
    return None if first is None else hash_weights(first)


def _reference(
    config: RunConfig,
    start: Start,
    schedules: StepSchedules,
    model: nn.Module,
    first: Mapping[str, torch.Tensor] | None,
) -> nn.Module | None:
    """The frozen student of the keep-old-logits term: it has the weights the run began with.

    Where an adapter is trained that is the student itself, asked without it.
    """
    if config.student.lora is not None and schedules.gamma.value(start.step) > 0:
        return model
    if first is None:
        return None
    reference = copy.deepcopy(model)
    if start.kind == "continue":
        load_weights(reference, first, str(config.student.resume_uri))
    return reference.requires_grad_(False).eval()


def _restore(parts: Parts, start: Start) -> None:
    """Give the parts what a checkpoint says of them, where it goes on."""
    state, metadata = start.origin.state, start.origin.metadata
    if state is None or metadata is None:
        return
    built, progress = parts.built, parts.progress
    resize = {} if built.stretch is None else {built.model.get_parameter(built.stretch.parameter): built.stretch}
    if goes_on_with_moments(metadata, parts.config, start.origin.description):
        load_optimizer(parts.optimizer, state["optimizer"], where=start.origin.description, resize=resize)
    progress.step = metadata.step
    progress.tokens_seen = metadata.tokens_seen
    progress.data_position = metadata.data_position
    if start.kind == "continue":
        say_changes(metadata, state, parts.teachers.taught, parts.config)
        progress.skipped.count, progress.skipped.in_a_row = metadata.run.get("skipped_steps", (0, 0))
    progress.passes.max_tokens = metadata.run.get("max_pass_tokens")
    parts.evaluator.passes.max_tokens = metadata.run.get("eval_max_pass_tokens")
    if progress.selection is not None and "selection" in state:
        progress.selection.load_state_dict(state["selection"])
    if start.kind == "continue":
        if metadata.best_val_loss is not None and metadata.block_size == parts.config.data.block_size:
            progress.best_val_loss = metadata.best_val_loss  # of another run or length it would keep best.pt away
        set_random_state(state["random"])
        parts.accumulator.load_state_dict(state["accumulator"])


class BatchFeed:
    """Micro-batches in order, each with what gives its teacher signal; what can be done ahead is done in threads."""

    def __init__(self, parts: Parts, grad_accum: int, num_workers: int) -> None:
        stream, schedules, device = parts.stream, parts.schedules, parts.device
        router = parts.teachers.router
        first_step, rank, ranks = parts.progress.step, parts.engine.rank, parts.engine.world_size
        first_number, per_step = parts.progress.data_position, grad_accum // ranks

        def fetch(index: int) -> tuple[MicroBatch, Any]:
            batch = stream.at(first_number + index * ranks + rank)
            step = first_step + index // per_step
            objective = schedules.at(step).objective(batch.type)
            # A weight of 0 needs no teacher: the control of an experiment does not cost what the experiment does.
            prepared = router.prepare(batch, objective.signal_temperature) if objective.alpha > 0 else None
            # Not moved yet: memory that runs out is seen to where the batch is computed.
            return batch.pinned(device), None if prepared is None else prepared.pinned(device)

        self._router = router
        workers = max(1, num_workers)
        self._prefetcher = Prefetcher(fetch, 0, depth=max(2 * workers, per_step), workers=workers)

    @property
    def waited(self) -> float:
        """Seconds steps have waited for data or stored signal so far."""
        return self._prefetcher.wait_seconds

    def __enter__(self) -> BatchFeed:
        return self

    def __exit__(self, *_: object) -> None:
        self._prefetcher.close()

    def __iter__(self) -> Iterator[tuple[MicroBatch, SignalOf | None]]:
        return self

    def __next__(self) -> tuple[MicroBatch, SignalOf | None]:
        batch, prepared = next(self._prefetcher)
        if prepared is None:
            return batch, None
        return batch, lambda part, positions: self._router.signal(part, prepared.part(positions))
