"""The stored form of codec ``tail``: the integers of one sample's rows as columns of bits.

    positions | vocabulary | seed | exact ids a position (less one) | level of the likeliest | drops of level between
    its successors | four partitions (version 1: three) | class of each exact id | place in its class | draws a position
    | gaps between drawn slots | levels of the draws

Exact ids are stored by falling probability, so that their levels are small drops. An id is a class (class c holds
32 * 2**c ids, the first classes the most frequent ids) and its place there. Draws are stored by their slot in the
position's window, as gaps in Rice code whose parameter depends on how far down its position's list a draw is. The level
of a drawn id is stored as how far it lies above the least level that would have been drawn from that slot: mostly zero.

Positions follow each other in every column and none refers to a later one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from liquid_llm.signal_store.codecs.tail.bits import BitReader, BitsError, BitWriter
from liquid_llm.signal_store.codecs.tail.draws import (
    DRAW_STEP,
    DRAW_TURN,
    FINER,
    HEAD_STEP,
    NODES,
    PARTITION_STEP,
    TOP_STEP,
    Candidates,
    Draws,
    Floats,
    Ints,
    candidates,
    dither_gain,
    node_dithers,
    undither,
    uniforms,
    window_starts,
)

_CLASS_BITS = 4
_FIRST_CLASS_BITS = 5
_CLASS_STARTS = ((1 << np.arange(17, dtype=np.int64)) - 1) << _FIRST_CLASS_BITS  # the last class ends at 2,097,120
_GAP_GROUPS = 16
_MOST_REAL = 100.0  # no log-probability or log-partition of a stored position is farther from 0


@dataclass(frozen=True)
class Levels:
    """All that is stored of a run of positions, as integers.

    Attributes:
        seed: of the record.
        vocab_size: ids the distribution is over.
        head_counts: [n], at least 1; ``head_ids``, ``head_levels``: [sum of them], a position's values together.
        partition: [n, nodes], as many as its version has.
        draw_counts: [n]; ``draw_slots``, ``draw_levels``: [sum of them].
    """

    seed: int
    vocab_size: int
    head_counts: Ints
    head_ids: Ints
    head_levels: Ints
    partition: Ints
    draw_counts: Ints
    draw_slots: Ints
    draw_levels: Ints

    @property
    def num_positions(self) -> int:
        return self.head_counts.size


class Values:
    """What ``Levels`` say as real numbers, as far as it does not depend on a temperature.

    Attributes:
        head_rows, head_base: position and l of every exact id.
        head_starts: [n], where a position's exact ids begin.
        partition: [n, nodes], F at as many of ``NODES``.
        draw_rows, draw_ids, draw_share: position of every draw, the id in its slot, and that id's prior.
    """

    def __init__(self, levels: Levels, known: Candidates) -> None:
        n = levels.num_positions
        every = np.arange(n)
        self._numbers = uniforms(levels.seed, 0, n)
        self.head_rows = np.repeat(every, levels.head_counts)
        self.head_starts = np.cumsum(levels.head_counts) - levels.head_counts
        steps = np.full(self.head_rows.size, HEAD_STEP)
        steps[self.head_starts] = TOP_STEP
        self.head_base = undither(levels.head_levels, np.repeat(self._numbers[:, 1], levels.head_counts), steps)
        nodes = levels.partition.shape[1]
        self.partition = undither(levels.partition, node_dithers(self._numbers)[:, :nodes], PARTITION_STEP)
        for column, exponent in enumerate(NODES[:nodes]):
            self.partition[:, column] += self.head_sum(exponent)
        self.draw_rows = np.repeat(every, levels.draw_counts)
        self._slots = levels.draw_slots
        starts = window_starts(levels.seed, 0, n, known)
        self._counts = levels.draw_counts
        self.draw_ids = known.sequence[np.repeat(starts, self._counts) + self._slots].astype(np.int64)
        self.draw_share = known.share[self.draw_ids]
        dither = np.repeat(self._numbers[:, 5], self._counts) + self._slots * DRAW_TURN
        self._draw_dither = dither - np.floor(dither)

    def head_sum(self, exponent: float) -> Floats:
        """log of the exact ids' part of sum exp(exponent * l) [n]."""
        powers = np.exp(exponent * self.head_base) / self.of_head(dither_gain, exponent)
        return np.asarray(np.log(np.add.reduceat(powers, self.head_starts)))

    def of_head(self, function: Callable[[float, float], float], exponent: float) -> Floats:
        """``function`` of ``exponent`` and the step that it was rounded by, for every exact id."""
        found = np.full(self.head_rows.size, function(exponent, HEAD_STEP))
        found[self.head_starts] = function(exponent, TOP_STEP)
        return found

    def of_draws(self, partition: Floats) -> Floats:
        """For every draw what ``partition`` [n, nodes] has of its position, as far as an intensity asks for it."""
        return np.repeat(partition[:, :2], self._counts, axis=0)

    def draw_base(self, levels: Ints) -> Floats:
        """l of every draw."""
        return undither(levels, self._draw_dither, DRAW_STEP)

    def least_levels(self, draws: Draws) -> Ints:
        """The least level with which an id is drawn from its slot, for every draw."""
        arrival_time = self._slots + 1.0 - np.repeat(self._numbers[:, 0], self._counts)
        base = draws.base_of(np.log(arrival_time * self.draw_share), self.of_draws(self.partition))
        least: Ints = np.floor(base / DRAW_STEP - 0.5 + self._draw_dither).astype(np.int64) + 1
        return least


