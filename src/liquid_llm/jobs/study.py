"""``liquid study``: all runs of a study, their students' evaluation, and the verdict.

Every run is one of ``liquid train`` or ``liquid anneal`` in a directory of its own, so an interrupted one goes on as
those do. Runs are claimed by locks: any number of processes, on any machines that share the folder, may take part.
"""

from __future__ import annotations

import gc
import json
import logging
import multiprocessing
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.process import BaseProcess
from typing import Any

from liquid_llm import storage
from liquid_llm.checkpoint.discovery import remove_checkpoint
from liquid_llm.config import RunConfig, build_capture_config, build_run_config, schedule_remarks
from liquid_llm.config_names import counted_options, training_key
from liquid_llm.distributed import start_engine
from liquid_llm.errors import DataError, Interrupted, LiquidError, UsageError
from liquid_llm.jobs.capture import capture_signal, check_capture, exit_code
from liquid_llm.jobs.evaluate import check_evaluation, evaluate_students
from liquid_llm.jobs.prepare import prepare_run_data
from liquid_llm.jobs.study_ahead import look_ahead, print_ahead
from liquid_llm.jobs.study_result import open_folder, show_study
from liquid_llm.jobs.train import run_training
from liquid_llm.masking import process_masker
from liquid_llm.options import OPTIMIZER, options_of
from liquid_llm.provenance import mask_words
from liquid_llm.runtime import StopSignal
from liquid_llm.sources import overlay
from liquid_llm.storage import translate_errors
from liquid_llm.study.folder import CAPTURES, PACE, Busy, StudyFolder
from liquid_llm.study.plan import SECONDS, Study, Unit
from liquid_llm.study.results import measure_pace, units_at_seconds
from liquid_llm.terminal import setup_logging
from liquid_llm.unread import go_on_unread
from liquid_llm.wiring.exports import STUDENT

log = logging.getLogger(__name__)

FINAL = "final.pt"
AT_ONCE_BYTES, AT_ONCE = 3 * 2**30, 16
"""How many students are evaluated together: all are in memory, and the teacher is asked once for them."""

_WAIT_SECONDS = 1.0
_ASK_AGAIN_SECONDS = 5.0
_TEXTS = {"dataset_manifest", "dataset_name", "records", "val_fraction"}  # of evaluation: texts of its own
_FOR_EVALUATION = ("device", "num_workers", "hf_token_file", "hf_token_uri", "hf_token_secret")


def run_study(study: Study, folder: str) -> int:
    """Run what the study lacks, and show its result; returns the exit code.

    Raises:
        LiquidError: any problem a user can cause.
        Interrupted: the process was asked to stop; what was begun is saved.
    """
    setup_logging("INFO")
    start_engine()  # refuses several processes: a study's runs are of one each
    place = open_folder(folder)
    if study.dry_run:
        return _dry_run(study, place)
    plan = place.add_to_plan(_describe(study, place))
    for remark in plan["remarks"]:
        log.warning("%s", remark)
    _check_evaluation(study, place)
    with StopSignal() as stop:
        work = _Work(study, place, stop)
        for number in range(len(study.captures)):
            work.once(f"capture-{number}", lambda number=number: work.capture(number))  # type: ignore[misc]
        work.train(study.units())
        if SECONDS in study.at:
            with place.change():
                pace = measure_pace(place, plan)
                place.write(PACE, pace.at_seconds)
            work.train([one for one in units_at_seconds(plan, pace) if one.seed in study.seeds])
        units = [one for one in _all_units(plan, place) if place.is_done(one)]
        work.once("evaluate", lambda: work.evaluate(units))
        with stop.raising(work.stopped):
            return show_study(str(place.root))


# ----------------------------------------------------------------------------------------------------------- what to do


def _options(study: Study, place: StudyFolder, unit: Unit) -> dict[str, object]:
    """The options of a run: what all arms share, the arm's own, and the place and length that the study gives it."""
    options = overlay(study.options, study.arm(unit.arm).options)
    options = {"keep_last": 1, **options, "seed": unit.seed}
    if unit.steps is not None:
        options[_steps_option(study.face)] = unit.steps
    run_dir = place.run_dir(unit)
    options["output_gcs_uri"] = str(run_dir)
    if build_run_config(study.face, options).below_output:
        options |= {"output_gcs_uri": str(run_dir.parent), "run_id": run_dir.name}
    return options


def _steps_option(face: str) -> str:
    return next(one.name for one in options_of(face) if (one.group, one.field) == (OPTIMIZER, "steps"))


