"""``datasets.yaml``: what the raw inputs are and where their shards go.

    gsm8k:
      type: math_tool                  # lm, math_tool, code or any other name
      in: raw/gsm8k/*.jsonl            # a path, glob or URL, or a list of them
      out: prepared/gsm8k              # folder of the shards, or folder/name-*.jsonl (.jsonl.gz packs them)
      manifest: manifest.jsonl         # optional: gets a line for the shards
      weight: 0.5                      # optional, of that line; 1.0
      format: gsm8k                    # optional: how to read the inputs; else found out from each one
      field: text                      # optional: the key or column that holds the text
      members: "*train*"               # optional: which members of a zip; all that hold data
      shard_bytes: 134217728           # optional: a shard is closed once it is this long, before packing

Relative paths are relative to the file's own folder, as in a manifest.
"""

from __future__ import annotations

import difflib
import os
import posixpath
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from liquid_llm import storage
from liquid_llm.errors import StorageError, UsageError
from liquid_llm.parsing import ParseError, parse_yaml
from liquid_llm.preparation.layouts import FORMATS
from liquid_llm.sources import is_type

STATE_FOLDER = "_prepared"
TOOLKIT = "toolkit"  # the format of inputs that an outside toolkit turns into JSONL
DEFAULT_SHARD_BYTES = 128 * 2**20

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_KEYS = ("type", "in", "out", "manifest", "weight", "format", "field", "members", "shard_bytes")
_SUFFIXES = (".jsonl", ".jsonl.gz")


@dataclass(frozen=True)
class Dataset:
    """One entry of the catalog; every path is absolute.

    Attributes:
        inputs: paths or globs of the raw inputs.
        out: folder of the shards.
        prefix, suffix: of a shard's name, around its numbers.
        manifest: the manifest that gets a line for the shards, or None.
        weight: of that line; None where the file states none.
        format, field, members, shard_bytes: see above.
    """

    name: str
    type: str
    inputs: tuple[str, ...]
    out: str
    prefix: str
    suffix: str
    manifest: str | None = None
    weight: float | None = None
    format: str | None = None
    field: str | None = None
    members: str = "*"
    shard_bytes: int = DEFAULT_SHARD_BYTES

    @property
    def shards(self) -> str:
        """The glob that matches the shards."""
        return storage.join(self.out, f"{self.prefix}*{self.suffix}")

    def shard_name(self, input_number: int, part: int) -> str:
        return f"{self.prefix}{input_number:05d}-{part:05d}{self.suffix}"

    def is_shard_name(self, name: str) -> bool:
        return re.fullmatch(rf"{re.escape(self.prefix)}\d{{5,}}-\d{{5,}}{re.escape(self.suffix)}", name) is not None

    @property
    def state_name(self) -> str:
        """The folder of markers and rejects, relative to ``out``."""
        return f"{STATE_FOLDER}/{self.name}"

    def names_input(self, path: str) -> bool:
        """Whether ``path`` is one of the inputs or matches one of their globs."""
        path = to_absolute(path)
        return any(storage.matches(path, pattern) for pattern in self.inputs)

    def names_shards(self, path: str) -> bool:
        """Whether ``path`` is the glob of the shards, or would match them."""
        path = to_absolute(path)
        return path == self.shards or storage.matches(storage.join(self.out, self.shard_name(0, 0)), path)


@dataclass(frozen=True)
class Catalog:
    """The datasets of one file, and that file as it was read."""

    uri: str
    datasets: dict[str, Dataset]
    plain: dict[str, Any]


def to_absolute(path: str, folder: str = "") -> str:
    """``path``, relative to ``folder``, as it is named from anywhere, so that two spellings can be compared."""
    uri = storage.resolve(path.strip(), folder)
    return uri if storage.is_remote(uri) else os.path.abspath(storage.local_path(uri))


def read_catalog(uri: str) -> Catalog:
    """The catalog at ``uri``.

    Raises:
        UsageError: not YAML, not a mapping, an entry with a key missing, misspelt or of the wrong kind, two datasets
            whose shards could be taken for each other.
        StorageError: it cannot be read.
    """
    try:
        loaded = parse_yaml(storage.read_small(uri))
    except ParseError as error:
        raise UsageError("not a YAML file", where=uri, got=error) from None
    if not isinstance(loaded, Mapping) or not loaded:
        got = "nothing" if not loaded else type(loaded).__name__
        raise UsageError("not a mapping of datasets", where=uri, got=got, expected="name: {type, in, out} entries")
    folder, plain = posixpath.dirname(to_absolute(uri)), {str(name): entry for name, entry in loaded.items()}
    datasets = {name: _dataset(name, entry, folder, f"{uri}: {name}") for name, entry in plain.items()}
    _require_apart(list(datasets.values()), uri)
    return Catalog(uri, datasets, plain)


def choose(catalog: Catalog, names: Iterable[str]) -> list[Dataset]:
    """The datasets of those names, in the catalog's order; all of them without names.

    Raises:
        UsageError: a name the catalog does not have.
    """
    wanted = list(names)
    for name in wanted:
        if name not in catalog.datasets:
            near = difflib.get_close_matches(name, catalog.datasets, n=1) or catalog.datasets
            raise UsageError("no dataset of that name", where=catalog.uri, got=repr(name), expected=" or ".join(near))
    return [dataset for name, dataset in catalog.datasets.items() if not wanted or name in wanted]


