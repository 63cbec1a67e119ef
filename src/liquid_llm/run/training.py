"""A training job from options to exit code: both training faces."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from liquid_llm.checkpoint.store import CheckpointStore
from liquid_llm.checkpoint.upload import Uploader
from liquid_llm.config import RunConfig, as_plain, build_run_config, build_schedules
from liquid_llm.data.loader import TrainingStream
from liquid_llm.data.prefetch import Prefetcher
from liquid_llm.data.types import MicroBatch
from liquid_llm.errors import Interrupted
from liquid_llm.evaluation import Evaluator
from liquid_llm.losses.signals import Signal
from liquid_llm.metrics import MetricsWriter, StepAccumulator
from liquid_llm.models.export import save_student
from liquid_llm.options import ANNEAL
from liquid_llm.provenance import write_provenance
from liquid_llm.report import build_report
from liquid_llm.run.hooks import Recorder
from liquid_llm.run.inputs import Inputs, TextTools, read_dataset_inputs, read_manifest_inputs, validation_sets
from liquid_llm.run.places import Place, resolve_place
from liquid_llm.run.starting import Start, find_start, settle_context, shown_metadata
from liquid_llm.run.students import BuiltStudent, load_weights, make_student
from liquid_llm.run.teachers import RunTeachers, choose_tokenizer, make_teachers
from liquid_llm.run.tokens import read_token
from liquid_llm.run.unavailable import refuse_unavailable
from liquid_llm.runtime import Choice, StopSignal, choose_device, choose_dtype, seed_everything, torch_dtype
from liquid_llm.schedules import WarmupCosine
from liquid_llm.terminal import Stage, setup_logging
from liquid_llm.training import Progress, StepSchedules, Student, Trainer, build_optimizer

log = logging.getLogger(__name__)


def run_training(face: str, given: Mapping[str, object]) -> int:
    """Run one training job; returns the exit code.

    Raises:
        LiquidError: any problem a user can cause.
        Interrupted: the process was asked to stop and the state is saved.
    """
    setup_logging("INFO")
    config = build_run_config(face, given)
    refuse_unavailable(given)
    place = resolve_place(config)
    with CheckpointStore(place.run_dir, keep_last=config.output.keep_last, log=log.warning) as store:
        start = find_start(config, place, store)
        config, start = _merge(face, given, config, start)
        log.info("starting from %s at step %d: %s", start.kind, start.step, start.source)
        if _nothing_to_do(config, start, store):
            return 0
        job = Job(config, place, store, start)
        return job.run()


def _merge(face: str, given: Mapping[str, object], config: RunConfig, start: Start) -> tuple[RunConfig, Start]:
    """The configuration with the checkpoint's metadata behind what was given, and what goes on at that block size."""
    config = build_run_config(face, given, start.options(face))
    settled = settle_context(start, config)
    if start.metadata is not None:
        log.info("checkpoint metadata: %s", shown_metadata(start.metadata))
    return build_run_config(face, given, settled.options(face)), settled


def _nothing_to_do(config: RunConfig, start: Start, store: CheckpointStore) -> bool:
    steps = config.optimizer.steps
    schedules = build_schedules(config, after_step=start.step)
    log.info(
        "step %d: alpha %g, T %g",
        start.step,
        schedules.alpha.value(start.step),
        schedules.temperature.value(start.step),
    )
    if steps == 0:
        log.info("0 steps asked for: nothing is trained or written")
        return True
    if start.step < steps:
        return False
    if start.kind == "continue" and not (store.run_dir / "student").is_dir():
        return False  # killed between the last step and the end: what is left is done
    log.info("already at step %d of %d: nothing to do", start.step, steps)
    return True


