"""Codec ``sampled``: random-sampling knowledge distillation (Anshumann et al. 2025, arXiv 2503.16870, section 4).

A position keeps ``draws`` tokens drawn, with replacement, from the teacher's distribution at one temperature, as
distinct ids and how often each was drawn. count / draws is an unbiased estimate of every probability, so the gradient
of the loss is unbiased; the divergence that is reported is not, because the probabilities themselves are not stored.
Only the temperature of the capture can be read. The plain form of the idea, to compare codec ``tail`` with.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from liquid_llm.data.types import to_device
from liquid_llm.errors import SignalError
from liquid_llm.losses.signals import DRAWS, SparseSignal
from liquid_llm.signal_store.codecs.base import (
    TOP,
    Codec,
    Options,
    Payload,
    PayloadError,
    Rows,
    Run,
    check_temperature,
    cuts_for_cache,
    require,
    row_maximum,
    rows_of_runs,
)
from liquid_llm.signal_store.codecs.tail.draws import uniforms_of

_BLOCK_BYTES, _GPU_BLOCK_BYTES = 2**25, 2**27
_RUN = 64  # ids that are summed first


class SampledCodec(Codec):
    """Distinct drawn ids with their counts: three bytes each where an id and a count fit, four otherwise.

    Args:
        draws: draws a position, with replacement.
        temperature: of the distribution drawn from.
    """

    name = "sampled"
    version = 1
    form = DRAWS

    def __init__(self, draws: int = 50, temperature: float = 1.0) -> None:
        if isinstance(draws, bool) or not isinstance(draws, int) or not 1 <= draws <= 255:
            raise SignalError("codec 'sampled' needs a number of draws", got=draws, expected="1 to 255")
        if isinstance(temperature, bool) or not isinstance(temperature, (int, float)) or not temperature > 0:
            raise SignalError("codec 'sampled' needs a temperature", got=temperature, expected="a positive number")
        self.draws = self.most_ids = draws
        self.temperature = float(temperature)
        self.options: Options = {"draws": draws, "temperature": self.temperature}
        self.temperature_range = (self.temperature, self.temperature)

    def encode_runs(self, logits: Tensor, runs: Sequence[Run], exhaustive: bool = False) -> Rows:
        n, vocab_size = logits.shape
        top = row_maximum(logits)
        numbers = to_device(torch.from_numpy(uniforms_of(*rows_of_runs(runs), self.draws)), logits.device)
        ids = torch.empty(n, self.draws, dtype=torch.int64, device=logits.device)
        block = max(1, (_BLOCK_BYTES if cuts_for_cache(logits.device) else _GPU_BLOCK_BYTES) // (8 * vocab_size))
        for begin in range(0, n, block):
            rows = slice(begin, begin + block)
            powers = torch.sub(logits[rows], top[rows]).div_(self.temperature).exp_()
            ids[rows] = _find(powers, numbers[rows])
        return {"ids": ids.sort(dim=1).values.to(torch.int32), TOP: top.squeeze(1)}

    def pack(self, rows: Rows) -> Payload:
        ids = rows["ids"].numpy()
        first = np.ones(ids.shape, bool)
        first[:, 1:] = ids[:, 1:] != ids[:, :-1]
        starts = np.flatnonzero(first)
        times = np.diff(starts, append=ids.size)
        distinct = first.sum(axis=1).astype(np.uint8)
        entries = (ids[first].astype(np.uint32) << np.uint32(self._count_bits)) | (times - 1).astype(np.uint32)
        width = 3 if not entries.size or int(entries.max()) < 1 << 24 else 4
        stored = entries.astype("<u4").view(np.uint8).reshape(-1, 4)[:, :width]
        return {"distinct": torch.from_numpy(distinct), "entries": torch.from_numpy(np.ascontiguousarray(stored))}

    def decode(self, payload: Payload, start: int, stop: int, temperature: float, vocab_size: int) -> SparseSignal:
        check_temperature(self, temperature)
        distinct = require(payload, "distinct", torch.uint8, (None,)).numpy().astype(np.int64)
        stored = require(payload, "entries", torch.uint8, (int(distinct.sum()), None)).numpy()
        if distinct.size < stop:
            raise PayloadError(f"{distinct.size} positions, {stop} wanted")
        if stored.shape[1] not in (3, 4):
            raise PayloadError(f"entries of {stored.shape[1]} bytes")
        ends = np.cumsum(distinct)
        window = slice(int(ends[start] - distinct[start]), int(ends[stop - 1])) if stop > start else slice(0, 0)
        entries = np.zeros((window.stop - window.start, 4), np.uint8)
        entries[:, : stored.shape[1]] = stored[window]
        values = entries.view("<u4").ravel().astype(np.int64)
        ids, times = values >> self._count_bits, (values & ((1 << self._count_bits) - 1)) + 1
        counts = distinct[start:stop]
        if values.size and int(ids.max()) >= vocab_size:
            raise PayloadError(f"id {int(ids.max())} in a vocabulary of {vocab_size}")
        used = torch.from_numpy(np.arange(int(distinct.max(initial=0))) < counts[:, None])
        weights = torch.from_numpy(times.astype(np.float32)) / self.draws
        shape = used.shape
        return SparseSignal(
            torch.zeros(shape, dtype=torch.int64).masked_scatter_(used, torch.from_numpy(ids)),
            torch.zeros(shape).masked_scatter_(used, weights),
            torch.zeros(shape).masked_scatter_(used, weights.log()),
            torch.zeros(shape[0]),
            torch.ones(shape[0], dtype=torch.bool),
            temperature,
        )

    @property
    def _count_bits(self) -> int:
        return (self.draws - 1).bit_length()


def _find(powers: Tensor, numbers: Tensor) -> Tensor:
    """The id at which the running sum of ``powers`` [n, vocab] first exceeds each of ``numbers`` times the whole sum.

    Sums are float64: first of runs of ids, then inside the few runs that a number falls into.
    """
    vocab_size = powers.shape[1]
    powers = torch.nn.functional.pad(powers, (0, -vocab_size % _RUN))
    runs = powers.view(powers.shape[0], powers.shape[1] // _RUN, _RUN)
    running = torch.nn.functional.pad(runs.sum(dim=2, dtype=torch.float64).cumsum(dim=1), (1, 0))
    wanted = numbers * running[:, -1:]
    # A number that rounds up to the whole sum would fall behind the last run, or the last id.
    run = torch.searchsorted(running[:, 1:].contiguous(), wanted, right=True).clamp_(max=runs.shape[1] - 1)
    inside = runs.gather(1, run[:, :, None].expand(-1, -1, _RUN)).cumsum(dim=2, dtype=torch.float64)
    place = (inside + running.gather(1, run)[:, :, None] <= wanted[:, :, None]).sum(dim=2)
    return (run * _RUN + place.clamp_(max=_RUN - 1)).clamp_(max=vocab_size - 1)
