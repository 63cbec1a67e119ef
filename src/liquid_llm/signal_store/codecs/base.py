"""How one position's teacher distribution is turned into few bytes and back.

    rows      what ``encode`` makes of a chunk of logits: tensors whose first dimension is the position
    payload   what is stored for one sample: ``pack`` of its rows, where entropy coding may change the shapes
    decode    payload -> the signal of a run of positions at one temperature

Encoding happens once, on whatever device the teacher runs; decoding happens every step, on the CPU, in any thread.
A codec is a value: its name, version and options are stored with each record and are enough to make it again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from liquid_llm.errors import SignalError
from liquid_llm.losses.signals import LogitsSignal, SparseSignal

Rows: TypeAlias = dict[str, Tensor]
Payload: TypeAlias = dict[str, Tensor]
Options: TypeAlias = Mapping[str, int | float | str]
StoredSignal: TypeAlias = LogitsSignal | SparseSignal


class PayloadError(ValueError):
    """A payload that this codec cannot have written; readers report its record as corrupt."""


class Codec(Protocol):
    """A pure pair of encoder and decoder. One that inherits from this has the methods given here.

    Attributes:
        name, version, options: identity; plain values that go into the record and into ``store.json``.
        temperature_range: lowest and highest temperature ``decode`` answers for.
        most_ids: the most ids a position of a decoded signal has; 0 for a codec that keeps whole logits.
        form: what a decoded position tells, a key of ``losses.signals.FORMS``.
    """

    name: str
    version: int
    options: Options
    temperature_range: tuple[float, float]
    most_ids: int
    form: str

    @classmethod
    def usual_options(cls, num_positions: int) -> Options:
        """What a new store of about so many stored positions is begun with where nobody says otherwise; {}: the
        defaults."""
        return {}

    def encode(self, logits: Tensor, seed: int, start: int) -> Rows:
        """Encode a chunk.

        Args:
            logits: [n, vocab] float32 on any device, n >= 0; may be overwritten.
            seed: of the record the rows belong to, at least 0 and below 2**63.
            start: position of the first row in its record. A codec that draws takes its random numbers from these two
                alone: a record depends neither on its neighbours in the batch nor on how it was cut into chunks.

        Raises:
            SignalError: a row holds NaN or plus infinity. Minus infinity (a masked token) is a probability of zero.
        """
        ...

    def pack(self, rows: Rows) -> Payload:
        """The stored form of all rows of one sample, contiguous CPU tensors."""
        return {name: tensor.contiguous() for name, tensor in rows.items()}

    def decode(self, payload: Payload, start: int, stop: int, temperature: float, vocab_size: int) -> StoredSignal:
        """Positions ``[start, stop)`` at ``temperature``; every row's mask is True.

        Raises:
            SignalError: the temperature is outside ``temperature_range``.
            PayloadError: the payload does not have the form ``pack`` gives it.
        """
        ...

    def parts(self, payload: Payload, vocab_size: int) -> dict[str, int]:
        """Bytes of ``payload`` by what they say: they add up to all of it. Raises PayloadError."""
        return {name: tensor.nbytes for name, tensor in payload.items()}


_CUT_FOR: ContextVar[str | None] = ContextVar("_CUT_FOR", default=None)


@contextmanager
def encode_as_on(device: str) -> Iterator[None]:
    """Let encoders cut their work as on a device of this type, wherever the logits are: memory follows from the cut."""
    token = _CUT_FOR.set(device)
    try:
        yield
    finally:
        _CUT_FOR.reset(token)


def cuts_for_cache(device: torch.device) -> bool:
    """Whether work on ``device`` is cut into blocks that a processor's cache holds: on a CPU."""
    return (_CUT_FOR.get() or device.type) == "cpu"


@lru_cache(maxsize=64)
def lagrange_weights(points: tuple[float, ...], at: float) -> tuple[float, ...]:
    """Weights of the values at ``points`` in the value at ``at`` of the polynomial through them."""
    return tuple(math.prod((at - other) / (point - other) for other in points if other != point) for point in points)


def row_maximum(logits: Tensor) -> Tensor:
    """Largest logit of each row, [n, 1]. Raises SignalError where a row has none: NaN, plus infinity, all masked."""
    top = logits.amax(dim=1, keepdim=True) if logits.shape[0] else logits.new_zeros(0, 1)
    require_finite(top)
    return top


def require_finite(top: Tensor) -> None:
    """As ``row_maximum``, for rows whose largest logits [n, 1] are known: a NaN counts as larger than anything."""
    bad = ~torch.isfinite(top)
    if bool(bad.any()):
        position = int(bad.nonzero()[0, 0])
        raise SignalError(
            "the teacher's logits are not finite",
            where=f"row {position}",
            got=float(top[position]),
            remedy="load the teacher in float32 or bfloat16, or leave this sample out",
        )


def check_temperature(codec: Codec, temperature: float) -> None:
    """Raise SignalError unless ``codec`` can decode at ``temperature``."""
    lowest, highest = codec.temperature_range
    if not lowest <= temperature <= highest:
        raise SignalError(
            f"signal stored with codec {codec.name!r} cannot be read at this temperature",
            got=f"{temperature:g}",
            expected=f"{lowest:.3g} to {highest:.3g}",
            remedy="choose --kd_temperature in this range or capture with codec 'full'",
        )


def require(payload: Payload, name: str, dtype: torch.dtype, shape: tuple[int | None, ...]) -> Tensor:
    """The payload's tensor ``name``, of which ``shape`` (None: any size) and ``dtype`` are what the codec writes."""
    tensor = payload.get(name)
    if tensor is None:
        raise PayloadError(f"no tensor {name!r}")
    fits = len(tensor.shape) == len(shape) and all(
        wanted in (None, size) for wanted, size in zip(shape, tensor.shape, strict=True)
    )
    if tensor.dtype != dtype or not fits:
        raise PayloadError(f"{name!r} is {tensor.dtype} {list(tensor.shape)}, not {dtype} {list(shape)}")
    return tensor
