"""From runs and evaluations to verdicts: ``study.json``, from a study's files alone.

row       one run: its arm, seed and steps, what it cost, and each measure of its student
verdict   an arm against the baseline by one measure, for all texts or those of one type, at equal tokens or seconds
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import replace as with_changes
from typing import Any

import numpy as np
from numpy.typing import NDArray

from liquid_llm.errors import DataError
from liquid_llm.metrics import read_metrics
from liquid_llm.study.folder import CAPTURES, PACE, VERSION, StudyFolder
from liquid_llm.study.pace import scale_steps, share_captures, step_seconds
from liquid_llm.study.plan import SECONDS, TOKENS, Unit
from liquid_llm.study.verdict import MEASURES, Measure, compare

Floats = NDArray[np.float64]
ALL = "all"  # types together
WEIGHTS = {"ce": "positions", "kl": "kl_positions", "agreement": "agreement_positions", "overlap": "teacher_positions"}
"""A measure's sums, and the positions they are over, in the rows of an evaluation's texts."""


@dataclass(frozen=True)
class Pace:
    """What the arms cost.

    Attributes:
        seconds: arm -> of a step.
        captures: arm -> its share of the captures.
        steps: arm -> its own steps.
        at_seconds: arm -> the steps in which the baseline takes as long.
    """

    seconds: Mapping[str, float]
    captures: Mapping[str, float]
    steps: Mapping[str, int]
    at_seconds: Mapping[str, int]

    def total(self, arm: str) -> float:
        """Seconds of an arm: of its steps, and its share of the captures."""
        return self.seconds[arm] * self.steps[arm] + self.captures[arm]


def measure_pace(folder: StudyFolder, plan: Mapping[str, Any], expected: Mapping[str, float] | None = None) -> Pace:
    """What the arms cost, from the rows of their runs; how long the baseline trains for each is kept once it is known,
    so that the same study asks for the same runs whenever it goes on.

    Args:
        expected: arm -> seconds of a step, of arms without a finished run.
    """
    arms = {arm["name"]: arm for arm in plan["arms"]}
    baseline = next(iter(arms))
    captures = share_captures(folder.read(CAPTURES) or [], {name: arm["stores"] for name, arm in arms.items()})
    seconds = dict(expected or {})
    for name in arms:
        units = [Unit(name, seed) for seed in plan["seeds"]]
        found = step_seconds([folder.run_dir(one) for one in units if folder.is_done(one)])
        if found is not None:
            seconds[name] = found
    steps = {name: int(arm["steps"]) for name, arm in arms.items()}
    kept: dict[str, int] = {name: one for name, one in (folder.read(PACE) or {}).items() if name in arms}
    pace = Pace(seconds, captures, steps, kept)
    for name in arms:
        if name != baseline and name not in kept and {name, baseline} <= seconds.keys():
            left = pace.total(name) - captures[baseline]  # it pays for what it reads, as the arm does
            kept[name] = scale_steps(steps[baseline], seconds[baseline], left, list(kept.values()))
    return pace


def units_at_seconds(plan: Mapping[str, Any], pace: Pace) -> list[Unit]:
    """The further runs of the baseline, a seed after the other; none where an arm takes as long as it does."""
    baseline = plan["arms"][0]["name"]
    lengths = sorted({steps for steps in pace.at_seconds.values() if steps != pace.steps[baseline]})
    return [Unit(baseline, seed, steps) for seed in plan["seeds"] for steps in lengths]


def baseline_unit(plan: Mapping[str, Any], pace: Pace, arm: str, seed: int, at: str) -> Unit:
    """The run of the baseline that an arm's run is compared with."""
    baseline = plan["arms"][0]["name"]
    steps = None if at == TOKENS else pace.at_seconds[arm]
    return Unit(baseline, seed, None if steps == pace.steps[baseline] else steps)


# ------------------------------------------------------------------------------------------------------------- pairing


def judge_arms(folder: StudyFolder, plan: Mapping[str, Any], pace: Pace) -> tuple[list[dict[str, Any]], list[str]]:
    """Verdicts of all arms but the baseline, as plain values, and what is to be said of those that cannot be made.

    Raises:
        DataError: evaluations of other texts than the baseline's.
    """
    found, remarks = [], []
    baseline, *others = (arm["name"] for arm in plan["arms"])
    for arm in others:
        for at in plan["at"]:
            if at == SECONDS and arm not in pace.at_seconds:
                continue
            pairs = [
                (folder.evaluation(Unit(arm, seed)), folder.evaluation(baseline_unit(plan, pace, arm, seed, at)))
                for seed in plan["seeds"]
            ]
            there = [(one, other) for one, other in pairs if one is not None and other is not None]
            if len(there) < len(pairs):
                remarks.append(
                    f"{arm}, at equal {at}: {len(pairs) - len(there)} of {len(pairs)} seeds are not done yet."
                )
            if not there:
                continue
            steps = baseline_unit(plan, pace, arm, 0, at).steps or pace.steps[baseline]
            about = {"arm": arm, "at": at, "baseline_steps": steps}
            for type, measure, values in pair_evaluations(there, f"{arm} and {baseline}", remarks):
                least = with_changes(measure, least_gain=plan["least_gain"])
                found.append({**about, "type": type, **compare(*values, least).as_dict()})
    return found, list(dict.fromkeys(remarks))


