"""A capture job that goes unit by unit: any number of tasks, each with its share, under any scheduler.

A unit's file is tokenised when its turn comes and its tokens are thrown away when it is complete, unless they are to be
kept for a run, so that neither memory nor disk grows with the corpus. The teacher is loaded when the first unit is met
that is not complete.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property, partial
from typing import NamedTuple

import torch

from liquid_llm import storage
from liquid_llm.capture.held_out import SHARE, choose_held_out, open_held_out
from liquid_llm.capture.job import CaptureSummary, capture
from liquid_llm.capture.served import ServedTeacher
from liquid_llm.capture.units import Unit, UnitsSummary, claim, fingerprint, list_units
from liquid_llm.config import CaptureConfig, build_capture_config
from liquid_llm.data.tokens import TokenDataset
from liquid_llm.data.types import ManifestEntry
from liquid_llm.distributed import read_rank
from liquid_llm.errors import DataError, UsageError
from liquid_llm.jobs.capture import (
    Asked,
    check_capture,
    choose_folder,
    find_fit,
    find_layout,
    is_captured,
    open_teacher,
    record_capture,
)
from liquid_llm.jobs.prepare import RunData, prepare_run_data
from liquid_llm.losses.signals import WHOLE
from liquid_llm.models.loading import LoadedModel
from liquid_llm.runtime import Choice, StopSignal
from liquid_llm.signal_store.codecs import Codec
from liquid_llm.signal_store.description import HELD_OUT
from liquid_llm.signal_store.store import StoreWriter
from liquid_llm.signal_store.units import UnitsLayout, why_to_do, write_marker, write_plan
from liquid_llm.sources import WINDOWS
from liquid_llm.terminal import Stage
from liquid_llm.wiring.inputs import read_manifest_inputs, token_cache
from liquid_llm.wiring.repeat import begin_choice

log = logging.getLogger(__name__)


def is_of_units(config: CaptureConfig, asked: Asked) -> bool:
    """Whether a capture goes unit by unit: it is asked to, or its store was begun so.

    Raises:
        UsageError: it is said of one of several stores alone.
    """
    layouts = {uri: store.layout for uri, store in asked.stores.items()}
    of_units = [uri for uri, layout in layouts.items() if layout == UnitsLayout.name]
    if of_units and len(of_units) < len(layouts):
        other = next(uri for uri in layouts if uri not in of_units)
        raise UsageError(
            "one capture fills stores of units or stores of another layout, not both",
            where=of_units[0],
            got=f"layout {layouts[other]} in {other}",
            remedy="capture the types apart, each with --signal OTHER=none",
        )
    return bool(of_units)


class _Loaded(NamedTuple):
    """The teacher, and what follows from it."""

    model: LoadedModel | ServedTeacher
    choices: dict[str, Choice]
    vocab_size: int
    largest: str


class UnitCapture:
    """Captures units, whichever it is asked for; made once a process, as the teacher is kept.

    Args:
        config: of the capture; its ``--unit`` is not looked at.
        asked: what can be refused without data or teacher has been.
        stopping: asked between batches; true ends a unit early, with everything begun written.
    """

    def __init__(self, config: CaptureConfig, asked: Asked, stopping: Callable[[], bool] = lambda: False) -> None:
        self._config, self._asked, self._stopping = config, asked, stopping

    @cached_property
    def data(self) -> RunData:
        """The manifest, after what it names has been prepared."""
        data = prepare_run_data(self._config.data, lambda type: is_captured(self._config, type))
        for entry in data.entries:
            choose_folder(self._config, entry.type)
        return data

    def units(self) -> Iterator[Unit]:
        """All units of the manifest, one after the other. Raises DataError: a pattern matches no file."""
        assert self._config.data.manifest is not None
        return list_units(self.data.entries, self._config.data.manifest)

    def codec(self, folder: str) -> Codec:
        """The codec of a store: of one that is begun, its own."""
        return self._asked.stores[folder].codec or self._asked.codec

    @cached_property
    def loaded(self) -> _Loaded:
        """The teacher on its device, or behind its server."""
        config, asked = self._config, self._asked
        model, choices, vocab_size = open_teacher(config, asked)
        largest = max(map(self.codec, asked.stores), key=lambda codec: codec.most_ids)
        device = torch.device(asked.device.value)
        fit = find_fit(config, model, largest, config.data.seq_len, vocab_size, device)
        return _Loaded(model, choices, vocab_size, fit.largest())

    def run(self, unit: Unit) -> tuple[CaptureSummary, bool]:
        """Capture a unit unless it is complete.

        Returns:
            What came of it, and whether it was complete before.

        Raises:
            DataError: its file is not there or cannot be used.
            LiquidError: any other problem a user can cause.
        """
        source = storage.stat(unit.file)
        if source is None or not source.version:
            raise DataError("no such file", where=unit.file, got=f"named in {unit.where}" if unit.where else None)
        folder = choose_folder(self._config, unit.type)
        known = fingerprint(source, self._decided(unit.type, folder))
        if not self._why(unit, folder, known):
            return CaptureSummary(), True
        cache = token_cache(self._config.data) / "units"
        with storage.translate_errors(cache, writing=True):
            cache.mkdir(parents=True, exist_ok=True)
        # Two tasks of one machine that are given the same unit: the second waits and finds it complete. Two stores of
        # the same texts, of two teachers say, have nothing to wait for.
        store = folder if storage.is_remote(folder) else os.path.abspath(storage.local_path(folder))
        own = f"{unit.name}-{hashlib.blake2b(store.encode(), digest_size=4).hexdigest()}"
        lock = cache / f".{own}.lock"
        with storage.locked(lock, on_wait=lambda who: log.info("%s: process %s is at it", unit.name, who)):
            why = self._why(unit, folder, known)
            if not why:
                return CaptureSummary(), True
            log.info("%s: captured, as %s", unit.name, why)
            try:
                summary = self._capture(unit, folder, str(cache / own))
                if summary.is_whole:
                    if self._held_tokens(unit.type):
                        write_marker(storage.join(folder, HELD_OUT), unit.name, self._held_out(unit, known), source)
                    write_marker(folder, unit.name, known, source)
            finally:
                shutil.rmtree(cache / own, ignore_errors=True)
                lock.unlink(missing_ok=True)  # whoever waits for it finds that out
        return summary, False

    def _why(self, unit: Unit, folder: str, known: str) -> str:
        """Why a unit has to be captured, in words; "" where it is complete, with its held-out records."""
        if self._config.store.overwrite:
            return "--overwrite says"
        why = why_to_do(folder, unit.name, known)
        if not why and self._held_tokens(unit.type):
            of_held_out = why_to_do(storage.join(folder, HELD_OUT), unit.name, self._held_out(unit, known))
            why = of_held_out and f"of its held-out samples {of_held_out}"
        return why

    def _held_out(self, unit: Unit, known: str) -> str:
        """The fingerprint of a unit's held-out records."""
        return f"{known}-{self._held_tokens(unit.type)}"

    def _capture(self, unit: Unit, folder: str, cache: str) -> CaptureSummary:
        config, asked = self._config, self._asked
        dataset = self._read(unit, cache)
        framing, vocab_size = asked.stores[folder].framing, self.loaded.vocab_size
        writer = StoreWriter(
            folder,
            self.loaded.model.identity,
            self.codec(folder),
            vocab_size=vocab_size,
            layout=UnitsLayout.name,
            framing=framing,
            positions=config.store.positions,
            unit=unit.name,
        )
        score = partial(
            capture,
            teacher=self.loaded.model,
            seq_len=config.data.seq_len,
            batch_size=config.data.batch_size,
            num_workers=max(1, config.data.num_workers),
            overwrite=config.store.overwrite,
            stopping=self._stopping,
        )
        windows = int(dataset.lengths.clip(max=config.data.seq_len).sum())
        with Stage(f"capture {unit.name}", unit="tokens", total=windows) as stage:
            summary = score({unit.type: [dataset]}, {unit.type: writer}, progress=stage.advance)
        if summary.too_large:
            summary.consumers = self.loaded.largest
        held = (
            choose_held_out({unit.type: [dataset]}, SHARE, tokens) if (tokens := self._held_tokens(unit.type)) else {}
        )
        if not held or summary.interrupted:
            return summary
        judging = open_held_out(
            {unit.type: folder}, {unit.type: framing}, self.loaded.model.identity, vocab_size, unit.name
        )
        also = score(held, judging)
        summary.interrupted = also.interrupted
        summary.add_failures(also)
        return summary

    def _held_tokens(self, type: str) -> int:
        """Tokens of a unit whose signal is stored for evaluation too.

        Of windows the documents are held out, and a window does not say which it is of.
        """
        whole = self.codec(choose_folder(self._config, type)).form == WHOLE
        windows = find_layout(self._config, type) == WINDOWS
        return 0 if whole or windows else self._config.store.held_out_tokens

    def _read(self, unit: Unit, cache: str) -> TokenDataset:
        """The samples of a unit's file, as the type's layout has them."""
        entry = ManifestEntry(unit.file, unit.type, 1.0, unit.where)
        kept = self._config.data.cache_dir if self._config.store.keep_tokens else cache
        data = replace(self._config.data, cache_dir=kept, val_fraction=0.0)
        with Stage(f"tokenise {unit.name}", unit="tokens", total=None) as stage:
            inputs = read_manifest_inputs(
                data,
                self._asked.text,
                [entry],
                lambda type: find_layout(self._config, type),
                progress=lambda _, tokens: stage.advance(tokens),
            )
        return inputs.everything[0]

    def _decided(self, type: str, folder: str) -> list[object]:
        """What the records of a type follow from beside its texts, as plain values."""
        config, codec, model = self._config, self.codec(folder), self._asked.model
        framing = self._asked.stores[folder].framing
        return [
            [type, config.data.seq_len, find_layout(config, type), self._asked.text.learning.key],
            model.plain(),
            [codec.name, codec.version, dict(codec.options), config.store.positions],
            None if framing is None else asdict(framing),
        ]


