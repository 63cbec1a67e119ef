"""What ``liquid inspect`` says of data and stored signal: how many records, tokens and bytes there are, and of what."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any, TypeAlias

import numpy as np

from liquid_llm import storage
from liquid_llm.data.manifest import entry_files, read_manifest
from liquid_llm.data.records import RecordFile
from liquid_llm.data.token_writer import META, DatasetMeta
from liquid_llm.data.types import ManifestEntry
from liquid_llm.errors import DataError, LiquidError, SignalError, StorageError
from liquid_llm.models.loading import load_tokenizer
from liquid_llm.parsing import ParseError, parse_json
from liquid_llm.preparation.catalog import STATE_FOLDER
from liquid_llm.preparation.dataset import COMPLETE
from liquid_llm.signal_store.description import HELD_OUT, present_layout
from liquid_llm.signal_store.shards.file import read_shard_header
from liquid_llm.signal_store.store import open_store
from liquid_llm.sources import is_type
from liquid_llm.storage import FileInfo
from liquid_llm.storage.streams import lines, unpack

_LINE = 2**20  # a manifest's are short
_ANY = "any"
_AT_ONCE = 512
_SUMS = ("files", "records", "characters", "tokens", "bytes")

CountTokens: TypeAlias = Callable[[Sequence[str]], int]


def is_manifest(uri: str) -> bool:
    """Whether the first line of a file names data rather than being some."""
    with storage.open_read(uri) as stream:
        first = next((line for line in lines(unpack(stream, None), _LINE) if line is None or line.strip()), None)
    try:
        value = parse_json(first) if first is not None else None
    except ParseError:
        return True  # its reader says in words what is wrong with it
    return value is None or not isinstance(value, dict) or ("path" in value and "text" not in value)


def describe_manifest(uri: str, count_tokens: CountTokens | None = None) -> dict[str, Any]:
    """Each entry of a manifest with its files, records and bytes; every file is read to its end.

    Args:
        count_tokens: gives the tokens of some texts, where they are wanted too.
    """
    entries = read_manifest(uri)
    rows = [{**entry.plain(), **_count(entry, count_tokens)} for entry in entries]
    types: dict[str, Counter[str]] = {}
    for row in rows:
        sums = types.setdefault(row["type"], Counter())
        sums.update(entries=1, **{name: row[name] for name in _SUMS if name in row})
    return {"kind": "manifest", "entries": rows, "types": {type: dict(sums) for type, sums in types.items()}}


def _count(entry: ManifestEntry, count_tokens: CountTokens | None) -> dict[str, Any]:
    counts: Counter[str] = Counter(files=0, records=0)
    try:
        for uri in entry_files(entry):
            counts.update(files=1, **_read(RecordFile(uri, entry.type), count_tokens))
    except LiquidError as error:
        return {**counts, "problem": str(error)}
    return dict(counts)


def _read(file: RecordFile, count_tokens: CountTokens | None = None) -> dict[str, int]:
    """Records of a file, their characters (and tokens), and its bytes."""
    sums: Counter[str] = Counter(records=0, characters=0)
    numbered = iter(file)
    while texts := [record.whole for _, record in islice(numbered, _AT_ONCE)]:
        sums.update(records=len(texts), characters=sum(map(len, texts)))
        if count_tokens is not None:
            sums.update(tokens=count_tokens(texts))
    info = storage.stat(file.uri)
    return {**sums, "bytes": 0 if info is None else info.size}


def describe_records(uri: str, count_tokens: CountTokens | None = None) -> dict[str, Any]:
    """A file of records: their type where they state one, how many there are, and the beginning of the first."""
    try:
        type, file = None, RecordFile(uri, _ANY)
        first = next(iter(file))[1]
    except DataError as error:
        stated = str(error.got).strip("'\"")
        if error.got is None or not is_type(stated):
            raise
        type, file = stated, RecordFile(uri, stated)
        first = next(iter(file))[1]
    began = {"sample_id": first.sample_id, "text": first.whole[:200]}
    return {"kind": "records", "type": type, **_read(RecordFile(uri, file.type), count_tokens), "first": began}


def token_counter(model: str) -> CountTokens:
    """Counts tokens as a model's tokenizer has them, of texts alone: without what stands around them in training.

    Raises:
        ModelError: it has no usable tokenizer.
    """
    tokenizer = load_tokenizer(model)

    def count(texts: Sequence[str]) -> int:
        return sum(map(len, tokenizer(list(texts), add_special_tokens=False)["input_ids"]))

    return count


def describe_prepared(uri: str, infos: Mapping[str, FileInfo]) -> dict[str, Any]:
    """The datasets that ``liquid prepare`` has made in a folder."""
    names = sorted({name.split("/")[1] for name in infos if name.startswith(f"{STATE_FOLDER}/")})
    datasets = {name: _prepared(infos.get(f"{STATE_FOLDER}/{name}/{COMPLETE}")) for name in names}
    sums = {key: sum(int(one.get(key) or 0) for one in datasets.values()) for key in ("records", "shards", "bytes")}
    return {"kind": "prepared data", **sums, "datasets": datasets}


def _prepared(marker: FileInfo | None) -> dict[str, Any]:
    if marker is None:
        return {"problem": "not complete: run liquid prepare again"}
    try:
        values = parse_json(storage.read_small(marker.uri))
        shards = values["shards"]
        sums = {key: sum(int(one[key]) for one in shards) for key in ("records", "bytes")}
        return {"type": str(values["type"]), **sums, "shards": len(shards)}
    except (ParseError, KeyError, TypeError, ValueError):
        return {"problem": "its marker is damaged: run liquid prepare again"}


def describe_tokens(uri: str) -> dict[str, Any]:
    """A folder of tokenised data, such as the cache has one for each type."""
    try:
        meta = DatasetMeta(**parse_json(storage.read_small(storage.join(uri, META))))
        width = np.dtype(meta.token_dtype).itemsize
        samples, tokens = meta.sizes["lengths"] // 8, meta.sizes["tokens"] // width
    except (ParseError, TypeError, KeyError, ValueError) as error:
        raise StorageError("its description is damaged", where=storage.join(uri, META), got=error) from error
    plain = meta.plain()
    return {
        "kind": "tokenised data",
        "samples": samples,
        "tokens": tokens,
        "tokens_a_sample": tokens / samples if samples else None,
        "bytes": sum(meta.sizes.values()),
        "type": meta.type,
        "layout": meta.layout,
        "forms": list(meta.forms),
        **{key: plain.get(key, 0) for key in ("num_short", "num_repeated", "num_unlearnt")},
    }


def describe_store(uri: str) -> dict[str, Any]:
    """A signal store: whose signal it holds, how it is kept, and how many records there are."""
    store, held_out = open_store(uri), storage.join(uri, HELD_OUT)
    also = describe_store(held_out) if present_layout(held_out) is not None else {}
    try:
        return {"kind": "store", **{name: value for name, value in store.describe().items() if name != "uri"}} | (
            {"held_out": {name: also[name] for name in ("records", "units", "codec") if name in also}} if also else {}
        )
    finally:
        store.close()


def describe_shard(uri: str) -> dict[str, Any]:
    """One shard of a store, from its header alone."""
    info = storage.stat(uri)
    assert info is not None
    try:
        header = read_shard_header(lambda start, end: storage.read_bytes(uri, start, end), info.size)
    except (ValueError, TypeError, KeyError, AttributeError, SignalError) as error:
        raise StorageError(
            "the shard is damaged", where=uri, got=error, remedy="liquid doctor says what is left of its store"
        ) from error
    records = len(header.ends)
    return {
        "kind": "shard",
        "records": records,
        "bytes": info.size,
        "by_type": header.by_type,
    } | header.identity.plain()
