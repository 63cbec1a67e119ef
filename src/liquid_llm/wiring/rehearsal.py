"""What a dry run measures: two steps, an evaluation of the largest batches, writing to the disk; and what follows.

The first step pays for what is done once (compiled kernels, moments); the second is timed. Evaluation is scaled from
what was scored to all validation batches, saves from what was written to the size of a checkpoint.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from liquid_llm.config import RunConfig
from liquid_llm.device import device_memory
from liquid_llm.evaluation import Evaluator
from liquid_llm.training import StepResult, Student, Trainer
from liquid_llm.wiring.speech import Speech

_WRITTEN_BYTES = 128 * 2**20
_SPOKEN = 16  # prompts, as many as are computed together


@dataclass(frozen=True)
class Rehearsal:
    """What was measured.

    Attributes:
        first, second: the two steps.
        step_seconds: of the second.
        eval_seconds: of a whole evaluation; None where nothing is held out.
        save_seconds: of a checkpoint.
        device_peak_bytes: most bytes of tensors that the device held; None where it does not tell.
    """

    first: StepResult
    second: StepResult
    step_seconds: float
    eval_seconds: float | None
    save_seconds: float
    device_peak_bytes: int | None


def rehearse(
    trainer: Trainer,
    evaluator: Evaluator,
    speech: Speech,
    folder: Path,
    checkpoint_bytes: int,
    clock: Callable[[], float] = time.monotonic,
) -> Rehearsal:
    """Take two steps, score and answer one batch of each kind, write to ``folder``; the student is changed.

    Raises:
        LiquidError: whatever the run itself would end with.
    """
    device = trainer.student.device
    first = trainer.step()
    _wait(device)
    began = clock()
    second = trainer.step()
    _wait(device)
    step_seconds = clock() - began
    eval_seconds = _evaluation(trainer.student, evaluator, clock)
    if eval_seconds is not None:
        eval_seconds += speaking_seconds(trainer.student, speech, clock)
    held = device_memory(device)
    return Rehearsal(
        first,
        second,
        step_seconds,
        eval_seconds,
        write_seconds(folder, checkpoint_bytes, clock),
        None if held is None else held.peak_bytes,
    )


def _evaluation(student: Student, evaluator: Evaluator, clock: Callable[[], float]) -> float | None:
    """Seconds of a whole evaluation, from that of the largest batch of each type and length."""
    batches = [those for by_type in evaluator.sets.values() for those in by_type.values()]
    if not batches:
        return None
    evaluator.probe(student)
    _wait(student.device)
    began = clock()
    evaluator.probe(student)
    _wait(student.device)
    scored = sum(max(batch.padded_tokens for batch in those) for those in batches)
    return (clock() - began) * sum(batch.padded_tokens for those in batches for batch in those) / scored


def speaking_seconds(student: Student, speech: Speech, clock: Callable[[], float]) -> float:
    """Seconds of all samples and answers of an evaluation, from those of their first batch."""
    seconds = 0.0
    few = speech.first(_SPOKEN)
    for everything, some, say in (
        (speech.prompts, few.prompts, lambda: few.sample(student)),
        (speech.questions, few.questions, lambda: few.add_answers(student, {"by_type": {}})),
    ):
        if some:
            began = clock()
            say()
            _wait(student.device)
            seconds += (clock() - began) * len(everything) / len(some)
    return seconds


def write_seconds(folder: Path, size: int, clock: Callable[[], float] = time.monotonic) -> float:
    """Seconds that ``size`` bytes take to be on the disk of ``folder``, from writing at most 128 MiB of them."""
    written = min(size, _WRITTEN_BYTES)
    path = folder / "written"
    block = os.urandom(2**20)  # a disk that compresses must not look faster than it is
    began = clock()
    with path.open("wb") as file:
        for start in range(0, written, len(block)):
            file.write(block[: written - start])
        file.flush()
        os.fsync(file.fileno())
    seconds = clock() - began
    path.unlink()
    return seconds * size / written if written else 0.0


def time_to_the_end(config: RunConfig, first_step: int, fresh: bool, found: Rehearsal) -> dict[str, float | int]:
    """How long the run will take from here: steps, evaluations, and what is waited for of its saves.

    Steps go on while a save is written: only what the steps up to the next one leave of it is waited for, and the last.
    """
    steps = max(0, config.optimizer.steps - first_step)
    evaluations = _times(config.evaluation.every_steps, first_step, config.optimizer.steps) + fresh
    saves = _times(config.output.save_every_steps, first_step, config.optimizer.steps)
    if found.eval_seconds is None:
        evaluations = 0
    beside = config.output.save_every_steps * found.step_seconds
    waited = max(0, saves - 1) * max(0.0, found.save_seconds - beside) + (found.save_seconds if saves else 0.0)
    parts = {
        "training_seconds": steps * found.step_seconds,
        "evaluation_seconds": evaluations * (found.eval_seconds or 0.0),
        "saving_seconds": waited,
    }
    counts = {"steps": steps, "evaluations": evaluations, "saves": saves}
    return {**counts, **parts, "seconds": sum(parts.values())}


def _times(every: int, first: int, last: int) -> int:
    """How often something is done after steps ``first`` to ``last``: after every ``every``-th, and at the end."""
    if last <= first:
        return 0
    regular = last // every - first // every if every else 0
    return regular + (not every or last % every > 0)


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)