@dataclass
class Job:
    """The parts of one training job, built in the order in which they can fail: cheap checks first."""

    config: RunConfig
    place: Place
    store: CheckpointStore
    start: Start

    def run(self) -> int:
        config = self.config
        device = torch.device(choose_device().value)
        dtype = choose_dtype(config.student.precision, device.type)
        log.info("student in %s: %s", dtype.value, dtype.reason)
        seed_everything(config.seed)
        token = read_token(config.teacher)
        text = choose_tokenizer(config, self.start, token)
        inputs = self._read_inputs(text)
        built = make_student(config, self.start, text, device, token)
        teachers = make_teachers(config, inputs, text, device, token)
        self._write_provenance(inputs, built, teachers, {"device": choose_device(), "student_dtype": dtype})
        with ExitStack() as stack:
            return self._train(stack, built, teachers, inputs, text, device, dtype)

    def _read_inputs(self, text: TextTools) -> Inputs:
        read = read_dataset_inputs if self.config.face == ANNEAL else read_manifest_inputs
        with Stage("tokenise", unit="tokens", total=None) as stage:
            inputs = read(self.config.data, text, progress=lambda _, tokens: stage.advance(tokens))
        for kind, row in inputs.readiness().items():
            log.info("%s: %s", kind, ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in row.items()))
        return inputs

    def _train(
        self,
        stack: ExitStack,
        built: BuiltStudent,
        teachers: RunTeachers,
        inputs: Inputs,
        text: TextTools,
        device: torch.device,
        dtype: Choice,
    ) -> int:
        config = self.config
        stop = stack.enter_context(StopSignal())
        schedules = self._schedules()
        student = Student(built.model, torch_dtype(dtype.value), self._reference(built, schedules, device))
        optimizer = build_optimizer(
            built.model,
            lr=config.optimizer.peak,
            weight_decay=config.optimizer.weight_decay,
            betas=(config.optimizer.betas[0], config.optimizer.betas[1]),
        )
        lengths = sorted({config.data.block_size, *config.evaluation.context_lengths})
        evaluator = Evaluator(
            validation_sets(inputs, lengths, config.data, text.eos_id, config.evaluation.max_tokens),
            config.data.block_size,
            config.evaluation.context_lengths,
            teachers.router,
        )
        accumulator = StepAccumulator()
        progress = Progress()
        self._restore(progress, optimizer, accumulator, built)
        stream = TrainingStream(
            inputs.sources,
            block_size=config.data.block_size,
            batch_size=config.data.batch_size,
            seed=config.seed,
            eos_id=text.eos_id,
        )
        batches = stack.enter_context(
            BatchFeed(stream, teachers, schedules, progress, config.optimizer.grad_accum, device)
        )
        metrics = stack.enter_context(
            MetricsWriter(self.place.run_dir, resume_step=progress.step if self.start.kind == "continue" else None)
        )
        uploader = stack.enter_context(
            Uploader(self.place.run_dir, self.place.remote, every_seconds=config.output.upload_every_seconds)
        )
        trainer = Trainer(
            student,
            optimizer,
            schedules,
            batches,
            progress,
            config.optimizer.steps,
            config.optimizer.grad_accum,
            config.optimizer.grad_clip,
            stopping=lambda: stop.requested,
        )
        recorder = Recorder(
            config,
            trainer,
            evaluator,
            self.store,
            metrics,
            accumulator,
            uploader,
            built,
            text,
            waited=lambda: batches.waited,
        )
        trainer.hooks = recorder.hooks()
        return self._finish(trainer, recorder, uploader, built, text)

    def _finish(
        self, trainer: Trainer, recorder: Recorder, uploader: Uploader, built: BuiltStudent, text: TextTools
    ) -> int:
        if self.start.state is None:
            recorder.evaluate()
        with Stage("train", unit="tokens", total=None) as stage:
            recorder.stage = stage
            done = trainer.train()
        if not done:
            recorder.save(snapshot=True)
            uploader.close()
            raise Interrupted(
                f"stopped at step {trainer.progress.step} of {trainer.total_steps} with the state saved",
                where=self.place.shown,
                remedy="run the same command again to go on",
            )
        recorder.finish()
        save_student(built.model, text.tokenizer, self.place.run_dir / "student")
        build_report(self.place.run_dir)
        uploader.close()
        log.info("done: %s", self.place.shown)
        return 0

    def _schedules(self) -> StepSchedules:
        config = self.config
        parts = build_schedules(config, after_step=self.start.step)
        lr = WarmupCosine(config.optimizer.peak, config.optimizer.warmup_steps, config.optimizer.steps)
        return StepSchedules(parts.alpha, parts.temperature, parts.l2, lr)

    def _reference(self, built: BuiltStudent, schedules: StepSchedules, device: torch.device) -> torch.nn.Module | None:
        if schedules.l2.value(self.start.step) == 0:
            return None
        import copy

        reference = copy.deepcopy(built.model)
        if self.start.kind == "continue":
            # The checkpoint holds the student as it is now; the old logits are those of the weights the run began with.
            from liquid_llm.checkpoint.resume import read_student_weights
            from liquid_llm.run.places import cache_dir

            assert self.config.student.resume_uri is not None
            source = read_student_weights(self.config.student.resume_uri, cache_dir() / "resume")
            load_weights(reference, source.state_dict, source.description)
        return reference.requires_grad_(False).eval()

    def _restore(
        self, progress: Progress, optimizer: torch.optim.Optimizer, accumulator: StepAccumulator, built: BuiltStudent
    ) -> None:
        state, metadata = self.start.state, self.start.metadata
        if state is None or metadata is None:
            return
        optimizer.load_state_dict(state["optimizer"])
        progress.step = metadata.step
        progress.tokens_seen = metadata.tokens_seen
        progress.data_position = metadata.data_position
        if metadata.best_val_loss is not None:
            progress.best_val_loss = metadata.best_val_loss
        if self.start.kind == "continue":
            from liquid_llm.runtime import set_random_state

            set_random_state(state["random"])
            accumulator.load_state_dict(state["accumulator"])

    def _write_provenance(
        self, inputs: Inputs, built: BuiltStudent, teachers: RunTeachers, choices: dict[str, Choice]
    ) -> None:
        write_provenance(
            self.place.run_dir,
            config=as_plain(self.config),
            manifest=[{"path": e.path, "type": e.type, "weight": e.weight} for e in inputs.entries],
            readiness={"types": inputs.readiness(), "signal": teachers.coverage},
            datasets={"name": self.config.data.dataset_name, "config": self.config.data.dataset_config},
            choices={name: {"value": str(choice.value), "reason": choice.reason} for name, choice in choices.items()},
            extra={
                "start": {"kind": self.start.kind, "source": self.start.source, "step": self.start.step},
                "student": built.description,
                "parameters": sum(p.numel() for p in built.model.parameters()),
                "teachers": teachers.identities,
            },
        )


