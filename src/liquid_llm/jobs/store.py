"""``liquid store``: pack, verify, stats and diff, from options to exit code.

Each prints a table for people or, with ``--json``, the same as one JSON object. ``verify`` and ``diff`` end with 3
where something is not as it should be, ``pack`` where a record had to be left out.
"""

from __future__ import annotations

import json
from bisect import insort
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from liquid_llm import storage
from liquid_llm.capture.plan import Window, batches
from liquid_llm.capture.verify import Verifier
from liquid_llm.config import CaptureConfig, build_capture_config
from liquid_llm.data.many_files import ManyFiles
from liquid_llm.data.tokens import TokenDataset
from liquid_llm.errors import DataError, SignalError, UsageError
from liquid_llm.formatting import format_bytes, format_count
from liquid_llm.framing import Framings
from liquid_llm.jobs.prepare import find_run_data
from liquid_llm.models.loading import load_tokenizer
from liquid_llm.runtime import choose_device
from liquid_llm.signal_store.compare import compare
from liquid_llm.signal_store.description import HELD_OUT, present_layout
from liquid_llm.signal_store.records import Record
from liquid_llm.signal_store.shards.pack import pack
from liquid_llm.signal_store.shards.remote import ShardCache
from liquid_llm.signal_store.store import StoreReader, open_store
from liquid_llm.signal_store.survey import survey
from liquid_llm.sources import default_layout
from liquid_llm.teachers.online import OnlineTeacher
from liquid_llm.terminal import Stage, setup_logging
from liquid_llm.wiring.framing import stored_framing
from liquid_llm.wiring.inputs import HeldOut, Inputs, is_of_units, read_manifest_inputs
from liquid_llm.wiring.places import cache_dir
from liquid_llm.wiring.served import SERVED
from liquid_llm.wiring.teachers import load_online, name_in_store
from liquid_llm.wiring.tokenizers import TextTools
from liquid_llm.wiring.tokens import read_token

_LEFT_OUT = DataError.exit_code
_TEMPERATURE, _TEMPERATURES = 2.0, (1.0, 2.0)  # where none is asked for


def run_pack(source: str, target: str, *, as_json: bool) -> int:
    """``liquid store pack``. Raises LiquidError for any problem a user can cause."""
    setup_logging("INFO")
    store = _open(source)
    if present_layout(target) == "pt":
        raise UsageError(
            "this folder holds one .pt file a sample, and packing makes shards, in another folder",
            where=target,
            remedy=f"name another: liquid store pack {source} FOLDER",
        )
    with Stage("pack", unit="records", total=len(store)) as stage:
        summary = pack(store, target, progress=stage.advance)
    store.close()
    held_out = storage.join(source, HELD_OUT)
    if present_layout(held_out) is not None:
        with closing(_open(held_out)) as also:
            pack(also, storage.join(target, HELD_OUT))
    _show(asdict(summary), as_json)
    return _LEFT_OUT if summary.left_out_count else 0


def run_stats(uri: str, given: Mapping[str, object], *, samples: int, temperature: float | None, as_json: bool) -> int:
    """``liquid store stats``; with a teacher and a manifest in ``given`` the fidelity is measured too."""
    setup_logging("WARNING" if as_json else "INFO")
    store = _open(uri)
    asked = None if temperature is None else [temperature]
    (at,), moved = _choose_temperatures([store], "--temperature", asked, [_TEMPERATURE])
    seed = int(str(given.get("seed", 1234)))
    found = survey(store, samples=samples, temperature=at, seed=seed)
    report = {**store.describe(), "temperature": at, **found}
    if report["superseded"]:
        moved.append(("superseded", f"liquid store pack {uri} {uri} gives their room back"))
    if report["positions"]:
        moved.append(("shares", _shares_in_words(report)))
    code = 0
    if "mc_teacher_id" in given:
        report["fidelity"], code = _verify(store, build_capture_config(given), samples, (at,))
    store.close()
    _show(report, as_json, moved)
    return code


def _shares_in_words(report: Mapping[str, Any]) -> str:
    stored, learnt, kept = (f"{report[name]:.1%}" for name in ("stored_share", "learnt_share", "kd_positions"))
    of_learnt = "all of them" if report["kd_positions"] == 1.0 else f"of these {kept} (--kd_positions), rounded up,"
    return f"{learnt} of the positions are learnt, {of_learnt} stored: {stored}; bytes_per_token is for each stored one"


