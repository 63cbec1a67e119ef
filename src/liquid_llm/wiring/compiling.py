"""How the device is kept busy: whether the student's blocks are compiled (``--compile``), and doing it, with a trial
before the first step; and the teacher's stream (``--teacher_stream``)."""

from __future__ import annotations

import importlib.util
import logging
import subprocess
import time
import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch

from liquid_llm.data.loader import BlockOrder
from liquid_llm.data.types import IGNORE_INDEX, MicroBatch
from liquid_llm.device import is_lost, release_memory
from liquid_llm.errors import ModelError, UsageError, first_line
from liquid_llm.losses.rows.giving_up import is_compilers
from liquid_llm.models.compiled import INDUCTOR, CompiledBlocks
from liquid_llm.models.heads import blocks_of
from liquid_llm.runtime import Choice
from liquid_llm.streams import SideStream
from liquid_llm.training import Student
from liquid_llm.wiring.parts import Parts
from liquid_llm.wiring.start import Start
from liquid_llm.wiring.teachers import no_stream

log = logging.getLogger(__name__)

# Compiling takes about 40 s and spares about 40 ms of a micro-batch (docs/LOG.md, predicted): fewer are no gain.
GAINING_MICRO_BATCHES = 1000
BACKEND = INDUCTOR

Shapes = Collection[tuple[int, int]]


@dataclass(frozen=True)
class Circumstances:
    """What decides whether blocks are compiled.

    Attributes:
        device: where the student is.
        shapes: rows and tokens a row of the micro-batches that always have these.
        micro_batches: of a rank, that are left to the end of the run.
        deterministic: the same bits are asked for each time.
        dealt_out: each rank holds a part of the student.
        before: whether blocks were compiled in the run so far; None where a run begins or a checkpoint does not say.
    """

    device: torch.device
    shapes: Shapes
    micro_batches: int
    deterministic: bool = False
    dealt_out: bool = False
    before: bool | None = None


def choose_compile(requested: bool | str, case: Circumstances) -> Choice:
    """``true`` or ``false``, and why.

    Args:
        requested: ``auto``, or what a person has decided.

    Raises:
        UsageError: it was asked for and cannot be.
    """
    obstacle = _obstacle(case)
    if requested is True:
        if obstacle is not None:
            raise UsageError(
                "the student's blocks cannot be compiled", where="--compile=true", got=obstacle, remedy="leave it out"
            )
        return Choice("true", "requested")
    if requested is False:
        return Choice("false", "requested")
    if obstacle is not None:
        return Choice("false", obstacle)
    if case.before is not None:
        return Choice(str(case.before).lower(), "as the run began")
    obstacle = _no_gain(case)
    return Choice("false", obstacle) if obstacle is not None else Choice("true", _why(case))


def _obstacle(case: Circumstances) -> str | None:
    """Why blocks cannot be compiled; None if they can."""
    if not case.shapes:
        return "no micro-batch has a fixed shape: no texts are joined into blocks"
    if case.dealt_out:
        return "the student is dealt out among processes, which gather its blocks between them"
    if case.device.type not in ("cpu", "cuda"):
        return f"not tried on {case.device.type} devices"
    if case.deterministic and case.device.type != "cpu":
        return "--deterministic: the compiler times kernels against each other and may take another one next time"
    return None


def _no_gain(case: Circumstances) -> str | None:
    """Why compiling would not be worth it, or would fail; None if it would be."""
    if case.device.type != "cuda":
        return "on a CPU compiling takes longer than it gains; what is saved are launches on a GPU"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if case.micro_batches < GAINING_MICRO_BATCHES:
        return f"{case.micro_batches} micro-batches are left: below {GAINING_MICRO_BATCHES} compiling takes longer"
    return None


def _why(case: Circumstances) -> str:
    shapes = " and ".join(f"{rows} x {time}" for rows, time in sorted(case.shapes))
    return f"fewer launches for each of {case.micro_batches} micro-batches; blocks of {shapes} tokens have one shape"


def give_stream(parts: Parts) -> Parts:
    """The parts with a stream for the teacher, where one is asked for.

    Raises:
        UsageError: there is nothing that it could do.
    """
    if not parts.config.teacher.stream:
        return parts
    if not len(parts.teachers.router):
        raise no_stream("no teacher is asked while training")
    log.info("the teacher's signal is formed on a stream of its own, beside the student's forward pass: requested")
    choices = {**parts.choices, "teacher_stream": Choice("true", "requested")}
    return replace(parts, teacher_stream=SideStream(parts.device), choices=choices)