def open_units(given: Mapping[str, object]) -> UnitCapture:
    """Units for whoever schedules them.

    Args:
        given: option name -> value.

    Raises:
        LiquidError: what ``check_capture`` finds; a manifest that cannot be read is found when units are listed.
    """
    if given.get("unit") is not None:
        raise UsageError("whoever asks for a unit says which", where="unit", got=given["unit"], remedy="leave it out")
    config = build_capture_config({"logits_format": UnitsLayout.name, **given})
    return UnitCapture(config, check_capture(config))


def capture_units(config: CaptureConfig, asked: Asked) -> UnitsSummary:
    """Capture this task's share of the units.

    A file that cannot be used keeps no other from being captured: it is told in the summary.
    """
    rank, world_size = read_rank()
    index, count = config.store.share or (0, 1)
    with StopSignal() as stop:
        job = UnitCapture(config, asked, lambda: stop.requested)
        mine, total = claim(job.units(), (index * world_size + rank, count * world_size))
        summary = UnitsSummary(units=len(mine), units_of_all=total)
        log.info("%d of %d units are this task's", len(mine), total)
        if mine and mine[0].number == 0:
            _begin_stores(config, job)
        for unit in mine:
            if stop.requested:
                summary.interrupted = True
                break
            try:
                one, was_complete = job.run(unit)
            except DataError as error:
                log.warning("unit %d is not captured, the others are: %s", unit.number, error)
                summary.broken[unit.name] = str(error)
                continue
            summary.add(one)
            summary.units_skipped += was_complete
            summary.units_complete += one.is_whole
    if summary.written and mine[0].number == 0:
        _record(config, asked, job)
    return summary


def _begin_stores(config: CaptureConfig, job: UnitCapture) -> None:
    """Say how many units each store is to have: what the task of the first unit does for all."""
    counts: dict[str, int] = {}
    for unit in job.units():
        folder = choose_folder(config, unit.type)
        counts[folder] = counts.get(folder, 0) + 1
    for folder, units in counts.items():
        write_plan(folder, units)


def _record(config: CaptureConfig, asked: Asked, job: UnitCapture) -> None:
    """Write what would make the records again, whichever units this task had."""
    data = job.data
    types: Sequence[str] = [entry.type for entry in data.entries]
    choices = {**job.loaded.choices, "device": asked.device, **begin_choice(asked.text.framings, types)}
    given = {**config.given, "logits_format": UnitsLayout.name}
    given.pop("unit", None)
    stores = dict.fromkeys(choose_folder(config, type) for type in types)
    record_capture(stores, config, given, data.entries, data.readiness, data, choices, job.loaded.model.identity)
