"""A training job from options to exit code: both training faces."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from liquid_llm.checkpoint.discovery import latest_checkpoint
from liquid_llm.checkpoint.store import CheckpointStore
from liquid_llm.config import RunConfig, as_plain, build_run_config, build_schedules, inherit
from liquid_llm.device import deterministic_algorithms, prepare_allocator
from liquid_llm.distributed import Engine, start_engine
from liquid_llm.errors import Interrupted
from liquid_llm.jobs.dry_run import check_place, check_records, describe_pace, estimate, print_findings, schedule_values
from liquid_llm.jobs.prepare import RunData, describe_datasets, find_run_data, prepare_run_data
from liquid_llm.metrics import MetricsWriter
from liquid_llm.provenance import write_provenance
from liquid_llm.report import build_report
from liquid_llm.runtime import StopSignal, choose_device
from liquid_llm.terminal import Stage, setup_logging
from liquid_llm.trackers import open_trackers
from liquid_llm.training import Trainer
from liquid_llm.wiring.exports import STUDENT, keep_tokenizer, save_with_card
from liquid_llm.wiring.fitting import Fit, check_fit, say_fit
from liquid_llm.wiring.mirrors import Mirrors, send_what_is_lacking
from liquid_llm.wiring.parts import BatchFeed, Parts, build_basis, build_parts
from liquid_llm.wiring.places import Place, resolve_place
from liquid_llm.wiring.recorder import Hooks, Recorder
from liquid_llm.wiring.rehearsal import rehearse
from liquid_llm.wiring.repeat import run_options_to_repeat
from liquid_llm.wiring.start import Start, continue_from, describe_metadata, find_start, settle_context

log = logging.getLogger(__name__)


def run_training(face: str, given: Mapping[str, object]) -> int:
    """Run one training job; returns the exit code.

    Raises:
        LiquidError: any problem a user can cause.
        Interrupted: the process was asked to stop and the state is saved.
    """
    setup_logging("INFO")
    engine = start_engine()
    prepare_allocator()
    config = build_run_config(face, given)
    choose_device(config.device)  # before anything is read or made
    with deterministic_algorithms(config.deterministic):
        place = resolve_place(config)
        if config.dry_run:
            print_findings(*_dry_run(config, place, engine))
            return 0
        with CheckpointStore(place.run_dir, keep_last=config.output.keep_last, log=log.warning) as store:
            config, start = _take_up(config, find_start(config, place, store))
            if not _nothing_to_do(config, start, store):
                _train(config, place, store, start, engine)
            elif config.optimizer.steps > 0 and start.kind == "continue":
                send_what_is_lacking(place)
    return 0


def try_training(face: str, given: Mapping[str, object]) -> tuple[dict[str, Any], Fit]:
    """What a dry run of a job finds, without a word of it on standard output; raises as ``run_training``."""
    prepare_allocator()
    config = build_run_config(face, given)
    choose_device(config.device)
    with deterministic_algorithms(config.deterministic):
        return _dry_run(config, resolve_place(config), start_engine())


def _take_up(config: RunConfig, start: Start) -> tuple[RunConfig, Start]:
    """What goes on of a start, and the configuration with what it stands for behind what was given."""
    settled = settle_context(start, config)
    if start.origin.metadata is not None:
        log.info("checkpoint metadata: %s", describe_metadata(start.origin.metadata))
    log.info("starting from %s at step %d: %s", settled.kind, settled.step, settled.origin.description)
    return inherit(config, settled.options(config)), settled


def _nothing_to_do(config: RunConfig, start: Start, store: CheckpointStore) -> bool:
    step, steps = start.step, config.optimizer.steps
    schedules = build_schedules(config)
    log.info("step %d: alpha %g, T %g", step, schedules.alpha.value(step), schedules.temperature.value(step))
    if steps == 0:
        log.info("0 steps asked for: nothing is trained or written")
        return True
    if step < steps:
        return False
    if start.kind == "continue" and not (store.run_dir / STUDENT).is_dir():
        return False  # killed between the last step and the end: what is left is done
    log.info("already at step %d of %d: nothing to do", step, steps)
    return True


def _train(config: RunConfig, place: Place, store: CheckpointStore, start: Start, engine: Engine) -> None:
    basis = build_basis(config, start)
    data = prepare_run_data(config.data)
    parts = build_parts(basis, start, data.entries, engine)
    config = parts.config
    fit = check_fit(config, parts)
    say_fit(fit, parts.device)
    parts.evaluator.consumers = fit.largest
    if config.output.restart:  # not before everything that can fail has not
        store.set_aside()
    _write_provenance(config, place, start, parts, data, fit)
    keep_tokenizer(parts.text.tokenizer, place.run_dir)
    with ExitStack() as stack:
        stop = stack.enter_context(StopSignal())
        stack.enter_context(closing(parts.teachers.router))
        feed = stack.enter_context(BatchFeed(parts, config.optimizer.grad_accum, config.data.num_workers))
        resume_step = parts.progress.step if start.kind == "continue" else None
        trackers = open_trackers(config.output.trackers, place.run_dir, resume_step)
        metrics = stack.enter_context(MetricsWriter(place.run_dir, resume_step=resume_step, trackers=trackers))
        mirrors = stack.enter_context(Mirrors(place, config.output.upload_every_seconds))
        recorder = stack.enter_context(
            Recorder(config, parts, store, metrics, mirrors.checkpoints, waited=lambda: feed.waited)
        )
        if start.goes_on:
            recorder.probe()
        else:
            recorder.evaluate()
        with Stage("train", unit="steps", total=config.optimizer.steps, done=parts.progress.step) as stage:
            trainer = _make_trainer(config, parts, feed, fit, recorder.hooks(stage), lambda: stop.requested)
            done = trainer.train()
        if not done:
            recorder.stop()
            mirrors.close()
            raise Interrupted(
                f"stopped at step {parts.progress.step} of {config.optimizer.steps} with the state saved",
                where=place.shown,
                remedy="run the same command again to go on",
            )
        recorder.finish()
        save_with_card(parts.built.model, parts.text.student_tokenizer(), recorder.metadata(), place.run_dir / STUDENT)
        build_report(place.run_dir)
        mirrors.finish()
    log.info("done: %s", place.shown)


def _make_trainer(
    config: RunConfig,
    parts: Parts,
    feed: BatchFeed,
    fit: Fit,
    hooks: Hooks = (),
    stopping: Callable[[], bool] = lambda: False,
) -> Trainer:
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
        stopping=stopping,
        consumers=fit.largest,
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


def _would_start(config: RunConfig, place: Place, nowhere: Place, store: CheckpointStore) -> Start:
    """What the run itself would start from, without a trace: its directory is read, its mirror fetched elsewhere."""
    there = place.run_dir.is_dir() and not config.output.restart
    found = latest_checkpoint(place.run_dir) if there else None
    if found is not None:
        return continue_from(store, found)
    return find_start(config, replace(nowhere, remote=place.remote), store)


def _dry_run(config: RunConfig, place: Place, engine: Engine) -> tuple[dict[str, Any], Fit]:
    """Look at everything, take two steps on real data in a folder that is thrown away; what was found."""
    findings: dict[str, Any] = {"place": check_place(place)}
    with tempfile.TemporaryDirectory() as folder:
        nowhere = Place(Path(folder), None)
        with CheckpointStore(nowhere.run_dir, keep_last=1, log=log.warning) as store:
            config, start = _take_up(config, _would_start(config, place, nowhere, store))
        basis = build_basis(config, start)
        parts = build_parts(basis, start, find_run_data(config.data).entries, engine)
        config = parts.config
        fit = check_fit(config, parts)
        parts.evaluator.consumers = fit.largest
        sizes = estimate(config, parts.built.model, parts.teachers.models)
        findings |= {
            "starts_from": _describe_start(start),
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
