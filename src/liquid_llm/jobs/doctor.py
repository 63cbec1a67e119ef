"""``liquid doctor``: whether a run, checkpoint, store, manifest or prepared data is whole, and what to do where not.

part      a file, or what stands in one: it is read to its end and compared with its checksums
whole     nothing in any part is damaged, lost or in the way of what the place is for

Everything is read and nothing is changed: the exit code is 0 where all is whole, else that of the worst part (4 for a
run or checkpoint, 3 for data and stores).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from liquid_llm import storage
from liquid_llm.checkpoint.discovery import (
    DATA_SUFFIX,
    SIDECAR_SUFFIX,
    parse_sidecar,
    read_checkpoint,
)
from liquid_llm.checkpoint.files import read_archive
from liquid_llm.checkpoint.mending import read_whole, remains
from liquid_llm.checkpoint.metadata import CheckpointMetadata
from liquid_llm.checkpoint.pieces import fetch_pieces
from liquid_llm.checkpoint.resume import read_student_weights
from liquid_llm.data.manifest import entry_files, read_manifest
from liquid_llm.data.records import read_records
from liquid_llm.device import find_not_finite
from liquid_llm.errors import CheckpointError, DataError, LiquidError, StorageError, UsageError
from liquid_llm.evaluation.result import FILE_NAME as EVALUATION
from liquid_llm.masking import process_masker
from liquid_llm.metrics import FILE_NAME, SAMPLES_FILE
from liquid_llm.models.loading import load_tokenizer
from liquid_llm.parsing import ParseError, parse_json, parse_yaml
from liquid_llm.preparation.catalog import STATE_FOLDER
from liquid_llm.preparation.dataset import COMPLETE
from liquid_llm.provenance import HISTORY, OPTIONS, parse_kept_options
from liquid_llm.signal_store.description import HELD_OUT, STORE_FILE
from liquid_llm.signal_store.pt import is_record_file
from liquid_llm.signal_store.records import RecordError, difference_in_words
from liquid_llm.signal_store.shards.file import is_shard
from liquid_llm.signal_store.store import open_store
from liquid_llm.signal_store.units import UnitsLayout, find_damaged, read_plan

_MAX_TOLD = 20  # of records alike
_CAPTURE = "copy it again from where it is whole, or capture again: the same command fills gaps"
_UNITS = "run the liquid capture of this store again: what is complete is skipped"
_PARSERS: dict[str, Callable[[bytes], object]] = {
    OPTIONS: parse_kept_options,
    "datasets_snapshot.yaml": parse_yaml,
    "config.json": parse_json,
    "data_readiness.json": parse_json,
    "environment.json": parse_json,
    HISTORY: parse_json,
    "manifest_snapshot.jsonl": lambda text: [parse_json(line) for line in text.splitlines() if line.strip()],
}
_EXPECTED = "a run directory, a .pt checkpoint, a signal store, a .jsonl manifest or a folder of prepared data"


@dataclass(frozen=True)
class Part:
    """One thing that was looked at.

    Attributes:
        name: file, or file and record.
        found: what it is, in words.
        problem, remedy: what is wrong and what to do; None where it is whole.
    """

    name: str
    found: str
    problem: str | None = None
    remedy: str | None = None


@dataclass
class Finding:
    """What a place is, and its parts; those that are whole and alike are counted in one."""

    kind: str
    where: str
    parts: list[Part]
    exit_code: int

    @property
    def whole(self) -> bool:
        return all(part.problem is None for part in self.parts)


def doctor(uri: str) -> int:
    """Print what ``examine`` finds as one JSON object; returns the exit code.

    Raises:
        UsageError: there is nothing there that this project writes or reads.
        StorageError: the place cannot be read.
    """
    found = examine(uri)
    parts = [{name: value for name, value in asdict(part).items() if value is not None} for part in found.parts]
    said = {"kind": found.kind, "where": found.where, "whole": found.whole, "parts": parts}
    print(json.dumps(process_masker().urls(said), indent=2))
    return 0 if found.whole else found.exit_code


def examine(uri: str) -> Finding:
    """Look at everything behind ``uri``; raises as ``doctor``."""
    if uri.endswith((DATA_SUFFIX, SIDECAR_SUFFIX)):
        name = uri.removesuffix(DATA_SUFFIX).removesuffix(SIDECAR_SUFFIX)
        folder, _, stem = name.rpartition("/")
        parts = [_checkpoint(folder or ".", stem)]
        return Finding("checkpoint", uri, parts, StorageError.exit_code)
    if uri.endswith((".jsonl", ".manifest")):
        return Finding("manifest", uri, list(_manifest(uri)), DataError.exit_code)
    names = {info.name: info for info in storage.list_files(uri)}
    if STORE_FILE in names or _is_bare_store(names):
        parts = list(_store(uri))
        if f"{HELD_OUT}/{STORE_FILE}" in names:
            parts += [replace(part, name=f"{HELD_OUT}/{part.name}") for part in _store(storage.join(uri, HELD_OUT))]
        return Finding("store", uri, parts, DataError.exit_code)
    if remains(names) or FILE_NAME in names:
        return Finding("run", uri, list(_run(uri, set(names))), StorageError.exit_code)
    prepared = sorted({name.split("/")[1] for name in names if name.startswith(f"{STATE_FOLDER}/")})
    if prepared:
        parts = [part for name in prepared for part in _prepared(uri, name)]
        return Finding("prepared data", uri, parts, DataError.exit_code)
    raise UsageError("nothing to examine here", where=uri, expected=_EXPECTED)


def _is_bare_store(names: Any) -> bool:
    """Whether a folder holds records and has lost what says whose they are."""
    return any(is_shard(name) for name in names) or (not remains(names) and any(is_record_file(name) for name in names))


# ------------------------------------------------------------------------------------------------- runs and checkpoints


def _run(uri: str, names: set[str]) -> Iterator[Part]:
    found = remains(names)
    for name in found:
        yield _checkpoint(uri, name.removesuffix(DATA_SUFFIX))
    in_place = {name.partition(".")[0] for name in names}  # also of what is a folder now
    is_run = any(name.startswith("provenance/") for name in names)  # else checkpoints alone, which have no rows
    for name in (FILE_NAME, SAMPLES_FILE):
        due = _last_row_due(uri, found) if name == FILE_NAME and is_run else None
        if name.partition(".")[0] in in_place or due is not None:
            yield _rows(uri, name, due)
    for name, parse in _PARSERS.items():
        if f"provenance/{name.partition('.')[0]}" in in_place:
            yield _read(uri, f"provenance/{name}", parse)
    if EVALUATION.partition(".")[0] in in_place:
        yield _read(uri, EVALUATION, parse_json, "what it was judged to be", "liquid evaluate writes it again")
    if any(name.startswith("student/") for name in names):
        with storage.scratch("doctor") as folder:
            read = partial(_read_student, storage.join(uri, "student"), folder)
            yield _tried("student/", "the exported student", read, "liquid export writes it again from a checkpoint")


def _read_student(uri: str, folder: Path) -> None:
    """Its weights, and the tokenizer beside them."""
    origin = read_student_weights(uri, folder)
    if origin.tokenizer_folder is not None:
        load_tokenizer(origin.tokenizer_folder)


def _last_row_due(uri: str, names: list[str]) -> int | None:
    """The step whose row has been there since the newest checkpoint; None where nothing tells."""
    steps = [0]
    for name in names:
        metadata, _ = _sidecar(storage.join(uri, name.removesuffix(DATA_SUFFIX) + SIDECAR_SUFFIX))
        steps.append(0 if metadata is None else metadata.step)
    if not max(steps):
        return None  # killed before its first checkpoint: rows are forced to the disk with those
    try:
        config = parse_json(storage.read_small(storage.join(uri, "provenance", "config.json")))
        every = int(config["output"]["metrics_every_steps"])
        return max(steps) // every * every
    except (StorageError, ParseError, LookupError, TypeError, ValueError, ArithmeticError):
        return 0


def _checkpoint(folder: str, name: str) -> Part:
    """One checkpoint: its sidecar, its data, and whether they belong together."""
    shown = name + DATA_SUFFIX
    place = storage.join(folder, shown)
    if not storage.exists(place):
        return Part(shown, "a sidecar alone", "its data is lost", "copy the data back, or remove the sidecar")
    with _as_local(place) as data:
        metadata, problem = _sidecar(storage.join(folder, name + SIDECAR_SUFFIX))
        try:
            if metadata is None:
                metadata = read_whole(data)
                if metadata is None:
                    read_archive(data, place)  # says why, where it can
                    raise CheckpointError("its checksums do not match, or it is no checkpoint of a run", where=place)
                remedy = "it is used all the same: the run that goes on from it writes its sidecar again"
                return Part(shown, f"data of step {metadata.step}, whole", problem, remedy)
            if storage.sha256(data) != metadata.sha256:
                raise CheckpointError("its sha256 is not the one its sidecar says", where=place)
            if storage.is_remote(place):
                fetch_pieces(folder, metadata, data.parent)
            state, _ = read_checkpoint(data, metadata)
        except LiquidError as error:
            remedy = "copy it back from the mirror or a backup; a run goes on from the newest one that is whole"
            return Part(shown, "a checkpoint", error.problem, remedy)
    poisoned = find_not_finite(state["student"])
    if poisoned is not None:
        return Part(shown, f"step {metadata.step}", f"NaN or infinity in {poisoned}", "go on from an earlier step")
    return Part(shown, f"a checkpoint of step {metadata.step}")


def _sidecar(uri: str) -> tuple[CheckpointMetadata | None, str]:
    if not storage.exists(uri):
        return None, "its sidecar is lost"
    try:
        return parse_sidecar(storage.read_small(uri), uri), ""
    except StorageError as error:  # also a folder in its place
        return None, f"its sidecar is damaged ({error.problem})"


@contextmanager
def _as_local(uri: str) -> Iterator[Path]:
    if not storage.is_remote(uri):
        yield storage.local_path(uri)
        return
    with storage.scratch("doctor") as folder:
        path = folder / uri.rpartition("/")[2]
        storage.download(uri, path)
        yield path


def _rows(uri: str, name: str, due: int | None) -> Part:
    """A file of rows.

    Args:
        due: the step that they reach at least; None: there may be none.
    """
    try:
        lines = storage.read_bytes(storage.join(uri, name)).splitlines(keepends=True)
    except StorageError as error:
        return Part(name, "rows", error.problem, "put the file back from the mirror or a backup")
    bad = [number for number, line in enumerate(lines, start=1) if _row_of(line) is None]
    torn = bad == [len(lines)] and not lines[-1].endswith(b"\n")
    if bad and not torn:
        problem = f"{len(bad)} of {len(lines)} lines are no rows, the first is line {bad[0]}"
        return Part(name, "rows", problem, "readers leave them out; a copy of the mirror may have them whole")
    rows = [row for line in lines if (row := _row_of(line)) is not None]
    reached = max((row["step"] for row in rows if isinstance(row.get("step"), int)), default=-1)
    if due is not None and reached < due:
        problem = f"the rows end at step {reached}" if rows else "it holds no rows"
        problem += f", and a checkpoint is there whose run had written those up to step {due}"
        return Part(
            name, f"{len(rows)} rows", problem, "a copy of the mirror may have them; the run goes on without them"
        )
    return Part(name, f"{len(rows)} rows" + (" and a torn last one, as a kill leaves it" if torn else ""))


def _row_of(line: bytes) -> dict[str, Any] | None:
    try:
        row = parse_json(line) if line.endswith(b"\n") else None
    except ParseError:
        return None
    return row if isinstance(row, dict) else None


def _read(
    uri: str,
    name: str,
    parse: Callable[[bytes], object],
    found: str = "what the run was made of",
    remedy: str = "the run writes it again when it is continued",
) -> Part:
    try:
        parse(storage.read_small(storage.join(uri, name)))
    except (ParseError, StorageError) as error:
        return Part(name, found, error.problem if isinstance(error, StorageError) else str(error), remedy)
    return Part(name, found)


def _tried(name: str, found: str, read: Callable[[], object], remedy: str) -> Part:
    try:
        read()
    except LiquidError as error:
        return Part(name, found, str(error), error.remedy or remedy)
    return Part(name, found)


# ----------------------------------------------------------------------------------------------------- data and signals


def _store(uri: str) -> Iterator[Part]:
    try:
        store = open_store(uri)
    except LiquidError as error:
        problem = error.problem + ("" if error.got is None else f": {error.got}")
        yield Part(STORE_FILE, "a signal store", problem, error.remedy)
        return
    yield Part(STORE_FILE, f"a store of {len(store):,} records of {store.identity.teacher_id}")
    count = 0
    bad: list[Part] = []
    for name, record in store.layout.records():
        if isinstance(record, RecordError):
            bad.append(Part(name, "a record or its file", str(record), _CAPTURE))
        elif (difference := record.header.identity.difference(store.identity)) is not None:
            what, theirs, stated = difference_in_words(*difference)
            problem = f"captured with {what} {theirs}, and {STORE_FILE} says {stated}"
            bad.append(Part(name, "a whole record", problem, f"copy {STORE_FILE} back if it is damaged, or {_CAPTURE}"))
        else:
            count += 1
    store.close()
    yield Part("records", f"{count:,} read to their end")
    yield from _few(bad)
    for problem in store.layout.problems():
        yield Part(uri, "the folder", problem, _CAPTURE)
    if isinstance(store.layout, UnitsLayout):
        yield from _units(uri, store.layout)


def _units(uri: str, layout: UnitsLayout) -> Iterator[Part]:
    """What is missing of a store that is captured data file by data file, which no record by itself would show."""
    complete, planned = len(layout.complete), read_plan(uri)
    short = planned is not None and complete < planned
    found = f"{complete:,} complete" + (f" of {planned:,} planned" if planned is not None else "")
    yield Part("units", found, "the capture is not at its end" if short else None, _UNITS if short else None)
    yield from _few([Part(f"units/{name}", "said to be complete", why, _UNITS) for name, why in find_damaged(uri)])


def _manifest(uri: str) -> Iterator[Part]:
    try:
        entries = read_manifest(uri)
    except DataError as error:
        yield Part(uri, "a manifest", str(error), error.remedy)
        return
    for entry in entries:
        try:
            files = entry_files(entry)
        except LiquidError as error:
            yield Part(entry.where, entry.path, error.problem, error.remedy)
            continue
        yield from _few([_records(file, entry.type) for file in files])


def _records(uri: str, type: str) -> Part:
    count = 0
    try:
        for _ in read_records(uri, type):
            count += 1
    except LiquidError as error:
        remedy = error.remedy or "correct it, or write it again"
        return Part(uri, f"{count:,} {type} records before it", str(error), remedy)
    return Part(uri, f"{count:,} {type} records")


def _few(parts: list[Part]) -> Iterator[Part]:
    """All that are whole, and of the others the first: thousands of records may be damaged alike."""
    bad = [part for part in parts if part.problem is not None]
    yield from (part for part in parts if part.problem is None)
    yield from bad[:_MAX_TOLD]
    if len(bad) > _MAX_TOLD:
        yield Part(f"{len(bad) - _MAX_TOLD:,} more", bad[-1].found, "as those before", bad[-1].remedy)


def _prepared(uri: str, name: str) -> Iterator[Part]:
    """The shards that a dataset's markers name."""
    marker, remedy = f"{STATE_FOLDER}/{name}/{COMPLETE}", "run liquid prepare again: it makes what is missing"
    if not storage.exists(storage.join(uri, marker)):
        yield Part(marker, f"dataset {name}", "its preparation has not come to its end", remedy)
        return
    try:
        values = parse_json(storage.read_small(storage.join(uri, marker)))
        shards = [(str(one["name"]), int(one["bytes"]), int(one["records"])) for one in values["shards"]]
        type = str(values["type"])
    except (ParseError, KeyError, TypeError, ValueError):
        yield Part(marker, f"dataset {name}", "the marker is damaged", remedy)
        return
    yield Part(marker, f"dataset {name}: {len(shards)} shards")
    for shard, size, count in shards:
        info = storage.stat(storage.join(uri, shard))
        if info is None or info.size != size:
            got = "it is not there" if info is None else f"{info.size:,} bytes, {size:,} expected"
            yield Part(shard, "a shard", got, remedy)
            continue
        part = _records(info.uri, type)
        if part.problem is None and part.found != f"{count:,} {type} records":
            part = Part(shard, part.found, f"{count:,} records expected", remedy)
        yield part
