"""``liquid study --dry_run``: what would be run, what it shares, and how long it takes.

Seconds of a step are those of an arm's finished runs, else of the second of two steps that are tried now. An arm whose
store is yet to be captured cannot be tried, and its time, as that of the capture itself, is said to be unknown.
"""

from __future__ import annotations

import gc
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from liquid_llm.checkpoint.discovery import latest_checkpoint
from liquid_llm.config import RunConfig, build_run_config
from liquid_llm.formatting import format_seconds
from liquid_llm.jobs.train import try_training
from liquid_llm.metrics import read_metrics
from liquid_llm.study.folder import StudyFolder
from liquid_llm.study.plan import SECONDS, Study, Unit
from liquid_llm.study.results import measure_pace, units_at_seconds
from liquid_llm.terminal import print_facts
from liquid_llm.wiring.inputs import token_cache

log = logging.getLogger(__name__)

MEASURED, TRIED, UNKNOWN = "finished runs", "two steps tried now", "unknown: its store is captured first"


@dataclass(frozen=True)
class _Rate:
    """What a step takes, and what evaluations and saves add to each; None: not known."""

    step_seconds: float | None
    beside: float
    source: str
    memory: str | None = None

    def seconds(self, steps: int) -> float | None:
        return None if self.step_seconds is None else steps * (self.step_seconds + self.beside)


def look_ahead(
    study: Study,
    place: StudyFolder,
    plan: Mapping[str, Any],
    captures: Sequence[Mapping[str, Any]],
    options: Callable[[Unit], dict[str, object]],
) -> dict[str, Any]:
    """What would be run, as plain values; two steps of each arm that has no finished run are taken on real data.

    Args:
        plan: what is planned, with what is asked for now.
        captures: each with ``stores``, ``state`` (``complete``, ``begun`` or ``never run``) and ``seconds``.
        options: of a run.

    Raises:
        LiquidError: whatever a run of the study would be refused for.
    """
    pending = {store for one in captures if one["state"] != "complete" for store in one["stores"]}
    arms = [arm for arm in plan["arms"] if any(arm["name"] == one.name for one in study.arms)]
    known = measure_pace(place, plan).seconds
    rates = {}
    for arm in arms:
        own = [Unit(arm["name"], seed) for seed in study.seeds]
        rates[arm["name"]] = _rate(place, study.face, own, known, bool(pending & set(arm["stores"])), options)
    tried = {name: one.step_seconds for name, one in rates.items() if one.step_seconds is not None}
    pace = measure_pace(place, plan, tried)
    further = [one for one in units_at_seconds(plan, pace) if one.seed in study.seeds] if SECONDS in study.at else []
    units = [_describe_unit(place, pace.steps, rates, one) for one in (*study.units(), *further)]
    lacking = [one for one in units if not one["done"]]
    seconds = [one["seconds"] for one in lacking if one["seconds"] is not None]
    baseline = study.arms[0].name
    first = build_run_config(study.face, options(study.units()[0]))
    return {
        "folder": str(place.root),
        "baseline": baseline,
        "arms": [_describe_arm(arm, rates[arm["name"]], units) for arm in arms],
        "captures": list(captures),
        "units": units,
        "at_seconds_unknown": [
            name for name in rates if SECONDS in study.at and name != baseline and name not in pace.at_seconds
        ],
        "shared": _describe_shared(first, arms),
        "remarks": plan["remarks"],
        "processes": study.processes,
        "seconds": sum(seconds) / min(study.processes, max(1, len(lacking))),
        "without": _not_counted(captures, lacking),
    }


def _rate(
    place: StudyFolder,
    face: str,
    units: Sequence[Unit],
    known: Mapping[str, float],
    waits: bool,
    options: Callable[[Unit], dict[str, object]],
) -> _Rate:
    """What an arm's steps take, from its finished runs or from two steps of the first that is not."""
    arm, done = units[0].arm, [one for one in units if place.is_done(one)]
    if arm in known and done:
        rows = [row for row in read_metrics(place.run_dir(done[0])) if row.get("kind") == "eval"]
        steps = max((row["step"] for row in rows), default=0)
        beside = sum(row.get("eval_seconds", 0.0) for row in rows) / steps if steps else 0.0
        return _Rate(known[arm], beside, MEASURED)
    if waits:
        return _Rate(None, 0.0, UNKNOWN)
    log.info("study: try two steps of %s", arm)
    found, fit = try_training(face, options(next(one for one in units if not place.is_done(one))))
    gc.collect()  # models refer to themselves in circles: the next arm's need their memory
    left = found["time_to_the_end"]
    beside = (left["evaluation_seconds"] + left["saving_seconds"]) / max(1, left["steps"])
    return _Rate(found["timed_step"]["seconds"], beside, TRIED, fit.line.removeprefix("memory: "))


