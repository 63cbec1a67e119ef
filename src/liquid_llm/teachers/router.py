"""Which teacher answers for a micro-batch, by its type: the online teacher, a signal store, or none.

    prepare    what can be done ahead of need and in any thread: reading records and decoding them
    signal     the teacher signal of a micro-batch, from what was prepared or from the online teacher, on its device
    strict     a stored micro-batch with any record missing gets no signal; otherwise only those samples go without
    coverage   how much of a run's data has stored signal, asked before step 1

Every sample without a usable record is counted by type and status; each kind is reported once, with an example.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from liquid_llm.data.types import MicroBatch, Sample, SampleSource, to_device
from liquid_llm.errors import DataError, SignalError
from liquid_llm.losses.signals import LogitsSignal, Signal, SparseSignal
from liquid_llm.signal_store.codecs import StoredSignal, check_temperature
from liquid_llm.signal_store.store import Lookup, StoreReader
from liquid_llm.teachers.assembly import assemble, merge_repeats
from liquid_llm.teachers.online import OnlineTeacher

log = logging.getLogger(__name__)

_MOST_PINNED_BYTES = 64 * 2**20
_SPREAD = 64  # records of a type that a coverage check reads at least, spread over the data


class SignalCounts:
    """How often a stored record was asked for, by type and status; safe to use from several threads."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, str]] = Counter()
        self._reported: set[tuple[str, str]] = set()
        self._lock = threading.Lock()

    def add(self, type: str, status: str) -> None:
        with self._lock:
            self._counts[type, status] += 1

    def first(self, type: str, kind: str) -> bool:
        """True the first time this kind of trouble is to be reported for this type."""
        with self._lock:
            new = (type, kind) not in self._reported
            self._reported.add((type, kind))
            return new

    def as_dict(self) -> dict[str, dict[str, int]]:
        """``{type: {status: lookups}}``."""
        with self._lock:
            table: dict[str, dict[str, int]] = {}
            for (type, status), count in sorted(self._counts.items()):
                table.setdefault(type, {})[status] = count
            return table


@dataclass(frozen=True)
class Prepared:
    """What ``prepare`` made of a micro-batch: nothing yet for the online teacher, the finished signal of a store."""

    online: bool = False
    stored: StoredSignal | None = None

    def pinned(self, device: torch.device) -> Prepared:
        """The same in memory from which a copy to ``device`` runs beside the computation; to be done ahead of need."""
        if self.stored is None or device.type == "cpu":
            return self
        if sum(getattr(self.stored, name).nbytes for name in _tensors(self.stored)) > _MOST_PINNED_BYTES:
            return self  # whole logits: several micro-batches of them, locked, could be all the host has
        tensors: dict[str, Any] = {name: getattr(self.stored, name).pin_memory() for name in _tensors(self.stored)}
        return replace(self, stored=replace(self.stored, **tensors))

    def part(self, positions: slice) -> Prepared:
        """What was prepared for some of the micro-batch's labelled positions."""
        return self if self.stored is None else replace(self, stored=part_of(self.stored, positions))


@dataclass(frozen=True)
class TypeCoverage:
    """Stored signal for one type of a run's data.

    Attributes:
        samples: in the data.
        listed: of which the store has a record of that name.
        checked: listed records that were read.
        usable: of those checked.
        problem: what was wrong with the first one that was not usable, or "".
    """

    samples: int
    listed: int
    checked: int
    usable: int
    problem: str

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


