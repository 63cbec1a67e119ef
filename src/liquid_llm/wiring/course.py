"""What the course of a run is a function of: kept in its checkpoints, compared when the run is continued.

order    which texts a step takes: data, weights, batch, seed; and the weights that the keep-old-logits term stays near.
         Another order is another run, and nothing of the numbers would show it: it is refused
course   what shapes the loss from here on and is not taken up from the checkpoint: it is said
jump     a schedule whose value at the step reached is not what the checkpoint would have gone on with: it is said
moments  what the optimizer remembers; another optimizer has none: it is refused, or begins without
taught   which model teaches each type, and the codec its signal is kept in: another one is said

A checkpoint of an earlier release says nothing of its order, and goes on as it always did.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from liquid_llm.checkpoint.metadata import CheckpointMetadata
from liquid_llm.config import RunConfig
from liquid_llm.data.many_files import ManyFiles
from liquid_llm.data.tokens import TokenDataset
from liquid_llm.errors import DataError, LiquidError, UsageError
from liquid_llm.options import ADAMW
from liquid_llm.schedules import StepSchedules, WarmupCosine

log = logging.getLogger(__name__)

_SAME = 1e-6  # relative difference of two values of a schedule that are one
_OPTIONS = ("seed", "val_fraction", "grad_accum", "batch_size", "seq_len", "teacher_quantize")
_OF_THE_LENGTH = ("batch_size", "seq_len")  # chosen anew with another context length, which is said by itself


def order_of(
    config: RunConfig, sources: Iterable[tuple[TokenDataset | ManyFiles, float]], reference: str | None
) -> dict[str, Any]:
    """What the order of a run depends on, and which teacher its signal is of, as plain values.

    Args:
        sources: what is drawn from, before anything of it is held out, with its weight.
        reference: ``hash_weights`` of what the keep-old-logits term stays near; None where there is no such term.
    """
    return {
        "data": [
            {
                "type": one.type,
                "weight": weight,
                "samples": len(one),
                "layout": config.source(one.type).layout,
                "fingerprint": one.fingerprint,
            }
            for one, weight in sources
        ],
        "seed": config.seed,
        "val_fraction": config.data.val_fraction,
        "grad_accum": config.optimizer.grad_accum,
        "batch_size": config.data.batch_size,
        "seq_len": config.data.seq_len,
        "teacher_quantize": config.teacher.quantize,
        "reference": reference,
    }


def hash_weights(weights: Mapping[str, Tensor]) -> str:
    """A hash of names and values, whatever order they come in."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        value = weights[name].detach().cpu().contiguous()
        digest.update(f"{name}\0{value.dtype}\0{tuple(value.shape)}\0".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data if value.numel() else b"")
    return digest.hexdigest()


def require_same_order(metadata: CheckpointMetadata, order: Mapping[str, Any], config: RunConfig, source: str) -> None:
    """Refuse to continue a run over another order than its own; with ``--accept_changes`` it is said.

    Args:
        order: ``order_of`` the run as it would go on.
        source: the checkpoint, for messages.

    Raises:
        DataError: its texts, their types or weights have changed.
        UsageError: an option has.
    """
    known = metadata.run.get("order")
    if not isinstance(known, Mapping):
        return
    data = _changes_of_data(known.get("data", []), order["data"])
    options = list(_changes_of_options(metadata, known, order, config))
    if not data and not options:
        return
    if config.output.accept_changes:
        for change in (*data, *options):
            log.warning("the run goes on over a change, as --accept_changes says: %s", change)
        return
    kind: type[LiquidError] = DataError if data else UsageError
    raise kind(
        "the data of this run has changed since its checkpoint" if data else "this run was begun with other options",
        where=source,
        got="; ".join((*data, *options)),
        expected=f"what its {metadata.step} steps were taken on: another order of texts is another run",
        remedy="put it back, begin a run of its own with --restart or another output, or go on all the same with "
        "--accept_changes",
    )


def _changes_of_data(known: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]) -> list[str]:
    """How the texts differ, in words; empty where they do not."""
    if list(known) == list(now):
        return []
    changes = []
    for type in dict.fromkeys(one["type"] for one in (*known, *now)):
        before, after = ([one for one in rows if one["type"] == type] for rows in (known, now))
        if not after or not before:
            count = sum(one["samples"] for one in (before or after))
            changes.append(f"{type}: {'gone' if before else 'new'}, {count:,} samples")
        elif len(before) != len(after):
            changes.append(f"{type}: {len(after)} entries instead of {len(before)}")
        else:
            for one, other in zip(before, after, strict=True):
                changes += _changes_of_entry(type, one, other)
    return changes or ["its entries stand in another order"]


