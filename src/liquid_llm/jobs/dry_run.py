"""``--dry_run``: everything a run needs is looked at and two steps are taken on real data.

Nothing is kept but the cache of tokenised data, which the run then need not make again.

What was found is printed twice: as a table for people on standard error, as one JSON object for programs on standard
output.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from liquid_llm import storage
from liquid_llm.config import RunConfig
from liquid_llm.formatting import format_bytes, format_counts, format_seconds
from liquid_llm.masking import process_masker
from liquid_llm.optimizers import moment_bytes
from liquid_llm.runtime import process_peak_memory_bytes
from liquid_llm.schedules import StepSchedules
from liquid_llm.teachers.router import TeacherRouter
from liquid_llm.terminal import print_facts
from liquid_llm.training import StepResult
from liquid_llm.wiring.fitting import Fit
from liquid_llm.wiring.inputs import Inputs
from liquid_llm.wiring.places import Place
from liquid_llm.wiring.rehearsal import Rehearsal, time_to_the_end
from liquid_llm.wiring.start import Start

log = logging.getLogger(__name__)

_PARAMETER_BYTES = 4
_SHOWN_STEPS = 3


def check_place(place: Place) -> dict[str, Any]:
    """Whether the run directory and its mirrors can be written, without leaving a trace.

    Raises:
        StorageError: one of them cannot.
    """
    storage.check_writable(str(place.run_dir))
    elsewhere = {"mirror": place.remote, "tensorboard": place.tensorboard, "model": place.model}
    for uri in elsewhere.values():
        if uri is not None:
            storage.check_writable(uri)
    return {"run_directory": str(place.run_dir), **elsewhere}


def check_records(teachers: TeacherRouter, inputs: Inputs, window: int) -> dict[str, dict[str, Any]]:
    """Every sample's stored record, looked up and verified: usable, missing, stale or corrupt by type.

    Raises:
        StorageError: a store cannot be read.
    """
    rows: dict[str, dict[str, Any]] = {}
    for type, teacher in teachers.items():
        datasets = [part.dataset for part in inputs.mixture if part.dataset.type == type]
        found = teacher.coverage([*datasets, *inputs.validation.get(type, [])], window, every=True)
        if found is None:
            continue
        share = found.usable / found.samples if found.samples else 0.0
        rows[type] = {"samples": found.samples, "coverage": share, **found.statuses}
        if found.examples:
            rows[type]["examples"] = dict(found.examples)
    return rows


def estimate(
    config: RunConfig, student: nn.Module, optimizer: torch.optim.Optimizer, teachers: Sequence[nn.Module]
) -> dict[str, int]:
    """Bytes a run takes: memory of weights, gradients and moments; a checkpoint; all snapshots kept; all uploads."""
    parameters, moments = sum(one.numel() for one in student.parameters()), moment_bytes(optimizer)
    trained = sum(one.numel() for one in student.parameters() if one.requires_grad)
    training = (parameters + trained) * _PARAMETER_BYTES + moments
    reference = parameters * _PARAMETER_BYTES if config.objective.gamma > 0 and config.student.lora is None else 0
    held = sum(one.numel() * one.element_size() for teacher in teachers for one in teacher.parameters())
    checkpoint = trained * _PARAMETER_BYTES + moments
    every, steps = config.output.save_every_steps, config.optimizer.steps
    saves = 1 + (steps // every if every else 0)
    return {
        "parameters": parameters,
        "memory_weights_gradients_moments_bytes": training + reference,
        "memory_teacher_bytes": held,
        "checkpoint_bytes": checkpoint,
        # best can lie outside the last snapshots; last and final are links to one of them
        "disk_bytes": checkpoint * (min(saves, config.output.keep_last) + 1) + parameters * _PARAMETER_BYTES,
        "upload_bytes": checkpoint * saves + parameters * _PARAMETER_BYTES,
    }


def schedule_values(schedules: StepSchedules, first: int) -> list[dict[str, float]]:
    """What the schedules say for the first steps."""
    return [{"step": step, **schedules.at(step).as_row()} for step in range(first, first + _SHOWN_STEPS)]


def _describe_step(result: StepResult) -> dict[str, Any]:
    batches = [one.batch for one in result.scored]
    return {"types": [one.type for one in batches], "tokens": sum(one.num_tokens for one in batches)}


def describe_pace(config: RunConfig, start: Start, found: Rehearsal) -> dict[str, Any]:
    """What follows from the two steps: speed, time to the end, and what that costs where the price is known."""
    remaining = time_to_the_end(config, start.step, not start.goes_on, found)
    timed, positions = _describe_step(found.second), sum(one.output.num_positions for one in found.first.scored)
    price = config.price_per_hour
    cost = None if price is None else {"price_per_hour": price, "whole_run": price * remaining["seconds"] / 3600}
    return {
        "one_step": {
            **_describe_step(found.first),
            "loss": sum(float(one.output.loss.detach()) for one in found.first.scored) / positions,
            "kd_coverage": sum(one.output.num_signal for one in found.first.scored) / positions,
            "grad_norm": found.first.grad_norm,
            "peak_memory_bytes": process_peak_memory_bytes(),
        },
        "timed_step": {
            **timed,
            "seconds": found.step_seconds,
            "tokens_per_second": timed["tokens"] / found.step_seconds,
        },
        "evaluation_seconds": found.eval_seconds,
        "save_seconds": found.save_seconds,
        "time_to_the_end": remaining,
        "cost": cost,
        "device_peak_memory_bytes": found.device_peak_bytes,
    }


def print_findings(findings: Mapping[str, Any], fit: Fit) -> None:
    """The dry run's findings: a table on standard error, one JSON object on standard output."""
    findings = process_masker().urls(findings)
    print_facts("dry run: nothing was kept but tokenised data", _lines(findings, fit))
    print(json.dumps(findings, indent=2, default=str))


