"""The writer's half of codec ``tail``: logits -> which ids are kept, as integers, on the teacher's device."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from liquid_llm.teachers.codecs.base import Rows, row_maximum
from liquid_llm.teachers.codecs.candidates import Candidates, candidates, device_tables, uniforms
from liquid_llm.teachers.codecs.intensity import (
    DRAW_STEP,
    HEAD_STEP,
    NODES,
    PARTITION_STEP,
    Draws,
    dither_gain,
)
from liquid_llm.teachers.codecs.topk import largest

MOST_EXACT = 64  # ids that a position may store exactly
EXACT_PRICE = 1.8  # bits of an exact id over bits of a draw
DITHER_TURN = 0.7548776662466927  # of the draws' dithers along a window; unrelated to the golden ratio
_LEAST_BASE = -60.0
_BLOCK_BYTES = 2**20


def most_draws(draws: Draws) -> int:
    """Slots for draws in a row: their mean is at most the sum of the three, and far less in practice."""
    return 64 + 2 * math.ceil(draws.at_1 + draws.at_2 + draws.at_4)


def encode_rows(logits: Tensor, seed: int, start: int, draws: Draws) -> Rows:
    """Exact ids, draws and partitions of a chunk.

    Args:
        logits: [n, vocab] float32, overwritten.
        seed: of the record; ``start``: position of the first row in it.

    Returns:
        ``head_counts`` [n], ``head_ids`` and ``head_levels`` [n, MOST_EXACT], ``partition`` [n, 3], ``draw_counts`` [n],
        ``draw_slots`` and ``draw_levels`` [n, most_draws], ``seed`` [n].
    """
    n, vocab_size = logits.shape
    device = logits.device
    known = candidates(vocab_size)
    numbers = torch.from_numpy(uniforms(seed, start, n)).to(device)
    top = row_maximum(logits)
    whole, log_sum = _partitions(logits, top)

    values, ids = largest(logits, min(MOST_EXACT, vocab_size))
    base = (values - top) / 2 - log_sum
    keep = _worth_storing(base, ids, whole, draws, known)
    order = torch.argsort((~keep).to(torch.uint8), dim=1, stable=True)
    keep, ids, base = keep.gather(1, order), ids.gather(1, order), base.gather(1, order)
    values = values.gather(1, order)

    head_dither = numbers[:, 2:3].float()
    levels = torch.floor(base / HEAD_STEP + head_dither)
    stored = ((levels + (0.5 - head_dither)) * HEAD_STEP).masked_fill(~keep, -math.inf)
    exact = base.masked_fill(~keep, -math.inf)
    partition_levels, partition = [], []
    for column, exponent in enumerate(NODES):
        dither = numbers[:, 3 + column].float()
        gap = whole[:, column] - torch.logsumexp(exponent * exact, dim=1)
        level = torch.floor(gap / PARTITION_STEP + dither)
        known_sum = torch.logsumexp(exponent * stored, dim=1) - math.log(dither_gain(exponent, HEAD_STEP))
        partition_levels.append(level)
        partition.append(known_sum + (level + (0.5 - dither)) * PARTITION_STEP)

    logits.scatter_(1, ids, values.masked_fill(keep, -math.inf))
    counts, slots, draw_levels = _draw(logits, top, log_sum, torch.stack(partition, dim=1), numbers, draws, known)
    width = MOST_EXACT - ids.shape[1]
    return {
        "seed": torch.full((n,), seed, dtype=torch.int64),
        "head_counts": keep.sum(dim=1).to(torch.uint8),
        "head_ids": torch.nn.functional.pad(ids.to(torch.int32), (0, width)),
        "head_levels": torch.nn.functional.pad(levels.clamp(-30000, 30000).to(torch.int16), (0, width)),
        "partition": torch.stack(partition_levels, dim=1).clamp(-30000, 30000).to(torch.int16),
        "draw_counts": counts,
        "draw_slots": slots,
        "draw_levels": draw_levels,
    }


def _partitions(logits: Tensor, top: Tensor) -> tuple[Tensor, Tensor]:
    """F at ``NODES`` [n, 3], and log sum exp((z - top) / 2) [n, 1]."""
    n, vocab_size = logits.shape
    block = n if logits.device.type != "cpu" else max(1, 3 * _BLOCK_BYTES // (12 * vocab_size))
    sums = logits.new_empty(n, 4)
    powers = logits.new_empty(min(block, max(n, 1)), 3, vocab_size)
    for begin in range(0, n, block):
        rows = slice(begin, min(begin + block, n))
        used = powers[: rows.stop - begin]
        one, two, four = used.unbind(1)
        torch.sub(logits[rows], top[rows], out=one)
        one.mul_(0.25).exp_()
        torch.mul(one, one, out=two)
        torch.mul(two, two, out=four)
        products = torch.bmm(used, used.transpose(1, 2))
        sums[rows, 0] = one.sum(dim=1)
        sums[rows, 1] = products[:, 0, 0]
        sums[rows, 2] = products[:, 1, 1]
        sums[rows, 3] = products[:, 1, 2]
    logs = sums.log_()
    log_sum = logs[:, 1:2]
    return logs[:, [0, 2, 3]] - log_sum * logs.new_tensor(NODES), log_sum


def _log_intensity(base: Tensor, partition: Tensor, draws: Draws) -> Tensor:
    """``Draws.log_intensity`` for ``base`` [n, m] and ``partition`` [n, 3]."""
    at_1, at_2, at_4 = draws.logs
    most = torch.add(base, at_2)
    torch.maximum(most, 2.0 * base + (at_1 - partition[:, 1:2]), out=most)
    return torch.maximum(most, 0.5 * base + (at_4 - partition[:, 0:1]), out=most)


def _worth_storing(base: Tensor, ids: Tensor, whole: Tensor, draws: Draws, known: Candidates) -> Tensor:
    """Which of the largest ids are stored exactly [n, k]: where the variance saved pays for the bytes.

    An id of intensity i met in a window i' = min(i, share * window) times on average adds i^2 / i' to the variance (in
    units of 1 / draws^2) and costs i' draws; a draw lowers the variance by 1. The likeliest id is always stored.
    """
    log_share = device_tables(ids_size := known.num_cells.size, base.device)[2]
    intensity = _log_intensity(base, whole, draws).exp()
    met = torch.minimum(intensity, log_share[ids].exp() * known.window).clamp(min=1e-30)
    keep = (intensity * intensity / met + met > EXACT_PRICE) & torch.isfinite(base)
    keep[:, 0] = True
    assert ids_size > 0
    return keep


def _draw(
    logits: Tensor, top: Tensor, log_sum: Tensor, partition: Tensor, numbers: Tensor, draws: Draws, known: Candidates
) -> tuple[Tensor, Tensor, Tensor]:
    """Accepted entries of each position's window: counts [n], slots in the window and levels [n, most_draws]."""
    n, device, width = logits.shape[0], logits.device, known.window
    sequence, log_share, _ = device_tables(known.num_cells.size, device)
    steps = torch.arange(width, device=device)
    turn = (steps.double() * DITHER_TURN % 1.0).float()
    offsets = (numbers[:, 0] * known.total_cells).long()
    late, dithers = numbers[:, 1:2].float(), numbers[:, 2:3].float()
    shift = top / 2 + log_sum
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    block = n if device.type != "cpu" else max(1, _BLOCK_BYTES // (4 * width))
    for begin in range(0, n, max(block, 1)):
        rows = slice(begin, min(begin + block, n))
        cells = offsets[rows, None] + steps
        base = logits[rows].gather(1, sequence[cells].long())
        base.mul_(0.5).sub_(shift[rows]).clamp_(min=_LEAST_BASE * 2)
        dither = torch.frac_(turn + dithers[rows])
        levels = torch.floor(base / DRAW_STEP + dither)
        rounded = (levels + 0.5 - dither).mul_(DRAW_STEP)
        wanted = _log_intensity(rounded, partition[rows], draws).sub_(log_share[cells])
        row, slot = (wanted > torch.log(steps + late[rows])).nonzero(as_tuple=True)
        found.append((row + begin, slot, levels[row, slot]))
    limit = most_draws(draws)
    slots = torch.zeros(n, limit, dtype=torch.int16, device=device)
    levels_out = torch.zeros(n, limit, dtype=torch.int8, device=device)
    if not found:
        return torch.zeros(0, dtype=torch.int16, device=device), slots, levels_out
    row, slot, level = (torch.cat(parts) for parts in zip(*found, strict=True))
    counts = torch.bincount(row, minlength=n)
    place = torch.arange(row.numel(), device=device) - (counts.cumsum(0) - counts)[row]
    fits = place < limit
    slots[row[fits], place[fits]] = slot[fits].to(torch.int16)
    levels_out[row[fits], place[fits]] = level[fits].clamp(-128, 127).to(torch.int8)
    return counts.clamp(max=limit).to(torch.int16), slots, levels_out