def _dataset(name: str, entry: Any, folder: str, where: str) -> Dataset:
    if not _NAME.fullmatch(name):
        raise UsageError("a dataset's name is not usable in file names", where=where, expected="letters, digits, . _ -")
    if not isinstance(entry, Mapping):
        raise UsageError("not a mapping", where=where, got=repr(entry)[:80], expected="type, in and out")
    for key in entry:
        if key not in _KEYS:
            near = difflib.get_close_matches(str(key), _KEYS, n=1) or _KEYS
            raise UsageError("unknown key", where=where, got=repr(key), expected=" or ".join(near))
    missing = [key for key in ("type", "in", "out") if not entry.get(key)]
    if missing:
        raise UsageError(f"no {' and no '.join(missing)}", where=where, expected="type, in and out")
    if not is_type(entry["type"]):
        raise UsageError(
            "not a type's name", where=where, got=repr(entry["type"]), expected="lm, math_tool, code or another word"
        )
    inputs = entry["in"] if isinstance(entry["in"], list) else [entry["in"]]
    texts = [*inputs, entry["out"], *(entry[key] for key in ("manifest", "field", "members") if entry.get(key))]
    for text in texts:
        if not isinstance(text, str) or not text.strip():
            raise UsageError("not a path or name", where=where, got=repr(text)[:80])
    places = _places([*inputs, entry["out"]], folder, where)
    # the manifest names the shards: one in a bucket may not name this machine's
    named = entry.get("manifest")
    manifest = _places([named], folder, where)[named] if named else None
    if manifest is not None and storage.is_remote(manifest):
        _places([places[entry["out"]]], posixpath.dirname(manifest), where)
    out, prefix, suffix = _split_out(name, places[entry["out"]], where)
    return Dataset(
        name=name,
        type=entry["type"],
        inputs=tuple(places[one] for one in inputs),
        out=out,
        prefix=prefix,
        suffix=suffix,
        manifest=manifest,
        weight=_number(entry, "weight", where),
        format=_format(entry.get("format"), where),
        field=entry.get("field"),
        members=entry.get("members") or "*",
        shard_bytes=int(_number(entry, "shard_bytes", where) or DEFAULT_SHARD_BYTES),
    )


def _places(texts: Iterable[str], folder: str, where: str) -> dict[str, str]:
    """Each text and the place that it names from anywhere. Raises UsageError for one that may not be named here."""
    try:
        return {text: to_absolute(text, folder) for text in texts}
    except StorageError as error:
        raise UsageError(
            error.problem, where=where, got=error.got, expected=error.expected, remedy=error.remedy
        ) from None


def _split_out(name: str, out: str, where: str) -> tuple[str, str, str]:
    """(folder, prefix, suffix) of the shards: ``out`` is a folder, or a folder and one name with a ``*``."""
    folder, _, last = out.rpartition("/")
    if "*" not in last and not last.endswith(_SUFFIXES):
        folder, last = out.rstrip("/"), f"{name}-*.jsonl"
    prefix, _, suffix = last.partition("*")
    if re.search(r"[*?\[\]]", folder + prefix + suffix) or suffix not in _SUFFIXES:
        raise UsageError(
            "out cannot be used",
            where=where,
            got=out,
            expected="a folder, or folder/name-*.jsonl (or .jsonl.gz) with the one * in the file name",
        )
    return folder, prefix, suffix


def _number(entry: Mapping[str, Any], key: str, where: str) -> float | None:
    value = entry.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise UsageError(f"{key} is not a positive number", where=where, got=repr(value)[:80])
    return value


def _format(value: Any, where: str) -> str | None:
    if value is None:
        return None
    known = [*FORMATS, TOOLKIT]
    name = str(value).lower().replace("_", "-")
    if name not in known:
        raise UsageError("unknown format", where=where, got=repr(value)[:80], expected=f"one of {', '.join(known)}")
    return name


def _require_apart(datasets: list[Dataset], uri: str) -> None:
    for number, one in enumerate(datasets):
        if one.names_input(storage.join(one.out, one.shard_name(0, 0))):
            raise UsageError(
                "the shards would be taken for inputs",
                where=f"{uri}: {one.name}",
                got=f"in {', '.join(one.inputs)} and out {one.shards}",
                remedy="give the shards their own folder",
            )
        for other in datasets[:number]:
            if one.names_shards(other.shards) or other.names_shards(one.shards) or _overlap(one, other):
                raise UsageError(
                    "the shards of two datasets could be taken for each other",
                    where=uri,
                    got=f"{other.name}: {other.shards} and {one.name}: {one.shards}",
                    remedy="give each its own folder",
                )


def _overlap(one: Dataset, other: Dataset) -> bool:
    starts = one.prefix.startswith(other.prefix) or other.prefix.startswith(one.prefix)
    return one.out == other.out and starts and one.suffix == other.suffix
