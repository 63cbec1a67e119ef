"""The parts of a training job, built in the order in which they can fail: cheap checks first."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from liquid_llm.checkpoint.resume import read_student_weights
from liquid_llm.config import RunConfig, build_schedules, schedule_remarks
from liquid_llm.data.loader import TrainingStream
from liquid_llm.data.prefetch import Prefetcher
from liquid_llm.data.types import ManifestEntry, MicroBatch
from liquid_llm.device import forget_peak
from liquid_llm.evaluation import Evaluator
from liquid_llm.metrics import StepAccumulator
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
from liquid_llm.schedules import WarmupCosine
from liquid_llm.terminal import Stage
from liquid_llm.training import Progress, StepSchedules, Student, build_optimizer, load_optimizer
from liquid_llm.wiring.fitting import settle
from liquid_llm.wiring.inputs import Inputs, read_dataset_inputs, read_manifest_inputs, validation_sets
from liquid_llm.wiring.places import cache_dir
from liquid_llm.wiring.start import Start
from liquid_llm.wiring.students import BuiltStudent, load_weights, make_student
from liquid_llm.wiring.teachers import RunTeachers, make_teachers
from liquid_llm.wiring.tokenizers import TextTools, choose_tokenizer
from liquid_llm.wiring.tokens import read_token

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Parts:
    """What a training job is made of; see each class.

    Attributes:
        config: the run's, with nothing left to be decided by memory.
        decided: what memory decided, for checkpoints.
    """

    config: RunConfig
    decided: dict[str, Any]
    text: TextTools
    inputs: Inputs
    built: BuiltStudent
    teachers: RunTeachers
    student: Student
    optimizer: torch.optim.Optimizer
    schedules: StepSchedules
    evaluator: Evaluator
    stream: TrainingStream
    progress: Progress
    accumulator: StepAccumulator
    device: torch.device
    choices: dict[str, Choice]


def build_parts(config: RunConfig, start: Start, entries: Sequence[ManifestEntry]) -> Parts:
    """Build everything a run needs from its configuration, what it starts from and the entries of its manifest.

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
    settled = settle(config, start, text, device, token, keep=not config.dry_run)
    config = settled.config
    inputs = _read_inputs(config, text, token, entries)
    built = make_student(config, start, text, device, token)
    teachers = make_teachers(config, inputs, text, device, token)
    schedules = _schedules(config, start)
    evaluator = _evaluator(config, inputs, text, teachers)
    if start.state is not None and start.metadata is not None:
        evaluator.passes.max_tokens = start.metadata.run.get("eval_max_pass_tokens")
    optimizer = build_optimizer(
        built.model,
        lr=config.optimizer.peak,
        weight_decay=config.optimizer.weight_decay,
        betas=(config.optimizer.betas[0], config.optimizer.betas[1]),
    )
    progress, accumulator = (
        Progress(),
        StepAccumulator(inputs.types),
    )
    _restore(start, built, progress, optimizer, accumulator, config.data.block_size)
    return Parts(
        config=config,
        decided=settled.decided,
        text=text,
        inputs=inputs,
        built=built,
        teachers=teachers,
        student=Student(built.model, torch_dtype(dtype.value), _reference(config, start, built.model, schedules)),
        optimizer=optimizer,
        schedules=schedules,
        evaluator=evaluator,
        stream=TrainingStream(
            inputs.mixture,
            block_size=config.data.block_size,
            batch_size=config.data.batch_size,
            seed=config.seed,
            eos_id=text.eos_id,
            sample_tokens=config.data.seq_len,
        ),
        progress=progress,
        accumulator=accumulator,
        device=device,
        choices={"device": device_choice, "student_dtype": dtype, **settled.choices, **teachers.choices},
    )


def _read_inputs(config: RunConfig, text: TextTools, token: str | None, entries: Sequence[ManifestEntry]) -> Inputs:
    with Stage("tokenise", unit="tokens", total=None) as stage:

        def progress(fraction: float, num_tokens: int) -> None:
            stage.advance(num_tokens)
            stage.note(f"{fraction:.0%} of this source")

        if config.data.manifest is None:
            inputs = read_dataset_inputs(config.data, text, token=token, progress=progress)
        else:
            inputs = read_manifest_inputs(
                config.data, text, entries, lambda type: config.source(type).layout, progress=progress
            )
    for kind, row in inputs.readiness().items():
        log.info("%s: %s", kind, ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in row.items()))
    return inputs


def _schedules(config: RunConfig, start: Start) -> StepSchedules:
    for remark in schedule_remarks(config, start.step):
        log.warning("%s", remark)
    parts = build_schedules(config)
    lr = WarmupCosine(config.optimizer.peak, config.optimizer.warmup_steps, config.optimizer.steps)
    return StepSchedules(parts.alpha, parts.temperature, parts.l2, lr)


def _evaluator(config: RunConfig, inputs: Inputs, text: TextTools, teachers: RunTeachers) -> Evaluator:
    lengths = sorted({config.data.block_size, *config.evaluation.context_lengths})
    sets = validation_sets(inputs, lengths, config.data, text.eos_id, config.evaluation.max_tokens)
    return Evaluator(sets, config.data.block_size, config.evaluation.context_lengths, teachers.router)


def _reference(config: RunConfig, start: Start, model: nn.Module, schedules: StepSchedules) -> nn.Module | None:
    """The frozen student of the keep-old-logits term: the weights the run began with, even when it is continued."""
    if schedules.l2.value(start.step) == 0:
        return None
    reference = copy.deepcopy(model)
    if start.kind == "continue":
        assert config.student.resume_uri is not None
        source = read_student_weights(config.student.resume_uri, cache_dir() / "resume")
        load_weights(reference, source.state_dict, source.description)
    return reference.requires_grad_(False).eval()


def _restore(
    start: Start,
    built: BuiltStudent,
    progress: Progress,
    optimizer: torch.optim.Optimizer,
    accumulator: StepAccumulator,
    block_size: int,
) -> None:
    state, metadata = start.state, start.metadata
    if state is None or metadata is None:
        return
    resize = {} if built.stretch is None else {built.model.get_parameter(built.stretch.parameter): built.stretch}
    load_optimizer(optimizer, state["optimizer"], where=start.source, resize=resize)
    progress.step = metadata.step
    progress.tokens_seen = metadata.tokens_seen
    progress.data_position = metadata.data_position
    progress.passes.max_tokens = metadata.run.get("max_pass_tokens")
    if start.kind == "continue":
        if metadata.best_val_loss is not None and metadata.block_size == block_size:
            progress.best_val_loss = metadata.best_val_loss  # of another run or length it would keep best.pt away
        set_random_state(state["random"])
        accumulator.load_state_dict(state["accumulator"])


class BatchFeed:
    """Micro-batches in order, each with what gives its teacher signal; what can be done ahead is done in threads."""

    def __init__(self, parts: Parts, grad_accum: int, num_workers: int) -> None:
        stream, schedules, device = parts.stream, parts.schedules, parts.device
        router = parts.teachers.router
        first_step, first_index = parts.progress.step, parts.progress.data_position

        def fetch(index: int) -> tuple[MicroBatch, Any]:
            batch = stream.micro_batch(index)
            step = first_step + (index - first_index) // grad_accum
            prepared = router.prepare(batch, schedules.temperature.value(step))
            # Not moved yet: memory that runs out is seen to where the batch is computed.
            return batch.pinned(device), None if prepared is None else prepared.pinned(device)

        self._router = router
        workers = max(1, num_workers)
        self._prefetcher = Prefetcher(fetch, first_index, depth=max(2 * workers, grad_accum), workers=workers)

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
