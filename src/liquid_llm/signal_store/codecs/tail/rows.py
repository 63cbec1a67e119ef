"""The writer's half of codec ``tail``: logits -> which ids are kept, as integers, on the teacher's device.

Words are those of ``draws``. Real numbers are float32 where they are as many as logits and
float64 where they are few.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from liquid_llm.data.types import to_device
from liquid_llm.signal_store.codecs.base import SPILT, TOP, Rows, Run, cuts_for_cache, row_maximum, rows_of_runs
from liquid_llm.signal_store.codecs.tail import chosen, room
from liquid_llm.signal_store.codecs.tail.chosen import MOST_EXACT, lines_of, most_draws
from liquid_llm.signal_store.codecs.tail.draws import (
    PARTITION_STEP,
    Candidates,
    Draws,
    candidates,
    device_steps,
    device_tables,
    node_dithers,
    uniforms_of,
    window_starts_of,
)
from liquid_llm.signal_store.codecs.tail.scanning import scan


def encode_rows(logits: Tensor, runs: Sequence[Run], draws: Draws, exhaustive: bool = False) -> Rows:
    """Exact ids, draws and partitions of a chunk.

    On a CPU, and where ``exhaustive``, as many ids are looked at as there are; elsewhere as many as there is room for,
    so that nothing need be read from the device.

    Args:
        logits: [n, vocab] float32.
        runs: the records that its rows are of.

    Returns:
        ``head_counts`` [n], ``head_ids`` and ``head_levels`` [n, MOST_EXACT], ``partition`` [n, 4], ``draw_counts``
        [n], ``draw_slots`` and ``draw_levels`` [n, most_draws]; ``seed`` and ``vocab_size`` [n], on the CPU;
        ``TOP`` and, unless ``exhaustive``, ``SPILT``.
    """
    n, vocab_size = logits.shape
    known, width = candidates(vocab_size), most_draws(draws)
    finding = chosen if exhaustive or cuts_for_cache(logits.device) else room
    seeds, numbers, node_numbers, offsets = _random_numbers(runs, known, logits.device)
    peaks, whole, log_sum, proposed = _scan(logits, offsets, known)
    top = row_maximum(peaks)
    shift = top / 2 + log_sum  # l = z / 2 - shift

    values, ids, keep, spilt = finding.exact_ids(logits, peaks, shift, whole, draws, known)
    steps, k = device_steps(MOST_EXACT, known.window, logits.device), values.shape[1]
    base = (values / 2 - shift).double()
    dither, step = numbers[:, 1:2], steps.head[:, :k]
    head_levels = torch.floor(base / step + dither)
    rounded = ((head_levels + 0.5 - dither) * step).masked_fill_(~keep, -math.inf)
    head_sums = torch.logsumexp(steps.exponents * rounded[:, None] - steps.gains[:, :k], dim=2)
    partition = torch.floor((whole - head_sums) / PARTITION_STEP + node_numbers)

    lines = lines_of(head_sums + (partition + 0.5 - node_numbers) * PARTITION_STEP, draws)
    exact = ids.masked_fill(~keep, -1)
    counts, slots, levels, draws_spilt = finding.accepted(proposed, shift, lines, numbers, offsets, exact, known, width)
    rows = {
        "seed": torch.from_numpy(seeds.astype(np.int64)),
        "vocab_size": torch.full((n,), vocab_size, dtype=torch.int32),
        "head_counts": keep.sum(dim=1).to(torch.uint8),
        "head_ids": _widen(ids.to(torch.int32)),
        "head_levels": _widen(head_levels.masked_fill_(~keep, 0).to(torch.int16)),
        "partition": partition.to(torch.int16),
        "draw_counts": counts.to(torch.int16),
        "draw_slots": slots.to(torch.int16),
        "draw_levels": levels.to(torch.int8),
        TOP: top.squeeze(1),
    }
    return rows if spilt is None or draws_spilt is None else {**rows, SPILT: spilt | draws_spilt}


def _random_numbers(
    runs: Sequence[Run], known: Candidates, device: torch.device
) -> tuple[np.ndarray, Tensor, Tensor, Tensor]:
    """Seeds [n] of the rows, their random numbers [n, 6], dithers of F [n, 4], and window starts [n], in one copy."""
    seeds, positions = rows_of_runs(runs)
    drawn = uniforms_of(seeds, positions)
    starts = window_starts_of(seeds, positions, known).astype(np.float64)  # whole numbers far below 2**53
    together = to_device(torch.from_numpy(np.column_stack([drawn, node_dithers(drawn), starts])), device)
    streams = drawn.shape[1]
    return seeds, together[:, :streams], together[:, streams:-1], together[:, -1].long()


def _scan(logits: Tensor, offsets: Tensor, known: Candidates) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All that needs every logit.

    Returns:
        the largest logit of every run of ``RUN`` ids [n, runs]; F at ``NODES`` [n, 4];
        log sum exp((z - top) / 2) [n, 1]; the logits in each position's window [n, window].
    """
    n, vocab_size = logits.shape
    windows = device_tables(vocab_size, logits.device)[0].unfold(0, known.window, 1)
    proposed = logits.new_empty(n, known.window)
    starts = offsets.tolist() if cuts_for_cache(logits.device) else []

    def propose(rows: slice) -> None:
        for row in range(rows.start, min(rows.stop, len(starts))):  # without a copy of the ids: in half the time
            torch.index_select(logits[row], 0, windows[starts[row]], out=proposed[row])
        if not starts:
            torch.gather(logits[rows], 1, windows.index_select(0, offsets[rows]), out=proposed[rows])

    peaks, logs = scan(logits, known, propose)
    log_sum = logs[:, 1:2]
    nodes = device_steps(MOST_EXACT, known.window, logits.device).nodes
    return peaks, torch.cat([logs[:, :1], logs[:, 2:]], dim=1) - log_sum * nodes, log_sum, proposed


def _widen(columns: Tensor) -> Tensor:
    """Columns up to ``MOST_EXACT``, so that chunks of a record can be joined."""
    return torch.nn.functional.pad(columns, (0, MOST_EXACT - columns.shape[1]))
