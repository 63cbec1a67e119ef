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
from liquid_llm.losses.largest import stretches
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
    row_blocks,
    row_maximum,
    rows_of_runs,
)
from liquid_llm.signal_store.codecs.tail.draws import uniforms_of

_GPU_BLOCK_BYTES = 2**27
_FOUND_BYTES = 2**25  # of the runs that draws fall into
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
        sums = torch.empty(n, -(-vocab_size // _RUN), dtype=torch.float64, device=logits.device)
        for rows in row_blocks(n, logits.device, 8 * vocab_size, _GPU_BLOCK_BYTES):
            sums[rows] = _run_sums(_powers(logits[rows], top[rows], self.temperature))
        step = max(1, _FOUND_BYTES // (12 * _RUN * self.draws))
        for begin in range(0, n, step):
            rows = slice(begin, begin + step)
            ids[rows] = _find(logits[rows], top[rows], self.temperature, sums[rows], numbers[rows])
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


def _powers(logits: Tensor, top: Tensor, temperature: float) -> Tensor:
    """exp((logits - top) / temperature), a new tensor."""
    powers = torch.sub(logits, top)
    return (powers if temperature == 1.0 else powers.div_(temperature)).exp_()


def _run_sums(powers: Tensor) -> Tensor:
    """The float64 sums of runs of ids [n, runs], the last of which may be shorter.

    On a CPU it is a product with ones, of numbers widened before: a fifth of the time of a sum of so short runs.
    """
    n, vocab_size = powers.shape
    if vocab_size % _RUN:
        powers = torch.nn.functional.pad(powers, (0, -vocab_size % _RUN))
    runs = powers.view(n, powers.shape[1] // _RUN, _RUN)
    if not cuts_for_cache(powers.device):
        return runs.sum(dim=2, dtype=torch.float64)
    return torch.matmul(runs.double(), torch.ones(_RUN, dtype=torch.float64))


def _find(logits: Tensor, top: Tensor, temperature: float, sums: Tensor, numbers: Tensor) -> Tensor:
    """The id at which the running sum of powers first exceeds each of ``numbers`` [n, draws] times the whole sum.

    First among ``sums`` of runs of ids, then inside the few runs that a number falls into.
    """
    (n, vocab_size), num_draws = logits.shape, numbers.shape[1]
    running = torch.nn.functional.pad(sums.cumsum(dim=1), (1, 0))
    wanted = numbers * running[:, -1:]
    # A number that rounds up to the whole sum would fall behind the last run, or the last id.
    run = torch.searchsorted(running[:, 1:].contiguous(), wanted, right=True).clamp_(max=sums.shape[1] - 1)
    length = min(_RUN, vocab_size)
    first = (run * _RUN).clamp_(max=vocab_size - length)  # the last run may be shorter: it is read with some before it
    row = torch.arange(n, device=logits.device)[:, None].expand(n, num_draws)
    within = stretches(logits, row.flatten(), first.flatten(), length).view(n, num_draws, length)
    powers = _powers(within, top[:, :, None], temperature)
    if vocab_size % _RUN:
        before = torch.arange(length, device=logits.device) + first[:, :, None] < run[:, :, None] * _RUN
        powers.masked_fill_(before, 0.0)
    inside = powers.cumsum(dim=2, dtype=torch.float64)
    place = (inside + running.gather(1, run)[:, :, None] <= wanted[:, :, None]).sum(dim=2)
    return first + place.clamp_(max=length - 1)
