"""As ``chosen``, in room of a fixed size for each row: nothing is read from the device, so the host need not wait.

A row that takes more room is said to have spilt; what is found of it is to be thrown away, and ``chosen`` asked. The
same ids are found, in the same order but for ids of exactly equal logits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from liquid_llm.signal_store.codecs.tail.chosen import (
    MOST_EXACT,
    RUN,
    Lines,
    draw_level,
    is_worth,
    least_logit,
    lines_of,
    shortfall,
)
from liquid_llm.signal_store.codecs.tail.draws import Candidates, Draws, device_steps, device_tables

_MOST_RUNS = 128  # of ids, among which a position's exact ids are looked for
_ROOM = 2.0  # for entries that may be drawn, times the most draws of a position: half of them or so are drawn


def exact_ids(
    logits: Tensor, peaks: Tensor, shift: Tensor, whole: Tensor, draws: Draws, known: Candidates
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits [n, k] and ids of what is stored exactly, likeliest first, which of the k columns a row uses, and which
    rows have spilt [n].

    They are looked for in the runs of the largest peaks. That is enough where no other run has an id above the bound,
    or where as many as may be stored are found that are likelier than any other.
    """
    vocab_size, num_runs = logits.shape[1], peaks.shape[1]
    counting = device_steps(MOST_EXACT, known.window, logits.device).counting
    log_share = device_tables(vocab_size, logits.device)[2]
    lines = lines_of(whole, draws)
    bound = least_logit(shift, lines, known)
    num_looked_at = min(_MOST_RUNS, num_runs)
    best = peaks.topk(min(num_looked_at + 1, num_runs), dim=1)
    looked_at = best.indices[:, :num_looked_at].sort(dim=1).values
    ids = torch.add(counting[:RUN], looked_at[:, :, None], alpha=RUN).flatten(1)
    inside = ids < vocab_size
    ids.clamp_(max=vocab_size - 1)
    values = logits.gather(1, ids).masked_fill_(~inside, -math.inf)
    exact = is_worth(values, shift, lines, log_share[ids], known.window) & (values > bound)
    kept = values.masked_fill(~exact, -math.inf)
    kept, place = kept.topk(min(MOST_EXACT, kept.shape[1]), dim=1)
    likeliest, its_place = values.max(dim=1, keepdim=True)
    none = kept[:, :1] == -math.inf
    kept[:, :1] = torch.where(none, likeliest, kept[:, :1])
    place[:, :1] = torch.where(none, its_place, place[:, :1])
    spilt = torch.zeros_like(none)
    if num_runs > num_looked_at:
        next_peak = best.values[:, num_looked_at:]
        spilt = (next_peak > bound) & (next_peak > kept[:, -1:])
    return kept, ids.gather(1, place), kept > -math.inf, spilt.squeeze(1)


def accepted(
    proposed: Tensor,
    shift: Tensor,
    lines: Lines,
    numbers: Tensor,
    offsets: Tensor,
    exact: Tensor,
    known: Candidates,
    width: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draws of each row [n], their slots and levels [n, width], and which rows have spilt [n].

    Ids stored exactly are not drawn.
    """
    sequence, log_share, _ = device_tables(known.num_cells.size, proposed.device)
    counting = device_steps(MOST_EXACT, known.window, proposed.device).counting
    most = min(math.ceil(_ROOM * width), known.window)
    running = (shortfall(proposed, shift, lines, offsets, known) < 0).cumsum(1, dtype=torch.int32)
    slot, there = _places(running, most, counting)
    entry = offsets[:, None] + slot
    level, taken = draw_level(proposed.gather(1, slot), slot, shift, lines, numbers[:, None], log_share[entry])
    ordered, ids = exact.sort(dim=1).values, sequence[entry]
    nearest = torch.searchsorted(ordered, ids).clamp_(max=ordered.shape[1] - 1)
    taken &= there & (ordered.gather(1, nearest) != ids)
    drawn = taken.cumsum(1, dtype=torch.int32)
    place, used = _places(drawn, min(width, most), counting)
    slots, levels = (one.gather(1, place).masked_fill_(~used, 0) for one in (slot, level))
    counts = drawn[:, -1].clamp(max=width)
    if width > most:
        slots, levels = (torch.nn.functional.pad(one, (0, width - most)) for one in (slots, levels))
    return counts, slots, levels, running[:, -1] > most


def _places(running: Tensor, most: int, counting: Tensor) -> tuple[Tensor, Tensor]:
    """Where the first ``most`` True of each row are, [n, most], from how many there are up to each place [n, m]; and
    which of them there are. A row's last value is how many it has."""
    number = counting[:most].to(torch.int32)
    place = torch.searchsorted(running, (number + 1).expand(running.shape[0], -1).contiguous())
    return place.clamp_(max=running.shape[1] - 1), number < running[:, -1:]