def _describe(study: Study, place: StudyFolder) -> dict[str, Any]:
    """What the plan keeps of a study; every arm's options are checked before anything is run.

    Raises:
        UsageError: an arm's options cannot work, or two arms are the same.
    """
    arms: list[dict[str, Any]] = []
    keys: list[dict[str, Any]] = []
    remarks: list[str] = []
    captured = [store for one in study.captures for store in build_capture_config(one).source.stores]
    for arm in study.arms:
        try:
            config = build_run_config(study.face, _options(study, place, Unit(arm.name, study.seeds[0])))
        except UsageError as error:
            raise UsageError(f"arm {arm.name!r}: {error}") from None
        if not config.data.val_fraction and not _TEXTS & {name for name, value in study.evaluation.items() if value}:
            raise UsageError(
                "nothing is held out, so students could not be judged at the end",
                where=f"arm {arm.name!r}",
                got="val_fraction: 0",
                remedy="raise --val_fraction, or name texts in evaluation: (records: TYPE=FILE)",
            )
        counts = counted_options(config)
        counts = {**counts["options"], "teachers": counts["source"]}
        counts.pop("seed", None)
        stores = _stores_read(config)
        plain = {"name": arm.name, "options": arm.options, "counts": counts, "stores": stores}
        arms.append({**plain, "steps": config.optimizer.steps})
        keys.append(training_key(config))
        _refuse_twins(arms, keys)
        remarks += [f"{arm.name}: {remark}" for remark in schedule_remarks(config, 0)]
        foreign = [store for store in stores if store not in captured]
        if SECONDS in study.at and foreign:
            remarks.append(
                f"{arm.name}: reads {', '.join(foreign)}, whose capture is not part of the study nor counted."
            )
    if SECONDS in study.at and study.processes > 1:
        remarks.append(f"{study.processes} runs at a time shared this machine: their seconds a step are of sharing it.")
    return {
        "face": study.face,
        "arms": _as_kept(arms),
        "seeds": list(study.seeds),
        "at": list(study.at),
        "least_gain": study.least_gain,
        "remarks": remarks,
    }


def _dry_run(study: Study, place: StudyFolder) -> int:
    """Say what would be run, with every refusal there is before the first run; nothing but tokenised data is kept."""
    plan = place.merge_plan(_describe(study, place))
    storage.check_writable(str(place.root))
    for one in study.captures:
        check_capture(build_capture_config(one), "shards")
    _check_evaluation(study, place, prepare=False)
    captures = [_capture_state(one, place.read(CAPTURES) or []) for one in study.captures]
    print_ahead(look_ahead(study, place, plan, captures, partial(_options, study, place)))
    return 0


def _refuse_twins(arms: Sequence[Mapping[str, Any]], keys: Sequence[Mapping[str, Any]]) -> None:
    """Refuse the last arm where an earlier one trains in the same way, be their options equal or not."""
    last, key = arms[-1], keys[-1]
    same = next((one for one, other in zip(arms[:-1], keys, strict=False) if other == key), None)
    if same is None:
        return
    was, now = same["counts"], last["counts"]
    differing = [name for name in dict.fromkeys([*was, *now]) if was.get(name) != now.get(name)]
    why = f": what differs plays no part in either ({', '.join(differing)})" if differing else ""
    raise UsageError(
        f"arms {same['name']!r} and {last['name']!r} are the same training{why}",
        remedy="leave one out; where --vary makes every combination, list the arms in the configuration file instead",
    )


def _check_evaluation(study: Study, place: StudyFolder, *, prepare: bool = True) -> None:
    """Refuse an evaluation that cannot be made, before hours of training; the texts are those of the baseline.

    Raises:
        LiquidError: nothing is held out, or nothing of it can be marked.
    """
    if all(place.is_done(one) for one in study.units()):
        return
    config = build_run_config(study.face, _options(study, place, study.units()[0]))
    if prepare and config.data.prepare != "skip":
        prepare_run_data(replace(config.data, prepare="auto"))  # as the first run would, which finds it done
    check_evaluation(config, _evaluation_options(study))


def _evaluation_options(study: Study) -> dict[str, object]:
    return {**{name: study.options[name] for name in _FOR_EVALUATION if name in study.options}, **study.evaluation}


def _as_kept(value: Any) -> Any:
    """Plain values as a study's files have them: as JSON gives them back, and without secrets."""
    return json.loads(json.dumps(mask_words(value, process_masker())))


def _capture_key(options: Mapping[str, object]) -> dict[str, Any]:
    """What tells a capture from others."""
    key: dict[str, Any] = _as_kept({"stores": build_capture_config(options).source.stores, "options": dict(options)})
    return key


