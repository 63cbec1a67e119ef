"""``liquid store``: pack, verify, stats and diff, from options to exit code.

Each prints a table for people or, with ``--json``, one JSON object. ``verify`` and ``diff`` end with 3 where something
is not as it should be, ``pack`` where a record had to be left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from statistics import fmean
from typing import Any

import numpy as np
import torch

from liquid_llm.capture.verify import Verifier
from liquid_llm.config import CaptureConfig, build_capture_config
from liquid_llm.data.tokens import TokenDataset
from liquid_llm.errors import DataError, SignalError, UsageError
from liquid_llm.formatting import format_bytes
from liquid_llm.jobs.prepare import find_run_data
from liquid_llm.models.loading import load_tokenizer
from liquid_llm.runtime import choose_device
from liquid_llm.signal_store.compare import Difference, compare
from liquid_llm.signal_store.description import present_layout
from liquid_llm.signal_store.records import Record
from liquid_llm.signal_store.shards.pack import pack
from liquid_llm.signal_store.shards.remote import ShardCache
from liquid_llm.signal_store.store import StoreReader, open_store
from liquid_llm.signal_store.survey import survey
from liquid_llm.teachers.online import OnlineTeacher
from liquid_llm.terminal import Stage, setup_logging
from liquid_llm.wiring.inputs import read_manifest_inputs
from liquid_llm.wiring.places import cache_dir
from liquid_llm.wiring.teachers import load_online, stored_name
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
    _show(
        asdict(summary),
        as_json,
        [
            ("records packed", f"{summary.packed:,}"),
            ("already there", f"{summary.present:,}"),
            ("left out", f"{summary.left_out_count:,}"),
            ("files", f"{summary.files_before:,} before, {summary.files_after:,} now"),
            ("size", f"{format_bytes(summary.bytes_before)} before, {format_bytes(summary.bytes_after)} now"),
            *(("", f"{name}: {why}") for name, why in summary.left_out.items()),
        ],
    )
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
    lines = [*_stats_lines(report), *moved]
    code = 0
    if "mc_teacher_id" in given:
        verified, code = _verify(store, build_capture_config(given), samples, (at,))
        report["fidelity"] = verified
        lines += _verify_lines(verified)
    store.close()
    _show(report, as_json, lines)
    return code


def run_verify(
    uri: str, given: Mapping[str, object], *, samples: int, temperatures: Sequence[float] | None, as_json: bool
) -> int:
    """``liquid store verify``: 3 unless all records looked at are usable and say what the teacher says."""
    setup_logging("WARNING" if as_json else "INFO")
    config = build_capture_config(given)
    store = _open(uri, teacher_id=stored_name(config.teacher.stored_id))
    chosen, moved = _choose_temperatures([store], "--temperatures", temperatures, _TEMPERATURES)
    report, code = _verify(store, config, samples, tuple(chosen))
    store.close()
    report["temperatures"] = chosen
    _show({**store.describe(), **report}, as_json, [("store", uri), *moved, *_verify_lines(report)])
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
    _show(report, as_json, [*moved, *_diff_lines(found, first, second)])
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
    why = f"codec {' and '.join(dict.fromkeys(repr(one.codec.name) for one in stores))} is read at"
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
    teacher_id = config.teacher.stored_id
    assert teacher_id is not None
    token = read_token(config.teacher)
    text = TextTools.of(load_tokenizer(teacher_id, token=token))
    _require(store, "tokenizer hash", store.identity.tokenizer_hash, text.hash)
    entries = find_run_data(config.data, partial(_may_hold, store)).entries
    with Stage("tokenise", unit="tokens", total=None) as stage:
        inputs = read_manifest_inputs(
            config.data, text, entries, lambda _: "samples", progress=lambda _, tokens: stage.advance(tokens)
        )
    coverage = _coverage(store, inputs.everything)
    chosen = list(_choose(store, inputs.everything, samples, config.seed))
    if not chosen:
        raise SignalError("no sample of the manifest has a record", where=store.uri, got=config.data.manifest)
    loaded, _ = load_online(teacher_id, config.teacher, torch.device(choose_device(config.device).value), token)
    _require(store, "teacher revision", store.identity.teacher_revision, loaded.identity.revision)
    vocab_size = min(text.vocab_size, loaded.model.config.vocab_size)
    _require(store, "vocabulary size", store.identity.vocab_size, vocab_size)
    verifier = Verifier(store, OnlineTeacher(loaded, vocab_size), temperatures)
    with Stage("verify", unit="records", total=len(chosen)) as stage:
        for dataset, index in chosen:
            verifier.check(dataset.sample(index))
            stage.advance()
    totals = {name: sum(row[name] for row in coverage.values()) for name in ("samples", "with_record")}
    return {**totals, "coverage": coverage, **verifier.as_dict()}, 0 if verifier.agrees else _LEFT_OUT


def _may_hold(store: StoreReader, type: str) -> bool:
    """Whether a store may have records of a type; plain text, of which there is much, is looked for in the store."""
    return type != "lm" or any(
        isinstance(record, Record) and record.header.type == type for _, record in store.layout.draw(16, 0)
    )


def _coverage(store: StoreReader, datasets: Sequence[TokenDataset]) -> dict[str, dict[str, int]]:
    """Samples by type, and how many of them have a record of their name."""
    found: dict[str, dict[str, int]] = {}
    for dataset in datasets:
        row = found.setdefault(dataset.type, {"samples": 0, "with_record": 0})
        row["samples"] += len(dataset)
        row["with_record"] += sum(store.has(dataset.sample_id(index)) for index in range(len(dataset)))
    return found


def _choose(
    store: StoreReader, datasets: Sequence[TokenDataset], count: int, seed: int
) -> Iterator[tuple[TokenDataset, int]]:
    """Up to ``count`` samples that have a record of that name, drawn at random from all."""
    ends = np.cumsum([len(dataset) for dataset in datasets])
    for row in np.random.default_rng(seed).permutation(int(ends[-1])).tolist():
        if count == 0:
            return
        number = int(ends.searchsorted(row, side="right"))
        dataset, index = datasets[number], row - (int(ends[number]) - len(datasets[number]))
        if store.has(dataset.sample_id(index)):
            count -= 1
            yield dataset, index


def _require(store: StoreReader, what: str, stored: object, present: object) -> None:
    if stored != present:
        raise SignalError(
            f"the store is not of this teacher: the {what} differs", where=store.uri, got=present, expected=stored
        )


# --------------------------------------------------------------------------------------------------------------- output


def _show(report: Mapping[str, Any], as_json: bool, lines: Iterable[tuple[str, str]]) -> None:
    if as_json:
        print(json.dumps(report, sort_keys=True))
        return
    rows = list(lines)
    width = max((len(name) for name, _ in rows), default=0)
    for name, text in rows:
        print(f"{name:<{width}}  {text}".rstrip())


def _stats_lines(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    positions = f"{report['positions']:,}" if report["positions"] else "-"
    lines = [
        ("store", f"{report['uri']}, layout {report['layout']}"),
        ("teacher", f"{report['teacher_id']}@{report['teacher_revision'][:12]}"),
        ("codec", f"{report['codec']} {report['codec_version']} {report['codec_options']}"),
        ("records", f"{report['records']:,} in {report['files']:,} files, {positions} positions"),
    ]
    if report["unreadable"] or report["unreadable_bytes"]:
        size = format_bytes(report["unreadable_bytes"])
        lines.append(("unreadable", f"{report['unreadable']:,} of these records, {size}"))
    if report["superseded"]:
        room = f"liquid store pack {report['uri']} {report['uri']} gives the room back"
        lines.append(("superseded", f"{report['superseded']:,} more, counted below; {room}"))
    lines += [
        ("size", format_bytes(report["bytes"])),
        ("bytes a token", _or_dash(report["bytes_per_token"])),
        *((f"  {name}", f"{size:.2f}") for name, size in report["parts_bytes_per_token"].items()),
        ("looked at", f"{report['sampled']:,}: {report['corrupt']} corrupt, {report['stale']} stale"),
    ]
    for type, row in report["types"].items():
        size = f"{row['records']:,} records, {_or_dash(row['payload_bytes_per_token'])} bytes a token of payload"
        mass = "none decoded"
        if row["mass"] is not None:
            mass = f"mass {row['mass']:.4f}, tail share {row['tail_share']:.3f}, mass error {row['mass_error']:.3f}"
        lines.append((type, f"{size}; {mass} at T={report['temperature']:g}"))
    lines += list(report["examples"].items())
    return lines + [("problem", problem) for problem in report["problems"]]


def _or_dash(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _diff_lines(found: Difference, first: str, second: str) -> list[tuple[str, str]]:
    words = {
        "equal": "equal",
        "payload": "same tokens, other signal",
        "tokens": "of another text or length (stale in one of them)",
        "only_first": f"only in {first}",
        "only_second": f"only in {second}",
        "unreadable": "unreadable",
    }
    lines = [(words[outcome], f"{count:,}") for outcome, count in found.counts.items()]
    if found.identity is not None:
        name, mine, theirs = found.identity
        lines.append((f"the {name} differs", f"{mine} and {theirs}"))
    if found.decoded:
        what = "relative Euclidean distance of a record's distributions"
        lines.append(
            ("decoded difference", f"mean {fmean(found.decoded):.3g}, largest {max(found.decoded):.3g} ({what})")
        )
    return lines + [(words[outcome], name) for outcome, names in found.examples.items() for name in names]


def _verify_lines(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    counts = ", ".join(f"{report[name]} {name}" for name in ("usable", "stale", "corrupt", "identical", "differing"))
    by_type = ", ".join(
        f"{type} {row['with_record']:,} of {row['samples']:,}" for type, row in report["coverage"].items()
    )
    covered = f"{report['with_record']:,} of {report['samples']:,} samples of the manifest have a record"
    lines = [
        ("manifest", f"{covered} ({by_type})"),
        ("re-scored", f"{report['looked_at']} records: {counts}"),
    ]
    for row in report["measured"]:
        words = [
            f"{words} {row[f'stored_{name}']:.5f} (fresh {row[f'fresh_{name}']:.5f})"
            for name, words in (
                ("divergence", "divergence"),
                ("divergence_p95", "95th percentile"),
                ("error", "error of the mean"),
            )
        ]
        lines.append((f"{row['type']} at T={row['temperature']:g}", f"{'; '.join(words)}; {row['positions']:,} rows"))
    lines += [(name, why) for name, why in report["examples"].items()]
    lines += [(name, "not what the teacher says") for name in report["differing_samples"]]
    return [*lines, ("verdict", report["verdict"])]
