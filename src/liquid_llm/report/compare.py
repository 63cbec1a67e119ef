"""Several runs side by side: which they are, what each has come to, in what they differ, and what does not compare.

label    what a run is called here: its folder's name, or where it is below the folder of all that are called so
differ   a value of the configuration that is not the same in all runs; None where a run's files do not have it
remark   something without which the figures would mislead: a quantity that is not one in all runs, a run that is not
         finished, held-out text that is not the same
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from liquid_llm import storage
from liquid_llm.errors import UsageError
from liquid_llm.report.data import RunData, read_run
from liquid_llm.report.facts import (
    Taught,
    dig,
    is_finished,
    span_of,
    student_name,
    taught_by,
    total_steps,
    value_at,
)
from liquid_llm.report.private import hosts_of, without_places
from liquid_llm.report.runs import find_runs, open_run
from liquid_llm.report.summary import ALL, summarise
from liquid_llm.report.tables import flatten

_LOSS = "val_loss_student"
_WHOLE = "the whole distribution"
_NOT_COMPARED = ("given", "dry_run")  # what was typed is compared by what it came to
_OF_MACHINE = ("packages", "python", "git", "choices", "hardware")
_REST_OF_MACHINE = ("hardware.host", "hardware.gpus_reason", "git.reason")


@dataclass(frozen=True)
class Run:
    """One of the runs.

    Attributes:
        label: as the module says.
        where: its path or URL.
    """

    label: str
    where: str
    data: RunData

    @property
    def taught(self) -> dict[str, Taught]:
        """Type -> what taught it."""
        return taught_by(self.data)


def read_runs(places: Sequence[str]) -> list[Run]:
    """The runs at some paths and URLs; a folder that holds several stands for all of them, in the order of their names.

    Raises:
        UsageError: a place holds no run, or there are fewer than two in all.
        StorageError: one cannot be read.
    """
    found: dict[str, None] = {}
    for place in places:
        runs = find_runs(place)
        if not runs:
            with open_run(place):  # says why there is none, or takes what is a run of its provenance alone
                runs = [place]
        found.update(dict.fromkeys(_same(one) for one in runs))
    if len(found) < 2:
        raise UsageError(
            "to compare takes two runs",
            where="liquid compare",
            got=", ".join(found),
            remedy="give another run beside it, or a folder of several; of one alone: liquid report RUN",
        )
    labels = label_runs(list(found))
    return [Run(labels[where], where, read_run(where)) for where in found]


def _same(place: str) -> str:
    """One spelling for one place."""
    return place.rstrip("/") if storage.is_remote(place) else str(storage.local_path(place).resolve())


def label_runs(places: Sequence[str]) -> dict[str, str]:
    """Place -> what the run there is called, for places of which no two are one."""
    by_name: dict[str, list[list[str]]] = {}
    parts = {place: [part for part in place.split("/") if part] for place in places}
    for own in parts.values():
        by_name.setdefault(own[-1], []).append(own)
    return {place: "/".join(own[-_needed(own, by_name[own[-1]]) :]) for place, own in parts.items()}


def _needed(own: Sequence[str], alike: Sequence[Sequence[str]]) -> int:
    """How many parts of a path, from its end, say which of some paths it is."""
    if len(alike) == 1:
        return 1
    shared = next(count for count in range(len(own) + 1) if len({tuple(one[: count + 1]) for one in alike}) > 1)
    shared = min(shared, *(len(one) - 1 for one in alike))
    if shared:
        return len(own) - shared
    counts = (count for count in range(1, len(own)) if sum(one[-count:] == own[-count:] for one in alike) == 1)
    return next(counts, len(own))


def compare_runs(runs: Sequence[Run], without_effect: Iterable[str] = ()) -> dict[str, Any]:
    """What there is to say of several runs, as plain values.

    Args:
        without_effect: values of the configuration, by dotted name, that change no step: where a run is, how it is
            carried out.

    Returns:
        ``runs``, a mapping each; ``differ``, ``differ_without_effect`` and ``differ_in_machine``, name -> a value of
        each run; ``remarks``, sentences; ``common_step``, the last at which all were judged, None where
        that is the end of all or of none; ``kl_compares``, whether KL from the teacher is one quantity.
    """
    common = _common_step(runs)
    config = {run.label: _settings(run) for run in runs}
    differ = _differing(list(config.values()))
    effect = {name: name not in set(without_effect) for name in differ}
    return {
        "runs": [_describe(run, common) for run in runs],
        "differ": {name: values for name, values in differ.items() if effect[name]},
        "differ_without_effect": {name: values for name, values in differ.items() if not effect[name]},
        "differ_in_machine": _differing([_machine(run) for run in runs]),
        "remarks": _remarks(runs),
        "common_step": common,
        "kl_compares": len(signal_groups(runs, None)) < 2,
    }


# ------------------------------------------------------------------------------------------------------------ each run


def _describe(run: Run, common: int | None) -> dict[str, Any]:
    data = run.data
    summary = summarise(data)
    loss = data.evaluation.get(_LOSS)
    best = None if loss is None else int(loss.finite.values.argmin())
    rows = {row["type"]: {key: row[key] for key in row if key != "type"} for row in summary["rows"]}
    for type, row in rows.items():
        prefix = "" if type == ALL else f"{type}/"
        row["perplexity"] = math.exp(min(row["after"], 700.0))
        row["bits_per_byte"] = value_at(data.evaluation.get(f"{prefix}val_bits_per_byte"), math.inf)
    return {
        "run": run.label,
        "where": run.where,
        "finished": is_finished(data),
        "steps": int(span_of(data)[1]),
        "of_steps": total_steps(data),
        "tokens": summary["tokens"],
        "training_seconds": summary["training_seconds"],
        "tokens_per_second": summary["tokens_per_second"],
        "peak_memory_bytes": summary["device_peak_memory_bytes"] or summary["peak_memory_bytes"],
        "student": student_name(data),
        "parameters": dig(data.environment, "parameters"),
        "signal": {type: {"teacher": one.teacher, "codec": one.codec} for type, one in run.taught.items()},
        "best_loss": None if loss is None or best is None else float(loss.finite.values[best]),
        "best_step": None if loss is None or best is None else int(loss.finite.steps[best]),
        "loss_at_common_step": None if common is None else value_at(loss, common, exactly=True),
        "by_type": rows,
    }


def _common_step(runs: Sequence[Run]) -> int | None:
    judged = [run.data.evaluation.get(_LOSS) for run in runs]
    steps = [set(one.finite.steps.tolist()) for one in judged if one is not None]
    if len({max(one) for one in steps}) == 1:
        return None  # the last figures are of one step
    shared = set.intersection(*steps) if steps and len(steps) == len(runs) else set()
    return int(max(shared)) if shared else None


# --------------------------------------------------------------------------------------------------------- differences


def _settings(run: Run) -> dict[str, Any]:
    config = run.data.config if isinstance(run.data.config, Mapping) else {}
    return dict(flatten({name: one for name, one in config.items() if name not in _NOT_COMPARED}))


def _machine(run: Run) -> dict[str, Any]:
    """Software, hardware and what was chosen by itself, without names of machines."""
    environment = run.data.environment if isinstance(run.data.environment, Mapping) else {}
    kept = {name: environment[name] for name in _OF_MACHINE if name in environment}
    choices = kept.get("choices")
    if isinstance(choices, Mapping):  # their reasons tell of the machine at that moment
        kept["choices"] = {name: dig(one, "value") for name, one in choices.items()}
    return {name: one for name, one in flatten(kept) if name not in _REST_OF_MACHINE}


def _differing(settings: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    names = dict.fromkeys(name for one in settings for name in one)
    found = {name: [one.get(name) for one in settings] for name in names}
    return {name: values for name, values in found.items() if len({_key(value) for value in values}) > 1}


def _key(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def for_page(runs: Sequence[Run], differ: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
    """The same differences without paths and machines' names; paths of one last part are told apart by numbers."""
    hosts = frozenset[str]().union(*(hosts_of(run.data.environment) for run in runs))
    shown = {}
    for name, values in differ.items():
        short = without_places(list(values), hosts)
        wholes: dict[str, dict[str, int]] = {}
        for whole, one in zip(values, short, strict=True):
            wholes.setdefault(_key(one), {}).setdefault(_key(whole), len(wholes.get(_key(one), {})) + 1)
        shown[name] = [
            f"{one} ({wholes[_key(one)][_key(whole)]})" if len(wholes[_key(one)]) > 1 else one
            for whole, one in zip(values, short, strict=True)
        ]
    return shown


