"""A training job from options to exit code: both training faces."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from liquid_llm import storage
from liquid_llm.checkpoint.discovery import latest_checkpoint
from liquid_llm.checkpoint.store import MARK_FILE, CheckpointStore
from liquid_llm.config import RunConfig, as_plain, build_run_config, build_schedules, inherit
from liquid_llm.config_names import counted_options
from liquid_llm.device import deterministic_algorithms, prepare_allocator
from liquid_llm.distributed import Engine, read_rank, start_engine
from liquid_llm.distributed_link import TeacherLink, TrainingLink, join_ranks, require_training_ranks
from liquid_llm.errors import Interrupted, StorageError
from liquid_llm.jobs.dry_run import check_place, check_records, describe_pace, estimate, print_findings, schedule_values
from liquid_llm.jobs.prepare import RunData, check_run_data, describe_datasets, find_run_data, prepare_run_data
from liquid_llm.jobs.run_result import show_run
from liquid_llm.jobs.teach import run_teacher
from liquid_llm.metrics import MetricsWriter
from liquid_llm.models.lora import merge_adapter
from liquid_llm.provenance import add_to_history, write_provenance
from liquid_llm.report import build_report
from liquid_llm.report.data import read_run
from liquid_llm.report.summary import summarise, write_summary
from liquid_llm.run_log import RunLog
from liquid_llm.runtime import StopSignal, choose_device
from liquid_llm.storage.lease import Lease, LeaseLost
from liquid_llm.terminal import Stage, brief, setup_logging
from liquid_llm.trackers import open_trackers
from liquid_llm.training import Trainer
from liquid_llm.wiring.compiling import compile_parts, give_stream
from liquid_llm.wiring.exports import STUDENT, keep_tokenizer, save_with_card
from liquid_llm.wiring.fitting import Fit, check_fit, say_fit, settle_loss
from liquid_llm.wiring.mirrors import Mirrors, send_what_is_lacking
from liquid_llm.wiring.parts import BatchFeed, Parts, build_basis, build_parts
from liquid_llm.wiring.places import Place, resolve_place, try_places
from liquid_llm.wiring.recorder import Hooks, Recorder, RunFiles
from liquid_llm.wiring.rehearsal import rehearse
from liquid_llm.wiring.repeat import run_options_to_repeat
from liquid_llm.wiring.sharding import gather_student, place_parts, require_processes
from liquid_llm.wiring.siblings import differences_of, find_siblings, in_words
from liquid_llm.wiring.start import (
    Start,
    continue_from,
    deal_out,
    describe_metadata,
    find_start,
    require_nothing_lost,
    settle_context,
    share_start,
)
from liquid_llm.wiring.teachers import teacher_spec

log = logging.getLogger(__name__)


def run_training(
    face: str,
    given: Mapping[str, object],
    *,
    show_result: bool = False,
    ended: Callable[[Place], object] | None = None,
) -> int:
    """Run one training job; returns the exit code.

    Args:
        show_result: print what it has come to on standard output, where it comes to its end.
        ended: is told where the run is, on the main rank of one that has come to its end.

    Raises:
        LiquidError: any problem a user can cause.
        Interrupted: the process was asked to stop and the state is saved.
    """
    setup_logging(most="INFO" if read_rank()[0] == 0 else "WARNING")
    prepare_allocator()
    config = build_run_config(face, given)
    device = torch.device(choose_device(config.device).value)  # before anything is read or made
    with deterministic_algorithms(config.deterministic), join_ranks(device, config.teacher.ranks) as engine:
        if isinstance(engine.link, TeacherLink):
            run_teacher(config, engine.link, device)
            return 0
        require_processes(config, engine.world_size)
        if config.dry_run:
            findings = _dry_run(config, engine)
            if engine.is_main:
                print_findings(*findings)
        else:
            place = _run(config, engine)
            if place is not None and show_result:
                show_run(summarise(read_run(place.run_dir)), place.run_dir, place.shown)
            if place is not None and ended is not None:
                ended(place)
    return 0


@dataclass(frozen=True)
class _Output:
    """What the main rank alone has: where the run is written to, its checkpoints, its log, its mirror's lease."""

    place: Place
    store: CheckpointStore
    log: RunLog
    lease: Lease | None


