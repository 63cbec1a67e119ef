"""Micro-batches of near-equal length for samples that stay whole and alone.

window: the first ``block_size`` tokens of a sample, what a model sees of it; budget: padded tokens a micro-batch may
hold;
bucket: the samples whose windows lie in one range of lengths, cut evenly into micro-batches.

The ranges are the cheapest partition of the histogram of lengths, found by dynamic programming. A wide bucket pads
more; a narrow one leaves a half-filled micro-batch behind and lets the same few samples meet in every epoch. A price
in tokens, for each bucket and for each micro-batch, weighs the two. The ranges depend on the lengths alone, so each
epoch has the same number of micro-batches while their samples are drawn anew, and the place of micro-batch ``k`` is
a division.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
from numpy.typing import NDArray

from liquid_llm.data.sampling import keyed_bits, keyed_permutation
from liquid_llm.data.two_levels import Lengths, Windows

MAX_PADDING = 0.05
_MAX_RANGES = 512  # a histogram with more distinct lengths is coarsened, by under 1 % for windows up to 16k tokens


@dataclass(frozen=True)
class BucketPlan:
    """How the samples of one source fall into micro-batches.

    Attributes:
        bucket_of: [samples] bucket of each sample.
        bounds: [micro_batches + 1] where micro-batches begin in the order of samples sorted by bucket.
        padding: share of padded tokens in all tokens computed, an upper bound.
    """

    bucket_of: NDArray[np.int64]
    bounds: NDArray[np.int64]
    padding: float

    @property
    def num_micro_batches(self) -> int:
        return len(self.bounds) - 1

    def order(self, *key: int | str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """One epoch: samples sorted by bucket and shuffled inside it, and the order of the micro-batches."""
        samples = np.lexsort((keyed_bits(len(self.bucket_of), "samples", *key), self.bucket_of))
        return samples, keyed_permutation(self.num_micro_batches, "micro-batches", *key)

    def longest(self, windows: NDArray[np.int64]) -> NDArray[np.int64]:
        """[micro_batches] the longest window of the bucket that each micro-batch draws from."""
        longest = np.zeros(int(self.bucket_of.max()) + 1, dtype=np.int64)
        np.maximum.at(longest, self.bucket_of, windows)
        return longest[np.sort(self.bucket_of)[self.bounds[:-1]]]


class WholePlan:
    """Micro-batches of samples that are shuffled as a whole in each epoch.

    Args:
        windows: [samples] lengths in tokens.
        key: of the order, the seed first.

    Attributes:
        num_micro_batches: in one epoch.
    """

    def __init__(
        self, windows: NDArray[np.int64], batch_size: int, block_size: int, key: tuple[int | str, ...]
    ) -> None:
        self._plan = plan_buckets(windows, batch_size, block_size)
        self._longest = self._plan.longest(windows)
        self._order = lru_cache(maxsize=2)(partial(self._plan.order, *key))
        self.num_micro_batches = self._plan.num_micro_batches

    def shapes(self) -> set[tuple[int, int]]:
        """Rows, and the most tokens a row, that every micro-batch can have."""
        rows = np.diff(self._plan.bounds)
        return set(zip(rows.tolist(), self._longest.tolist(), strict=True))

    def samples(self, index: int) -> NDArray[np.int64]:
        """The samples of the ``index``-th micro-batch since the beginning, across epochs."""
        epoch, within = divmod(index, self.num_micro_batches)
        samples, micro_batches = self._order(epoch)
        number = micro_batches[within]
        return samples[self._plan.bounds[number] : self._plan.bounds[number + 1]]


class WindowedPlan:
    """Micro-batches that hold samples of one window each, see ``two_levels``.

    The ranges of lengths are those of all samples, so that a window's micro-batches are counted without a look at
    others, and alike in each epoch. Of a window their number is kept; lengths are asked for when its turn comes.

    Args:
        lengths: of the samples in tokens, as a model sees them.
        parts: which samples are shuffled together.
        key: of the order, the seed first.

    Attributes:
        num_micro_batches: in one epoch.
    """

    def __init__(
        self, lengths: Lengths, batch_size: int, block_size: int, parts: Windows, key: tuple[int | str, ...]
    ) -> None:
        self._lengths, self._parts, self._key = lengths, parts, key
        self._edges = _longest_of_buckets(*lengths.histogram(), batch_size, block_size)
        self._rows = np.maximum(1, batch_size * block_size // self._edges)
        self._counts = np.zeros(len(parts), dtype=np.int64)
        self._shapes = np.zeros(0, dtype=np.int64)  # rows and tokens of each in one number
        for window in range(len(parts)):
            values, counts = lengths.histogram(parts.shards(window))
            held = np.zeros(len(self._edges), dtype=np.int64)
            np.add.at(held, self._buckets(values), counts)
            bounds, of_batch = self._cuts(held)
            self._counts[window] = len(of_batch)
            shapes = np.diff(bounds) << 32 | self._edges[of_batch]
            self._shapes = np.union1d(self._shapes, shapes)
        self.num_micro_batches = int(self._counts.sum())
        self._shuffled = lru_cache(maxsize=4)(self._shuffle)

    def shapes(self) -> set[tuple[int, int]]:
        """Rows, and the most tokens a row, that every micro-batch can have."""
        return {(shape >> 32, shape & 0xFFFFFFFF) for shape in self._shapes.tolist()}

    def samples(self, index: int) -> NDArray[np.int64]:
        """The samples of the ``index``-th micro-batch since the beginning, across epochs."""
        epoch, within = divmod(index, self.num_micro_batches)
        window, number = self._parts.find(epoch, within, self._counts)
        samples, micro_batches, bounds = self._shuffled(epoch, window)
        chosen = micro_batches[number]
        return samples[bounds[chosen] : bounds[chosen + 1]]

    def _buckets(self, lengths: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.searchsorted(self._edges, lengths)

    def _cuts(self, held: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Where micro-batches begin in samples sorted by bucket, each of which has ``held`` of them, [n + 1]; the
        bucket of each, [n]."""
        pieces = -(-held // self._rows)
        return _cut_evenly(held, pieces), np.repeat(np.arange(len(held)), pieces)

    def _shuffle(self, epoch: int, window: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """A window's samples by bucket and shuffled inside it, the order of its micro-batches, and their bounds."""
        items, key = self._parts.items(window), (*self._key, epoch, window)
        buckets = self._buckets(self._lengths.of(self._parts.shards(window)))
        order = np.lexsort((keyed_bits(len(items), "samples", *key), buckets))
        bounds, _ = self._cuts(np.bincount(buckets, minlength=len(self._edges)))
        return items[order], keyed_permutation(len(bounds) - 1, "micro-batches", *key), bounds


def plan_buckets(
    windows: NDArray[np.int64], batch_size: int, block_size: int, *, max_padding: float = MAX_PADDING
) -> BucketPlan:
    """Buckets for windows of the given lengths, under a budget of ``batch_size * block_size`` tokens a micro-batch.

    Padding stays under ``max_padding`` with one exception: few samples of very different lengths are not torn into
    micro-batches of one. They make at most twice the micro-batches that their tokens fill, or as many as batches of
    ``batch_size`` samples would be, and pad as that needs.

    Args:
        windows: [samples] window lengths in tokens, positive; one longer than the budget gets a micro-batch alone.
    """
    budget_tokens = batch_size * block_size
    values, value_of, held = np.unique(windows, return_inverse=True, return_counts=True)
    lengths, range_of, counts = _ranges(values, held)
    chosen = _choose_cut(lengths, counts, int(windows.sum()), batch_size, budget_tokens, max_padding)
    return BucketPlan(
        _bucket_of_ranges(chosen)[range_of[value_of]],
        _bounds(lengths, counts, budget_tokens, chosen),
        _padding(lengths, counts, int(windows.sum()), chosen),
    )


def _longest_of_buckets(
    values: NDArray[np.int64], held: NDArray[np.int64], batch_size: int, block_size: int
) -> NDArray[np.int64]:
    """The longest window of each bucket that ``plan_buckets`` makes, where ``held`` windows are ``values`` long."""
    lengths, range_of, counts = _ranges(values, held)
    tokens = int((values * held).sum())
    chosen = _choose_cut(lengths, counts, tokens, batch_size, batch_size * block_size, MAX_PADDING)
    longest = np.zeros(len(chosen) - 1, dtype=np.int64)
    np.maximum.at(longest, _bucket_of_ranges(chosen)[range_of], values)
    return longest


def _choose_cut(
    lengths: NDArray[np.int64],
    counts: NDArray[np.int64],
    tokens: int,
    batch_size: int,
    budget_tokens: int,
    max_padding: float,
) -> NDArray[np.int64]:
    """Boundaries of the buckets in the ranges of lengths; see ``plan_buckets``."""
    most = max(2 * -(-tokens // budget_tokens), -(-int(counts.sum()) // batch_size))
    price = budget_tokens / 8  # a guess at what a forward and backward pass costs beyond its tokens, in tokens
    chosen = _cut(lengths, counts, budget_tokens, price)
    while _padding(lengths, counts, tokens, chosen) > max_padding and price > 0:
        price = price / 1.5 if price > 0.1 else 0.0
        finer = _cut(lengths, counts, budget_tokens, price)
        if _num_micro_batches(lengths, counts, budget_tokens, finer) > most:
            break
        chosen = finer
    return chosen


def _bucket_of_ranges(chosen: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.repeat(np.arange(len(chosen) - 1), np.diff(chosen))


def _ranges(
    values: NDArray[np.int64], held: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Upper length of each range, the range of each value, and how many windows each range holds."""
    if len(values) <= _MAX_RANGES:
        return values, np.arange(len(values)), held
    edges = np.unique(np.geomspace(values[0], values[-1], _MAX_RANGES).round().astype(np.int64))
    range_of = np.searchsorted(edges, values)
    counts = np.zeros(len(edges), dtype=np.int64)
    np.add.at(counts, range_of, held)
    return edges, range_of, counts


def _cut(lengths: NDArray[np.int64], counts: NDArray[np.int64], budget_tokens: int, price: float) -> NDArray[np.int64]:
    """Boundaries [buckets + 1] of the partition with least ``padded tokens + price * (buckets + micro-batches)``."""
    total = np.concatenate(([0], np.cumsum(counts)))
    best = np.zeros(len(lengths) + 1)
    start_of = np.zeros(len(lengths) + 1, dtype=np.int64)
    for end, length in enumerate(lengths.tolist(), start=1):
        samples = total[end] - total[:end]
        rows = max(1, budget_tokens // length)
        cost = best[:end] + samples * length + price * (1 + -(-samples // rows))
        start_of[end] = cost.argmin()
        best[end] = cost[start_of[end]]
    cuts = [len(lengths)]
    while cuts[-1] > 0:
        cuts.append(int(start_of[cuts[-1]]))
    return np.array(cuts[::-1], dtype=np.int64)


def _bucket_sizes(
    lengths: NDArray[np.int64], counts: NDArray[np.int64], budget_tokens: int, cuts: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Samples and micro-batches of each bucket."""
    samples = np.add.reduceat(counts, cuts[:-1])
    rows = np.maximum(1, budget_tokens // lengths[cuts[1:] - 1])
    return samples, -(-samples // rows)


def _num_micro_batches(
    lengths: NDArray[np.int64], counts: NDArray[np.int64], budget_tokens: int, cuts: NDArray[np.int64]
) -> int:
    return int(_bucket_sizes(lengths, counts, budget_tokens, cuts)[1].sum())


def _padding(lengths: NDArray[np.int64], counts: NDArray[np.int64], tokens: int, cuts: NDArray[np.int64]) -> float:
    padded = int((np.add.reduceat(counts, cuts[:-1]) * lengths[cuts[1:] - 1]).sum())
    return 1.0 - tokens / padded


def _bounds(
    lengths: NDArray[np.int64], counts: NDArray[np.int64], budget_tokens: int, cuts: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Each bucket cut into its micro-batches as evenly as whole samples allow."""
    return _cut_evenly(*_bucket_sizes(lengths, counts, budget_tokens, cuts))


def _cut_evenly(samples: NDArray[np.int64], pieces: NDArray[np.int64]) -> NDArray[np.int64]:
    """[micro_batches + 1] where each begins, of buckets of so many samples cut into so many pieces."""
    ends, last = np.cumsum(samples), np.cumsum(pieces)
    within = np.arange(int(last[-1])) - np.repeat(last - pieces, pieces)
    bounds = np.repeat(ends - samples, pieces) + within * np.repeat(samples, pieces) // np.repeat(pieces, pieces)
    return np.append(bounds, ends[-1])
