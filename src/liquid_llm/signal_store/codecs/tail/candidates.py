"""Candidates: ids that the writer and the reader of a record both know without storing any.

    prior       how often an id is expected in a tail, before anything is known: 1 / (id + 1000). Ids of byte-pair and
                unigram vocabularies are handed out by falling frequency, so this holds for any of them about as well as
                a table would, and a wrong prior costs bytes but never makes a signal wrong
    cell        one of 2**B equal shares of the prior; an id owns ``num_cells[id]`` of them, at least one
    sequence    all cells, visited by steps of 2**B / golden ratio: every stretch of it holds each id in proportion to
                its prior as evenly as can be (a Weyl sequence)
    window      the stretch of the sequence that a position looks at; it starts at a random place, so that every entry
                of it, taken alone, is a draw from the prior

A position's random numbers are functions of the record's seed and the position: nothing about them is stored.
All is integer arithmetic: the same on every machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_PRIOR_OFFSET = 1000
_CELL_BITS = 2  # four cells an id on average
_WINDOW_BITS = 6  # a window is 1/64 of the sequence: nearly every id whose weight is worth it can be met in it
_LEAST_WINDOW = 4096
_MOST_WINDOW = 1 << 15
_GOLDEN = (5**0.5 - 1) / 2
_TURN = 3**0.5 - 1  # of the circle of cells, from a position to the next; unrelated to the golden ratio


@dataclass(frozen=True)
class Candidates:
    """The sequence for one vocabulary size.

    Attributes:
        sequence: [2**B + window] int32, the id of every cell in visiting order, wrapped around.
        num_cells: [vocab] int64.
        total_cells: 2**B.
        window: entries a position looks at.
        stride: entries from one position's window to the next's.
    """

    sequence: NDArray[np.int32]
    num_cells: NDArray[np.int64]
    total_cells: int
    window: int
    stride: int

    @cached_property
    def share(self) -> NDArray[np.float64]:
        """The prior of every id [vocab]."""
        return self.num_cells / self.total_cells

    @cached_property
    def least_share(self) -> float:
        """The prior of the rarest."""
        return float(self.share.min())


@lru_cache(maxsize=4)
def candidates(vocab_size: int) -> Candidates:
    """The sequence for ``vocab_size`` ids, at least one."""
    bits = (vocab_size - 1).bit_length() + _CELL_BITS
    total = 1 << bits
    weights = (1 << 30) // (np.arange(vocab_size, dtype=np.int64) + _PRIOR_OFFSET)
    running = np.cumsum(weights)
    ends = running * (total - vocab_size) // running[-1] + np.arange(1, vocab_size + 1)
    num_cells = np.diff(ends, prepend=0)
    owner = np.repeat(np.arange(vocab_size, dtype=np.int32), num_cells)
    step = int(total * _GOLDEN) | 1  # odd: all cells are visited
    sequence = owner[(np.arange(total, dtype=np.int64) * step) & (total - 1)]
    window = min(total, max(_LEAST_WINDOW, total >> _WINDOW_BITS), _MOST_WINDOW)
    stride = int(total * _TURN) * pow(step, -1, total) % total
    return Candidates(np.concatenate([sequence, sequence[:window]]), num_cells, total, window, stride)


@lru_cache(maxsize=4)
def device_tables(vocab_size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """On ``device``: the sequence [cells + window] int64, the log prior of its entries, and of every id [vocab]."""
    known = candidates(vocab_size)
    log_share = torch.from_numpy(np.log(known.share).astype(np.float32))
    sequence = torch.from_numpy(known.sequence).long()
    return sequence.to(device), log_share[sequence].to(device), log_share.to(device)


NUM_STREAMS = 6  # random numbers a position: the draws' lateness, and five dithers


def uniforms(seed: int, start: int, count: int, streams: int = NUM_STREAMS) -> NDArray[np.float64]:
    """[count, streams] numbers in [0, 1) for positions ``start`` and on of the record with this ``seed``.

    Splitmix64 (Steele, Lea and Flood 2014) of a counter, 53 bits each.
    """
    counter = np.arange(1 + start * streams, 1 + (start + count) * streams, dtype=np.uint64)
    numbers: NDArray[np.float64] = _mixed(seed, counter).astype(np.float64) * 2.0**-53
    return numbers.reshape(count, streams)


def window_starts(seed: int, start: int, count: int, known: Candidates) -> NDArray[np.int64]:
    """Where the windows of positions ``start`` and on begin in the sequence [count].

    The first is random; the others follow it by equal turns of the circle of cells. The positions of a record so look
    at different ids, and their sampling errors cancel a little where gradients are summed over positions.
    """
    mask = known.total_cells - 1
    first = int(_mixed(seed, np.zeros(1, np.uint64))[0]) & mask
    return (first + np.arange(start, start + count, dtype=np.int64) * known.stride) & mask


def _mixed(seed: int, counter: NDArray[np.uint64]) -> NDArray[np.uint64]:
    state = np.full(1, seed & (2**64 - 1), np.uint64) + counter * np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray((state ^ (state >> np.uint64(31))) >> np.uint64(11))