def _run(config: RunConfig, engine: Engine) -> Place | None:
    """Train; where the run is, on the main rank of one that has come to its end."""
    with ExitStack() as stack:

        def open_output() -> _Output:
            place = resolve_place(config)
            store = CheckpointStore(place.run_dir, keep_last=config.output.keep_last, log=log.warning)
            stack.enter_context(store)
            written = stack.enter_context(RunLog())
            if place.remote is None or config.optimizer.steps == 0:
                return _Output(place, store, written, None)
            return _Output(place, store, written, stack.enter_context(Lease(place.remote, place.run_dir / MARK_FILE)))

        output = engine.together(lambda: open_output() if engine.is_main else None)
        folder = stack.enter_context(storage.scratch("train"))
        start = share_start(engine, lambda: _find_start(config, output), folder)
        config, start = engine.together(lambda: _take_up(config, start, engine))
        if output is not None:
            _say_siblings(config, output.place, start)
        if not engine.share(lambda: _nothing_to_do(config, start, output)):
            _train(config, output, start, engine)
        elif output is not None and config.optimizer.steps > 0 and start.kind == "continue":
            send_what_is_lacking(output.place, output.lease)
        is_there = output is not None and (output.place.run_dir / STUDENT).is_dir()
        return output.place if output is not None and is_there and config.optimizer.steps > 0 else None


def try_training(face: str, given: Mapping[str, object]) -> tuple[dict[str, Any], Fit]:
    """What a dry run of a job finds, without a word of it on standard output; raises as ``run_training``."""
    prepare_allocator()
    config = build_run_config(face, given)
    choose_device(config.device)
    require_training_ranks(config.teacher.ranks, 1)
    with deterministic_algorithms(config.deterministic):
        engine = start_engine()
        require_processes(config, engine.world_size)
        return _dry_run(config, engine)


def _say_siblings(config: RunConfig, place: Place, start: Start) -> list[str]:
    """Name the runs in the same output that differ from one that begins now in few values."""
    if start.kind == "continue" or not config.below_output:
        return []
    told = [one.in_words() for one in find_siblings(*place.parent_and_name, counted_options(config))]
    for words in told:
        log.info("%s", words)
    return told


def _find_start(config: RunConfig, output: _Output | None) -> Start:
    assert output is not None
    return find_start(config, output.place, output.store)


def _take_up(config: RunConfig, start: Start, engine: Engine) -> tuple[RunConfig, Start]:
    """What goes on of a start, and the configuration with what it stands for behind what was given."""
    settled = settle_context(start, config)
    if start.origin.metadata is not None:
        log.info("checkpoint metadata: %s", describe_metadata(start.origin.metadata), extra=brief(""))
    log.info("%s", settled.in_words())
    return deal_out(inherit(config, settled.options(config)), settled, engine.world_size), settled


def _nothing_to_do(config: RunConfig, start: Start, output: _Output | None) -> bool:
    assert output is not None
    step, steps = start.step, config.optimizer.steps
    schedules = build_schedules(config)
    alpha, temperature = schedules.alpha.value(step), schedules.temperature.value(step)
    log.info("at step %d the teacher weighs %g (alpha), at temperature %g", step, alpha, temperature)
    if steps == 0:
        log.info("0 steps asked for: nothing is trained or written")
        return True
    if step < steps:
        return False
    if start.kind == "continue" and not (output.place.run_dir / STUDENT).is_dir():
        return False  # killed between the last step and the end: what is left is done
    log.info("already at step %d of %d: nothing to do. %s", step, steps, _how_to_go_on(config, output))
    return True


def _how_to_go_on(config: RunConfig, output: _Output) -> str:
    """What to give where more is wanted of a finished run: more steps are another name, unless the run is named."""
    _, name = output.place.parent_and_name
    named = f" --run_id={name}" if config.below_output and config.output.run_id is None else ""
    return (
        f"To train it longer give{named} --{config.steps_option}=MORE; its data is looked at then, and texts that are "
        "new need --accept_changes"
    )