def run_verify(
    uri: str, given: Mapping[str, object], *, samples: int, temperatures: Sequence[float] | None, as_json: bool
) -> int:
    """``liquid store verify``: 3 unless all records looked at are usable and say what the teacher says."""
    setup_logging("WARNING" if as_json else "INFO")
    config = build_capture_config(given)
    store = _open(uri, teacher_id=name_in_store(config.teacher.stored_id))
    chosen, moved = _choose_temperatures([store], "--temperatures", temperatures, _TEMPERATURES)
    report, code = _verify(store, config, samples, tuple(chosen))
    store.close()
    report["temperatures"] = chosen
    _show({**store.describe(), **report}, as_json, moved)
    return code


def run_diff(first: str, second: str, *, temperature: float | None, as_json: bool) -> int:
    """``liquid store diff``: 3 unless both hold the same signal of the same samples."""
    setup_logging("WARNING" if as_json else "INFO")
    stores = _open(first), _open(second)
    asked = None if temperature is None else [temperature]
    chosen, moved = _choose_temperatures(stores, "--temperature", asked, [_TEMPERATURE])
    at = chosen[0] if chosen else None
    found = compare(*stores, at)
    for store in stores:
        store.close()
    report = {"first": first, "second": second, "temperature": at, **found.as_dict()}
    _show(report, as_json, moved)
    return 0 if found.same else _LEFT_OUT


def _choose_temperatures(
    stores: Sequence[StoreReader], option: str, asked: Sequence[float] | None, usual: Sequence[float]
) -> tuple[list[float], list[tuple[str, str]]]:
    """The temperatures to decode at, and lines of output about those that are not the usual ones.

    Where none is ``asked`` for, the ``usual`` ones are moved into what the codecs of all ``stores`` can be read at;
    none is left where they have nothing in common.

    Raises:
        UsageError: one asked for that a store cannot be read at.
    """
    ranges = [store.codec.temperature_range for store in stores]
    for store, (lowest, highest) in zip(stores, ranges, strict=True):
        for one in asked or ():
            if not lowest <= one <= highest:
                raise UsageError(
                    f"signal stored with codec {store.codec.name!r} cannot be read at this temperature",
                    where=f"{option}, store {store.uri}",
                    got=f"{one:g}",
                    expected=_range_words(lowest, highest),
                    remedy=f"choose {option} in this range, or leave it out",
                )
    if asked is not None:
        return list(dict.fromkeys(asked)), []
    low, high = max(low for low, _ in ranges), min(high for _, high in ranges)
    if low > high:
        return [], [("temperature", "none that both can be read at: nothing was decoded")]
    moved = {one: min(max(one, low), high) for one in usual}
    names = list(dict.fromkeys(repr(one.codec.name) for one in stores))
    why = f"codec {names[0]} is read at" if len(names) == 1 else f"codecs {' and '.join(names)} are both read at"
    lines = [
        ("temperature", f"{at:g} instead of {one:g}: {why} {_range_words(low, high)}")
        for one, at in moved.items()
        if at != one
    ]
    return list(dict.fromkeys(moved.values())), lines


def _range_words(lowest: float, highest: float) -> str:
    return f"{lowest:.3g}" if lowest == highest else f"{lowest:.3g} to {highest:.3g}"


# --------------------------------------------------------------------------------------------------------------- verify


def _open(uri: str, **expected: str | None) -> StoreReader:
    return open_store(uri, cache=ShardCache(cache_dir() / "signal"), **expected)  # type: ignore[arg-type]


