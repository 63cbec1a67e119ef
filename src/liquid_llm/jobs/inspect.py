"""``liquid inspect``: what anything that this project writes or reads holds, for people or as one JSON object.

kind      what a file or folder is, found from its name and from the names in it
holding   a folder of such folders (of runs, of stores, a demo's, a study's): each of them in a few words
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from typing import Any

from liquid_llm import storage
from liquid_llm.checkpoint.discovery import DATA_SUFFIX, SIDECAR_SUFFIX
from liquid_llm.data.token_writer import META
from liquid_llm.errors import DataError, LiquidError, UsageError
from liquid_llm.jobs.inspect_data import (
    describe_manifest,
    describe_prepared,
    describe_records,
    describe_shard,
    describe_store,
    describe_tokens,
    is_manifest,
    token_counter,
)
from liquid_llm.jobs.inspect_model import describe_model, is_model
from liquid_llm.jobs.inspect_run import describe_checkpoint, describe_provenance, describe_rows, describe_run
from liquid_llm.jobs.inspect_shown import show
from liquid_llm.masking import process_masker
from liquid_llm.metrics import FILE_NAME, SAMPLES_FILE
from liquid_llm.parsing import ParseError, parse_json
from liquid_llm.preparation.catalog import STATE_FOLDER
from liquid_llm.provenance import ENVIRONMENT, FOLDER
from liquid_llm.report.runs import SUMMARY_FILE
from liquid_llm.signal_store.description import STORE_FILE
from liquid_llm.signal_store.pt import is_record_file
from liquid_llm.signal_store.shards.file import is_shard
from liquid_llm.storage import FileInfo
from liquid_llm.study.folder import PLAN, RESULT

_MOST_HELD = 200
_ROWS = (FILE_NAME, SAMPLES_FILE, "rejects.jsonl")
_RECORDS = (".jsonl", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".parquet")
_FILES = (*_RECORDS, SIDECAR_SUFFIX, ".manifest", ".json", ".safetensors")
_RESULTS = {SUMMARY_FILE: "summary", "evaluation.json": "evaluation", RESULT: "study result", PLAN: "study plan"}
_EXPECTED = (
    "a run, a checkpoint or its sidecar, a signal store or one of its shards, a manifest or a file of records, "
    "prepared or tokenised data, a model's folder, provenance/, a result (.json), a study, a demo, or a folder of such"
)

Infos = Mapping[str, FileInfo]


def inspect(uri: str, *, as_json: bool = False, tokenizer: str | None = None) -> int:
    """Print what ``uri`` holds, for people or as one JSON object; returns the exit code.

    Args:
        tokenizer: a model by whose tokenizer the tokens of a manifest or of records are counted.

    Raises:
        UsageError: there is nothing there this project writes or reads.
        LiquidError: it is there and cannot be read.
    """
    found: dict[str, Any] = process_masker().urls(describe(uri, tokenizer))
    if as_json:
        print(json.dumps(found, indent=2, sort_keys=True, default=str))
    else:
        show(found, process_masker().text(uri))
    lacking = found["kind"] == "manifest" and any("problem" in entry for entry in found["entries"])
    return DataError.exit_code if lacking else 0


def describe(uri: str, tokenizer: str | None = None) -> dict[str, Any]:
    """The same as a mapping whose ``kind`` says what was found."""
    infos: Infos = {info.name: info for info in storage.list_files(uri)} if not _is_file(uri) else {}
    return _folder(uri, infos) if infos else _file(uri, tokenizer)


def _is_file(uri: str) -> bool:
    """Of a URL its name tells: not every server lists what is below one."""
    if uri.endswith(DATA_SUFFIX):
        return True
    return uri.endswith(_FILES) if storage.is_remote(uri) else storage.local_path(uri).is_file()


# ------------------------------------------------------------------------------------------------------------- one file


def _file(uri: str, tokenizer: str | None) -> dict[str, Any]:
    name = uri.rstrip("/").rpartition("/")[2]
    if name.endswith(DATA_SUFFIX):
        return describe_checkpoint(uri.removesuffix(DATA_SUFFIX))
    if name.endswith(SIDECAR_SUFFIX):
        return describe_checkpoint(uri.removesuffix(SIDECAR_SUFFIX))
    if not storage.exists(uri):
        raise UsageError("there is nothing here", where=uri, expected=_EXPECTED)
    counter = None if tokenizer is None else token_counter(tokenizer)
    if name in _ROWS:
        return describe_rows(uri)
    if name.endswith(".manifest") or (name.endswith(".jsonl") and is_manifest(uri)):
        return describe_manifest(uri, counter)
    if name.endswith(_RECORDS):
        return describe_records(uri, counter)
    if is_shard(name):
        return describe_shard(uri)
    if name == STORE_FILE:
        return describe_store(uri.rpartition("/")[0] or ".")
    if name.endswith(".json"):
        return _result(uri, name)
    raise UsageError("this is no file that can be inspected", where=uri, expected=_EXPECTED)


def _result(uri: str, name: str) -> dict[str, Any]:
    """A JSON object that a command has left, as it is."""
    try:
        value = parse_json(storage.read_small(uri))
    except ParseError as error:
        raise UsageError("this is no whole JSON file", where=uri, got=error, remedy="copy it again") from None
    if not isinstance(value, dict):
        raise UsageError("this holds no JSON object", where=uri, got=type(value).__name__, expected=_EXPECTED)
    return {**value, "kind": _RESULTS.get(name, "a JSON object")}


# ------------------------------------------------------------------------------------------------------------- folders


def _kind(names: Collection[str]) -> str | None:
    """What a folder with files of these names is; None where it is nothing by itself."""
    here = {name for name in names if "/" not in name}
    if STORE_FILE in here:
        return "store"
    if FILE_NAME in here or any(name.endswith(SIDECAR_SUFFIX) for name in here):
        return "run"
    if is_model(here):
        return "model"
    if {META, "tokens", "starts"} <= here:
        return "tokenised data"
    if ENVIRONMENT in here:
        return "provenance"
    if any(name.startswith(f"{STATE_FOLDER}/") for name in names):
        return "prepared data"
    return None


_DESCRIBE: dict[str, Callable[[str, Infos], dict[str, Any]]] = {
    "store": lambda uri, infos: describe_store(uri),
    "run": describe_run,
    "model": describe_model,
    "tokenised data": lambda uri, infos: describe_tokens(uri),
    "provenance": describe_provenance,
    "prepared data": describe_prepared,
}
# Of what a folder holds, the words that tell one from another.
_TOLD = {
    "store": ("codec", "teacher_id", "records", "units"),
    "run": ("student", "step", "total_steps", "val_loss", "finished"),
    "model": ("architecture", "parameters", "weights"),
    "tokenised data": ("type", "samples", "tokens"),
    "provenance": ("started_at",),
    "prepared data": ("records", "shards"),
}


def _folder(uri: str, infos: Infos) -> dict[str, Any]:
    kind = _kind(infos)
    if kind is not None and not _is_place(infos):
        return _DESCRIBE[kind](uri, infos)
    held = _holding(infos)
    if not held:
        bare = any(is_shard(name) or is_record_file(name) for name in infos)
        remedy = f"records without {STORE_FILE}: liquid doctor says what is lost" if bare else None
        raise UsageError("nothing to inspect here", where=uri, expected=_EXPECTED, remedy=remedy)
    holds = {name: _in_brief(storage.join(uri, name), kind, _below(infos, name)) for name, kind in held.items()}
    found: dict[str, Any] = {"kind": _place(infos), "holds": holds}
    if RESULT in infos:
        found["sentences"] = _result(infos[RESULT].uri, RESULT).get("sentences")
    return found


def _is_place(infos: Infos) -> bool:
    return STORE_FILE not in infos and (PLAN in infos or "capture.json" in infos)  # a store of units has a plan too


def _place(infos: Infos) -> str:
    if PLAN in infos and any(name.startswith("done/") or name == RESULT for name in infos):
        return "study"
    return "demo" if "capture.json" in infos and any(name.startswith("runs/") for name in infos) else "folder"


def _holding(infos: Infos) -> dict[str, str]:
    """Folder -> kind, of the outermost folders below that are something; what lies in a run is the run's."""
    below: dict[str, set[str]] = {}
    for name in infos:
        parts = name.split("/")
        for depth in range(1, len(parts)):
            below.setdefault("/".join(parts[:depth]), set()).add("/".join(parts[depth:]))
    found: dict[str, str] = {}
    for folder in sorted(below, key=lambda one: (one.count("/"), one)):
        inside = any(folder.startswith(f"{one}/") for one in found)
        kind = None if inside or folder.split("/")[-1] == FOLDER else _kind(below[folder])
        if kind is not None and len(found) < _MOST_HELD:
            found[folder] = kind
    return dict(sorted(found.items()))


def _below(infos: Infos, folder: str) -> Infos:
    prefix = f"{folder}/"
    return {name.removeprefix(prefix): info for name, info in infos.items() if name.startswith(prefix)}


def _in_brief(uri: str, kind: str, infos: Infos) -> dict[str, Any]:
    try:
        found = _DESCRIBE[kind](uri, infos)
    except LiquidError as error:
        return {"kind": kind, "problem": str(error)}
    return {"kind": kind, **{key: found[key] for key in _TOLD[kind] if found.get(key) is not None}}