def _train(config: RunConfig, output: _Output | None, start: Start, engine: Engine) -> None:
    parts, fit = engine.together(lambda: _prepare(config, output, start, engine))
    config = parts.config
    parts = place_parts(parts, engine)
    with ExitStack() as stack:
        stop = stack.enter_context(StopSignal())
        stack.enter_context(closing(parts.teachers.router))
        feed = stack.enter_context(BatchFeed(parts, config.optimizer.grad_accum, config.data.num_workers))
        files, mirrors = None, None
        if output is not None:
            resume_step = parts.progress.step if start.kind == "continue" else None
            trackers = open_trackers(config.output.trackers, output.place.run_dir, resume_step)
            metrics = MetricsWriter(output.place.run_dir, resume_step=resume_step, trackers=trackers)
            stack.enter_context(metrics)
            every = config.output.upload_every_seconds
            mirrors = stack.enter_context(Mirrors(output.place, every, stop.deadline, output.lease))
            files = RunFiles(output.store, metrics, mirrors.checkpoints)
            stack.enter_context(output.log.ending())
        recorder = stack.enter_context(Recorder(config, parts, files, waited=lambda: feed.waited))
        stack.enter_context(engine.watch())
        if start.goes_on:
            recorder.probe()
        else:
            recorder.evaluate()
        with Stage("train", unit="steps", total=config.optimizer.steps, done=parts.progress.step) as stage:
            trainer = _make_trainer(config, parts, feed, fit, recorder.hooks(stage))
            trainer.stopping, trainer.saving = partial(_stopping, stop, engine), recorder.wants_save
            done = trainer.train()
        if not done:
            recorder.stop()
            log.info("asked to stop: the state of step %d is saved", parts.progress.step)
            unsent = None if output is None or mirrors is None else _send_in_time(output, mirrors.close, stop)
            engine.wait_for_all()  # a launcher ends all as soon as one has ended: not before the state is saved
            raise _interrupted(config, parts, output, unsent)
        recorder.finish()
        merge_adapter(parts.built.model)  # all is saved: what is left to do is to write the student
        weights = gather_student(parts)
        if output is not None and mirrors is not None:
            student, run_dir = parts.text.student_tokenizer(), output.place.run_dir
            metadata, run = recorder.metadata(), str(run_dir)
            save_with_card(parts.built.model, student, metadata, run_dir / STUDENT, weights, run=run)
            write_summary(run_dir)
            build_report(run_dir)
            log.info("finished at step %d: the student, the summary and the report are written", parts.progress.step)
            if unsent := _send_in_time(output, mirrors.finish, stop):
                raise _interrupted(config, parts, output, unsent)
        engine.wait_for_all()
    if output is not None:
        log.info("done: %s", output.place.shown)


def _stopping(stop: StopSignal, engine: Engine) -> bool:
    """Whether this process was asked to stop, or one that holds a teacher: the main one looks for all."""
    return stop.requested or (engine.is_main and isinstance(engine.link, TrainingLink) and engine.link.stop_asked())


def _prepare(config: RunConfig, output: _Output | None, start: Start, engine: Engine) -> tuple[Parts, Fit]:
    """All that a run needs before its first step; what it was made of is written."""
    if output is not None:
        try_places(output.place)
    check_run_data(config.data, partial(teacher_spec, config))
    basis = build_basis(config, start, engine)
    data = engine.host_first(lambda: prepare_run_data(config.data))
    parts = build_parts(basis, start, data.entries, engine)
    settle_loss(parts.config, parts, start)
    fit = check_fit(parts.config, parts)
    say_fit(fit, parts.device)
    parts = compile_parts(give_stream(parts), start)
    parts.evaluator.consumers = fit.largest
    if output is not None:
        output.log.open(output.place.run_dir)  # not before everything that can fail has not
        if config.output.restart:
            output.store.set_aside()
        _write_provenance(parts.config, output.place, start, parts, data, fit)
        _write_history(parts.config, output.place, start, parts)
        keep_tokenizer(parts.text.tokenizer, output.place.run_dir)
    return parts, fit


def _send_in_time(output: _Output, send: Callable[[], None], stop: StopSignal) -> StorageError | None:
    """Bring the mirrors up to date, with a log that is whole; what they lack, where there was no time for more.

    Raises:
        StorageError: they lack something, and nobody asked to stop.
    """
    output.log.end()
    try:
        send()
    except StorageError as error:
        if not stop.requested or isinstance(error, LeaseLost):
            raise
        return error
    return None


def _interrupted(
    config: RunConfig, parts: Parts, output: _Output | None, unsent: StorageError | None = None
) -> Interrupted:
    """What a run ends with that was asked to stop; ``unsent``: what did not reach its output in the time there was."""
    where, remedy = None if output is None else output.place.shown, "run the same command again to go on"
    if output is not None and unsent is not None:
        log.warning("%s", unsent)
        where = str(output.place.run_dir)
        remedy = f"run the same command again on this machine: {output.place.shown} is not up to date"
    steps = config.optimizer.steps
    error = Interrupted(
        f"stopped at step {parts.progress.step} of {steps} with the state saved", where=where, remedy=remedy
    )
    error.speaks = output is not None  # all ranks end with it
    return error


def _make_trainer(config: RunConfig, parts: Parts, feed: BatchFeed, fit: Fit, hooks: Hooks = ()) -> Trainer:
    return Trainer(
        parts.student,
        parts.optimizer,
        parts.schedules,
        feed,
        parts.progress,
        config.optimizer.steps,
        config.optimizer.grad_accum,
        config.optimizer.grad_clip,
        engine=parts.engine,
        hooks=hooks,
        consumers=fit.largest,
        names=parts.stream.names,
        teacher_stream=parts.teacher_stream,
    )


