"""Which ids of a position are stored exactly and which entries of its window are drawn, in as much room as they take.

How many there are is read from the device, which is waited for. ``room`` does the same in room of a fixed size; the
formulas are here.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from torch import Tensor

from liquid_llm.losses.largest import stretches
from liquid_llm.signal_store.codecs.base import row_blocks
from liquid_llm.signal_store.codecs.tail.draws import (
    DRAW_STEP,
    DRAW_TURN,
    Candidates,
    Draws,
    device_steps,
    device_tables,
)

MOST_EXACT = 64  # ids that a position may store exactly
EXACT_PRICE = 1.8  # bits of an exact id over bits of a draw
RUN = 64  # ids whose largest logit is known together
_LEAST_BASE = -120.0  # of a masked token: far too small to be drawn, and finite

Lines = list[tuple[float, Tensor]]


def most_draws(draws: Draws) -> int:
    """Slots for draws in a row: their mean is at most the sum of the three, and far less in practice."""
    return 64 + 2 * math.ceil(draws.at_1 + draws.at_2 + draws.at_4)


# ------------------------------------------------------------------------------------------------------------- formulas


def lines_of(partition: Tensor, draws: Draws) -> Lines:
    """Slope, and constant [n, 1], of the three lines in l whose maximum is the log-intensity."""
    at_1, at_2, at_4 = draws.logs
    return [
        (1.0, torch.full_like(partition[:, :1], at_2)),
        (2.0, at_1 - partition[:, 1:2]),
        (0.5, at_4 - partition[:, 0:1]),
    ]


def least_logit(shift: Tensor, lines: Lines, known: Candidates) -> Tensor:
    """The logit [n, 1] that an id must exceed to be worth storing exactly."""
    least = min(known.least_share * known.window, EXACT_PRICE / 2)
    least = math.log(math.sqrt(least * (EXACT_PRICE - least)))  # no id of a lower log-intensity is worth it
    bound = torch.stack([(least - constant) / slope for slope, constant in lines]).amin(dim=0)
    return 2 * (bound + shift)


def is_worth(values: Tensor, shift: Tensor, lines: Lines, log_share: Tensor, window: int) -> Tensor:
    """Whether ids are worth storing exactly.

    An id of intensity i, accepted i' = min(i, share * window) times on average, adds i^2 / i' to the variance (in units
    of 1 / draws^2) and costs i' draws, each of which would lower the variance by 1 elsewhere. It is stored exactly
    where that exceeds the price.

    Args:
        values: logits of the ids, of any shape.
        shift, lines: of their positions, so that they fit ``values``.
        log_share: log prior of the ids, of the same shape.
    """
    base = values / 2 - shift
    intensity = _greatest(base, lines).exp()
    accepted = torch.minimum(intensity, log_share.exp() * window)
    return intensity * intensity / accepted + accepted > EXACT_PRICE


def draw_level(
    logits: Tensor, slot: Tensor, shift: Tensor, lines: Lines, numbers: Tensor, log_share: Tensor
) -> tuple[Tensor, Tensor]:
    """The level of each entry of a window, and whether it is accepted.

    An entry of a window is accepted when its intensity over its share exceeds its arrival time, its slot plus the
    position's shift: for a random window and shift that happens ``intensity`` times on average.

    Args:
        logits, slot, log_share: of the entries, of any shape.
        shift, lines: of their positions, so that they fit; ``numbers`` [..., 6] likewise.
    """
    dither = numbers[..., 5] + slot * DRAW_TURN
    dither.sub_(dither.floor())  # of numbers that are not negative; a remainder is an operation many times slower
    base = (logits / 2 - shift).double().clamp_(min=_LEAST_BASE)
    level = torch.floor(base / DRAW_STEP + dither)
    rounded = (level + 0.5 - dither) * DRAW_STEP
    intensity = _greatest(rounded, lines)
    arrival_time = slot + 1.0 - numbers[..., 0]
    return level, intensity - log_share > torch.log(arrival_time)


def _greatest(base: Tensor, lines: Lines) -> Tensor:
    """The log-intensity at ``base``: of the lines there the highest."""
    return functools.reduce(torch.maximum, (slope * base + constant for slope, constant in lines))


def shortfall(proposed: Tensor, shift: Tensor, lines: Lines, offsets: Tensor, known: Candidates) -> Tensor:
    """By how much every entry of the windows [n, window] at least fails to be drawn: below 0 for the few that may be.

    A bound that takes few operations.
    """
    device = proposed.device
    shares = device_tables(known.num_cells.size, device)[1].unfold(0, known.window, 1)
    needed = shares.index_select(0, offsets).add_(device_steps(MOST_EXACT, known.window, device).log_slots)
    short, other = torch.empty_like(needed), torch.empty_like(needed)
    for number, (slope, constant) in enumerate(lines):
        # Rounding adds at most half a step, float32 far less than the hundredth more.
        most = (constant + slope * (DRAW_STEP / 2 + 0.01 - shift)).float()
        of_line = short if number == 0 else other
        torch.sub(needed, proposed, alpha=slope / 2, out=of_line).sub_(most)
        if number > 0:
            torch.minimum(short, other, out=short)
    return short


# ------------------------------------------------------------------------------------------------- as many as there are


def exact_ids(
    logits: Tensor, peaks: Tensor, shift: Tensor, whole: Tensor, draws: Draws, known: Candidates
) -> tuple[Tensor, Tensor, Tensor, None]:
    """Logits [n, k] and ids of what is stored exactly, likeliest first, and which of the k columns a row uses.

    A position that has no id worth storing stores its likeliest. No row takes more room than there is: None.
    """
    n, device = logits.shape[0], logits.device
    lines = lines_of(whole, draws)
    row, column = _above(logits, peaks, least_logit(shift, lines, known))
    value = logits[row, column]
    log_share = device_tables(known.num_cells.size, device)[2]
    of_rows = [(slope, constant[row, 0]) for slope, constant in lines]
    exact = is_worth(value, shift[row, 0], of_rows, log_share[column], known.window)
    which = _true(exact)
    row, column, value = row[which], column[which], value[which]
    counts = torch.bincount(row, minlength=n)
    width = max(1, int(counts.max())) if n else 1
    _, (values, ids) = pad(n, width, row, (value, column), (-math.inf, 0))
    none = (counts == 0).nonzero().squeeze(1)
    if none.numel():
        values[none, 0], ids[none, 0] = logits[none].max(dim=1)
    values, order = values.topk(min(width, MOST_EXACT), dim=1)
    return values, ids.gather(1, order), values > -math.inf, None


def accepted(
    proposed: Tensor,
    shift: Tensor,
    lines: Lines,
    numbers: Tensor,
    offsets: Tensor,
    exact: Tensor,
    known: Candidates,
    width: int,
) -> tuple[Tensor, Tensor, Tensor, None]:
    """Draws of each row [n], their slots and levels [n, width]; None as above. Ids stored exactly are not drawn."""
    sequence, log_share, _ = device_tables(known.num_cells.size, proposed.device)
    row, slot = _possible(proposed, shift, lines, offsets, known)
    entry = offsets[row] + slot
    of_rows = [(slope, constant[row, 0]) for slope, constant in lines]
    level, taken = draw_level(proposed[row, slot], slot, shift[row, 0], of_rows, numbers[row], log_share[entry])
    which = _true(taken)
    row, slot, level, entry = row[which], slot[which], level[which], entry[which]
    which = _true(~_among(row, sequence[entry], exact, known.num_cells.size))
    small = slot[which].to(torch.int16), level[which].to(torch.int8)  # as they are kept: rows are long and mostly empty
    counts, (slots, levels) = pad(proposed.shape[0], width, row[which], small)
    return counts, slots, levels, None


def _among(row: Tensor, ids: Tensor, exact: Tensor, vocab_size: int) -> Tensor:
    """Whether ``ids`` [m] are among the exact ids [n, k] (-1: none) of their rows, of which each has one at least."""
    of_row, column = (exact >= 0).nonzero(as_tuple=True)
    there = (of_row * vocab_size + exact[of_row, column]).sort().values
    wanted = row * vocab_size + ids
    return there[torch.searchsorted(there, wanted).clamp_(max=there.numel() - 1)] == wanted


def pad(
    n: int, width: int, row: Tensor, columns: tuple[Tensor, Tensor], fill: tuple[float, float] = (0, 0)
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Values ordered by ``row`` as rows [n, width] of equal length, and their counts; what does not fit is left out."""
    counts = torch.bincount(row, minlength=n)
    place = torch.arange(row.numel(), device=row.device) - (counts.cumsum(0) - counts)[row]
    where = row * width + place
    first, second = columns
    if n and int(counts.max()) > width:
        fits = place < width
        where, first, second = where[fits], first[fits], second[fits]
    rows_of_first, rows_of_second = (one.new_full((n, width), value) for one, value in zip(columns, fill, strict=True))
    rows_of_first.view(-1)[where] = first
    rows_of_second.view(-1)[where] = second
    return counts.clamp(max=width), (rows_of_first, rows_of_second)


