"""One dataset from its inputs to complete shards, restartable at any moment.

    OUT/NAME-00002-00000.jsonl          shards: number of the input, number within it
    OUT/_prepared/NAME/input-00002.json   what became of one input, written after its shards
    OUT/_prepared/NAME/rejects.jsonl      the first rejects, with place and reason
    OUT/_prepared/NAME/complete.json      the completion marker, written last and removed first

fingerprint: a hash of how the inputs are read and of the inputs' names, sizes and versions, each folded into the one
before. An input's own file carries the fingerprint up to that input, so work goes on after the last input that still is
what it was, and a new input at the end costs only itself. The same inputs give the same shards, byte for byte.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from liquid_llm import storage
from liquid_llm.data.records import read_records, stable_sample_id
from liquid_llm.errors import DataError
from liquid_llm.masking import Masker, secret_values
from liquid_llm.preparation.catalog import Dataset
from liquid_llm.preparation.formats import EXCERPT_CHARACTERS, Document, Reading, Reject, documents
from liquid_llm.preparation.shards import Seen, ShardInfo, ShardWriter
from liquid_llm.storage import FileInfo

FORMAT_VERSION = 1  # of the markers and of what documents look like: another one prepares anew
MAX_REJECTS = 100
COMPLETE = "complete.json"
REJECTS = "rejects.jsonl"

_log = logging.getLogger(__name__)


@dataclass
class Counts:
    """What became of the pieces of an input or dataset.

    Attributes:
        records: written; characters: their length together.
        repeated: left out because the same text was written before.
        left_out: not meant to be read (redirects, pages of other namespaces, pages without words).
        rejected: malformed.
    """

    records: int = 0
    characters: int = 0
    repeated: int = 0
    left_out: int = 0
    rejected: int = 0

    def add(self, other: Counts) -> None:
        for one in fields(self):
            setattr(self, one.name, getattr(self, one.name) + getattr(other, one.name))


@dataclass
class InputResult:
    """What one input's file says."""

    fingerprint: str
    counts: Counts = field(default_factory=Counts)
    rejects: list[dict[str, str]] = field(default_factory=list)
    shards: list[ShardInfo] = field(default_factory=list)

    def plain(self) -> dict[str, Any]:
        return {
            "fingerprint": self.fingerprint,
            "counts": vars(self.counts),
            "rejects": self.rejects,
            "shards": [shard.plain() for shard in self.shards],
        }


@dataclass(frozen=True)
class Source:
    """An input as it is read, and how the fingerprint knows it."""

    uri: str
    size: int
    identity: tuple[str, int, str]


@dataclass(frozen=True)
class Progress:
    """Told of work as it is done: bytes of inputs read (now, and before this process), and a few words."""

    advance: Callable[[int], None] = lambda _: None
    note: Callable[[str], None] = lambda _: None


def input_files(dataset: Dataset) -> list[FileInfo]:
    """The raw inputs, in the order of the catalog and then by name; [] where nothing matches.

    Raises:
        DataError: some of the inputs' paths match files and another matches none.
        StorageError: a place cannot be listed.
    """
    found: dict[str, FileInfo] = {}
    empty = []
    for pattern in dataset.inputs:
        uris = storage.glob(pattern)
        empty += [] if uris else [pattern]
        for uri in uris:
            info = storage.stat(uri)
            if info is not None:
                found.setdefault(uri, info)
    if found and empty:
        raise DataError("a path of the inputs matches no file", where=dataset.name, got=", ".join(empty))
    return list(found.values())


def sources_of(files: Sequence[FileInfo]) -> list[Source]:
    """Inputs read as they are, known by name, size and version."""
    return [Source(one.uri, one.size, (one.uri, one.size, one.version)) for one in files]


def fingerprints(dataset: Dataset, sources: Sequence[Source], *, toolkit: str | None = None) -> list[str]:
    """The fingerprint before the first input and after each."""
    settings = [FORMAT_VERSION, dataset.name, dataset.type, dataset.format, dataset.field, dataset.members]
    settings += [dataset.shard_bytes, dataset.prefix, dataset.suffix, toolkit]
    chain = [hashlib.blake2b(json.dumps(settings).encode(), digest_size=16).hexdigest()]
    for source in sources:
        chain.append(folded(chain[-1], source.identity))
    return chain


def folded(fingerprint: str, identity: object) -> str:
    return hashlib.blake2b(json.dumps([fingerprint, identity]).encode(), digest_size=16).hexdigest()