def _lines(findings: Mapping[str, Any], fit: Fit) -> list[tuple[str, str]]:
    place, step, timed = findings["place"], findings["one_step"], findings["timed_step"]
    types, timed_types = " ".join(step["types"]), " ".join(timed["types"])
    remaining, sizes, cost = findings["time_to_the_end"], findings["estimate"], findings["cost"]
    times = {name: remaining[name] for name in ("steps", "evaluations", "saves")}
    lines = [
        ("writes to", ", ".join(str(place[name]) for name in ("run_directory", "mirror") if place[name])),
        ("starts from", f"{findings['starts_from']['source']}, step {findings['starts_from']['step']}"),
    ]
    lines += [(type, format_counts(row)) for type, row in findings["data"].items()]
    lines += [(f"signal of {type}", _words_of_signal(row)) for type, row in findings["signal"].items()]
    lines += [(name, f"{choice['value']} ({choice['reason']})") for name, choice in findings["choices"].items()]
    lines += [
        ("first step", f"loss {step['loss']:.4f}, {types}, {step['kd_coverage']:.0%} with signal"),
        ("second step", f"{timed['seconds']:.3g} s, {timed['tokens_per_second']:,.0f} tokens/s, {timed_types}"),
        ("memory", fit.line.removeprefix("memory: ")),
    ]
    if fit.prediction is not None:
        lines.append(("  most is", fit.largest()))
    if fit.verdict is not None:
        lines += [("  fits with", f"{one.change}: {format_bytes(one.needed_bytes)}") for one in fit.verdict.options]
    lines.append(("  measured", _words_of_peak(findings, fit)))
    lines += [
        ("a checkpoint", format_bytes(sizes["checkpoint_bytes"])),
        ("disk, uploads", f"{format_bytes(sizes['disk_bytes'])}, {format_bytes(sizes['upload_bytes'])}"),
        ("to the end", f"{format_seconds(remaining['seconds'])}: {format_counts(times)}"),
    ]
    if cost is not None:
        lines.append(("cost", f"{cost['whole_run']:,.3g} at {cost['price_per_hour']:g} an hour"))
    return lines


def _words_of_signal(row: Mapping[str, Any]) -> str:
    counts = ", ".join(f"{row[name]:,} {name}" for name in ("usable", "missing", "stale", "corrupt") if row.get(name))
    return f"{row['coverage']:.1%} of {row['samples']:,} samples usable" + (f" ({counts})" if counts else "")


def _words_of_peak(findings: Mapping[str, Any], fit: Fit) -> str:
    peak = findings["device_peak_memory_bytes"]
    if peak is None:
        return "no: this device does not count its tensors"
    predicted = "" if fit.prediction is None else f"; {format_bytes(fit.prediction.peak_bytes)} predicted"
    return f"{format_bytes(peak)} in two steps and an evaluation{predicted}"