def _find_capture(key: Mapping[str, Any], known: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """What is kept of a capture."""
    return next((one for one in known if {name: one[name] for name in key} == key), None)


def _capture_state(options: Mapping[str, object], known: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How far a capture is."""
    key = _capture_key(options)
    mine = _find_capture(key, known)
    state = "never run" if mine is None else "complete" if mine["complete"] else "begun"
    return {"stores": key["stores"], "state": state, "seconds": 0.0 if mine is None else mine["seconds"]}


def _stores_read(config: RunConfig) -> list[str]:
    """The stores whose signal a run uses: one whose weight is 0 at every step asks for none."""
    named = config.source.named.items()
    return list(dict.fromkeys(one.store for type, one in named if one.store is not None and config.weighs(type)))


def _all_units(plan: Mapping[str, Any], place: StudyFolder) -> list[Unit]:
    """All runs that are planned so far."""
    units = [Unit(arm["name"], seed) for seed in plan["seeds"] for arm in plan["arms"]]
    return units + (units_at_seconds(plan, measure_pace(place, plan)) if SECONDS in plan["at"] else [])


# ---------------------------------------------------------------------------------------------------------------- doing


@dataclass
class _Work:
    """What one process does of a study; ``stop`` says that it was asked to stop."""

    study: Study
    place: StudyFolder
    stop: StopSignal

    def train(self, units: Sequence[Unit]) -> None:
        """Take part in these runs until all are done, together with as many other processes as are asked for."""
        lacking = [one for one in units if not self.place.is_done(one)]
        if not lacking:
            return
        context = multiprocessing.get_context("spawn")  # a forked process could not use a GPU
        others = [
            context.Process(target=_help, args=(self.study, self.place, lacking))
            for _ in range(min(self.study.processes, len(lacking)) - 1)
        ]
        for one in others:
            one.start()
        try:
            self.take(lacking)
        except BaseException:
            _end(others)
            raise
        for one in others:
            one.join()

    def take(self, units: Sequence[Unit]) -> None:
        """Run what nobody else does, and wait for what others do: should one of them end, its run is taken up."""
        lacking = list(units)
        while lacking:
            before = len(lacking)
            for unit in list(lacking):
                self.check()
                if self._try(unit.folder, lambda unit=unit: self._train_one(unit)):  # type: ignore[misc]
                    lacking.remove(unit)
            if len(lacking) == before:
                time.sleep(_WAIT_SECONDS)

    def once(self, what: str, work: Callable[[], None]) -> None:
        """Do what one process alone does at a time; the others wait, and see then whether anything is left to do."""
        while not self._try(what, work):
            self.check()
            time.sleep(_WAIT_SECONDS)

    def _try(self, what: str, work: Callable[[], None]) -> bool:
        """Do something under its lock; False where another process holds it."""
        try:
            with self.place.claim(what):
                work()
        except Busy:
            return False
        return True

    def check(self) -> None:
        """Raise Interrupted where the process was asked to stop."""
        if self.stop.requested:
            raise self.stopped()

    def stopped(self) -> Interrupted:
        """What a study ends with that was asked to stop between two runs, or while students are judged."""
        return Interrupted("the study was stopped", where=self.place.root, remedy=_GO_ON)

    def _train_one(self, unit: Unit) -> None:
        if self.place.is_done(unit):
            return
        log.info("study: %s", unit.title)
        try:
            run_training(self.study.face, _options(self.study, self.place, unit))
        except Interrupted as error:
            raise Interrupted(f"the study was stopped in {unit.title}: {error.problem}", remedy=_GO_ON) from None
        except LiquidError:
            log.error("study: %s failed", unit.title)
            raise
        run_dir = self.place.run_dir(unit)
        for name in [path.stem for path in run_dir.glob("*.pt")]:  # optimizer states of many runs fill a disk
            if name != "final":
                with translate_errors(run_dir, writing=True):
                    remove_checkpoint(run_dir, name)
        self.place.mark_done(unit)
        gc.collect()  # models refer to themselves in circles: the next run needs their memory

    def capture(self, number: int) -> None:
        """One of the captures that come before, unless it is complete; what all attempts took is kept."""
        options = self.study.captures[number]
        config = build_capture_config(options)
        key = _capture_key(options)
        known = self.place.read(CAPTURES) or []
        mine = _find_capture(key, known)
        if mine is not None and mine["complete"]:
            return
        mine = mine or {**key, "seconds": 0.0, "complete": False, "begun": 0, "ended": 0}
        # Another one into these stores that is still asked for filled a part of them; one that is not was in its place.
        asked = [_capture_key(one) for one in self.study.captures]
        others = [
            one
            for one in known
            if one is not mine and (one["stores"] != mine["stores"] or {name: one[name] for name in key} in asked)
        ]
        log.info("study: capture into %s", ", ".join(config.source.stores))
        mine["begun"] += 1
        self.place.write(CAPTURES, [*others, mine])
        began = time.monotonic()
        summary = capture_signal(config, "shards")
        mine["seconds"] += time.monotonic() - began
        mine["ended"] += 1
        mine["written"] = mine.get("written", 0) + summary.written
        mine["complete"] = not summary.interrupted
        self.place.write(CAPTURES, [*others, mine])
        if code := exit_code(summary):
            raise DataError("samples could not be captured", where="captures", got=f"exit code {code}")

    def evaluate(self, units: Sequence[Unit]) -> None:
        """Evaluate the students that are not yet, all on what the baseline has held out.

        Where no more than ``answers`` is asked for otherwise than before, the measures stay and the answers alone are
        generated.
        """
        asked = _as_kept(self.study.evaluation)
        known = {one: self.place.evaluation(one) or {} for one in units}
        lacking = [one for one in units if _asked_of_measures(known[one].get("asked")) != _asked_of_measures(asked)]
        self._evaluate(lacking, units, asked, measuring=True)
        lacking = [one for one in units if one not in lacking and known[one]["asked"] != asked]
        self._evaluate(lacking, units, asked, measuring=False)

    def _evaluate(
        self, lacking: Sequence[Unit], units: Sequence[Unit], asked: Mapping[str, Any], *, measuring: bool
    ) -> None:
        baseline = self.study.arms[0].name
        of_baseline = next((one for one in units if one.arm == baseline), units[0])
        while lacking:
            self.check()
            # The first of each group says what is held out, so it is one of the baseline: a new one where there is any.
            first = next((one for one in lacking if one.arm == baseline), of_baseline)
            others = [one for one in lacking if one != first]
            group = [first, *others[: max(1, self._at_once(first) - 1)]]
            what = "evaluate" if measuring else "hear the answers of"
            log.info("study: %s %d students", what, sum(one in lacking for one in group))
            students = [str(self.place.run_dir(one) / FINAL) for one in group]
            with self.stop.raising(self.stopped):  # a group's judgement is kept whole or not at all
                found = evaluate_students(students, _evaluation_options(self.study), measuring=measuring)
            for unit, one in zip(group, found, strict=True):
                self._keep(unit, one.plain(), asked, measuring=measuring)
            lacking = [one for one in lacking if one not in group]
            gc.collect()

    def _keep(self, unit: Unit, found: Mapping[str, Any], asked: Mapping[str, Any], *, measuring: bool) -> None:
        if not measuring:
            there = self.place.evaluation(unit)
            assert there is not None
            measures = {name: value for name, value in there["measures"].items() if name not in _ANSWERS}
            answered = {name: found[name] for name in _ANSWERS}
            found = {**there, **answered, "measures": {**measures, **found["measures"]}}
        self.place.keep_evaluation(unit, _as_kept({**found, "asked": asked}))

    def _at_once(self, unit: Unit) -> int:
        """How many students such as this run's are evaluated together."""
        size = sum(info.size for info in storage.list_files(str(self.place.run_dir(unit) / STUDENT)))
        return min(AT_ONCE, AT_ONCE_BYTES // max(1, size))


def _asked_of_measures(asked: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What was asked of an evaluation besides its answers."""
    return None if asked is None else {name: value for name, value in asked.items() if name not in _OF_ANSWERS}


_ANSWERS = ("answers", "teacher_answers")  # what an evaluation holds of them
_OF_ANSWERS = ("answers", "answer_tokens")  # what is asked of them
_GO_ON = "run the same command again to go on"


def _end(processes: Sequence[BaseProcess]) -> None:
    """Have processes save their runs and end. Asked again and again: a signal between fork and exec is lost."""
    while any(one.is_alive() for one in processes):
        for one in processes:
            one.terminate()
        for one in processes:
            one.join(_ASK_AGAIN_SECONDS)


def _help(study: Study, place: StudyFolder, units: Sequence[Unit]) -> None:
    """A further process: take part in the runs; what goes wrong is said, and ends it with the error's exit code."""
    setup_logging("INFO")
    with go_on_unread(), StopSignal() as stop:
        try:
            _Work(study, place, stop).take(units)
        except LiquidError as error:
            log.error("%s", error)
            raise SystemExit(error.exit_code) from None
