"""``--dry_run``: everything a run needs is looked at, one step is taken on real data, and nothing is kept."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from torch import nn

from liquid_llm import storage
from liquid_llm.checkpoint.discovery import latest_checkpoint
from liquid_llm.config import RunConfig
from liquid_llm.data.tokens import TokenDataset
from liquid_llm.data.types import Sample
from liquid_llm.run.inputs import Inputs
from liquid_llm.run.places import Place
from liquid_llm.runtime import process_peak_memory_bytes
from liquid_llm.teachers.store import StoreReader
from liquid_llm.training import StepResult, StepSchedules

log = logging.getLogger(__name__)

_ADAM_BYTES = 8  # two float32 moments a parameter
_PARAMETER_BYTES = 4
_READERS = 8
_SHOWN_STEPS = 3


def check_place(place: Place) -> dict[str, Any]:
    """Whether the run directory and its mirrors can be written, without leaving a trace; what it would continue.

    Raises:
        StorageError: one of them cannot.
    """
    storage.check_writable(str(place.run_dir))
    elsewhere = {"mirror": place.remote, "tensorboard": place.tensorboard, "model": place.model}
    for uri in elsewhere.values():
        if uri is not None:
            storage.check_writable(uri)
    found = latest_checkpoint(place.run_dir) if place.run_dir.is_dir() else None
    continues = None if found is None else {"checkpoint": str(found.path), "step": found.step}
    return {"run_directory": str(place.run_dir), **elsewhere, "would_continue": continues}


def check_records(stores: Mapping[str, StoreReader], inputs: Inputs, window: int) -> dict[str, dict[str, Any]]:
    """Every sample's stored record, looked up and verified: usable, missing, stale or corrupt by type.

    Raises:
        StorageError: a store cannot be read.
    """
    rows: dict[str, dict[str, Any]] = {}
    for kind, store in stores.items():
        counts: Counter[str] = Counter()
        example: dict[str, str] = {}
        datasets = [source.dataset for source in inputs.sources if source.dataset.type == kind]
        with ThreadPoolExecutor(_READERS, "check") as threads:
            for sample, lookup in threads.map(
                lambda sample, store=store: (sample, store.check(sample, window)),
                _samples([*datasets, *inputs.validation.get(kind, [])]),
            ):
                counts[lookup.status] += 1
                if lookup.status != "usable":
                    example.setdefault(lookup.status, f"{sample.sample_id}: {lookup.reason}")
        total = sum(counts.values())
        rows[kind] = {"samples": total, "coverage": counts["usable"] / total if total else 0.0, **counts}
        if example:
            rows[kind]["examples"] = example
    return rows


def _samples(datasets: Sequence[TokenDataset]) -> Iterator[Sample]:
    for dataset in datasets:
        for index in range(len(dataset)):
            yield dataset.sample(index)


def estimate(config: RunConfig, student: nn.Module, teacher: nn.Module | None) -> dict[str, int]:
    """Bytes a run takes: memory of weights, gradients and moments; a checkpoint; all snapshots kept; all uploads."""
    parameters = sum(one.numel() for one in student.parameters())
    training = parameters * (2 * _PARAMETER_BYTES + _ADAM_BYTES)
    reference = parameters * _PARAMETER_BYTES if config.objective.l2 > 0 else 0
    held = 0 if teacher is None else sum(one.numel() * one.element_size() for one in teacher.parameters())
    checkpoint = parameters * (_PARAMETER_BYTES + _ADAM_BYTES)
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
    return [{"step": step, **vars(schedules.at(step))} for step in range(first, first + _SHOWN_STEPS)]


def print_findings(findings: Mapping[str, Any], result: StepResult) -> None:
    """The dry run's findings and its one step, as one JSON object on standard output."""
    positions = sum(one.output.num_positions for one in result.scored)
    step = {
        "types": [one.batch.type for one in result.scored],
        "tokens": sum(one.batch.num_tokens for one in result.scored),
        "loss": sum(float(one.output.loss.detach()) for one in result.scored) / positions,
        "kd_coverage": sum(one.output.num_signal for one in result.scored) / positions,
        "grad_norm": result.grad_norm,
        "peak_memory_bytes": process_peak_memory_bytes(),
    }
    print(json.dumps({**findings, "one_step": step}, indent=2, default=str))
