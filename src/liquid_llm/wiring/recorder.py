"""What happens now and then while a run trains: metric rows, evaluation, checkpoints."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from liquid_llm.checkpoint.background import BackgroundSaver, Saved
from liquid_llm.checkpoint.copies import block_sizes
from liquid_llm.checkpoint.discovery import is_snapshot, sidecars
from liquid_llm.checkpoint.metadata import IN_PIECES, CheckpointMetadata
from liquid_llm.checkpoint.pieces import PieceWriter, require_folder
from liquid_llm.checkpoint.store import CheckpointStore
from liquid_llm.checkpoint.upload import Uploader
from liquid_llm.config import RunConfig
from liquid_llm.device import device_memory, find_not_finite
from liquid_llm.distributed import Ranks
from liquid_llm.errors import Interrupted, LiquidError, NumericalError
from liquid_llm.formatting import format_bytes, format_seconds
from liquid_llm.masking import process_masker
from liquid_llm.memory.free import host_room_bytes
from liquid_llm.metrics import SAMPLES_FILE, MetricsWriter, RowFile, iter_metrics
from liquid_llm.models.lora import trained_weights
from liquid_llm.runtime import process_peak_memory_bytes, random_state
from liquid_llm.schedules import Piecewise
from liquid_llm.sharding import find_parts, gather_whole, outline, own_parts, split_tensors
from liquid_llm.terminal import Stage, brief
from liquid_llm.training import StepResult
from liquid_llm.versions import CURRENT
from liquid_llm.wiring.course import course_of
from liquid_llm.wiring.order import order_version
from liquid_llm.wiring.parts import Parts
from liquid_llm.wiring.start import describe_metadata

log = logging.getLogger(__name__)
LARGEST_FILE = 10 * 10**9  # bytes of a student and its moments that are gathered into one file
STOP_SECONDS = 30.0  # what spot machines leave a process between SIGTERM and the end

Hook = tuple[Callable[[StepResult], None], int]
Hooks = Sequence[Hook]


@dataclass(frozen=True)
class RunFiles:
    """What a run is written to, by its main rank alone."""

    store: CheckpointStore
    metrics: MetricsWriter
    uploader: Uploader


@dataclass
class Recorder:
    """Writes a run's metrics and checkpoints; a context manager that does not end before the last save has.

    Rows are on the disk before the checkpoint of the same step, and evaluation comes before the snapshot it may name
    best, so that a run continued from any checkpoint writes what an uninterrupted one writes. Checkpoints are written
    behind the steps (``checkpoint/background.py``). Each rank of a run has one, as all of them add up and evaluate; the
    main rank's alone writes.

    Attributes:
        files: None on all ranks but the main one.
        waited: seconds that steps have waited for data so far.
    """

    config: RunConfig
    parts: Parts
    files: RunFiles | None
    waited: Callable[[], float]
    clock: Callable[[], float] = time.monotonic
    _row_started: float = field(default=0.0, init=False)
    _row_waited: float = field(default=0.0, init=False)
    _last_time_save: float = field(default=0.0, init=False)
    _evaluated_at: int = field(default=-1, init=False)
    _saved_at: int = field(default=-1, init=False)
    _saver: BackgroundSaver | None = field(default=None, init=False)
    _prepared: bool = field(default=False, init=False)
    _said_stop: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self._row_started = self._last_time_save = self.clock()
        if self.files is not None:
            store = self.files.store
            self._saver = BackgroundSaver(store, self.parts.device, self._tell_saved, log=log.warning, clock=self.clock)
            # A run killed between its last evaluation and its end is evaluated already.
            rows = (row for _, row in iter_metrics(store.run_dir) if row is not None)
            self._evaluated_at = max((row["step"] for row in rows if row.get("kind") == "eval"), default=-1)
            if (store.run_dir / SAMPLES_FILE).exists():
                self._open_samples(self.files).close()  # of steps that are run again nothing stays
        elif self.parts.student.is_dealt_out:
            self._saver = BackgroundSaver(None, self.parts.device, log=log.info, clock=self.clock)
        self._evaluated_at = int(self.parts.engine.gather(self._evaluated_at)[0])  # all evaluate, or none does

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._saver is None:
            return
        try:
            self._saver.__exit__(kind, error, traceback)
        finally:
            failed = isinstance(error, LiquidError) and not isinstance(error, Interrupted)
            if failed and self.files is not None:
                self._say_what_counts(self.files)

    def _say_what_counts(self, files: RunFiles) -> None:
        """Of a run that fails: which step its last whole checkpoint is of, where training has gone on since."""
        steps = [metadata.step for metadata in sidecars(files.store.run_dir).values()]
        step = self.parts.progress.step
        if step > max(steps, default=0):
            kept = f"a checkpoint of step {max(steps)}" if steps else "no checkpoint"
            log.warning("step %d was reached and %s is whole: what came after it is lost", step, kept)

    def hooks(self, stage: Stage) -> Hooks:
        """The trainer's hooks in the order they must run; ``stage`` shows how far it is."""
        config = self.config
        hooks: list[Hook] = [
            (self._count, 1),
            (lambda _: stage.advance(), 1),
            (lambda result: self._write_due_row(result, stage), 1),
            (lambda _: self._look_after_saves(), 1),
        ]
        if config.evaluation.every_steps:
            hooks.append((lambda _: self.evaluate(), config.evaluation.every_steps))
        if config.output.save_every_steps:
            hooks.append((self._save_due, config.output.save_every_steps))
        if config.output.save_every_minutes:
            hooks.append((lambda result: self._save_by_time() if result.save else None, 1))
        return hooks

    def _count(self, result: StepResult) -> None:
        for one in result.scored:
            self.parts.accumulator.add(
                one.batch.type,
                one.output,
                tokens=one.batch.num_learnt,
                positions=one.batch.num_tokens,
                padded_tokens=one.batch.padded_tokens,
            )

    def _write_due_row(self, result: StepResult, stage: Stage) -> None:
        # The last step has a row whatever the interval: a short run would else say nothing of its losses.
        if result.step % self.config.output.metrics_every_steps == 0 or result.step == self.config.optimizer.steps:
            self._write_row(result, stage)

    def _write_row(self, result: StepResult, stage: Stage) -> None:
        now, waited, skipped = self.clock(), self.waited(), self.parts.progress.skipped.count
        if skipped and self.parts.accumulator.is_empty():
            return
        row = self.parts.accumulator.row(
            seconds=now - self._row_started,
            **result.values.as_row(),
            grad_norm=result.grad_norm,
            tokens_seen=self.parts.progress.tokens_seen,
            **({"skipped_steps": skipped} if skipped else {}),
            signal_wait_seconds=waited - self._row_waited,
            peak_memory_bytes=process_peak_memory_bytes(),
            **self._device_memory(),
        )
        self._row_started, self._row_waited = now, waited
        if self.files is None:
            return
        written = self.files.metrics.write("train", result.step, row)
        stage.note(f"loss {row['loss']:.3f}, {row['tokens_per_second']:,.0f} tokens/s")
        kd = "-" if written.get("kd") is None else f"{written['kd']:.4f}"
        log.info(
            "step %d/%d loss %.4f ce %.4f kd %s alpha %.3g T %.3g lr %.3g %.0f tokens/s",
            result.step,
            self.config.optimizer.steps,
            row["loss"],
            row["ce"],
            kd,
            result.values.default.alpha,
            result.values.default.temperature,
            result.values.lr,
            row["tokens_per_second"],
            extra=brief(f"step {result.step} · loss {row['loss']:.3f} · KL {kd[:5]} · lr {result.values.lr:.2g}"),
        )

    def _device_memory(self) -> dict[str, Any]:
        """What the device has held at most since the run began; nothing where that is the host's own memory."""
        held = device_memory(self.parts.device)
        if held is None:
            return {}
        return {"device_peak_memory_bytes": held.peak_bytes, "device_reserved_bytes": held.reserved_bytes}

    def probe(self) -> None:
        """Score one batch of each type, so that what evaluation needs is found out before minutes are spent."""
        began = self.clock()
        self.parts.evaluator.probe(self.parts.student)
        self._row_started += self.clock() - began

    def evaluate(self) -> None:
        """Score the student on the validation batches, write the row, remember whether it is the best so far."""
        progress = self.parts.progress
        if self._evaluated_at == progress.step or not any(self.parts.evaluator.sets.values()):
            return
        began = self.clock()
        row = self.parts.evaluator(self.parts.student)
        self.parts.speech.add_answers(self.parts.student, row)
        self._write_samples()
        row["eval_seconds"] = self.clock() - began
        if self.files is not None:
            self.files.metrics.write("eval", progress.step, row)
        # A cut is in the checkpoint, for all ranks to round as they did.
        passes = self.parts.evaluator.passes
        passes.max_tokens = self.parts.engine.smallest(passes.max_tokens)
        self._evaluated_at = progress.step
        self._row_started += self.clock() - began  # a row's rate is that of training
        loss = float(row["val_loss_student"])
        log.info("step %d · %s", progress.step, describe_evaluation(row))
        if loss < progress.best_val_loss:
            progress.best_val_loss = loss
            if progress.step > 0:
                self._save(names=("best",), snapshot=True)

    def _write_samples(self) -> None:
        """What the student says; before the row of its evaluation, without which all of it is asked again."""
        if not self.parts.speech.prompts or not (self.files is not None or self.parts.student.is_dealt_out):
            return
        rows = self.parts.speech.sample(self.parts.student)
        if self.files is None:
            return
        with self._open_samples(self.files) as file:
            for row in rows:
                row = {"step": self.parts.progress.step, **row}
                file.write(row)
                self.files.metrics.log_sample(row)
            file.sync()

    def _open_samples(self, files: RunFiles) -> RowFile:
        done = self._evaluated_at if self._evaluated_at >= 0 else None
        return RowFile(files.store.run_dir / SAMPLES_FILE, resume_step=done)

    def save(self, *, snapshot: bool) -> None:
        """Write a checkpoint of this step, unless there is one; behind the steps."""
        if self._saved_at != self.parts.progress.step:
            self._save(names=(), snapshot=snapshot)

    def _save_due(self, result: StepResult) -> None:
        if result.step == self.config.optimizer.steps:
            self.evaluate()  # its last: it may save this step as the best, and one save is enough
        self.save(snapshot=True)

    def stop(self) -> None:
        """A checkpoint of this step, whole when this returns; within ``STOP_SECONDS`` if the disk allows it."""
        if self._saved_at != self.parts.progress.step:
            self._give_up_for_another()
        self.save(snapshot=True)
        self._wait_for_save()

    def _give_up_for_another(self) -> None:
        """Give up the save under way where only then one of this step is whole in time; the main rank knows."""
        saver = self._saver
        stands = saver is not None and self.files is not None and saver.stands_in_the_way(STOP_SECONDS)
        if self._in_pieces:
            stands = self.parts.engine.share(lambda: stands)
        if saver is not None and stands:
            log.info("the save under way was given up: in %.0f s there is time for this step's only", STOP_SECONDS)
            saver.give_up()

    def _wait_for_save(self) -> None:
        """Return when the save under way is whole. Raises what it failed with, on all ranks where all have a part."""
        saver = self._saver
        if saver is None:
            return
        if self._in_pieces:
            # First what is each rank's own: the main one then finds word of it, and waits for none that is gone.
            self.parts.engine.together(saver.wait_for_own)
            self.parts.engine.together(saver.wait)
        else:
            saver.wait()

    def finish(self) -> None:
        """Last evaluation, final checkpoint; it is whole when this returns."""
        skipped = self.parts.progress.skipped.count
        if skipped:
            log.warning("%d of %d steps were left out: --skip_bad_steps", skipped, self.parts.progress.step)
        self.evaluate()
        if self._saved_at != self.parts.progress.step:
            self._save(names=("final",), snapshot=True)
            self._wait_for_save()
            return
        self._wait_for_save()
        if self.files is not None and self._saver is not None:
            info = self._saver.give_names(("final",))
            if info is not None:
                self.files.uploader.enqueue_checkpoint(info)

    def wants_save(self) -> bool:
        """Whether the time for a checkpoint has come on this rank: on the main one, whose clock decides."""
        # One that is due while another is under way is taken once that is whole: it would only be waited for.
        minutes = self.config.output.save_every_minutes
        if not minutes or self.files is None or self._saver is None or self._saver.busy:
            return False
        return self.clock() - self._last_time_save >= 60 * minutes

    def _save_by_time(self) -> None:
        self._last_time_save = self.clock()
        self._save(names=(), snapshot=False)

    def _save(self, *, names: tuple[str, ...], snapshot: bool) -> None:
        began = self.clock()
        tensors = self._tensors()
        self._require_finite(own_parts(tensors) if self._in_pieces else tensors)
        metadata = self.metadata()
        state = {
            **tensors,
            "lr_schedule": {"step": metadata.step, "peak": self.config.optimizer.peak, "lr": metadata.lr},
            "random": random_state(gpus=self.parts.engine.world_size == 1),
            "accumulator": self.parts.accumulator.state_dict(),
        }
        if self.parts.progress.selection is not None:
            state["selection"] = self.parts.progress.selection.state_dict()
        self._saved_at = metadata.step
        saver = self._saver
        if saver is None or (self.files is None and not self._in_pieces):
            return
        if saver.busy:
            log.info("step %d waits to be saved: the save before it is still being written", metadata.step)
        kind: Literal["step", "time"] = "step" if snapshot else "time"
        first = self.files.metrics.sync if self.files is not None else lambda: None
        how: dict[str, Any] = {"kind": kind, "also_as": ("last", *names), "first": first, "began": began}
        if self._in_pieces:
            created = datetime.now(timezone.utc).isoformat(timespec="microseconds")  # no two have one folder
            metadata = replace(metadata, format_version=IN_PIECES, created=created)
            rest, dealt_out = split_tensors(state)
            parts = find_parts(dealt_out)
            pieces = self._open_pieces(metadata, {name: one.offsets for name, one in parts.items()})
            saver.save_in_pieces(pieces, {name: one.tensor for name, one in parts.items()}, rest, metadata, **how)
        else:
            saver.save(state, metadata, **how)
        self._row_started += self.clock() - began

    @property
    def _in_pieces(self) -> bool:
        """Whether checkpoints of this run are too large to be gathered: all ranks count the same."""
        if not self.parts.student.is_dealt_out:
            return False
        return sum(size * count for size, count in block_sizes(outline(self._own_tensors())).items()) > LARGEST_FILE

    def _open_pieces(self, metadata: CheckpointMetadata, offsets: Mapping[str, tuple[int, ...]]) -> PieceWriter:
        """Make the folder that takes the pieces of a checkpoint, once the save before it is whole.

        Raises:
            StorageError: a rank does not see the run directory, or cannot write there; that save has failed.
        """
        engine = self.parts.engine
        self._wait_for_save()
        with ExitStack() as stack:

            def make() -> str:
                assert self.files is not None
                return str(stack.enter_context(self.files.store.open_pieces(metadata)))

            folder = Path(engine.share(make))
            engine.together(lambda: require_folder(folder))
            return PieceWriter(engine, folder, offsets, stack.pop_all())

    def _tensors(self) -> dict[str, Any]:
        """The student's weights and the moments; of a student that is dealt out all are gathered on the main rank."""
        if self._in_pieces:
            return self._own_tensors()
        if self.parts.student.is_dealt_out:
            gathered: dict[str, Any] = gather_whole(self._own_tensors(), keep=self.files is not None)
            return gathered
        weights = trained_weights(self.parts.student.model)
        return {"student": weights, "optimizer": self.parts.optimizer.state_dict()}

    def _own_tensors(self) -> dict[str, Any]:
        """The same as this rank has it; tied weights are one, as parameters."""
        weights = self.parts.student.model.state_dict(keep_vars=True)
        return {"student": weights, "optimizer": self.parts.optimizer.state_dict()}

    def _require_finite(self, tensors: dict[str, Any]) -> None:
        """Raise NumericalError where a step has left weights or moments that nothing can be trained from: a step looks
        at its loss and gradient alone, and what it made of them would become the newest checkpoint, or the only one.
        """
        found = find_not_finite(tensors)
        finders = self.parts.engine.gather(found is not None)
        if not any(finders):
            return
        error = NumericalError(
            "the last step has left weights or moments that are not finite; they are not saved",
            where=f"step {self.parts.progress.step}",
            got=f"NaN or infinity in {found}" if found is not None else "those of another process",
            remedy="lower --lr, lengthen --warmup_steps or use --precision=float32; what was saved before is intact",
        )
        error.speaks = self.parts.engine.rank == finders.index(max(finders))
        raise error

    def _look_after_saves(self) -> None:
        """After each step: end with what a save failed with; after the first, when moments are there, prepare saves."""
        if self._saver is None:
            return
        self._saver.check()
        if self.files is not None:
            self.files.uploader.check()
        if self._prepared:
            return
        self._prepared = True
        if self._in_pieces:
            own = self._own_tensors()
            size = sum(size * count for size, count in block_sizes(outline(own)).items())
            self._saver.prepare(own_parts(own), host_room_bytes(Ranks.read().local_world_size), num_bytes=size)
        elif self.files is not None:
            dealt_out = self.parts.student.is_dealt_out  # then gathering is an exchange, and sizes are known without
            self._saver.prepare(outline(self._own_tensors()) if dealt_out else self._tensors(), host_room_bytes())
        if self.files is not None:
            self._say_if_a_stop_takes_long(self._saver, "as long as none was measured")

    def _tell_saved(self, saved: Saved) -> None:
        assert self.files is not None
        assert self._saver is not None
        self.files.uploader.enqueue_checkpoint(saved.info)
        step, names = saved.info.metadata.step, saved.info.names
        told = f"step {step} · saved {', '.join(name for name in names if not is_snapshot(name)) or names[0]}"
        waited = f" · training waited {format_seconds(saved.stopped_seconds)}" if saved.stopped_seconds >= 1 else ""
        log.info(
            "step %d · saved %s: stopped training for %.2f s, on the disk after %.2f s",
            step,
            ", ".join(names),
            saved.stopped_seconds,
            saved.seconds,
            extra=brief(told + waited),
        )
        log.info("checkpoint metadata: %s", describe_metadata(saved.info.metadata), extra=brief(""))
        self._say_if_a_stop_takes_long(self._saver, "as measured")

    def _say_if_a_stop_takes_long(self, saver: BackgroundSaver, basis: str) -> None:
        assert self.files is not None
        size, seconds = saver.num_bytes, saver.expected_seconds
        sending = self.files.uploader.expected_seconds(size)  # a machine that is taken away takes its disk along
        if self._said_stop or seconds + sending <= STOP_SECONDS:
            return
        self._said_stop = True
        log.warning(
            "a save takes about %s: %s at %.0f MB/s%s, %s. A machine that leaves %.0f s after SIGTERM ends before this "
            "run's state is saved, and the last checkpoint counts: make --save_every small enough, or the disk faster",
            format_seconds(seconds + sending),
            format_bytes(size),
            size / seconds / 1e6,
            f" to the disk and {format_seconds(sending)} more to the mirror" if sending else "",
            basis,
            STOP_SECONDS,
        )

    def metadata(self) -> CheckpointMetadata:
        """What a checkpoint of the present moment says about itself."""
        config, progress = self.config, self.parts.progress
        values = self.parts.schedules.at(progress.step)
        pending = {
            name: schedule.pending(progress.step)
            for name, schedule in (
                ("alpha", self.parts.schedules.alpha),
                ("temperature", self.parts.schedules.temperature),
            )
            if isinstance(schedule, Piecewise)
        }
        return CheckpointMetadata(
            step=progress.step,
            tokens_seen=progress.tokens_seen,
            block_size=config.data.block_size,
            kd_alpha=values.default.alpha,
            kd_temperature=values.default.temperature,
            alpha_schedule=config.objective.alpha_schedule,
            temp_schedule=config.objective.temp_schedule,
            schedule_state=pending,
            grad_accum=config.optimizer.grad_accum,
            warmup_steps=config.optimizer.warmup_steps,
            lr=config.optimizer.lr,
            lr_peak=config.optimizer.lr_peak,
            positional_embedding=self.parts.built.positional_embedding,
            rope_scale=config.student.rope_scale,
            eval_ctx_lens=config.evaluation.context_lengths,
            student=process_masker().urls(self.parts.built.description),
            tokenizer_hash=self.parts.text.hash,
            data_position=progress.data_position,
            best_val_loss=progress.best_val_loss,
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            run=process_masker().urls(self._run_values()),
            versions={**CURRENT, "order": self._order_version()},
        )

    def _order_version(self) -> int:
        return order_version(self.parts.group_size, self.parts.windows, self.parts.inputs.blocks_by_file)

    def _run_values(self) -> dict[str, Any]:
        config, progress = self.config, self.parts.progress
        levels = {"alpha": config.objective.alpha, "T": config.objective.temperature}
        return {
            "face": config.face,
            "seed": config.seed,
            "optimizer": config.optimizer.kind,
            "total_steps": self.config.optimizer.steps,
            "max_pass_tokens": progress.passes.max_tokens,
            "eval_max_pass_tokens": self.parts.evaluator.passes.max_tokens,
            "decided": self.parts.decided,
            "compiled": self.parts.student.compiled is not None,
            "group_size": self.parts.group_size,
            **({"window_tokens": self.parts.windows} if self.parts.windows else {}),
            **({"blocks_by_file": True} if self.parts.inputs.blocks_by_file else {}),
            "framing": self.parts.text.framings.plain(),
            "learning": None if self.parts.inputs.is_text else self.parts.text.learning.key,
            "course": course_of(config),
            "order": self.parts.order,
            "skipped_steps": [progress.skipped.count, progress.skipped.in_a_row],
            "teachers": self.parts.teachers.names,
            "taught": self.parts.teachers.taught,
            "chat_template": self.parts.text.tokenizer.chat_template,  # there only if it was trained with
            "given_levels": {name: value for name, value in levels.items() if name in config.given},
        }