def _verify(
    store: StoreReader, config: CaptureConfig, samples: int, temperatures: tuple[float, ...]
) -> tuple[dict[str, Any], int]:
    """Re-score records drawn at random; what was found, and the exit code."""
    if store.identity.teacher_revision.startswith(f"{SERVED}:"):
        raise UsageError(
            "no teacher here is the one that gave this signal: it ran behind a server",
            where=store.uri,
            got=store.identity.teacher_revision,
            remedy="capture some of its samples from the server into another folder, and compare what liquid store "
            "stats says of both",
        )
    teacher_id = config.teacher.stored_id
    assert teacher_id is not None
    token = read_token(config.teacher)
    tokenizer = load_tokenizer(teacher_id, token=token)
    framings = Framings(stored_framing(store.identity, tokenizer))
    text = TextTools.of(tokenizer, framings).learn(config.data, token)
    _require(store, "tokenizer hash", store.identity.tokenizer_hash, text.hash)
    entries = find_run_data(config.data, partial(_may_hold, store)).entries
    # Of units each data file has a cache of its own: that of a run, or of a capture that kept its tokens.
    apart = [entry.type for entry in entries] if is_of_units(store.uri) else []
    with Stage("tokenise", unit="tokens", total=None) as stage:
        inputs = read_manifest_inputs(
            config.data,
            text,
            entries,
            _layout_of,
            progress=lambda _, tokens: stage.advance(tokens),
            apart=dict.fromkeys(apart, HeldOut(0)),
        )
    coverage, chosen = _look_up(store, _parts(inputs), samples, config.seed)
    if not chosen:
        raise SignalError("no sample of the manifest has a record", where=store.uri, got=config.data.manifest)
    asked = replace(config.teacher, quantize=store.identity.quantisation or "none")  # scored as it was
    loaded, _ = load_online(teacher_id, asked, torch.device(choose_device(config.device).value), token)
    _require(store, "teacher revision", store.identity.teacher_revision, loaded.identity.revision)
    vocab_size = min(text.vocab_size, loaded.vocab_size)
    _require(store, "vocabulary size", store.identity.vocab_size, vocab_size)
    verifier = Verifier(store, OnlineTeacher(loaded, vocab_size), temperatures)
    with Stage("verify", unit="records", total=len(chosen)) as stage:
        for batch in batches(chosen, config.data.batch_size * config.data.seq_len):
            verifier.check(batch)
            stage.advance(len(batch))
    totals = {name: sum(row[name] for row in coverage.values()) for name in ("samples", "with_record")}
    return {**totals, "coverage": coverage, **verifier.as_dict()}, 0 if verifier.agrees else _LEFT_OUT


def _layout_of(type: str) -> str:
    """How capture cuts the texts of a type that names no layout."""
    return default_layout(type, "store:")


def _may_hold(store: StoreReader, type: str) -> bool:
    """Whether a store may have records of a type; plain text, of which there is much, is looked for in the store."""
    return type != "lm" or any(
        isinstance(record, Record) and record.header.type == type for _, record in store.layout.draw(16, 0)
    )


def _parts(inputs: Inputs) -> Iterator[TokenDataset]:
    """All texts; of many files those of one after the other, so that few are open at a time."""
    for dataset, _ in inputs.sources:
        if isinstance(dataset, ManyFiles):
            yield from map(dataset.part, range(len(dataset.shards)))
        else:
            yield dataset


def _look_up(
    store: StoreReader, parts: Iterable[TokenDataset], count: int, seed: int
) -> tuple[dict[str, dict[str, int]], list[Window]]:
    """Samples by type, and how many of them have a record of their name; up to ``count`` of these, drawn at random."""
    found: dict[str, dict[str, int]] = {}
    rng, chosen = np.random.default_rng(seed), list[tuple[float, Window]]()
    for one in parts:
        held = np.array([store.has(one.sample_id(index), one.shard(index)) for index in range(len(one))], bool)
        row = found.setdefault(one.type, {"samples": 0, "with_record": 0})
        row["samples"] += len(one)
        row["with_record"] += int(held.sum())
        lots = rng.random(len(one))
        numbers = np.flatnonzero(held)
        for index in numbers[np.argsort(lots[numbers])[:count]].tolist():
            if len(chosen) < count or lots[index] < chosen[-1][0]:
                window = Window(one, index, one.sample_id(index), one.type, int(one.lengths[index]))
                insort(chosen, (float(lots[index]), window), key=lambda lot: lot[0])
                del chosen[count:]
    return found, [window for _, window in chosen]


def _require(store: StoreReader, what: str, stored: object, present: object) -> None:
    if stored != present:
        raise SignalError(
            f"the store is not of this teacher: the {what} differs", where=store.uri, got=present, expected=stored
        )


# --------------------------------------------------------------------------------------------------------------- output


def _show(report: Mapping[str, Any], as_json: bool, notes: Iterable[tuple[str, str]] = ()) -> None:
    """One JSON object; or for people the same names and values, a line each, after what there is to say of them."""
    if as_json:
        print(json.dumps(report, sort_keys=True))
        return
    rows = [*notes, *_rows(report)]
    width = max(len(name) for name, _ in rows)
    for name, text in rows:
        print(f"{name:<{width}}  {text}".rstrip())


def _rows(values: Mapping[str, Any], indent: str = "") -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        parts = value if isinstance(value, list) else [value]
        if not any(isinstance(one, Mapping) for one in parts):
            yield f"{indent}{name}", ", ".join(_in_words(name, one) for one in parts) or "-"
            continue
        for one in parts:
            yield f"{indent}{name}", "" if one else "-"
            yield from _rows(one, f"{indent}  ")


def _in_words(name: str, value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and "bytes" in name.split("_"):
        return format_bytes(value)
    return format_count(value) if isinstance(value, int | float) else str(value)
