"""An order in two levels: data files in a random order, and what is in a few of them shuffled together.

    shard     what is read together: a data file's samples; where nobody says whose they are, a run of them
    window    a few shards, the same in every epoch, that hold about ``WINDOW_TOKENS``: what is shuffled as one
    epoch     all windows once, in an order of its own, and each of them shuffled anew

A store of signal in a bucket is then read file by file, and what a run looks at in a while fits the cache of a machine:
shuffled as a whole, each record would be a request of its own. Two samples of two windows are never in one micro-batch,
which is what that costs; a window has several shards so that neighbours of a file are apart.

All of it is a function of sizes, seed and index, as any order here is. Work is done for the window at hand alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from liquid_llm.data.sampling import keyed_permutation

WINDOW_TOKENS = 64 * 2**20  # about 7 GB of signal at 105 bytes a token: half of what a machine keeps of a bucket
MAX_SHARDS = 32  # in a window: half of the units that a store keeps open
_RUNS = 8  # shards a window, where there are no files


@dataclass(frozen=True)
class Shards:
    """Items in the order of their shards.

    Attributes:
        starts: [shards + 1] int64, where each begins; shards without an item are left out.
        tokens: [shards] int64, what each holds.
    """

    starts: NDArray[np.int64]
    tokens: NDArray[np.int64]

    @classmethod
    def of(cls, tokens: NDArray[np.int64], shard_of: NDArray[np.int32] | None, window_tokens: int) -> Shards:
        """Those of items with so many tokens each [items].

        Args:
            shard_of: [items] the number of each item's shard, ascending; None: runs of them are taken for shards.
        """
        if shard_of is None:
            run = max(1, window_tokens // _RUNS)
            shard_of = (np.cumsum(tokens) - tokens) // run
        firsts = np.flatnonzero(np.diff(shard_of, prepend=shard_of[0] - 1))
        if np.any(np.diff(shard_of) < 0):
            raise ValueError("items are not in the order of their shards")
        return cls(np.append(firsts, len(tokens)), np.add.reduceat(tokens, firsts))


class Lengths(Protocol):
    """The lengths of items by their shards: of all of them how often each comes, of a few shards each item's."""

    def histogram(self, shards: NDArray[np.int64] | None = None) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The lengths that items of these shards have, ascending, and how many have each; None: of all shards."""

    def of(self, shards: NDArray[np.int64]) -> NDArray[np.int64]:
        """[items of these shards] their lengths, one shard after another."""


class KnownLengths:
    """``Lengths`` of items that are all in memory [items]."""

    def __init__(self, lengths: NDArray[np.int64], shards: Shards) -> None:
        self._lengths, self._starts = lengths, shards.starts

    def histogram(self, shards: NDArray[np.int64] | None = None) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        found = np.unique(self._lengths if shards is None else self.of(shards), return_counts=True)
        return found[0], found[1]

    def of(self, shards: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.concatenate([self._lengths[self._starts[one] : self._starts[one + 1]] for one in shards])


class Windows:
    """Which shards are shuffled together, and in which order windows come.

    Args:
        shards: all of them.
        key: what the choice depends on, the seed first.
        window_tokens: that a window is to hold; at most ``MAX_SHARDS`` shards, and one at least.

    Attributes:
        most_shards: of a window.
    """

    def __init__(self, shards: Shards, key: tuple[int | str, ...], window_tokens: int = WINDOW_TOKENS) -> None:
        self._shards, self._key = shards, key
        count = len(shards.tokens)
        wanted = max(1, round(int(shards.tokens.sum()) / window_tokens), -(-count // MAX_SHARDS))
        self._members: Sequence[NDArray[np.int64]] = np.array_split(
            keyed_permutation(count, "shards", *key), min(count, wanted)
        )
        self._order = lru_cache(maxsize=2)(self._find_order)
        self.most_shards = max(map(len, self._members))

    def __len__(self) -> int:
        return len(self._members)

    def shards(self, window: int) -> NDArray[np.int64]:
        """The numbers of the shards in a window, ascending."""
        return np.sort(self._members[window])

    def count_items(self) -> NDArray[np.int64]:
        """[windows] how many items each has."""
        sizes = np.diff(self._shards.starts)
        return np.array([sizes[members].sum() for members in self._members], np.int64)

    def items(self, window: int) -> NDArray[np.int64]:
        """The numbers of the items in a window, ascending."""
        starts = self._shards.starts
        return np.concatenate([np.arange(starts[one], starts[one + 1]) for one in self.shards(window)])

    def find(self, epoch: int, index: int, counts: NDArray[np.int64]) -> tuple[int, int]:
        """The window that has the ``index``-th thing of an epoch, and its number there.

        Args:
            counts: [windows] how many of these things each has.
        """
        order = self._order(epoch)
        ends = np.cumsum(counts[order])
        place = int(np.searchsorted(ends, index, side="right"))
        window = int(order[place])
        return window, index - int(ends[place] - counts[window])

    def _find_order(self, epoch: int) -> NDArray[np.int64]:
        return keyed_permutation(len(self), "windows", *self._key, epoch)
