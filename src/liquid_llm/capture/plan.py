"""Which samples a capture job has to score, and in which batches."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from liquid_llm.data.types import Sample, SampleSource
from liquid_llm.signal_store.store import StoreWriter

MAX_PADDING = 0.05
_CHECKED_AT_ONCE = 1024


@dataclass(frozen=True, slots=True, eq=False)
class Item:
    """One sample to capture. ``num_tokens`` is the length of its window."""

    source: SampleSource
    index: int
    sample_id: str
    type: str
    num_tokens: int

    def sample(self) -> Sample:
        """The whole sample, read again: holding the tokens of all samples would take their memory."""
        return self.source.sample(self.index)


@dataclass
class Plan:
    """What is to be done.

    Attributes:
        todo: samples without a complete record.
        refused: samples that cannot be captured, with the reason.
        skipped, skipped_tokens: samples that need nothing, and the tokens of their windows.
    """

    todo: list[Item] = field(default_factory=list)
    refused: list[tuple[Item, str]] = field(default_factory=list)
    skipped: int = 0
    skipped_tokens: int = 0

    def skip(self, item: Item) -> None:
        self.skipped += 1
        self.skipped_tokens += item.num_tokens


def plan(
    datasets: Mapping[str, Sequence[SampleSource]],
    writers: Mapping[str, StoreWriter],
    seq_len: int,
    *,
    overwrite: bool,
    share: tuple[int, int],
    threads: ThreadPoolExecutor,
) -> Plan:
    """Find the samples that have no complete record yet.

    Existing records are read and compared, by several threads: a truncated or stale one is captured again.

    Args:
        share: this process's rank and the number of processes. A sample's share depends on its id alone, so a job
            restarted with another number of processes goes on with the same records.
    """
    found = Plan()
    existing: list[Item] = []
    seen: dict[tuple[str, str], Item] = {}
    for item in _items(datasets, seq_len, share):
        writer = writers[item.type]
        first = seen.setdefault((writer.uri, item.sample_id), item)
        if first is not item:
            _repeated(found, first, item)
        elif not overwrite and writer.has(item.sample_id):
            existing.append(item)
        else:
            found.todo.append(item)

    def complete(item: Item) -> bool:
        return writers[item.type].complete(item.sample(), seq_len)

    left = iter(existing)
    while part := list(islice(left, _CHECKED_AT_ONCE)):
        for item, done in zip(part, threads.map(complete, part), strict=True):
            if done:
                found.skip(item)
            else:
                found.todo.append(item)
    return found


def batches(items: Iterable[Item], budget_tokens: int) -> list[list[Item]]:
    """Items in batches of near-equal length, longest first so that too large a batch shows at once.

    A batch holds at most ``budget_tokens`` padded tokens (a longer sample is alone) and at most 5 % padding.
    """
    found: list[list[Item]] = []
    longest = real = 0
    for item in sorted(items, key=lambda item: -item.num_tokens):
        if found:
            padded = longest * (len(found[-1]) + 1)
            if padded <= budget_tokens and padded - real - item.num_tokens <= MAX_PADDING * padded:
                found[-1].append(item)
                real += item.num_tokens
                continue
        found.append([item])
        longest = real = item.num_tokens
    return found


def _items(datasets: Mapping[str, Sequence[SampleSource]], seq_len: int, share: tuple[int, int]) -> Iterator[Item]:
    rank, world_size = share
    for type, sources in datasets.items():
        for source in sources:
            windows = np.minimum(source.lengths, seq_len).tolist()
            for index, num_tokens in enumerate(windows):
                sample_id = source.sample_id(index)
                if world_size == 1 or _place(sample_id) % world_size == rank:
                    yield Item(source, index, sample_id, type, num_tokens)


def _place(sample_id: str) -> int:
    return int.from_bytes(hashlib.blake2b(sample_id.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def _repeated(found: Plan, first: Item, item: Item) -> None:
    """A sample id that was seen before: the same sample again, or another text, for which there is no second place."""
    same = first.type == item.type and np.array_equal(first.sample().input_ids, item.sample().input_ids)
    if same:
        found.skip(item)
    else:
        other = "text" if first.type == item.type else f"sample of type {first.type}"
        found.refused.append((item, f"another {other} has the same sample id"))