class BatchFeed:
    """Micro-batches with their teacher signal, in order; what can be done ahead of need is done in a thread."""

    def __init__(
        self,
        stream: TrainingStream,
        teachers: RunTeachers,
        schedules: StepSchedules,
        progress: Progress,
        grad_accum: int,
        device: torch.device,
    ) -> None:
        self._teachers = teachers
        first_step, first_index = progress.step, progress.data_position

        def fetch(index: int) -> tuple[MicroBatch, Any]:
            batch = stream.micro_batch(index)
            step = first_step + (index - first_index) // grad_accum
            router = teachers.router
            prepared = router.prepare(batch, schedules.temperature.value(step)) if router is not None else None
            return batch.to(device), prepared

        self._prefetcher = Prefetcher(fetch, first_index, depth=max(2, grad_accum))

    @property
    def waited(self) -> float:
        """Seconds steps have waited for data or stored signal so far."""
        return self._prefetcher.wait_seconds

    def __enter__(self) -> BatchFeed:
        return self

    def __exit__(self, *_: object) -> None:
        self._prefetcher.close()

    def __iter__(self) -> Iterator[tuple[MicroBatch, Signal | None]]:
        return self

    def __next__(self) -> tuple[MicroBatch, Signal | None]:
        batch, prepared = next(self._prefetcher)
        router = self._teachers.router
        return batch, router.signal(batch, prepared) if router is not None else None