class TeacherRouter:
    """Routes micro-batches to teachers.

    Args:
        online: answers for the types in ``online_types``; None where there is none.
        stores: type -> its signal store. A type in neither gets no signal: plain cross-entropy.
        strict: see the module.
        merge_repeats: sum the slots of an id that a codec drew twice: without repeats a GPU adds in one order only.
        online_types: types that the online teacher answers for, even where a store is given.

    Attributes:
        counts: lookups in the stores so far.
    """

    def __init__(
        self,
        online: OnlineTeacher | None,
        stores: Mapping[str, StoreReader],
        *,
        strict: bool,
        online_types: Iterable[str],
        merge_repeats: bool = False,
    ) -> None:
        self.counts = SignalCounts()
        self._online = online
        self._online_types = frozenset(online_types) if online is not None else frozenset()
        self._stores = {type: store for type, store in stores.items() if type not in self._online_types}
        self._strict = strict
        self._merge_repeats = merge_repeats

    def prepare(self, batch: MicroBatch, temperature: float) -> Prepared:
        """Read and decode the stored signal of ``batch``; may be called ahead of need, from any thread.

        Raises:
            SignalError: the store cannot answer at this temperature, or for joined blocks of text.
            StorageError: the store cannot be read.
        """
        if batch.type in self._online_types:
            return Prepared(online=True)
        store = self._stores.get(batch.type)
        if store is None:
            return Prepared()
        if len(batch.samples) != len(batch.lengths):
            raise SignalError(
                "stored signal is of whole samples and cannot serve blocks that join several",
                where=store.uri,
                got=f"a {batch.type} block",
                remedy=f"use the online teacher for {batch.type}",
            )
        windows = batch.lengths.tolist()
        lookups = store.get_many(batch.samples, windows, temperature)
        self._count(batch, lookups)
        signals = [lookup.signal for lookup in lookups]
        missing = sum(signal is None for signal in signals)
        if missing == len(signals) or (missing and self._strict):
            return Prepared()
        stored = assemble(signals, [window - 1 for window in windows])
        if self._merge_repeats and isinstance(stored, SparseSignal):
            stored = merge_repeats(stored)
        return Prepared(stored=stored)

    def signal(self, batch: MicroBatch, prepared: Prepared) -> Signal | None:
        """One row for each labelled position of ``batch``, row-major, on its device; None without any signal."""
        if prepared.online:
            assert self._online is not None
            return self._online.signal(batch)
        return None if prepared.stored is None else _to(prepared.stored, batch.input_ids.device)

    def check_temperatures(self, temperatures: Iterable[float]) -> None:
        """Raise SignalError where a store cannot answer at a temperature of the schedule."""
        for temperature in temperatures:
            for store in self._stores.values():
                check_temperature(store.codec, temperature)

    def answers(self, type: str, temperature: float) -> bool:
        """Whether the teacher of ``type`` can be asked at ``temperature``: a store of draws holds one alone."""
        if type not in self._stores:
            return True
        lowest, highest = self._stores[type].codec.temperature_range
        return lowest <= temperature <= highest

    def coverage(self, datasets: Mapping[str, Sequence[SampleSource]], *, window: int) -> dict[str, TypeCoverage]:
        """Stored signal by type for the data of a run, before its first step.

        All names are compared with the store's listing; some of the records found are read, and all of them as long as
        none has proved usable.

        Args:
            datasets: type -> its datasets; types without a store are left out.
            window: longest window in tokens.

        Raises:
            DataError: stores are given, and no sample has a usable record.
        """
        found = {
            type: self._type_coverage(store, datasets[type], window)
            for type, store in self._stores.items()
            if any(len(dataset) for dataset in datasets.get(type, ()))
        }
        if found and not any(row.usable for row in found.values()):
            details = "; ".join(f"{type}: {row.samples} samples, {_problem(row)}" for type, row in found.items())
            places = ", ".join(sorted({self._stores[type].uri for type in found}))
            raise DataError(
                "no sample of this run has usable stored signal",
                where=places,
                got=details,
                remedy="capture the signal of this manifest with this tokenizer and sequence length",
            )
        for type, row in found.items():
            if not row.usable:
                log.warning("%s: no sample has usable stored signal (%s): plain cross-entropy", type, _problem(row))
        return found

    def close(self) -> None:
        """Close the stores."""
        for store in self._stores.values():
            store.close()

    def _count(self, batch: MicroBatch, lookups: Sequence[Lookup]) -> None:
        for sample, lookup in zip(batch.samples, lookups, strict=True):
            self.counts.add(batch.type, lookup.status)
            if lookup.status == "usable":
                continue
            if self._strict:
                if self.counts.first(batch.type, "strict"):
                    log.warning(
                        "%s: KD is skipped for micro-batches with a sample that has no usable signal; the first is %s",
                        batch.type,
                        _example(sample, lookup),
                    )
            elif self.counts.first(batch.type, lookup.status):
                log.warning(
                    "%s: samples with %s signal train on cross-entropy; the first is %s",
                    batch.type,
                    lookup.status,
                    _example(sample, lookup),
                )

    def _type_coverage(self, store: StoreReader, datasets: Sequence[SampleSource], window: int) -> TypeCoverage:
        places = [
            (dataset, index)
            for dataset in datasets
            for index in range(len(dataset))
            if store.has(dataset.sample_id(index))
        ]
        # Spread over the data first; the rest only until one is usable.
        spread = set(np.linspace(0, len(places) - 1, min(_SPREAD, len(places))).astype(int).tolist())
        order = sorted(spread) + [place for place in range(len(places)) if place not in spread]
        checked = usable = 0
        problem = ""
        for place in order:
            if checked >= len(spread) and usable:
                break
            dataset, index = places[place]
            lookup = store.check(dataset.sample(index), window)
            checked += 1
            usable += lookup.status == "usable"
            if lookup.status != "usable" and not problem:
                problem = f"sample {dataset.sample_id(index)!r} is {lookup.status}: {lookup.reason}"
        return TypeCoverage(sum(map(len, datasets)), len(places), checked, usable, problem)


def _problem(row: TypeCoverage) -> str:
    return row.problem if row.listed else "none has a record"


def _example(sample: Sample, lookup: Lookup) -> str:
    return f"sample {sample.sample_id!r}: {lookup.status} ({lookup.reason})"


def part_of(signal: StoredSignal, positions: slice) -> StoredSignal:
    """The rows ``positions`` of a stored signal that is still on the CPU."""
    changed: dict[str, Any] = {name: getattr(signal, name)[positions] for name in _tensors(signal)}
    changed |= {name: None for name in ("num_signal", "any_tail") if hasattr(signal, name)}  # counted anew
    return replace(signal, **changed)


def _tensors(signal: StoredSignal) -> tuple[str, ...]:
    if isinstance(signal, LogitsSignal):
        return ("rows", "mask")
    return ("ids", "weights", "log_probs", "tail_mass", "mask")


def _to(signal: StoredSignal, device: torch.device) -> StoredSignal:
    if signal.mask.device == device:
        return signal
    moved: dict[str, Any] = {name: to_device(getattr(signal, name), device) for name in _tensors(signal)}
    return replace(signal, **moved)