def pair_evaluations(
    pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]], who: str, remarks: list[str]
) -> Iterator[tuple[str, Measure, tuple[Floats, Floats, Floats]]]:
    """Type, measure, and sums [seeds, texts] of both with weights [texts], of whatever both were measured by."""
    tables = [[_sums_by_text(one) for one in pair] for pair in pairs]
    names = list(tables[0][0])
    if any(set(one) != set(names) for pair in tables for one in pair):
        raise DataError(
            f"{who} were evaluated on different texts",
            remedy="remove evaluations/ in the study's folder and run the study again: they are made again",
        )
    marked = [[_rights(one) for one in pair] for pair in pairs]
    for key, measure in MEASURES.items():
        if key == "answers":
            prompts = list(marked[0][0])
            if not prompts or any(set(one) != set(prompts) for pair in marked for one in pair):
                continue
            for type in _types(prompts):
                chosen = [one for one in prompts if type in (ALL, one[0])]
                first, second = (np.array([[pair[n][one] for one in chosen] for pair in marked]) for n in (0, 1))
                yield type, measure, (first, second, np.ones(len(chosen)))
            continue
        weight = WEIGHTS[key]
        for type in _types(names):
            chosen = [one for one in names if type in (ALL, one[0]) and tables[0][0][one].get(weight)]
            every = np.array([[[one[text].get(weight, 0) for text in chosen] for one in pair] for pair in tables])
            if (every != every[:1, :1]).any():
                remarks.append(f"{who}: {measure.title} is over different positions and is not compared.")
            elif chosen:
                first, second = (np.array([[pair[n][text][key] for text in chosen] for pair in tables]) for n in (0, 1))
                yield type, measure, (first, second, every[0, 0].astype(np.float64))


def _types(names: Sequence[tuple[str, str]]) -> list[str]:
    """All together, and each of several."""
    types = list(dict.fromkeys(type for type, _ in names))
    return [ALL, *(types if len(types) > 1 else [])]


