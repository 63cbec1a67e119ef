"""What the writer and the reader of codec ``tail`` both know without storing it: how likely an id is kept, and which
ids are asked for.

base          l = log q_2, the teacher's log-probability at T = 2; at any other T, log q_T = a l - F(a), a = 2 / T
F(a)          log sum exp(a l) over the vocabulary; F(1) = 0
intensity     how often an id is wanted: max over T in {1, 2, 4} of draws_T q_T, the rate of a Poisson process. An id
              below 1 is kept that often, an id above is worth storing exactly; by this one number hard positions get
              many bytes and easy ones few. Drawn in proportion to q_T and weighted 1 / draws_T, a tail has the least
              variance that its number of draws allows, and the same number for all positions spends them where they
              help most
dither        a random number, known to both sides, added before rounding and taken away after: the error of a rounded
              value is then uniform whatever the value was (Roberts 1962), so that exp(a * value) can be unbiased
prior         how often an id is expected in a tail, before anything is known: 1 / (id + 1000). Ids of byte-pair and
              unigram vocabularies are handed out by falling frequency, so this holds for any of them about as well as a
              table would, and a wrong prior costs bytes but never makes a signal wrong
cell          one of 2**B equal shares of the prior; an id owns ``num_cells[id]`` of them, at least one
sequence      all cells, visited by steps of 2**B / golden ratio: every stretch of it holds each id in proportion to its
              prior as evenly as can be (a Weyl sequence)
window        the stretch of the sequence that a position looks at: the proposals of relative entropy coding. It starts
              at a random place, so that every entry of it, taken alone, is a draw from the prior
arrival time  of an entry: its slot in the window plus the position's one random shift. It is accepted where intensity
              over prior exceeds its arrival time

A position's random numbers are functions of the record's seed and the position: nothing about them is stored.
All but the intensity is integer arithmetic: the same on every machine.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

BASE_TEMPERATURE = 2.0
NODES = (0.5, 2.0, 3.0, 1.5)  # values of a at which F is stored: T = 4, 1, 2/3 and 4/3
NODES_BY_VERSION = {1: 3, 2: 4}  # how many of them
TEMPERATURE_RANGE = (BASE_TEMPERATURE / max(NODES), BASE_TEMPERATURE / min(NODES))

TOP_STEP = 0.03125  # of l, for a position's likeliest id
HEAD_STEP = 0.125  # of l, for the other ids stored exactly
FINER = 4  # HEAD_STEP / TOP_STEP
DRAW_STEP = 1.0  # of l, for drawn ids: at T = 2 their weight does not depend on l at all
NODE_TURN = 0.5698402909980532  # from the dither of the third node to that of the fourth
DRAW_TURN = 0.7548776662466927  # of the draws' dithers from slot to slot; unrelated to the golden ratio
PARTITION_STEP = 0.0625  # of F

_PRIOR_OFFSET = 1000
_CELL_BITS = 2  # four cells an id on average
_WINDOW_BITS = 6  # a window is 1/64 of the sequence: nearly every id whose weight is worth it can be met in it
_LEAST_WINDOW = 4096
_MOST_WINDOW = 1 << 15
_GOLDEN = (5**0.5 - 1) / 2
_TURN = 3**0.5 - 1  # of the circle of cells, from a position to the next; unrelated to the golden ratio


@dataclass(frozen=True)
class Draws:
    """Draws a position would get from the whole distribution at T = 1, 2 and 4."""

    at_1: float
    at_2: float
    at_4: float

    @property
    def logs(self) -> tuple[float, float, float]:
        at_1, at_2, at_4 = (math.log(draws) if draws > 0 else -math.inf for draws in (self.at_1, self.at_2, self.at_4))
        return at_1, at_2, at_4

    def log_intensity(self, base: Floats, partition: Floats) -> Floats:
        """Log of the intensity of ids with log-probability ``base`` [m]; ``partition`` [m, nodes]: F at the first two
        of ``NODES``, or at more."""
        at_1, at_2, at_4 = self.logs
        return np.maximum(
            np.maximum(base + at_2, 2.0 * base + (at_1 - partition[:, 1])), 0.5 * base + (at_4 - partition[:, 0])
        )

    def base_of(self, log_intensity: Floats, partition: Floats) -> Floats:
        """Inverse of ``log_intensity``."""
        at_1, at_2, at_4 = self.logs
        return np.minimum(
            np.minimum(log_intensity - at_2, (log_intensity - at_1 + partition[:, 1]) / 2.0),
            (log_intensity - at_4 + partition[:, 0]) * 2.0,
        )


def undither(levels: Ints, dither: Floats, step: Floats | float) -> Floats:
    """The value whose rounding gave ``levels = floor(value / step + dither)``, up to half a step."""
    return (levels + (0.5 - dither)) * step


def dither_gain(exponent: float, step: float) -> float:
    """Mean of exp(exponent * error) over the error of a dithered value, which is uniform in a step: sinh(h) / h.

    h = exponent * step / 2.
    """
    half = abs(exponent) * step / 2
    return math.sinh(half) / half if half > 1e-6 else 1.0


def dither_shift(exponent: float, step: float) -> float:
    """How much exponent * error is on average when weighted by exp(exponent * error): h coth(h) - 1."""
    half = abs(exponent) * step / 2
    return half / math.tanh(half) - 1.0 if half > 1e-3 else half * half / 3


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


class Steps(NamedTuple):
    """Numbers of the format as tensors of a device: a copy from the host in every call would be waited for.

    Attributes:
        exponents: [nodes, 1] float64, ``NODES``; ``nodes``: [nodes] float32, the same.
        squares: [5] float32, what the logarithms of sums of powers are multiplied by, some of which are roots of them.
        gains: [nodes, most] float64, log of the ``dither_gain`` of each exact id, the likeliest first.
        head: [1, most] float64, the steps that exact ids' levels are rounded by.
        log_slots: [window] float32, log of each slot.
        counting: [window] int64, the slots themselves.
    """

    exponents: Tensor
    nodes: Tensor
    squares: Tensor
    gains: Tensor
    head: Tensor
    log_slots: Tensor
    counting: Tensor


@lru_cache(maxsize=8)
def device_steps(most_exact: int, window: int, device: torch.device) -> Steps:
    """The ``Steps`` of ``most_exact`` exact ids and a window, on ``device``."""
    head = np.full((1, most_exact), HEAD_STEP)
    head[0, 0] = TOP_STEP
    gains = [[math.log(dither_gain(exponent, step)) for step in head[0]] for exponent in NODES]
    counting = torch.arange(window)
    return Steps(
        torch.tensor(NODES, dtype=torch.float64)[:, None].to(device),
        torch.tensor(NODES).to(device),
        torch.tensor([1.0, 2.0, 2.0, 2.0, 1.0]).to(device),
        torch.tensor(gains, dtype=torch.float64).to(device),
        torch.from_numpy(head).to(device),
        torch.log(counting).to(device),
        counting.to(device),
    )


NUM_STREAMS = 6  # random numbers a position: the shift of arrival times, and five dithers


def uniforms(seed: int, start: int, count: int, streams: int = NUM_STREAMS) -> Floats:
    """[count, streams] numbers in [0, 1) for positions ``start`` and on of the record with this ``seed``."""
    return uniforms_of(*_of_one(seed, start, count), streams)


def uniforms_of(seeds: NDArray[np.uint64], positions: Ints, streams: int = NUM_STREAMS) -> Floats:
    """[n, streams] numbers in [0, 1) for rows of which each has its record's seed [n] and its position there [n].

    Splitmix64 (Steele, Lea and Flood 2014) of a counter, 53 bits each.
    """
    counter = (positions[:, None] * streams + np.arange(1, 1 + streams)).astype(np.uint64)
    return np.asarray(_mixed(seeds[:, None], counter).astype(np.float64) * 2.0**-53)


def node_dithers(numbers: NDArray[np.float64]) -> NDArray[np.float64]:
    """Dithers of F at ``NODES`` [n, 4], of a position's random ``numbers``; the last follows from the one before."""
    three = numbers[:, 2:5]
    return np.concatenate([three, (three[:, 2:] + NODE_TURN) % 1.0], axis=1)


def window_starts(seed: int, start: int, count: int, known: Candidates) -> Ints:
    """Where the windows of positions ``start`` and on of the record with this ``seed`` begin in the sequence [count].

    The first is random; the others follow it by equal turns of the circle of cells. The positions of a record so look
    at different ids, and their sampling errors cancel a little where gradients are summed over positions.
    """
    return window_starts_of(*_of_one(seed, start, count), known)


def window_starts_of(seeds: NDArray[np.uint64], positions: Ints, known: Candidates) -> Ints:
    """As ``window_starts``, for rows of which each has its record's seed [n] and its position there [n]."""
    mask = known.total_cells - 1
    first = _mixed(seeds, np.zeros(1, np.uint64)).astype(np.int64) & mask
    return np.asarray((first + positions * known.stride) & mask)


def _of_one(seed: int, start: int, count: int) -> tuple[NDArray[np.uint64], Ints]:
    return np.full(count, seed & (2**64 - 1), np.uint64), np.arange(start, start + count, dtype=np.int64)


def _mixed(seeds: NDArray[np.uint64], counter: NDArray[np.uint64]) -> NDArray[np.uint64]:
    state = seeds + counter * np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray((state ^ (state >> np.uint64(31))) >> np.uint64(11))