def _describe_unit(
    place: StudyFolder, steps: Mapping[str, int], rates: Mapping[str, _Rate], unit: Unit
) -> dict[str, Any]:
    """A run: how many steps it lacks, and the seconds that these take; None: not known."""
    total = unit.steps or steps[unit.arm]
    run_dir, done = place.run_dir(unit), place.is_done(unit)
    begun = latest_checkpoint(run_dir) if run_dir.is_dir() and not done else None
    step = total if done else 0 if begun is None else begun.step
    seconds = rates[unit.arm].seconds(total - step)
    about = {"arm": unit.arm, "seed": unit.seed, "steps": total, "at": "tokens" if unit.steps is None else SECONDS}
    return {**about, "done": done, "step": step, "seconds": seconds}


def _describe_arm(arm: Mapping[str, Any], rate: _Rate, units: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    own = [one for one in units if one["arm"] == arm["name"] and one["at"] == "tokens"]
    return {
        "name": arm["name"],
        "options": arm["options"],
        "steps": arm["steps"],
        "stores": arm["stores"],
        "seeds": [one["seed"] for one in own],
        "done": sum(one["done"] for one in own),
        "begun": sum(not one["done"] and one["step"] > 0 for one in own),
        "step_seconds": rate.step_seconds,
        "run_seconds": rate.seconds(arm["steps"]),
        "from": rate.source,
        "memory": rate.memory,
    }


def _describe_shared(first: RunConfig, arms: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What several runs use that is made once."""
    readers: dict[str, list[str]] = {}
    for arm in arms:
        for store in arm["stores"]:
            readers.setdefault(store, []).append(arm["name"])
    return {"tokens": str(token_cache(first.data)), "stores": readers}


def _not_counted(captures: Sequence[Mapping[str, Any]], lacking: Sequence[Mapping[str, Any]]) -> list[str]:
    """What takes time and is not in the sum."""
    runs = sum(one["seconds"] is None for one in lacking)
    left = sum(one["state"] != "complete" for one in captures)
    return [
        *([f"{runs} runs whose store is captured first"] if runs else []),
        *([f"{left} captures"] if left else []),
        "starting up and the evaluation at the end",
    ]


# ---------------------------------------------------------------------------------------------------------- for people


def print_ahead(findings: Mapping[str, Any]) -> None:
    """A table for people on standard error, one JSON object on standard output."""
    print_facts("dry run of a study: nothing was kept but tokenised data", list(_lines(findings)))
    print(json.dumps(findings, indent=2, default=str))


def _lines(findings: Mapping[str, Any]) -> list[tuple[str, str]]:
    shared = findings["shared"]
    lines = [("study", findings["folder"])]
    lines += [("capture", _say_capture(one)) for one in findings["captures"]]
    for number, arm in enumerate(findings["arms"]):
        lines.append(("baseline" if number == 0 else "arm", _say_arm(arm)))
        if arm["memory"] is not None:
            lines.append(("  memory", arm["memory"]))
    further = [one for one in findings["units"] if one["at"] == SECONDS]
    for steps in dict.fromkeys(one["steps"] for one in further):
        seeds = [one for one in further if one["steps"] == steps]
        done = sum(one["done"] for one in seeds)
        lines.append(("equal seconds", f"the baseline for about {steps:,} steps: {len(seeds)} seeds, {done} done"))
    for name in findings["at_seconds_unknown"]:
        lines.append(("equal seconds", f"further runs of the baseline for {name}: how long is not known yet"))
    lines.append(("shared", f"tokenised texts in {shared['tokens']}"))
    lines += [("shared", f"{store}: read by {', '.join(arms)}") for store, arms in shared["stores"].items()]
    lines += [("note", one) for one in findings["remarks"]]
    lacking = sum(not one["done"] for one in findings["units"])
    slower = ", each as fast as if it were alone, which it is not on one machine"
    at_once = f", {findings['processes']} at a time{slower}" if findings["processes"] > 1 else ""
    about = f"about {format_seconds(findings['seconds'])} for {lacking} runs{at_once}" if lacking else "no run is left"
    lines.append(("to the end", f"{about}; not counted: {', '.join(findings['without'])}"))
    return lines


def _say_capture(capture: Mapping[str, Any]) -> str:
    took = f", {format_seconds(capture['seconds'])} so far" if capture["seconds"] else ""
    left = "" if capture["state"] == "complete" else "; what is left of it takes an unknown time"
    return f"into {', '.join(capture['stores'])}: {capture['state']}{took}{left}"


def _say_arm(arm: Mapping[str, Any]) -> str:
    seeds = f"seeds {', '.join(map(str, arm['seeds']))}: {arm['done']} done, {arm['begun']} begun"
    if arm["step_seconds"] is None:
        pace = f"seconds a step {arm['from']}"
    else:
        pace = f"{arm['step_seconds']:.3g} s a step, {format_seconds(arm['run_seconds'])} a run ({arm['from']})"
    return f"{arm['name']}: {arm['steps']:,} steps; {seeds}; {pace}"
