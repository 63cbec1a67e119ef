"""Which samples a capture job has to score, and in which batches."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from liquid_llm.data.buckets import MAX_PADDING
from liquid_llm.data.types import Sample, SampleSource
from liquid_llm.signal_store.store import StoreWriter

_CHECKED_AT_ONCE = 1024


@dataclass(frozen=True, slots=True, eq=False)
class Window:
    """What is to be captured of one sample: the learnt positions of its first ``num_tokens`` tokens."""

    source: SampleSource
    index: int
    sample_id: str
    type: str
    num_tokens: int

    def sample(self) -> Sample:
        """The whole sample, read again: holding the tokens of all samples would take their memory."""
        return self.source.sample(self.index)


@dataclass
class CapturePlan:
    """What is to be done.

    Attributes:
        todo: samples without a complete record.
        refused: samples that cannot be captured, with the reason.
        skipped, skipped_tokens: samples that need nothing, and the tokens of their windows.
    """

    todo: list[Window] = field(default_factory=list)
    refused: list[tuple[Window, str]] = field(default_factory=list)
    skipped: int = 0
    skipped_tokens: int = 0

    def skip(self, window: Window) -> None:
        self.skipped += 1
        self.skipped_tokens += window.num_tokens


def plan(
    datasets: Mapping[str, Sequence[SampleSource]],
    writers: Mapping[str, StoreWriter],
    seq_len: int,
    *,
    overwrite: bool,
    share: tuple[int, int],
    threads: ThreadPoolExecutor,
) -> CapturePlan:
    """Find the samples that have no complete record yet.

    Existing records are read and compared, by several threads: a truncated or stale one is captured again.

    Args:
        share: this process's rank and the number of processes. A sample's share depends on its id alone, so a job
            restarted with another number of processes goes on with the same records.
    """
    found = CapturePlan()
    existing: list[Window] = []
    seen: dict[tuple[str, str], Window] = {}
    for window in _windows(datasets, seq_len, share):
        writer = writers[window.type]
        first = seen.setdefault((writer.uri, window.sample_id), window)
        if first is not window:
            _add_repeated(found, first, window)
        elif not overwrite and writer.has(window.sample_id):
            existing.append(window)
        else:
            found.todo.append(window)

    def complete(window: Window) -> bool:
        return writers[window.type].complete(window.sample(), seq_len)

    left = iter(existing)
    while part := list(islice(left, _CHECKED_AT_ONCE)):
        for window, done in zip(part, threads.map(complete, part), strict=True):
            if done:
                found.skip(window)
            else:
                found.todo.append(window)
    return found


def batches(windows: Iterable[Window], budget_tokens: int) -> list[list[Window]]:
    """Windows in batches of near-equal length, longest first so that too large a batch shows at once.

    A batch holds at most ``budget_tokens`` padded tokens (a longer sample is alone) and at most 5 % padding.
    """
    found: list[list[Window]] = []
    longest = real = 0
    for window in sorted(windows, key=lambda window: -window.num_tokens):
        if found:
            padded = longest * (len(found[-1]) + 1)
            if padded <= budget_tokens and padded - real - window.num_tokens <= MAX_PADDING * padded:
                found[-1].append(window)
                real += window.num_tokens
                continue
        found.append([window])
        longest = real = window.num_tokens
    return found


def _windows(datasets: Mapping[str, Sequence[SampleSource]], seq_len: int, share: tuple[int, int]) -> Iterator[Window]:
    rank, world_size = share
    for type, sources in datasets.items():
        for source in sources:
            for index, num_tokens in enumerate(np.minimum(source.lengths, seq_len).tolist()):
                sample_id = source.sample_id(index)
                if world_size == 1 or _hash(sample_id) % world_size == rank:
                    yield Window(source, index, sample_id, type, num_tokens)


def _hash(sample_id: str) -> int:
    return int.from_bytes(hashlib.blake2b(sample_id.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def _add_repeated(found: CapturePlan, first: Window, window: Window) -> None:
    """A sample id that was seen before: the same sample again, or another text, for which there is no second place."""
    one, other = first.sample(), window.sample()
    tokens = max(first.num_tokens, window.num_tokens)
    same_text = first.type == window.type and np.array_equal(one.input_ids, other.input_ids)
    if same_text and np.array_equal(one.learnt_positions(tokens), other.learnt_positions(tokens)):
        found.skip(window)
    else:
        what = "text" if first.type == window.type else f"sample of type {first.type}"
        what = "sample, of which something else is learnt," if same_text else what
        found.refused.append((window, f"another {what} has the same sample id"))