def describe_evaluation(row: Mapping[str, Any]) -> str:
    """An ``eval`` row as a line for people: loss beside the teacher's, KL, each type, then what else was asked for."""
    partly = "val_loss_student_with_teacher" in row  # the teacher's loss is of other texts: it stands with its type
    of_teacher = "" if partly else "val_loss_teacher"
    said = [_loss_beside("held-out loss", row, "val_loss_student", of_teacher)]
    if "val_kd" in row:
        said.append(f"KL {row['val_kd']:.3f}{_of_codec(row.get('val_kd_codec', 'online'))}")
    types = row.get("by_type", {})
    if len(types) > 1:
        said.append(", ".join(_loss_beside(type, one, "val_loss", "val_loss_teacher") for type, one in types.items()))
    keys = [key for key in row if key.startswith("val_loss_student@")]
    said += [f"at {key.partition('@')[2]} tokens {row[key]:.3f}" for key in keys]
    if "val_agreement" in row:
        said.append(f"agrees {row['val_agreement']:.0%}")
    if "answers" in row:
        said.append(f"answers right {row['answers_right']}/{row['answers']}")
    return " · ".join(said)


def _of_codec(told: str) -> str:
    """A remark on a KL that is measured by what a codec has left of the teacher, and compares with no other's."""
    lossy = [one for one in told.split("+") if one not in ("online", "full") and not one.startswith("held_out:")]
    return f" (as codec {' and '.join(lossy)} has it)" if lossy else ""


def _loss_beside(name: str, row: Mapping[str, Any], own: str, of_teacher: str) -> str:
    teacher = row.get(of_teacher)
    return f"{name} {row[own]:.3f}" + ("" if teacher is None else f" (teacher {teacher:.3f})")