def _changes_of_entry(type: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    for name in ("weight", "layout"):
        if before[name] != after[name]:
            yield f"{type}: {name} {after[name]} instead of {before[name]}"
    if before["samples"] != after["samples"]:
        yield f"{type}: {after['samples']:,} samples instead of {before['samples']:,}"
    elif before["fingerprint"] != after["fingerprint"]:
        yield f"{type}: {after['samples']:,} samples as before, but other texts or other tokens of them"


def _changes_of_options(
    metadata: CheckpointMetadata, known: Mapping[str, Any], order: Mapping[str, Any], config: RunConfig
) -> Iterator[str]:
    same_length = metadata.block_size == config.data.block_size
    for name in _OPTIONS:
        if name in known and known[name] != order[name] and (same_length or name not in _OF_THE_LENGTH):
            yield f"--{name} is {order[name]} and was {known[name]}"
    if optimizer_of(metadata) != config.optimizer.kind:
        yield f"--optimizer is {config.optimizer.kind} and was {optimizer_of(metadata)}"
    reference = known.get("reference"), order["reference"]
    if None not in reference and reference[0] != reference[1]:
        yield "--resume_gcs_uri holds other weights than those that the run began with and is to stay near"


def say_jumps(metadata: CheckpointMetadata, schedules: StepSchedules, config: RunConfig) -> None:
    """Say which schedules do not go on where the checkpoint's would have."""
    steps, step = metadata.run.get("total_steps"), metadata.step
    values = schedules.at(step).default
    pairs = [
        ("KD weight alpha", metadata.kd_alpha, values.alpha),
        ("KD temperature", metadata.kd_temperature, values.temperature),
    ]
    if isinstance(steps, int):
        peak = metadata.lr if metadata.lr_peak is None else metadata.lr_peak
        was = WarmupCosine(peak, metadata.warmup_steps, steps).value(step)
        pairs.insert(0, ("learning rate", was, schedules.lr.value(step)))
    if step > config.optimizer.steps:
        log.warning("step %d is behind the %d steps asked for: none is taken", step, config.optimizer.steps)
    longer = f" (of {config.optimizer.steps} steps now, of {steps} then)" if steps != config.optimizer.steps else ""
    for name, before, now in pairs:
        if abs(before - now) > _SAME * max(abs(before), abs(now)):
            log.warning("the %s jumps at step %d: it is %.4g, and was to be %.4g%s", name, step, now, before, longer)


def optimizer_of(metadata: CheckpointMetadata) -> str:
    """The optimizer that a checkpoint has the moments of; earlier releases had one."""
    return str(metadata.run.get("optimizer", ADAMW))


def goes_on_with_moments(metadata: CheckpointMetadata, config: RunConfig, source: str) -> bool:
    """Whether a checkpoint's moments are those of the run's optimizer; with ``--accept_changes`` they need not be.

    Raises:
        UsageError: they are another's.
    """
    was, now = optimizer_of(metadata), config.optimizer.kind
    if was == now:
        return True
    if not config.output.accept_changes:
        raise UsageError(
            "another optimizer cannot go on with what this one has kept of its gradients",
            where=source,
            got=f"--optimizer={now}",
            expected=f"--optimizer={was}, as its {metadata.step} steps were taken",
            remedy="leave the option as it was, or go on without what was kept, with --accept_changes",
        )
    log.warning("--optimizer is %s, and was %s in the run so far: its moments begin at nothing", now, was)
    return False


def say_changes(
    metadata: CheckpointMetadata, state: Mapping[str, Any], taught: Mapping[str, Mapping[str, Any]], config: RunConfig
) -> None:
    """Say what else goes on in another way than the checkpoint had it: the optimizer's numbers, and the teachers.

    Args:
        state: the whole checkpoint.
        taught: type -> what teaches it from here on, as ``RunTeachers.taught`` has it.
    """
    changes: list[tuple[str, object, object]] = []
    group = state["optimizer"]["param_groups"][0]
    for name in ("weight_decay", "betas"):
        was, now = group.get(name), getattr(config.optimizer, name)
        if was is not None and (list(was) != list(now) if name == "betas" else was != now):
            changes.append((f"--{name}", _spell(was), _spell(now)))
    known = metadata.run.get("taught")
    if isinstance(known, Mapping):
        for type in dict.fromkeys((*known, *taught)):
            pair = known.get(type), taught.get(type)
            if pair[0] != pair[1]:
                changes.append((f"what teaches {type}", _spell_teacher(pair[0]), _spell_teacher(pair[1])))
    for name, was, now in changes:
        log.warning("%s is %s, and was %s in the run so far: the run changes its course", name, now, was)


def _spell_teacher(taught: Mapping[str, Any] | None) -> str:
    if taught is None:
        return "nothing"
    spelled = ", ".join(f"{name} {_spell(value)}" for name, value in taught.items() if name != "teacher" and value)
    return f"{taught.get('teacher')} ({spelled})"


def course_of(config: RunConfig) -> dict[str, Any]:
    """Option -> what shapes the loss and is not taken up from a checkpoint, which keeps it to be compared."""
    objective, named = config.objective, config.source.named.items()
    by_type = {
        f"{name}_by_type": {type: source.objective[name] for type, source in named if name in source.objective}
        for name in ("divergence", "alpha", "temperature")
    }
    return {
        "document_mask": config.data.document_mask,
        "kd_positions": objective.distilled_share,
        "divergence": objective.divergence,
        "grad_clip": config.optimizer.grad_clip,
        **by_type,
    }


def changes_of_course(metadata: CheckpointMetadata, config: RunConfig) -> list[tuple[str, str, str]]:
    """Option, old value, new value, of those that differ; a checkpoint of an older release says nothing of them."""
    known = metadata.run.get("course", {})
    present = course_of(config)
    changed = [name for name in present if name in known and known[name] != present[name]]
    return [(name, _spell(known[name]), _spell(present[name])) for name in changed]


def _spell(value: object) -> str:
    """A value as the command line has it."""
    if isinstance(value, Mapping):
        return ",".join(f"{type}={_spell(one)}" for type, one in value.items()) or "not given"
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)