# ------------------------------------------------------------------------------------------------------- comparability


def signal_groups(runs: Sequence[Run], type: str | None) -> dict[str, list[int]]:
    """What KL from the teacher is measured against -> the numbers of the runs where it is that.

    One group means that the figures compare. Whole distributions are one thing, however they were come by; what a
    codec keeps of them is another for each codec and its options.

    Args:
        type: the type; None for all of a run together.
    """
    groups: dict[tuple[Any, ...], list[int]] = {}
    names: dict[tuple[Any, ...], str] = {}
    for number, run in enumerate(runs):
        column = "val_kd" if type is None else f"{type}/val_kd"
        if run.data.evaluation.get(column) is None:
            continue
        types = [one for one in run.data.evaluation.types if f"{one}/val_kd" in run.data.evaluation.series]
        own = {one: _measured(run.taught.get(one)) for one in (types if type is None else [type])}
        key = tuple(sorted(own.items()))
        groups.setdefault(key, []).append(number)
        names[key] = _name_group(own)
    titles = [names[key] for key in groups]
    return {
        title if titles.count(title) == 1 else f"{title} ({place + 1})": groups[key]
        for place, (key, title) in enumerate(zip(groups, titles, strict=True))
    }


def _measured(taught: Taught | None) -> tuple[str, str, str]:
    """Teacher, its content, and what is known of its distribution."""
    if taught is None:
        return "an unknown teacher", "", "signal"
    whole = taught.codec is None or taught.codec.partition(" ")[0] == "full"
    return (
        taught.teacher or "an unknown teacher",
        str(taught.identity[1]),
        _WHOLE if whole else f"{taught.codec} signal",
    )


