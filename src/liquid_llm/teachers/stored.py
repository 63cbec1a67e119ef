"""A teacher whose signal was captured beforehand: records of a signal store, joined into the signal of a micro-batch.

strict    a micro-batch with any record missing gets no signal; otherwise only those samples go without
counts    every lookup by type and status; each kind of trouble is reported once for each type, with an example
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import numpy as np

from liquid_llm import storage
from liquid_llm.data.types import MicroBatch, Sample, Samples, ShardedSource
from liquid_llm.errors import SignalError
from liquid_llm.signal_store.description import HELD_OUT, STORE_FILE
from liquid_llm.signal_store.shards.remote import ShardCache
from liquid_llm.signal_store.store import Lookup, StoreReader, open_store
from liquid_llm.teachers.teacher import Coverage, Prepared, Teacher, TeacherSetup

log = logging.getLogger(__name__)

_SPREAD = 64  # records of a type that a coverage check reads at least, spread over the data
_READERS = 8
_PORTION = 4096  # records that are looked at between two breaths


class StoredTeacher(Teacher):
    """Reads a signal store; safe to use from several threads.

    Args:
        store: the records.
        strict: see the module.
        merge_repeats: sum the slots of an id that a codec drew twice: without repeats a GPU adds in one order only.
        judges: whether it is asked in evaluation alone, where a sample without a record is left out of a mean.

    Attributes:
        judge: what is asked in its place in evaluation, where the store has samples of its own for that.
        counts: lookups so far by (type, status).
    """

    def __init__(self, store: StoreReader, *, strict: bool, merge_repeats: bool = False, judges: bool = False) -> None:
        self.store = store
        self.temperature_range = store.codec.temperature_range
        self.most_ids, self.form = store.codec.most_ids, store.codec.form
        self.told_by = f"{HELD_OUT}:{store.codec.name}" if judges else store.codec.name
        self.judge: StoredTeacher | None = None
        self.counts: Counter[tuple[str, str]] = Counter()
        self._judges = judges
        self._strict = strict
        self._merge_repeats = merge_repeats
        self._lock = threading.Lock()

    def prepare(self, batch: MicroBatch, temperature: float) -> Prepared | None:
        """Read and decode the records of ``batch``; see ``Teacher`` for what it raises."""
        if len(batch.samples) != len(batch.lengths):
            raise SignalError(
                "stored signal is of whole samples and cannot serve blocks that join several",
                where=self.store.uri,
                got=f"a {batch.type} block",
                remedy=f"use an online teacher for {batch.type}",
            )
        lookups = self.store.get_many(batch.samples, batch.lengths.tolist(), temperature)
        self._count(batch, lookups)
        signals = [lookup.signal for lookup in lookups]
        missing = sum(signal is None for signal in signals)
        if missing == len(signals) or (missing and self._strict):
            return None
        like = next(signal for signal in signals if signal is not None)
        joined = type(like).join(signals, batch.row_positions.tolist())
        return Prepared(joined.merge_repeats() if self._merge_repeats else joined)

    def describe(self) -> dict[str, Any]:
        """Where the store is and whose signal it holds."""
        return self.store.describe()

    def coverage(self, datasets: Sequence[Samples], window: int, *, every: bool = False) -> Coverage:
        """All names are compared with the store's listing; some of the records found are read, spread over the data,
        and the others only as long as none has proved usable. Of a store of units the samples of complete units count
        as listed, and none but some spread over them are looked for.
        """
        sharded = [one for one in datasets if isinstance(one, ShardedSource) and one.counts is not None]
        if self.store.complete_units is not None and not self._judges and len(sharded) == len(datasets):
            places, num_samples, num_listed = _spread_over_units(sharded, self.store.complete_units)
            if not every:
                return self._look_at([places], window, num_samples, num_listed)
            all_places = ((one, index) for one in datasets for index in range(len(one)))
            return self._look_at(_portions(all_places), window, num_samples, num_listed, every=True)
        names = [(dataset, index) for dataset in datasets for index in range(len(dataset))]
        listed = [place for place in names if self._has(*place)]
        portions = [names]
        if not every:
            spread = set(np.linspace(0, len(listed) - 1, min(_SPREAD, len(listed))).astype(int).tolist())
            rest = [one for place, one in enumerate(listed) if place not in spread]
            portions = [[listed[place] for place in sorted(spread)]]
            portions += [rest[start : start + _SPREAD] for start in range(0, len(rest), _SPREAD)]
        return self._look_at(portions, window, len(names), len(listed))

    def _has(self, dataset: Samples, index: int) -> bool:
        if self.store.complete_units is None:
            return self.store.has(dataset.sample_id(index))
        sample = dataset.sample(index)  # which says what unit to look in
        return self.store.has(sample.sample_id, sample.shard)

    def _look_at(
        self,
        portions: Iterable[Sequence[tuple[Samples, int]]],
        window: int,
        num_samples: int,
        num_listed: int,
        *,
        every: bool = False,
    ) -> Coverage:
        """Read portion by portion, ``every`` or until a record proves usable; what there is to be said of all."""

        def check(place: tuple[Samples, int]) -> tuple[Sample, Lookup]:
            sample = place[0].sample(place[1])
            return sample, self.store.check(sample, window)

        statuses: Counter[str] = Counter()
        examples: dict[str, str] = {}
        remedies: dict[str, str] = {}
        with ThreadPoolExecutor(_READERS, "check") as threads:
            for portion in portions:
                if statuses["usable"] and not every:
                    break
                for sample, lookup in threads.map(check, portion):
                    statuses[lookup.status] += 1
                    if lookup.status != "usable":
                        examples.setdefault(
                            lookup.status, f"sample {sample.sample_id!r} is {lookup.status}: {lookup.reason}"
                        )
                        remedies.setdefault(lookup.status, lookup.remedy)
        total = statuses.total()
        return Coverage(self.store.uri, num_samples, num_listed, total, dict(statuses), examples, remedies)

    def close(self) -> None:
        """Close the store and say how often its records served."""
        if self.judge is not None:
            self.judge.close()
        for type in sorted({type for type, _ in self.counts} if not self._judges else ()):
            found = ", ".join(f"{n:,} {status}" for (of, status), n in sorted(self.counts.items()) if of == type)
            log.info("%s: stored signal asked for: %s", type, found)
        self.store.close()

    def _count(self, batch: MicroBatch, lookups: Sequence[Lookup]) -> None:
        for sample, lookup in zip(batch.samples, lookups, strict=True):
            with self._lock:
                known = {status for type, status in self.counts if type == batch.type} - {"usable"}
                self.counts[batch.type, lookup.status] += 1
            if self._judges or lookup.status in {"usable", *known} or (self._strict and known):
                continue
            trouble = (
                "KD is skipped for micro-batches with a sample that has no usable signal"
                if self._strict
                else f"samples with {lookup.status} signal train on cross-entropy"
            )
            log.warning(
                "%s: %s; the first is sample %r: %s (%s)",
                batch.type,
                trouble,
                sample.sample_id,
                lookup.status,
                lookup.reason,
            )


def _portions(places: Iterable[tuple[Samples, int]]) -> Iterator[list[tuple[Samples, int]]]:
    """The same in lists of a bounded length."""
    places = iter(places)
    while portion := list(islice(places, _PORTION)):
        yield portion


def _spread_over_units(
    datasets: Sequence[ShardedSource], complete: frozenset[str]
) -> tuple[list[tuple[Samples, int]], int, int]:
    """A few samples spread over units, those that are complete where there are any, without a look at each sample.

    Returns:
        the samples, the number of all, and of those whose unit is complete.
    """
    candidates: list[tuple[Samples, int]] = []
    of_all = of_complete = 0
    for dataset in datasets:
        counts = dataset.counts
        assert counts is not None
        inside = np.where([name in complete for name in dataset.shards], counts, 0)
        of_all += len(dataset)
        of_complete += int(inside.sum())
        found = inside if inside.any() else counts
        ends, starts = np.cumsum(found), np.cumsum(counts) - counts
        chosen = np.linspace(0, ends[-1] - 1, min(_SPREAD, int(ends[-1]))).astype(int)
        units = np.searchsorted(ends, chosen, side="right")
        places = starts[units] + chosen - (ends[units] - found[units])
        candidates += [(dataset, int(index)) for index in places]
    return candidates, of_all, of_complete


def open_stored(uri: str, setup: TeacherSetup) -> StoredTeacher:
    """The maker of ``store:URI``.

    Raises:
        SignalError: the store is missing, empty or of another teacher, tokenizer or vocabulary.
        StorageError: it cannot be read.
    """
    teacher = StoredTeacher(_open(uri, setup), strict=setup.strict, merge_repeats=setup.deterministic)
    held_out = storage.join(uri, HELD_OUT)
    if storage.exists(storage.join(held_out, STORE_FILE)):
        try:
            store = _open(held_out, setup)
            teacher.judge = StoredTeacher(store, strict=False, merge_repeats=setup.deterministic, judges=True)
        except SignalError as error:
            log.warning("%s: val_kd is measured by codec %s instead", error, teacher.told_by)
    return teacher


def _open(uri: str, setup: TeacherSetup) -> StoreReader:
    return open_store(
        uri,
        teacher_id=setup.stored_id,
        tokenizer_hash=setup.tokenizer_hash,
        vocab_size=setup.vocab_size,
        cache=ShardCache(setup.cache / "signal"),
    )
