"""How one position's teacher distribution is turned into few bytes and back.

    run       positions that follow each other in one record
    rows      what ``encode`` makes of a chunk of logits: tensors whose first dimension is the position
    payload   what is stored for one sample: ``pack`` of its rows, where entropy coding may change the shapes
    decode    payload -> the signal of a run of positions at one temperature

Encoding happens once, on whatever device the teacher runs; decoding happens every step, on the CPU, in any thread.
A codec is a value: its name, version and options are stored with each record and are enough to make it again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from liquid_llm.errors import SignalError
from liquid_llm.losses.signals import LogitsSignal, SparseSignal

Rows: TypeAlias = dict[str, Tensor]
Payload: TypeAlias = dict[str, Tensor]
Options: TypeAlias = Mapping[str, int | float | str]
StoredSignal: TypeAlias = LogitsSignal | SparseSignal

TOP = "top"
"""The rows' largest logits [n] float32; where one is not finite, nothing else of its row means anything."""
SPILT = "spilt"
"""Rows [n] bool that took more room than was set aside for them; nothing else of them means anything. Codecs whose rows
always fit leave it out."""


@dataclass(frozen=True)
class Run:
    """Rows that follow each other in a chunk and in their record.

    Attributes:
        seed: of the record, at least 0 and below 2**63.
        start: position of the first row in its record.
        count: rows.
    """

    seed: int
    start: int
    count: int


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
        """Encode a chunk of one record: [n, vocab], as ``encode_runs``.

        Raises:
            SignalError: a row holds NaN or plus infinity. Minus infinity (a masked token) is a probability of zero.
        """
        runs = [Run(seed, start, logits.shape[0])]
        rows = self.encode_runs(logits, runs)
        if SPILT in rows and bool(rows.pop(SPILT).any()):
            rows = self.encode_runs(logits, runs, exhaustive=True)
        require_finite(rows.pop(TOP)[:, None])
        return rows

    def encode_runs(self, logits: Tensor, runs: Sequence[Run], exhaustive: bool = False) -> Rows:
        """Encode a chunk that holds rows of many records.

        On an accelerator nothing is waited for, unless ``exhaustive``. No row depends on another.

        Args:
            logits: [n, vocab] float32 on any device, n >= 0; may be overwritten by a codec whose rows always fit.
            runs: which records its rows are of, one run after the other. A codec that draws takes its random numbers
                from these alone: a record depends neither on its neighbours in the batch nor on how it was cut into
                chunks.
            exhaustive: take what room there must be, at the price of waiting for the device.

        Returns:
            the codec's rows, ``TOP``, and ``SPILT`` where rows may not have fitted; on the device of ``logits`` or on
            the CPU.
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


_CACHED_BYTES = 2**20  # for each thread


def row_blocks(n: int, device: torch.device, row_bytes: int, elsewhere: int | None = None) -> list[slice]:
    """Runs of rows that stay in a processor's cache; one run elsewhere, or runs of so many bytes. At least one, which
    may be empty."""
    step = max(n, 1)
    if cuts_for_cache(device):
        step = max(1, torch.get_num_threads() * _CACHED_BYTES // row_bytes)
    elif elsewhere is not None:
        step = max(1, elsewhere // row_bytes)
    return [slice(begin, min(begin + step, n)) for begin in range(0, max(n, 1), step)]


@lru_cache(maxsize=64)
def lagrange_weights(points: tuple[float, ...], at: float) -> tuple[float, ...]:
    """Weights of the values at ``points`` in the value at ``at`` of the polynomial through them."""
    return tuple(math.prod((at - other) / (point - other) for other in points if other != point) for point in points)


def rows_of_runs(runs: Sequence[Run]) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Of each row of a chunk the seed of its record and its position there."""
    counts = np.array([run.count for run in runs], np.int64)
    begins = np.array([run.start for run in runs], np.int64) - (np.cumsum(counts) - counts)
    seeds = np.repeat(np.array([run.seed for run in runs], np.uint64), counts)
    return seeds, np.arange(seeds.size) + np.repeat(begins, counts)


def row_maximum(logits: Tensor) -> Tensor:
    """Largest logit of each row, [n, 1]: NaN where the row holds one."""
    return logits.amax(dim=1, keepdim=True) if logits.shape[0] else logits.new_zeros(0, 1)


def require_finite(top: Tensor, start: int = 0) -> None:
    """Raise SignalError where a row has no largest logit, of these [n, 1]: NaN, plus infinity, or all masked.

    ``start`` is the position of the first, for the message.
    """
    bad = ~torch.isfinite(top)
    if bool(bad.any()):
        row = int(bad.nonzero()[0, 0])
        raise SignalError(
            "the teacher's logits are not finite",
            where=f"row {start + row}",
            got=float(top[row]),
            remedy="load the teacher in float32 or bfloat16, or leave this sample out",
        )


def check_temperature(codec: Codec, temperature: float) -> None:
    """Raise SignalError unless ``codec`` can decode at ``temperature``."""
    lowest, highest = codec.temperature_range
    if not lowest <= temperature <= highest:
        raise SignalError(
            f"signal stored with codec {codec.name!r} cannot be read at this temperature",
            got=f"{temperature:g}",
            expected=f"{lowest:.3g}" if lowest == highest else f"{lowest:.3g} to {highest:.3g}",
            remedy="give such a temperature, or capture with codec 'tail' or 'full'",
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