def _sums_by_text(evaluation: Mapping[str, Any]) -> dict[tuple[str, str], dict[str, float]]:
    """(type, id) -> the sums of a text."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    for row in evaluation["texts"]:
        sums = found.setdefault((row["type"], row["id"]), {})
        for key in (*WEIGHTS, *WEIGHTS.values()):
            if row.get(key) is not None:
                sums[key] = sums.get(key, 0.0) + row[key]
    return found


def _rights(evaluation: Mapping[str, Any]) -> dict[tuple[str, str], float]:
    """(type, id) of a prompt -> 1 where its answer is right, else 0."""
    return {(row["type"], row["id"]): float(row["right"]) for row in evaluation.get("answers") or []}


# -------------------------------------------------------------------------------------------------------------- result


def summarise(folder: StudyFolder) -> dict[str, Any]:
    """What ``study.json`` holds.

    Raises:
        DataError, UsageError: the folder's files cannot be used.
    """
    plan = folder.plan()
    pace = measure_pace(folder, plan)
    verdicts, remarks = judge_arms(folder, plan, pace)
    arms = [_describe_arm(plan, pace, arm) for arm in plan["arms"]]
    units = [Unit(arm["name"], seed) for arm in plan["arms"] for seed in plan["seeds"]]
    if SECONDS in plan["at"]:
        units += units_at_seconds(plan, pace)
    return {
        "version": VERSION,
        "baseline": plan["arms"][0]["name"],
        "seeds": plan["seeds"],
        "at": plan["at"],
        "arms": arms,
        "captures": folder.read(CAPTURES) or [],
        "verdicts": verdicts,
        "comparisons": len(verdicts),
        "by_chance": round(len(verdicts) * 0.025, 2),
        "sentences": [_sentence(arm, verdicts, pace) for arm in arms[1:]],
        "remarks": [*plan["remarks"], *remarks, *_say_tokens(folder, plan), *_say_captures(folder)],
        "runs": [_describe_run(folder, one, pace) for one in units if folder.is_done(one)],
        "curves": {arm["name"]: _curve(folder, plan, arm["name"]) for arm in plan["arms"]},
    }


def _describe_arm(plan: Mapping[str, Any], pace: Pace, arm: Mapping[str, Any]) -> dict[str, Any]:
    name = arm["name"]
    seconds = pace.seconds.get(name)
    return {
        "name": name,
        "options": arm["options"],
        "steps": pace.steps[name],
        "seconds_per_step": seconds,
        "capture_seconds": pace.captures[name],
        "seconds": None if seconds is None else pace.total(name),
        "baseline_steps_at_seconds": pace.at_seconds.get(name),
    }


def _describe_run(folder: StudyFolder, unit: Unit, pace: Pace) -> dict[str, Any]:
    evaluation = folder.evaluation(unit) or {}
    measures = evaluation.get("measures") or {}
    return {
        "arm": unit.arm,
        "seed": unit.seed,
        "steps": unit.steps or pace.steps[unit.arm],
        "folder": f"runs/{unit.folder}",
        "tokens": _tokens_seen(folder, unit),
        "seconds_per_step": step_seconds([folder.run_dir(unit)]),
        "all": _values(measures.get("all")),
        "by_type": {type: _values(one) for type, one in (measures.get("by_type") or {}).items()},
        **_marks(evaluation),
    }


def _values(figures: Mapping[str, Any] | None) -> dict[str, float]:
    """The figures of an evaluation without their errors."""
    return {name: one["value"] for name, one in (figures or {}).items() if isinstance(one, Mapping) and "value" in one}


def _marks(evaluation: Mapping[str, Any]) -> dict[str, int]:
    rights = _rights(evaluation)
    return {"answers": len(rights), "right": int(sum(rights.values()))} if rights else {}


def _tokens_seen(folder: StudyFolder, unit: Unit) -> int | None:
    seen = [row["tokens_seen"] for row in read_metrics(folder.run_dir(unit)) if row.get("tokens_seen") is not None]
    return max(seen, default=None)


def _say_tokens(folder: StudyFolder, plan: Mapping[str, Any]) -> list[str]:
    """Of arms that saw other numbers of tokens than the baseline, where they are compared at equal ones."""
    if TOKENS not in plan["at"]:
        return []
    baseline, *others = (arm["name"] for arm in plan["arms"])
    remarks = []
    for seed in plan["seeds"]:
        usual = _tokens_seen(folder, Unit(baseline, seed))
        for arm in others:
            seen = _tokens_seen(folder, Unit(arm, seed))
            if usual and seen and abs(seen - usual) > 0.01 * usual:
                remarks.append(f"{arm} trained on {seen / usual:.2f} times the baseline's tokens: these are not equal.")
    return list(dict.fromkeys(remarks))


def _say_captures(folder: StudyFolder) -> list[str]:
    """Of captures whose cost is not known as a whole."""
    found = []
    for one in folder.read(CAPTURES) or []:
        name = ", ".join(one["stores"])
        if one["begun"] > one["ended"]:
            found.append(
                f"The capture into {name} was killed or failed once: what it had taken until then is not counted."
            )
        if one["complete"] and not one["written"]:
            found.append(f"All of {name} was there before the study: what its capture took is not known nor counted.")
    return found


def _sentence(arm: Mapping[str, Any], verdicts: Sequence[Mapping[str, Any]], pace: Pace) -> str:
    """The verdict on an arm, by held-out cross-entropy over all texts."""
    parts = []
    for one in verdicts:
        if (one["arm"], one["type"], one["measure"]) != (arm["name"], ALL, "ce"):
            continue
        cost = ""
        if one["at"] == SECONDS:
            share = arm["capture_seconds"]
            counted = f", its share of the captures, {share:,.0f} s, counted" if share else ""
            cost = f" (the baseline with {one['baseline_steps']:,} steps{counted})"
        parts.append(f"at equal {one['at']}{cost} {one['sentence']}")
    return f"{arm['name']}: {' '.join(part[:1].upper() + part[1:] for part in parts) or 'nothing is evaluated yet.'}"


def _curve(folder: StudyFolder, plan: Mapping[str, Any], arm: str) -> list[dict[str, Any]]:
    """The evaluations of an arm's runs while training: means over the seeds that have them, by step."""
    by_step: dict[int, list[Mapping[str, Any]]] = {}
    for seed in plan["seeds"]:
        for row in read_metrics(folder.run_dir(Unit(arm, seed))):
            if row.get("kind") == "eval":
                by_step.setdefault(row["step"], []).append(row)
    return [{"step": step, "seeds": len(rows), **_mean_of(rows)} for step, rows in sorted(by_step.items())]


def _mean_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    means: dict[str, Any] = {}
    for name in ("val_loss_student", "val_kd"):
        values = [row[name] for row in rows if row.get(name) is not None]
        if values:
            means[name] = sum(values) / len(values)
    types = dict.fromkeys(type for row in rows for type in row.get("by_type") or {})
    means["by_type"] = {
        type: {
            name: float(np.mean([v for row in rows if (v := row["by_type"].get(type, {}).get(name)) is not None]))
            for name in ("val_loss", "val_kd")
            if any(row["by_type"].get(type, {}).get(name) is not None for row in rows)
        }
        for type in types
    }
    return means