def _name_group(own: Mapping[str, tuple[str, str, str]]) -> str:
    kinds: dict[str, list[str]] = {}
    for type, (teacher, _, kept) in own.items():
        kinds.setdefault(f"{kept} of {teacher}", []).append(type)
    if len(kinds) == 1:
        return next(iter(kinds))
    return "; ".join(f"{', '.join(types)}: {kind}" for kind, types in kinds.items())


def _remarks(runs: Sequence[Run]) -> list[str]:
    remarks = []
    for run in runs:
        if not run.data.num_rows:
            remarks.append(f"{run.label} has no metrics yet: there is nothing of it to draw.")
        elif not is_finished(run.data):
            of = total_steps(run.data)
            steps = f"{span_of(run.data)[1]:,.0f}{f' of {of:,}' if of is not None else ''}"
            remarks.append(f"{run.label} is not finished: its figures are of step {steps}.")
        if run.data.num_rows and run.data.evaluation.get(_LOSS) is None:
            remarks.append(f"{run.label} was never judged on held-out text: it has no validation loss.")
    remarks += _about_signal(runs)
    remarks += _about_text(runs)
    if not all(isinstance(run.data.config, Mapping) for run in runs):
        without = [run.label for run in runs if not isinstance(run.data.config, Mapping)]
        remarks.append(f"No configuration was kept of {', '.join(without)}: what differs there is not known.")
    return remarks


def _about_signal(runs: Sequence[Run]) -> list[str]:
    types = dict.fromkeys(type for run in runs for type in run.data.evaluation.types)
    apart = {type: groups for type in types if len(groups := signal_groups(runs, type)) > 1}
    by_words: dict[str, list[str]] = {}
    for type, groups in apart.items():
        words = "; ".join(
            f"{', '.join(runs[number].label for number in numbers)}: {kind}" for kind, numbers in groups.items()
        )
        by_words.setdefault(words, []).append(type)
    remarks = [
        f"KL from the teacher of {', '.join(several)} is not one quantity and does not compare ({words})."
        for words, several in by_words.items()
    ]
    judged = [set(run.data.evaluation.types) for run in runs if run.data.evaluation.types]
    if judged and any(one != judged[0] for one in judged):
        shared = set.intersection(*judged)
        words = f"of both kinds are {', '.join(sorted(shared))}" if shared else "they share none"
        remarks.append(f"Not all are judged on the same types ({words}): figures of all types together do not compare.")
    return remarks


def _about_text(runs: Sequence[Run]) -> list[str]:
    """Of held-out text and tokens, what is not the same; as far as the runs' files tell."""
    found = [_text_of(run) for run in runs if run.data.num_rows]
    apart = [
        name
        for name in dict.fromkeys(name for one in found for name in one)
        if len({_key(one[name]) for one in found if one.get(name) is not None}) > 1
    ]
    remarks = []
    if "tokenizer" in apart:
        remarks.append(
            "The runs have different tokenizers: a token is not one thing, so nats a token do not compare; "
            "bits a byte do (--eval_measures)."
        )
    others = [name for name in apart if name != "tokenizer"]
    if others:
        remarks.append(f"Held-out text is not the same in all runs ({', '.join(others)}): losses compare with care.")
    return remarks


def _text_of(run: Run) -> dict[str, Any]:
    last: Mapping[str, Any] = run.data.checkpoints[-1] if run.data.checkpoints else {}
    order = dig(last, "run", "order")
    data = dig(order, "data")
    fingerprints = {str(dig(one, "type")): dig(one, "fingerprint") for one in data} if isinstance(data, list) else None
    every = run.data.evaluation
    positions = {type: value_at(every.get(f"{type}/positions"), math.inf) for type in every.types}
    return {
        "tokenizer": dig(last, "tokenizer_hash"),
        "data": fingerprints,
        "share held out": dig(run.data.config, "data", "val_fraction"),
        "context": last.get("block_size"),
        "tokens judged": positions if positions and not any(map(_missing, positions.values())) else None,
    }


def _missing(value: float | None) -> bool:
    return value is None or not np.isfinite(value)
