"""A run whose student is dealt out among its processes (``--shard=full``): what that asks for, and doing it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from liquid_llm.config import RunConfig
from liquid_llm.distributed import Engine
from liquid_llm.errors import UsageError
from liquid_llm.models.heads import blocks_of, body_of
from liquid_llm.sharding import deal_out_frozen, deal_out_trained, gather_whole, give_moments, take_moments
from liquid_llm.wiring.parts import Parts, make_optimizer

log = logging.getLogger(__name__)


def require_processes(config: RunConfig, ranks: int) -> None:
    """Raise UsageError where something is to be dealt out and there is one process, or the teacher is elsewhere."""
    if config.teacher.is_dealt_out and config.teacher.ranks:
        raise UsageError(
            "processes of its own hold the teacher, each the whole of it",
            where="--teacher_shard=full",
            got=f"--teacher_ranks={config.teacher.ranks}",
            remedy="leave one of the two out",
        )
    require_several(config, ranks, "start several with torchrun --nproc-per-node N -m liquid_llm ..., or leave it out")


def require_several(config: RunConfig, ranks: int, remedy: str) -> None:
    """Raise UsageError, with that remedy, where something is to be dealt out among one process."""
    asked = (("--shard=full", config.student.is_dealt_out), ("--teacher_shard=full", config.teacher.is_dealt_out))
    for option, is_asked in asked:
        if is_asked and ranks == 1:
            raise UsageError("one process has nobody to share a model with", where=option, remedy=remedy)


def place_parts(parts: Parts, engine: Engine) -> Parts:
    """The parts with the models dealt out that are to be; of the ranks' weights the main one's count.

    Raises:
        ModelError: the weights of a model do not lie in blocks.
        UsageError: the ranks would ask a teacher that is dealt out at different times.
    """
    engine.copy_from_main(parts.built.model.state_dict().values())  # what each has built is the same to rounding
    config = parts.config
    if config.teacher.is_dealt_out:
        _deal_out_teachers(parts, engine)
    if config.student.is_dealt_out:
        parts = _deal_out_student(parts, engine)
    if config.student.is_dealt_out or config.teacher.is_dealt_out:
        _compute_alike(parts)
    return parts


def _deal_out_student(parts: Parts, engine: Engine) -> Parts:
    student = parts.student
    blocks = blocks_of(student.model)
    moments = take_moments(parts.optimizer)
    deal_out_trained(student, blocks, parts.device, methods=("states", "loss", "ask"))
    student.is_dealt_out = True
    if student.reference is not None:
        frozen = student.reference
        deal_out_frozen(frozen, body_of(frozen), blocks_of(frozen), parts.device)
    optimizer = make_optimizer(parts.config, student.model)
    give_moments(optimizer, moments)
    log.info("the student is dealt out: %d blocks among %d processes", len(blocks), engine.world_size)
    return replace(parts, optimizer=optimizer)


def _deal_out_teachers(parts: Parts, engine: Engine) -> None:
    if len(parts.inputs.types) > 1 and parts.group_size % engine.world_size:
        raise UsageError(
            "the processes would ask a teacher that is dealt out at different times",
            where="--teacher_shard=full",
            got=f"texts of types {', '.join(parts.inputs.types)} drawn for {parts.group_size} micro-batches at a time, "
            f"{engine.world_size} processes",
            expected="as many processes as the run began with, or a divisor",
            remedy="leave it out, or begin another run with --restart",
        )
    for teacher in dict.fromkeys(parts.teachers.router.values()):
        teacher.deal_out(parts.device)
    parts.evaluator.cache_bytes = 0  # what one rank has room for, another may have to ask again
    log.info("the online teacher is dealt out among %d processes", engine.world_size)


def _compute_alike(parts: Parts) -> None:
    """Every rank computes as many passes as every other, in evaluation too."""
    limits = parts.progress.passes, parts.evaluator.passes
    if any(limit.max_tokens is not None for limit in limits):
        log.warning("this run's micro-batches were cut in passes so far; from now on each is computed in one")
    for limit in limits:
        limit.max_tokens, limit.cuts = None, False
    parts.evaluator.alike = True


def gather_student(parts: Parts) -> Mapping[str, Tensor] | None:
    """The weights of a student that is dealt out, whole, on the main rank (else none); None of one that is not."""
    if not parts.student.is_dealt_out:
        return None
    weights: dict[str, Tensor] = gather_whole(parts.built.model.state_dict(keep_vars=True), keep=parts.engine.is_main)
    return weights