def _describe_start(start: Start) -> dict[str, Any]:
    return {"kind": start.kind, "source": start.origin.description, "step": start.step}


def _write_provenance(config: RunConfig, place: Place, start: Start, parts: Parts, data: RunData, fit: Fit) -> None:
    write_provenance(
        place.run_dir,
        options=run_options_to_repeat(config, parts.choices),
        config=as_plain(config),
        manifest=[entry.plain() for entry in parts.inputs.entries],
        readiness={
            "types": parts.inputs.readiness(),
            "signal": {type: row.as_dict() for type, row in parts.teachers.coverage.items()},
            **data.readiness,
        },
        datasets=describe_datasets(config.data, data),
        choices={name: {"value": str(choice.value), "reason": choice.reason} for name, choice in parts.choices.items()},
        extra={
            "start": _describe_start(start),
            "student": parts.built.description,
            "framing": parts.text.framings.plain(),
            "parameters": sum(p.numel() for p in parts.built.model.parameters()),
            "teachers": parts.teachers.identities,
            "memory": fit.as_dict(),
        },
    )


def _write_history(config: RunConfig, place: Place, start: Start, parts: Parts) -> None:
    """Add this session to the run's history, and say which of its options have changed."""
    changed = add_to_history(
        place.run_dir,
        step=start.step,
        start=start.kind,
        options=run_options_to_repeat(config, parts.choices),
        counted=counted_options(config),
        changed=differences_of,
    )
    if changed and start.kind == "continue":
        log.warning("since its last session this run has other options: %s", in_words(changed))


def _would_start(config: RunConfig, nowhere: Place, store: CheckpointStore) -> Start:
    """What the run itself would start from, without a trace: its directory is read, its mirror fetched elsewhere."""
    place = resolve_place(config)
    there = place.run_dir.is_dir() and not config.output.restart
    found = latest_checkpoint(place.run_dir) if there else None
    if found is not None:
        return continue_from(store, found)
    if there:
        require_nothing_lost(place.run_dir, None)
    return find_start(config, replace(nowhere, remote=place.remote), store)


def _dry_run(config: RunConfig, engine: Engine) -> tuple[dict[str, Any], Fit]:
    """Look at everything, take two steps on real data in a folder that is thrown away; what was found."""
    place = resolve_place(config)
    findings: dict[str, Any] = {"place": engine.share(lambda: check_place(place))}
    with storage.scratch("dry") as folder:
        nowhere = Place(folder, None)
        with CheckpointStore(nowhere.run_dir, keep_last=1, log=log.warning) as store:
            find = partial(_would_start, config, nowhere, store)
            start = share_start(engine, find, nowhere.run_dir)
            config, start = engine.together(lambda: _take_up(config, start, engine))
        if engine.is_main:
            findings["siblings"] = _say_siblings(config, place, start)
        began = _describe_start(start)
        if place.remote is not None:  # what was fetched to be looked at lies in a folder that is thrown away
            began["source"] = str(began["source"]).replace(str(nowhere.run_dir), place.remote.rstrip("/"))
        findings["place"]["would_continue"] = began if start.kind == "continue" else None

        def prepare() -> tuple[Parts, Fit]:
            check_run_data(config.data, partial(teacher_spec, config))
            basis = build_basis(config, start, engine)
            parts = build_parts(basis, start, find_run_data(config.data).entries, engine)
            settle_loss(parts.config, parts, start)
            fit = check_fit(parts.config, parts)
            return compile_parts(give_stream(parts), start), fit

        parts, fit = engine.together(prepare)
        config = parts.config
        parts.evaluator.consumers = fit.largest
        sizes = estimate(config, parts.built.model, parts.optimizer, parts.teachers.models)
        parts = place_parts(parts, engine)
        findings |= {
            "starts_from": began,
            "data": parts.inputs.readiness(),
            "signal": check_records(parts.teachers.router, parts.inputs, config.data.seq_len),
            "choices": {name: vars(choice) for name, choice in parts.choices.items()},
            "estimate": sizes,
            "memory": fit.as_dict(),
            "schedules": schedule_values(parts.schedules, start.step),
        }
        two_more = replace(config.optimizer, steps=parts.progress.step + 2)
        feed = BatchFeed(parts, config.optimizer.grad_accum, config.data.num_workers)
        with closing(parts.teachers.router), feed:
            trainer = _make_trainer(replace(config, optimizer=two_more), parts, feed, fit)
            found = rehearse(trainer, parts.evaluator, parts.speech, nowhere.run_dir, sizes["checkpoint_bytes"])
    return {**findings, **describe_pace(config, start, found)}, fit