def _above(logits: Tensor, peaks: Tensor, bound: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns of the logits above ``bound`` [n, 1]: few, so only the runs that have one are looked at."""
    vocab_size, num_runs = logits.shape[1], peaks.shape[1]
    row, run = _divided(_negative(bound - peaks), num_runs)
    length = min(RUN, vocab_size)
    first = (run * RUN).clamp_(max=vocab_size - length)  # the last run may be shorter: it is read with some before it
    values = stretches(logits, row, first, length)
    if vocab_size % RUN:
        before = torch.arange(length, device=logits.device) + first[:, None] < run[:, None] * RUN
        values.masked_fill_(before, -math.inf)
    which, place = _divided(_negative(bound[row] - values), length)
    return row[which], first[which] + place


def _possible(
    proposed: Tensor, shift: Tensor, lines: Lines, offsets: Tensor, known: Candidates
) -> tuple[Tensor, Tensor]:
    """Row and slot of the few entries of all windows that may be drawn."""
    found = []
    for rows in row_blocks(proposed.shape[0], proposed.device, 16 * known.window):
        of_rows = [(slope, constant[rows]) for slope, constant in lines]
        short = shortfall(proposed[rows], shift[rows], of_rows, offsets[rows], known)
        found.append(_negative(short) + rows.start * known.window)
    return _divided(torch.cat(found), known.window)


def _negative(values: Tensor) -> Tensor:
    """Flat places of the values below zero; on CPUs by numpy, which is five times quicker where they are few."""
    if values.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(values.numpy() < 0))
    return _true(values < 0)


def _true(mask: Tensor) -> Tensor:
    """Flat places of what is true."""
    if mask.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.flatten().nonzero().squeeze(1)


def _divided(places: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Rows and columns of flat places in rows of ``width``."""
    row = places // width
    return row, places - row * width