def write_levels(levels: Levels, draws: Draws, sizes: dict[str, int] | None = None) -> bytes:
    """The stored bytes; ``sizes`` is told how many of them each part takes."""
    out = BitWriter()

    def end_of(part: str) -> None:
        if sizes is not None:
            sizes[part] = out.size - sum(sizes.values())

    for number in (levels.num_positions, levels.vocab_size, levels.seed):
        out.number(number)
    end_of("header")
    out.rice(levels.head_counts - 1)
    first = np.zeros(levels.head_ids.size, bool)
    first[np.cumsum(levels.head_counts) - levels.head_counts] = True
    out.signed(-levels.head_levels[first])
    out.rice(-np.diff(np.where(first, _coarse(levels.head_levels), levels.head_levels), prepend=0)[~first])
    end_of("exact levels")
    for column in range(levels.partition.shape[1]):
        out.around_median(levels.partition[:, column])
    end_of("partitions")
    classes = np.searchsorted(_CLASS_STARTS, levels.head_ids, side="right") - 1
    out.ranked(classes, _CLASS_BITS)
    out.fixed(levels.head_ids - _CLASS_STARTS[classes], classes + _FIRST_CLASS_BITS)
    end_of("exact ids")

    values = Values(levels, candidates(levels.vocab_size))
    excess = levels.draw_levels - values.least_levels(draws)
    # A draw taken by the breadth of a rounding error, which the reader's arithmetic would refuse, is left out.
    taken = excess >= 0
    counts = np.bincount(values.draw_rows[taken], minlength=levels.num_positions)
    out.around_median(counts)
    slots = levels.draw_slots[taken]
    places, groups = _places(counts)
    out.rice_by(np.where(places == 0, slots, np.diff(slots, prepend=-1) - 1), groups, _GAP_GROUPS)
    end_of("draws")
    out.sparse(excess[taken])
    end_of("draw levels")
    return out.bytes()


def read_levels(data: NDArray[np.uint8], draws: Draws, vocab_size: int, nodes: int) -> tuple[Levels, Values]:
    """Inverse of ``write_levels``, of so many partitions a position.

    Raises:
        BitsError: bytes it cannot have written for this vocabulary.
    """
    source = BitReader(data)
    n = source.count(per_byte=8)
    if (written := source.number()) != vocab_size:
        raise BitsError(f"written for a vocabulary of {written}, read for one of {vocab_size}")
    seed = source.number()
    head_counts, head_levels = _read_head_levels(source, n)
    partition = np.stack([source.around_median(n) for _ in range(nodes)], axis=1)
    classes = source.ranked(head_levels.size, _CLASS_BITS)
    head_ids = source.ragged(classes + _FIRST_CLASS_BITS) + _CLASS_STARTS[classes]
    if head_ids.size and int(head_ids.max()) >= vocab_size:
        raise BitsError(f"id {int(head_ids.max())} in a vocabulary of {vocab_size}")

    known = candidates(vocab_size)
    draw_counts = source.around_median(n)
    if n and (int(draw_counts.min()) < 0 or int(draw_counts.sum()) > 8 * source.bytes_left):
        raise BitsError("an impossible number of draws")
    slots = _read_slots(source, draw_counts)
    if slots.size and int(slots.max()) >= known.window:
        raise BitsError("a slot outside the window")
    levels = Levels(seed, vocab_size, head_counts, head_ids, head_levels, partition, draw_counts, slots, slots)
    values = Values(levels, known)
    if n and max(np.abs(values.head_base).max(), np.abs(values.partition).max()) > _MOST_REAL:
        raise BitsError("a probability out of range")
    levels = replace(levels, draw_levels=source.sparse(slots.size) + values.least_levels(draws))
    if source.bytes_left:
        raise BitsError(f"{source.bytes_left} bytes too many")
    return levels, values


def _read_head_levels(source: BitReader, n: int) -> tuple[Ints, Ints]:
    """Exact ids a position, and all their levels: the likeliest's is stored itself, the others as drops."""
    counts = source.rice(n) + 1
    total = int(counts.sum())
    if total > 8 * source.bytes_left:
        raise BitsError("an impossible number of exact ids")
    starts = np.cumsum(counts) - counts
    top = -source.signed(n)
    steps = np.zeros(total, np.int64)
    rest = np.ones(total, bool)
    rest[starts] = False
    steps[rest] = -source.rice(total - n)
    running = np.cumsum(steps)
    levels = running + np.repeat(_coarse(top) - running[starts], counts)
    levels[starts] = top
    return counts, levels


def _coarse(top_levels: Ints) -> Ints:
    """The highest level that a less likely id can have, of the level of the likeliest, whose steps are finer."""
    return (top_levels + FINER) // FINER


def _read_slots(source: BitReader, counts: Ints) -> Ints:
    """Slots of all draws: running sums of the gaps, begun anew at each position."""
    running = np.cumsum(source.rice_by(_places(counts)[1], _GAP_GROUPS) + 1)
    before = np.concatenate([np.zeros(1, np.int64), running])[np.cumsum(counts) - counts]
    slots: Ints = running - 1 - np.repeat(before, counts)
    return slots


def _places(counts: Ints) -> tuple[Ints, Ints]:
    """Each draw's place in its position's list, and which sixteenth of the list that is."""
    lengths = np.repeat(counts, counts)
    places = np.arange(lengths.size) - np.repeat(np.cumsum(counts) - counts, counts)
    return places, places * _GAP_GROUPS // np.maximum(lengths, 1)