def read_complete(dataset: Dataset) -> dict[str, Any] | None:
    """The completion marker, if every shard it names is there with its size; else None.

    Raises:
        DataError: a newer release prepared them: this one would take its own work for what is wanted.
    """
    marker = _read_json(dataset, COMPLETE)
    version = None if marker is None else marker.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        place = storage.join(dataset.out, dataset.state_name)
        raise DataError(
            f"the shards of {dataset.name} were prepared by a newer release",
            where=storage.join(place, COMPLETE),
            got=f"format version {version}",
            expected=f"at most {FORMAT_VERSION}",
            remedy=f"update liquid-llm, or remove {place} to have them prepared anew",
        )
    if marker is None or version != FORMAT_VERSION:
        return None
    sizes = {info.name: info.size for info in storage.list_files(dataset.out)}
    return marker if all(sizes.get(one["name"]) == one["bytes"] for one in marker["shards"]) else None


def prepare(
    dataset: Dataset,
    sources: Sequence[Source],
    chain: Sequence[str],
    *,
    fingerprint: str | None = None,
    force: bool = False,
    extra: dict[str, Any] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the dataset's shards and its completion marker; gives the marker.

    Args:
        dataset: what and where to.
        sources: the inputs as they are read.
        chain: ``fingerprints`` of the inputs.
        fingerprint: the marker's; the last one of ``chain`` if None.
        force: nothing of an earlier preparation is used.
        extra: further keys of the marker.
        progress: told of the work.

    Raises:
        DataError: an input of an unknown format, truncated, or with nothing usable in it.
        StorageError: an input cannot be read or a shard not be written.
    """
    with tempfile.TemporaryDirectory(prefix="liquid-prepare-") as folder:
        work = _Preparation(dataset, chain, Path(folder), progress or Progress())
        try:
            return work.run(sources, force, {"fingerprint": fingerprint or chain[-1], **(extra or {})})
        finally:
            work.seen.close()


class _Preparation:
    """One go at a dataset."""

    def __init__(self, dataset: Dataset, chain: Sequence[str], folder: Path, progress: Progress) -> None:
        self.dataset, self.chain, self.folder, self.progress = dataset, chain, folder, progress
        self.seen = Seen(folder)
        self.masker = Masker(secret_values(os.environ))  # a signed URL is a secret
        self.rejects: list[dict[str, str]] = []
        self.reading = Reading(dataset.type, dataset.format, dataset.field, dataset.members)

    def run(self, sources: Sequence[Source], force: bool, extra: dict[str, Any]) -> dict[str, Any]:
        dataset = self.dataset
        earlier_marker = _read_json(dataset, COMPLETE) or {}
        if force or earlier_marker.get("fingerprint") != extra["fingerprint"]:
            _remove(dataset, COMPLETE)  # from here on the shards may be of two preparations
        sizes = {info.name: info.size for info in storage.list_files(dataset.out)}
        done = [None if force else self._earlier(number, sizes) for number in range(len(sources))]
        last_to_do = max((number for number, one in enumerate(done) if one is None), default=-1)
        results = []
        for number, source in enumerate(sources):
            earlier = done[number]
            if earlier is None:
                results.append(self._convert(number, source))
            else:
                self._take_over(earlier, source, ids_needed=number < last_to_do)
                results.append(earlier)
        return self._complete(results, sources, sizes, extra)

    def _earlier(self, number: int, sizes: dict[str, int]) -> InputResult | None:
        """What an earlier go made of an input, if it is still all there and still what would be made."""
        name = _input_name(number)
        if f"{self.dataset.state_name}/{name}" not in sizes:
            return None
        plain = _read_json(self.dataset, name)
        if plain is None or plain.get("fingerprint") != self.chain[number + 1]:
            return None
        shards = [ShardInfo(**one) for one in plain["shards"]]
        if any(sizes.get(shard.name) != shard.bytes for shard in shards):
            return None
        return InputResult(plain["fingerprint"], Counts(**plain["counts"]), plain["rejects"], shards)

    def _take_over(self, earlier: InputResult, source: Source, *, ids_needed: bool) -> None:
        if ids_needed:
            for shard in earlier.shards:
                for record in read_records(storage.join(self.dataset.out, shard.name), self.dataset.type):
                    self.seen.add(record.sample_id, record.text)
        self.rejects = (self.rejects + earlier.rejects)[:MAX_REJECTS]
        self.progress.advance(source.size)

    def _convert(self, number: int, source: Source) -> InputResult:
        result = InputResult(self.chain[number + 1])
        read = 0

        def advance(amount: int) -> None:
            nonlocal read
            amount = min(amount, source.size - read)  # a zip's and a parquet's index are read twice
            read += amount
            self.progress.advance(amount)

        with ShardWriter(self.dataset, number, self.folder) as writer:
            for finding in documents(source.uri, self.reading, advance):
                if finding is None:
                    result.counts.left_out += 1
                elif isinstance(finding, Reject):
                    self._reject(result, finding)
                else:
                    self._write(result, finding, writer)
            if not (result.counts.records or result.counts.repeated or result.counts.left_out):
                self._nothing_usable(result, source)
        result.shards = writer.published
        advance(source.size - read)
        _write_json(self.dataset, _input_name(number), result.plain())
        return result

    def _write(self, result: InputResult, document: Document, writer: ShardWriter) -> None:
        counts, text = result.counts, document.text
        if not text.strip():
            return self._reject(result, Reject(document.place, "the text is empty", ""))
        try:
            sample_id = document.sample_id or stable_sample_id(self.dataset.type, text)
            outcome = self.seen.add(sample_id, text)
        except UnicodeEncodeError:
            return self._reject(
                result, Reject(document.place, "half of a surrogate pair, which is no text", ascii(text))
            )
        if outcome == "conflict":
            reason = f"sample_id {sample_id!r} already names another text"
            return self._reject(result, Reject(document.place, reason, text))
        if outcome == "repeated":
            counts.repeated += 1
            return None
        writer.write(text, sample_id)
        counts.records += 1
        counts.characters += len(text)
        if counts.records % 1000 == 0:
            self.progress.note(f"{counts.records:,} records of {document.place.rpartition('/')[2][:60]}")
        return None

    def _reject(self, result: InputResult, reject: Reject) -> None:
        result.counts.rejected += 1
        if len(self.rejects) < MAX_REJECTS:
            place = self.masker.text(reject.place)
            row = {name: _short(text) for name, text in (("reason", reject.reason), ("excerpt", reject.excerpt))}
            self.rejects.append({"place": place, **row})
            result.rejects.append(self.rejects[-1])

    def _nothing_usable(self, result: InputResult, source: Source) -> None:
        got = "no record at all"
        if result.rejects:
            first = result.rejects[0]
            got = f"{result.counts.rejected:,} rejects, first {first['place']}: {first['reason']}"
        self._publish_rejects()
        rejects = storage.join(self.dataset.out, self.dataset.state_name, REJECTS)
        raise DataError(
            "nothing in this input is usable",
            where=source.uri,
            got=got,
            remedy=f"see {rejects}; state format: or field: if the input is sound",
        )

    def _publish_rejects(self) -> None:
        body = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self.rejects)
        storage.write_bytes(storage.join(self.dataset.out, self.dataset.state_name, REJECTS), body.encode())

    def _complete(
        self, results: list[InputResult], sources: Sequence[Source], sizes: dict[str, int], extra: dict[str, Any]
    ) -> dict[str, Any]:
        dataset, total = self.dataset, Counts()
        for result in results:
            total.add(result.counts)
        shards = [shard for result in results for shard in result.shards]
        if not shards:
            raise DataError("the inputs of a dataset hold no record", where=dataset.name, got=", ".join(dataset.inputs))
        self._publish_rejects()
        inputs_done = {f"{dataset.state_name}/{_input_name(number)}" for number in range(len(sources))}
        current = {shard.name for shard in shards} | inputs_done
        for name in sorted(sizes.keys() - current):
            if dataset.is_shard_name(name) or name.startswith(f"{dataset.state_name}/input-"):
                storage.remove(storage.join(dataset.out, name))  # of an earlier preparation: readers would take it in
        marker = {
            "format_version": FORMAT_VERSION,
            "dataset": dataset.name,
            "type": dataset.type,
            **extra,
            "counts": vars(total),
            "inputs": [
                {"name": self.masker.text(name), "bytes": size, "version": version}
                for name, size, version in (source.identity for source in sources)
            ],
            "shards": [shard.plain() for shard in shards],
        }
        _write_json(dataset, COMPLETE, marker)
        return marker


def _input_name(number: int) -> str:
    return f"input-{number:05d}.json"


def _short(text: str) -> str:
    """At most ``EXCERPT_CHARACTERS`` of a text, and what UTF-8 can hold of them."""
    return text[:EXCERPT_CHARACTERS].encode("utf-8", errors="replace").decode()


def _read_json(dataset: Dataset, name: str) -> dict[str, Any] | None:
    """A marker, or None where there is none or it cannot be one."""
    uri = storage.join(dataset.out, dataset.state_name, name)
    if storage.stat(uri) is None:
        return None
    try:
        value = json.loads(storage.read_bytes(uri))
    except ValueError:
        _log.warning("%s: not a marker; prepared anew", uri)
        return None
    return value if isinstance(value, dict) else None


def _write_json(dataset: Dataset, name: str, value: dict[str, Any]) -> None:
    body = json.dumps(value, indent=1, ensure_ascii=False).encode() + b"\n"
    storage.write_bytes(storage.join(dataset.out, dataset.state_name, name), body)


def _remove(dataset: Dataset, name: str) -> None:
    storage.remove(storage.join(dataset.out, dataset.state_name, name))
