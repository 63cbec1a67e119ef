"""What is known about a checkpoint without opening its tensors.

    in-file metadata   the dictionary under ``metadata`` in ``NAME.pt``; its ``sha256`` is None: no file holds its own
    sidecar            ``NAME.meta.json`` beside it: the same fields, with the hash of the data file

A sidecar is published last, so one that is there, and agrees with its file, means a complete checkpoint.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from liquid_llm.errors import CheckpointError
from liquid_llm.versions import CURRENT, read_versions

FORMAT_VERSION = 1
IN_PIECES = 2  # the same with its tensors in a folder beside the file (``pieces``), which earlier releases do not read
_REMEDY = "the file was written by something else or is damaged: choose another checkpoint"


@dataclass(frozen=True)
class CheckpointMetadata:
    """The state of a run at one step, in plain values.

    Attributes:
        step: optimizer steps taken.
        tokens_seen: real tokens trained on.
        block_size: context length in tokens.
        kd_alpha, kd_temperature: values in force from this step on: what the next step takes.
        alpha_schedule, temp_schedule: the schedules as they were written on the command line, or None.
        schedule_state: for each schedule, which entry is next.
        grad_accum: micro-batches a step.
        warmup_steps: steps to the peak learning rate.
        lr, lr_peak: learning rate configured; peak reached after warm-up instead of it, where one was given.
        positional_embedding: ``learned``, ``rotary`` or ``none``.
        rope_scale: factor given for a rotary student, or None.
        eval_ctx_lens: context lengths evaluated beside ``block_size``.
        student: what rebuilds the model: its specification and Hugging Face configuration.
        tokenizer_hash: identifies the vocabulary the weights belong to.
        data_position: micro-batches consumed.
        best_val_loss: lowest validation loss so far, in nats a token; None before the first (infinity counts as None).
        created: time of saving, ISO 8601, UTC.
        run: plain values of whoever runs the training; not interpreted here.
        sha256: hexadecimal hash of the data file; None inside the file itself.
        format_version: layout of file and metadata.
        versions: of order, framing and numerics it was written with; a file without the field has the first of each.
            Whether this release can go on from them is for whoever continues to say (``versions.find_newer``).
    """

    step: int
    tokens_seen: int
    block_size: int
    kd_alpha: float
    kd_temperature: float
    alpha_schedule: str | None
    temp_schedule: str | None
    schedule_state: Mapping[str, Any]
    grad_accum: int
    warmup_steps: int
    lr: float
    lr_peak: float | None
    positional_embedding: str
    rope_scale: float | None
    eval_ctx_lens: tuple[int, ...]
    student: Mapping[str, Any]
    tokenizer_hash: str
    data_position: int
    best_val_loss: float | None
    created: str
    run: Mapping[str, Any] = field(default_factory=dict)
    sha256: str | None = None
    format_version: int = FORMAT_VERSION
    versions: Mapping[str, int] = field(default_factory=lambda: dict(CURRENT))

    def __post_init__(self) -> None:
        object.__setattr__(self, "eval_ctx_lens", tuple(self.eval_ctx_lens))
        if self.best_val_loss is not None and not math.isfinite(self.best_val_loss):
            object.__setattr__(self, "best_val_loss", None)

    def to_dict(self) -> dict[str, Any]:
        """Every field as JSON has it, so that file and sidecar hold equal dictionaries.

        Raises:
            TypeError, ValueError: a value is not plain, or not finite.
        """
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self), allow_nan=False))
        return plain

    def as_read_back(self) -> CheckpointMetadata:
        """A copy that shares nothing with this: checked, with the keys and lists of JSON. Raises as ``to_dict``."""
        return CheckpointMetadata.from_dict(self.to_dict(), "metadata to be saved")

    @classmethod
    def from_dict(cls, values: object, where: object) -> CheckpointMetadata:
        """Metadata out of ``values``, checked field by field. Fields this version does not know are left out.

        Raises:
            CheckpointError: another format version, a missing field or a value of a wrong type.
        """
        if not isinstance(values, Mapping):
            raise CheckpointError(
                "this is no checkpoint metadata", where=where, got=type(values).__name__, expected="a JSON object"
            )
        version = values.get("format_version")
        if version not in (FORMAT_VERSION, IN_PIECES):
            raise CheckpointError(
                "this checkpoint has another format version",
                where=f"{where}, field format_version",
                got=repr(version),
                expected=f"{FORMAT_VERSION} or {IN_PIECES}",
                remedy="use the release of liquid-llm that wrote it, or give the exported student/ folder instead",
            )
        checked = {name: _check_field(name, values, where) for name in _TYPES}
        metadata = cls(**checked, versions=_versions(values.get("versions"), where))
        try:  # nothing else is ever written
            metadata.to_dict()
        except (TypeError, ValueError, RecursionError) as error:
            raise CheckpointError(
                "metadata holds what JSON does not", where=where, got=f"{error!s:.80}", remedy=_REMEDY
            ) from error
        return metadata


def _versions(value: object, where: object) -> dict[str, int]:
    try:
        return read_versions(value)
    except ValueError as error:
        raise _wrong_value("versions", value, "an object of names and whole numbers from 1", where) from error


# what a field's annotation asks of a value that was read
_EXPECTED: dict[Any, tuple[Callable[[Any], bool], str]] = {
    int: (lambda value: isinstance(value, int) and value >= 0, "a whole number, at least 0"),
    float: (lambda value: isinstance(value, int | float), "a number"),
    str: (lambda value: isinstance(value, str), "text"),
    Mapping: (lambda value: isinstance(value, dict), "an object"),
    tuple: (
        lambda value: isinstance(value, list | tuple) and all(type(one) is int for one in value),
        "a list of whole numbers",
    ),
    type(None): (lambda value: value is None, "null"),
}


# for each field the types its annotation allows: ``float | None`` -> float, NoneType
_TYPES = {
    name: tuple(get_origin(one) or one for one in (get_args(hint) if get_origin(hint) is UnionType else (hint,)))
    for name, hint in get_type_hints(CheckpointMetadata).items()
    if name != "versions"
}


def _check_field(name: str, values: Mapping[str, Any], where: object) -> Any:
    types = _TYPES[name]
    expected = " or ".join(_EXPECTED[one][1] for one in types)
    if name not in values:
        raise CheckpointError(f"metadata field {name} is missing", where=where, expected=expected, remedy=_REMEDY)
    value = values[name]
    if isinstance(value, bool) or not any(_EXPECTED[one][0](value) for one in types):
        raise _wrong_value(name, value, expected, where)
    return value


def _wrong_value(name: str, value: object, expected: str, where: object) -> CheckpointError:
    return CheckpointError(
        "metadata field has a wrong value",
        where=f"{where}, field {name}",
        got=f"{value!r:.80}",
        expected=expected,
        remedy=_REMEDY,
    )
