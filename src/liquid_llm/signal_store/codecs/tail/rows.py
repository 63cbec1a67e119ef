"""The writer's half of codec ``tail``: logits -> which ids are kept, as integers, on the teacher's device.

Words are those of ``draws``. Real numbers are float32 where they are as many as logits and
float64 where they are few.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from liquid_llm.signal_store.codecs.base import Rows, cuts_for_cache, row_maximum
from liquid_llm.signal_store.codecs.tail.draws import (
    DRAW_STEP,
    DRAW_TURN,
    HEAD_STEP,
    NODES,
    PARTITION_STEP,
    TOP_STEP,
    Candidates,
    Draws,
    candidates,
    device_tables,
    dither_gain,
    node_dithers,
    uniforms,
    window_starts,
)

MOST_EXACT = 64  # ids that a position may store exactly
EXACT_PRICE = 1.8  # bits of an exact id over bits of a draw
_LEAST_BASE = -120.0  # of a masked token: far too small to be drawn, and finite
_BLOCK_BYTES = 2**20  # for each thread
_RUN = 64  # ids


def most_draws(draws: Draws) -> int:
    """Slots for draws in a row: their mean is at most the sum of the three, and far less in practice."""
    return 64 + 2 * math.ceil(draws.at_1 + draws.at_2 + draws.at_4)


def encode_rows(logits: Tensor, seed: int, start: int, draws: Draws) -> Rows:
    """Exact ids, draws and partitions of a chunk.

    Args:
        logits: [n, vocab] float32, overwritten.
        seed: of the record; ``start``: position of the first row in it.

    Returns:
        ``head_counts`` [n], ``head_ids`` and ``head_levels`` [n, MOST_EXACT], ``partition`` [n, 4], ``draw_counts``
        [n], ``draw_slots`` and ``draw_levels`` [n, most_draws]; ``seed`` and ``vocab_size`` [n], the same in all rows.

    Raises:
        SignalError: a row holds NaN or plus infinity.
    """
    n, vocab_size = logits.shape
    known = candidates(vocab_size)
    drawn = uniforms(seed, start, n)
    numbers, node_numbers = (torch.from_numpy(one).to(logits.device) for one in (drawn, node_dithers(drawn)))
    offsets = torch.from_numpy(window_starts(seed, start, n, known)).to(logits.device)
    peaks, whole, log_sum, proposed = _scan(logits, offsets, known)
    top = row_maximum(peaks)
    shift = top / 2 + log_sum  # l = z / 2 - shift

    values, ids, keep = _exact(logits, peaks, shift, whole, draws, known)
    base = (values / 2 - shift).double()
    dither = numbers[:, 1:2]
    step = torch.full_like(base[:1], HEAD_STEP)
    step[:, 0] = TOP_STEP
    head_levels = torch.floor(base / step + dither)
    rounded = ((head_levels + 0.5 - dither) * step).masked_fill_(~keep, -math.inf)
    partition_levels, partition = [], []
    for column, exponent in enumerate(NODES):
        gain = torch.full_like(step, math.log(dither_gain(exponent, HEAD_STEP)))
        gain[:, 0] = math.log(dither_gain(exponent, TOP_STEP))
        head_sum = torch.logsumexp(exponent * rounded - gain, dim=1)
        dither = node_numbers[:, column]
        level = torch.floor((whole[:, column] - head_sum) / PARTITION_STEP + dither)
        partition_levels.append(level)
        partition.append(head_sum + (level + 0.5 - dither) * PARTITION_STEP)

    exact = ids.masked_fill(~keep, -1)
    lines = _lines(torch.stack(partition, dim=1), draws)
    row, slots, levels = _accepted(proposed, shift, lines, numbers, offsets, exact, known)
    counts, (slots, levels) = _pad(n, most_draws(draws), row, (slots.to(torch.int16), levels.to(torch.int8)))
    return {
        "seed": torch.full((n,), seed, dtype=torch.int64),
        "vocab_size": torch.full((n,), vocab_size, dtype=torch.int32),
        "head_counts": keep.sum(dim=1).to(torch.uint8),
        "head_ids": _widen(ids.to(torch.int32)),
        "head_levels": _widen(head_levels.masked_fill_(~keep, 0).to(torch.int16)),
        "partition": torch.stack(partition_levels, dim=1).to(torch.int16),
        "draw_counts": counts.to(torch.int16),
        "draw_slots": slots,
        "draw_levels": levels,
    }


def _scan(logits: Tensor, offsets: Tensor, known: Candidates) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All that needs every logit, block by block: a block is read from memory once and then found in the cache.

    Returns:
        the largest logit of every run of ``_RUN`` ids [n, runs], the last run may be shorter; F at ``NODES`` [n, 4];
        log sum exp((z - top) / 2) [n, 1]; the logits in each position's window [n, window].
    """
    n, vocab_size = logits.shape
    sequence = device_tables(vocab_size, logits.device)[0].unfold(0, known.window, 1)
    even = vocab_size // _RUN * _RUN
    peaks = logits.new_empty(n, -(-vocab_size // _RUN))
    proposed = logits.new_empty(n, known.window)
    sums = logits.new_empty(n, 5)
    blocks = _blocks(n, logits.device, 4 * vocab_size)
    powers = logits.new_empty(2, blocks[0].stop - blocks[0].start, vocab_size)
    for rows in blocks:
        block, total = logits[rows], sums[rows]
        runs = block[:, :even].view(block.shape[0], even // _RUN, _RUN)
        torch.amax(runs, dim=2, out=peaks[rows, : even // _RUN])
        if even < vocab_size:
            torch.amax(block[:, even:], dim=1, out=peaks[rows, -1])
        torch.gather(block, 1, sequence[offsets[rows]], out=proposed[rows])
        one, two = powers[:, : block.shape[0]]  # exp(z / 4) and its powers
        torch.add(peaks[rows].amax(dim=1, keepdim=True) * -0.25, block, alpha=0.25, out=one).exp_()
        torch.sum(one, dim=1, out=total[:, 0])
        torch.linalg.vector_norm(one, dim=1, out=total[:, 1])
        torch.mul(one, one, out=two)
        torch.linalg.vector_norm(two, dim=1, out=total[:, 2])
        torch.linalg.vector_norm(two.mul_(one), dim=1, out=total[:, 3])
        torch.sum(two, dim=1, out=total[:, 4])
    logs = sums.log_() * sums.new_tensor([1.0, 2.0, 2.0, 2.0, 1.0])
    log_sum = logs[:, 1:2]
    return peaks, logs[:, [0, 2, 3, 4]] - log_sum * logs.new_tensor(NODES), log_sum, proposed


def _above(logits: Tensor, peaks: Tensor, bound: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns of the logits above ``bound`` [n, 1]: few, so only the runs that have one are looked at."""
    row, run = (peaks > bound).nonzero(as_tuple=True)
    columns = run[:, None] * _RUN + torch.arange(_RUN, device=logits.device)
    inside = columns < logits.shape[1]
    values = logits[row[:, None], columns.clamp_(max=logits.shape[1] - 1)]
    which, place = ((values > bound[row]) & inside).nonzero(as_tuple=True)
    return row[which], columns[which, place]


def _exact(
    logits: Tensor, peaks: Tensor, shift: Tensor, whole: Tensor, draws: Draws, known: Candidates
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [n, k] and ids of what is stored exactly, likeliest first, and which of the k columns a row uses.

    An id of intensity i, accepted i' = min(i, share * window) times on average, adds i^2 / i' to the variance (in units
    of 1 / draws^2) and costs i' draws, each of which would lower the variance by 1 elsewhere. It is stored exactly
    where that exceeds the price; a position that has no such id stores its likeliest.
    """
    n, device = logits.shape[0], logits.device
    least = min(known.least_share * known.window, EXACT_PRICE / 2)
    least = math.log(math.sqrt(least * (EXACT_PRICE - least)))  # no id of a lower log-intensity is worth it
    bound = torch.stack([(least - constant) / slope for slope, constant in _lines(whole, draws)]).amin(dim=0)
    row, column = _above(logits, peaks, 2 * (bound + shift))
    value = logits[row, column]
    base = value / 2 - shift[row, 0]
    lines = [slope * base + constant[row, 0] for slope, constant in _lines(whole, draws)]
    intensity = torch.stack(lines).amax(dim=0).exp()
    log_share = device_tables(known.num_cells.size, device)[2]
    accepted = torch.minimum(intensity, log_share[column].exp() * known.window)
    exact = intensity * intensity / accepted + accepted > EXACT_PRICE
    row, column, value = row[exact], column[exact], value[exact]
    counts = torch.bincount(row, minlength=n)
    width = max(1, int(counts.max())) if n else 1
    _, (values, ids) = _pad(n, width, row, (value, column), (-math.inf, 0))
    none = (counts == 0).nonzero().squeeze(1)
    if none.numel():
        values[none, 0], ids[none, 0] = logits[none].max(dim=1)
    values, order = values.topk(min(width, MOST_EXACT), dim=1)
    return values, ids.gather(1, order), values > -math.inf


def _accepted(
    proposed: Tensor,
    shift: Tensor,
    lines: list[tuple[float, Tensor]],
    numbers: Tensor,
    offsets: Tensor,
    exact: Tensor,
    known: Candidates,
) -> tuple[Tensor, Tensor, Tensor]:
    """Row, slot and level of every draw, by row and slot.

    An entry of a window is accepted when its intensity over its share exceeds its arrival time, its slot plus the
    position's shift: for a random window and shift that happens ``intensity`` times on average. Ids that are stored
    exactly are not drawn.
    """
    sequence, log_share, _ = device_tables(known.num_cells.size, proposed.device)
    row, slot = _possible(proposed, shift, lines, offsets, known)
    dither = (numbers[:, 5][row] + slot * DRAW_TURN).remainder_(1.0)
    base = (proposed[row, slot] / 2 - shift[row, 0]).double().clamp_(min=_LEAST_BASE)
    level = torch.floor(base / DRAW_STEP + dither)
    rounded = (level + 0.5 - dither) * DRAW_STEP
    intensity = torch.stack([slope * rounded + constant[row, 0] for slope, constant in lines]).amax(dim=0)
    arrival_time = slot + 1.0 - numbers[:, 0][row]
    taken = intensity - log_share[offsets[row] + slot] > torch.log(arrival_time)
    row, slot, level = row[taken], slot[taken], level[taken]
    drawn = (exact[row] != sequence[offsets[row] + slot, None]).all(dim=1)
    return row[drawn], slot[drawn], level[drawn]


def _possible(
    proposed: Tensor, shift: Tensor, lines: list[tuple[float, Tensor]], offsets: Tensor, known: Candidates
) -> tuple[Tensor, Tensor]:
    """Row and slot of the few entries of all windows that may be drawn, by a bound that takes few operations."""
    shares = device_tables(known.num_cells.size, proposed.device)[1].unfold(0, known.window, 1)
    log_steps = torch.log(torch.arange(known.window, device=proposed.device))
    # Rounding adds at most half a step, float32 far less than the hundredth more.
    most = [(slope, (constant + slope * (DRAW_STEP / 2 + 0.01)).float()) for slope, constant in lines]
    found = []
    for rows in _blocks(proposed.shape[0], proposed.device, 16 * known.window):
        base = torch.sub(proposed[rows], 2 * shift[rows]).mul_(0.5)
        needed = shares[offsets[rows]].add_(log_steps)
        short, other = torch.empty_like(base).fill_(math.inf), torch.empty_like(base)
        for slope, constant in most:
            torch.minimum(short, torch.sub(needed, base, alpha=slope, out=other).sub_(constant[rows]), out=short)
        found.append(_negative(short) + rows.start * known.window)
    places = torch.cat(found)
    return places // known.window, places % known.window


def _negative(values: Tensor) -> Tensor:
    """Flat places of the values below zero; on CPUs by numpy, which is five times quicker where they are few."""
    if values.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(values.numpy() < 0))
    return (values < 0).flatten().nonzero().squeeze(1)


def _lines(partition: Tensor, draws: Draws) -> list[tuple[float, Tensor]]:
    """Slope, and constant [n, 1], of the three lines in l whose maximum is the log-intensity."""
    at_1, at_2, at_4 = draws.logs
    return [
        (1.0, torch.full_like(partition[:, :1], at_2)),
        (2.0, at_1 - partition[:, 1:2]),
        (0.5, at_4 - partition[:, 0:1]),
    ]


def _pad(
    n: int, width: int, row: Tensor, columns: tuple[Tensor, Tensor], fill: tuple[float, float] = (0, 0)
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Values ordered by ``row`` as rows [n, width] of equal length, and their counts; what does not fit is left out."""
    counts = torch.bincount(row, minlength=n)
    place = torch.arange(row.numel(), device=row.device) - (counts.cumsum(0) - counts)[row]
    fits = place < width
    row, place = row[fits], place[fits]
    first, second = (column.new_full((n, width), value) for column, value in zip(columns, fill, strict=True))
    first[row, place] = columns[0][fits]
    second[row, place] = columns[1][fits]
    return counts.clamp(max=width), (first, second)


def _widen(columns: Tensor) -> Tensor:
    """Columns up to ``MOST_EXACT``, so that chunks of a record can be joined."""
    return torch.nn.functional.pad(columns, (0, MOST_EXACT - columns.shape[1]))


def _blocks(n: int, device: torch.device, row_bytes: int) -> list[slice]:
    """Runs of rows that stay in a processor's cache; one run elsewhere. At least one, which may be empty."""
    block = max(1, torch.get_num_threads() * _BLOCK_BYTES // row_bytes) if cuts_for_cache(device) else max(n, 1)
    return [slice(begin, min(begin + block, n)) for begin in range(0, max(n, 1), block)]