def compile_parts(parts: Parts, start: Start) -> Parts:
    """The parts with the student's blocks compiled, if that is wanted and a trial succeeds; the choice among theirs.

    Raises:
        ModelError: they were to be compiled, and cannot be.
        UsageError: likewise, which is known without a trial.
    """
    requested, case = parts.config.student.compile, _circumstances(parts, start)
    choice = choose_compile(requested, case)
    if choice.value == "true":
        blanks = [_blank(shape, parts.config.data.document_mask) for shape in sorted(case.shapes)]
        choice = _compile(parts.student, blanks, choice, must=requested is True)
    log.info("compile %s: %s", choice.value, choice.reason)
    if case.before is not None and case.before != (choice.value == "true"):
        was = "compiled" if case.before else "not compiled"
        log.warning("the student's blocks were %s in the run so far: from here on it rounds in another way", was)
    return replace(parts, choices={**parts.choices, "compile": choice})


def _circumstances(parts: Parts, start: Start) -> Circumstances:
    config = parts.config
    shapes = {shape for order in parts.stream.orders if isinstance(order, BlockOrder) for shape in order.shapes()}
    steps = max(0, config.optimizer.steps - parts.progress.step)
    return Circumstances(
        device=parts.device,
        shapes=shapes,
        micro_batches=steps * config.optimizer.grad_accum // parts.engine.world_size,
        deterministic=config.deterministic,
        dealt_out=config.student.is_dealt_out,
        before=(start.run_so_far or {}).get("compiled"),
    )


def _compile(student: Student, blanks: Sequence[MicroBatch], choice: Choice, *, must: bool) -> Choice:
    """Compile, and try it; the choice with how long it took, or the reason why it is not done after all.

    Args:
        blanks: a micro-batch of each shape.
    """
    began = time.monotonic()
    try:
        shapes = [(batch.input_ids.shape[0], batch.input_ids.shape[1]) for batch in blanks]
        student.compiled = CompiledBlocks(blocks_of(student.model), shapes, backend=BACKEND)
        for batch in blanks:
            _try(student, batch.to(student.device))
        release_memory(student.device)
    except Exception as error:
        known = (ModelError, RuntimeError, OSError, ImportError, subprocess.SubprocessError)
        if not (isinstance(error, known) or is_compilers(error)) or is_lost(error):
            raise
        said = first_line(error)
    else:
        return Choice("true", f"{choice.reason}; compiled in {time.monotonic() - began:.0f} s")
    # Here the error is gone, and with it what its traceback held of the device's memory.
    if student.compiled is not None:
        student.compiled.release()
        student.compiled = None
    student.zero_grad(set_to_none=True)
    release_memory(student.device)
    if must:
        raise ModelError(
            "the student's blocks cannot be compiled", where="--compile=true", got=said, remedy="leave --compile out"
        )
    log.warning("the student's blocks are not compiled, as a trial failed: %s", said)
    return Choice("false", f"a trial failed: {said}")


def _try(student: Student, batch: MicroBatch) -> None:
    """Forward and backward of a micro-batch: here the compiler does its work, or fails.

    More kinds of one block than torch compiles are a failure too: it would go on without a word, and uncompiled.
    """
    from torch._dynamo import config as dynamo_config

    loud = dynamo_config.patch(fail_on_recompile_limit_hit=True)
    with loud, student.passing(batch), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the compiler looking at what it is given: nothing of this project's
        student.states(batch).float().sum().backward()  # type: ignore[no-untyped-call]
    student.zero_grad(set_to_none=True)


def _blank(shape: tuple[int, int], documents: bool) -> MicroBatch:
    """A micro-batch of one token over and over, each row a document of its own."""
    ids = torch.zeros(shape, dtype=torch.int64)
    labels = ids.clone()
    labels[:, -1] = IGNORE_INDEX
    places = torch.arange(shape[1]).expand(shape).contiguous() if documents else None
    return MicroBatch("", ids, labels, torch.full(shape[:1], shape[1]), places=places)
