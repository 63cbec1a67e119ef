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
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from liquid_llm import storage
from liquid_llm.data.records import read_records, stable_sample_id
from liquid_llm.errors import DataError
from liquid_llm.masking import process_masker
from liquid_llm.parsing import parse_json
from liquid_llm.preparation.catalog import Dataset
from liquid_llm.preparation.formats import Document, Reading, Reject, documents, shorten
from liquid_llm.preparation.shards import Seen, ShardInfo, ShardWriter
from liquid_llm.storage import FileInfo

FORMAT_VERSION = 1  # of the markers and of what documents look like: another one prepares anew
MAX_REJECTS = 100
COMPLETE = "complete.json"

_log = logging.getLogger(__name__)
Identity = tuple[str, int, str]  # name, size, version


@dataclass
class Counts:
    """What became of the pieces of an input or dataset.

    Attributes:
        records: written; characters: their length together.
        repeated: left out because the same text was written before.
        rejected: malformed.
    """

    records: int = 0
    characters: int = 0
    repeated: int = 0
    rejected: int = 0

    def add(self, other: Counts) -> None:
        for name, count in vars(other).items():
            setattr(self, name, getattr(self, name) + count)


@dataclass
class InputResult:
    """What one input's file says."""

    fingerprint: str
    counts: Counts = field(default_factory=Counts)
    rejects: list[dict[str, str]] = field(default_factory=list)
    shards: list[ShardInfo] = field(default_factory=list)


def input_files(dataset: Dataset) -> list[FileInfo]:
    """The raw inputs, in the order of the catalog and then by name; [] where nothing matches.

    Raises:
        DataError: some of the inputs' paths match files and another matches none.
        StorageError: a place cannot be listed.
    """
    uris = {pattern: storage.glob(pattern) for pattern in dataset.inputs}
    found = [storage.stat(uri) for uri in dict.fromkeys(uri for some in uris.values() for uri in some)]
    empty = [pattern for pattern, some in uris.items() if not some]
    if found and empty:
        raise DataError("a path of the inputs matches no file", where=dataset.name, got=", ".join(empty))
    return [info for info in found if info is not None]


def fingerprints(dataset: Dataset, files: Sequence[FileInfo], *, toolkit: str | None = None) -> list[str]:
    """The fingerprint before the first input and after each; ``toolkit``: the hash of the one that converts them."""
    settings = [FORMAT_VERSION, dataset.name, dataset.type, dataset.format, dataset.field, dataset.members]
    settings += [dataset.shard_bytes, dataset.prefix, dataset.suffix, toolkit]
    first = hashlib.blake2b(json.dumps(settings).encode(), digest_size=16).hexdigest()
    return _chain(first, [_identity(one) for one in files])


def _identity(info: FileInfo) -> Identity:
    return info.uri, info.size, info.version


def _chain(first: str, identities: Sequence[Identity]) -> list[str]:
    chain = [first]
    for identity in identities:
        words = json.dumps([chain[-1], identity]).encode()
        chain.append(hashlib.blake2b(words, digest_size=16).hexdigest())
    return chain


def read_complete(dataset: Dataset) -> dict[str, Any] | None:
    """The completion marker, if every shard it names is there with its size; else None.

    Raises:
        DataError: a newer release prepared them: this one would take its own work for what is wanted.
    """
    marker = _read_json(dataset, COMPLETE)
    version = None if marker is None else marker.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise DataError(
            f"the shards of {dataset.name} were prepared by a newer release",
            where=_state_uri(dataset, COMPLETE),
            got=f"format version {version}",
            expected=f"at most {FORMAT_VERSION}",
            remedy=f"update liquid-llm, or remove {_state_uri(dataset)} to have them prepared anew",
        )
    if marker is None or version != FORMAT_VERSION:
        return None
    sizes = {info.name: info.size for info in storage.list_files(dataset.out)}
    try:
        whole = all(sizes.get(one["name"]) == one["bytes"] for one in marker["shards"])
    except (KeyError, TypeError):
        _say_damaged(_state_uri(dataset, COMPLETE))
        return None
    return marker if whole else None


def prepare(
    dataset: Dataset,
    files: Sequence[FileInfo],
    *,
    toolkit: str | None = None,
    outputs: Sequence[FileInfo] | None = None,
    force: bool = False,
    advance: Callable[[int], object] = lambda _: None,
    note: Callable[[str], object] = lambda _: None,
) -> dict[str, Any]:
    """Write the dataset's shards and its completion marker; gives the marker.

    Args:
        toolkit: the hash of the toolkit that made ``outputs`` of them, which are then read in their place.
        force: nothing of an earlier preparation is used.
        advance: told of bytes of inputs as they are read, or found read by an earlier process.

    Raises:
        DataError: an input of an unknown format, truncated, or with nothing usable in it.
        StorageError: an input cannot be read or a shard not be written.
    """
    chain = fingerprints(dataset, files, toolkit=toolkit)
    extra = {"fingerprint": chain[-1]}
    identities = [_identity(one) for one in files]
    if outputs is not None and toolkit is not None:
        # the toolkit's files have new times at every run: they are known by name and size
        identities = [(one.name, one.size, "") for one in outputs]
        chain = _chain(chain[-1], identities)
        extra["toolkit_sha256"] = toolkit
        dataset, files = replace(dataset, format="jsonl"), outputs
    with storage.scratch("prepare") as folder:
        work = _Preparation(dataset, chain, folder, advance, note)
        try:
            results = work.run(files, force, extra["fingerprint"])
            return work.complete(results, identities, extra)
        finally:
            work.seen.close()


class _Preparation:
    """One go at a dataset."""

    def __init__(
        self,
        dataset: Dataset,
        chain: Sequence[str],
        folder: Path,
        advance: Callable[[int], object],
        note: Callable[[str], object],
    ) -> None:
        self.dataset, self.chain, self.folder, self.advance, self.note = dataset, chain, folder, advance, note
        self.seen = Seen(folder)
        self.masker = process_masker()  # a signed URL is a secret
        self.rejects: list[dict[str, str]] = []
        self.sizes = {info.name: info.size for info in storage.list_files(dataset.out)}

    def run(self, files: Sequence[FileInfo], force: bool, fingerprint: str) -> list[InputResult]:
        marker = _read_json(self.dataset, COMPLETE) or {}
        if force or marker.get("fingerprint") != fingerprint:
            storage.remove(_state_uri(self.dataset, COMPLETE))  # from here on the shards may be of two preparations
        done = [None if force else self._earlier(number) for number in range(len(files))]
        last_to_do = max((number for number, one in enumerate(done) if one is None), default=-1)
        results = []
        for number, (info, earlier) in enumerate(zip(files, done, strict=True)):
            if earlier is None:
                results.append(self._convert(number, info))
            else:
                self._take_over(earlier, ids_needed=number < last_to_do)
                self.advance(info.size)
                results.append(earlier)
        return results

    def _earlier(self, number: int) -> InputResult | None:
        """What an earlier go made of an input, if it is still all there and still what would be made."""
        name = _input_name(number)
        plain = _read_json(self.dataset, name) if f"{self.dataset.state_name}/{name}" in self.sizes else None
        if plain is None or plain.get("fingerprint") != self.chain[number + 1]:
            return None
        try:
            shards = [ShardInfo(**one) for one in plain["shards"]]
            counts = Counts(**{name: plain["counts"][name] for name in vars(Counts())})
            result = InputResult(plain["fingerprint"], counts, plain["rejects"], shards)
        except (KeyError, TypeError):
            _say_damaged(_state_uri(self.dataset, name))
            return None
        return None if any(self.sizes.get(shard.name) != shard.bytes for shard in shards) else result

    def _take_over(self, earlier: InputResult, *, ids_needed: bool) -> None:
        for shard in earlier.shards if ids_needed else ():
            for record in read_records(storage.join(self.dataset.out, shard.name), self.dataset.type):
                self.seen.add(record.sample_id, record.whole)
        self.rejects = (self.rejects + earlier.rejects)[:MAX_REJECTS]

    def _convert(self, number: int, info: FileInfo) -> InputResult:
        dataset, result = self.dataset, InputResult(self.chain[number + 1])
        read = 0

        def advance(amount: int) -> None:
            nonlocal read
            read += amount
            self.advance(amount)

        reading = Reading(dataset.type, dataset.format, dataset.field, dataset.members)
        with ShardWriter(dataset, number, self.folder) as writer:
            for finding in documents(info.uri, reading, advance):
                reject = self._write(result.counts, finding, writer) if isinstance(finding, Document) else finding
                if reject is not None:
                    self._reject(result, reject)
            if not (result.counts.records or result.counts.repeated):
                self._refuse_useless(result, info)
        result.shards = writer.published
        self.advance(max(0, info.size - read))
        _write_json(dataset, _input_name(number), asdict(result))
        return result

    def _write(self, counts: Counts, document: Document, writer: ShardWriter) -> Reject | None:
        text = document.text
        if not text.strip():
            return Reject(document.location, "the text is empty")
        try:
            sample_id = document.sample_id or stable_sample_id(self.dataset.type, text)
            outcome = self.seen.add(sample_id, text)
        except UnicodeEncodeError:
            return Reject(document.location, "half of a surrogate pair, which is no text", ascii(text))
        if outcome == "conflict":
            return Reject(document.location, f"sample_id {sample_id!r} already names another text", text)
        if outcome == "repeated":
            counts.repeated += 1
            return None
        writer.write(document.body, sample_id)
        counts.records += 1
        counts.characters += len(text)
        if counts.records % 1000 == 0:
            self.note(f"{counts.records:,} records of {document.location.rpartition('/')[2][:60]}")
        return None

    def _reject(self, result: InputResult, reject: Reject) -> None:
        result.counts.rejected += 1
        if len(self.rejects) < MAX_REJECTS:
            place = self.masker.text(reject.location)
            row = {"place": place, "reason": shorten(reject.reason), "excerpt": shorten(reject.excerpt)}
            self.rejects.append(row)
            result.rejects.append(row)

    def _refuse_useless(self, result: InputResult, info: FileInfo) -> None:
        got = "no record at all"
        if result.rejects:
            first = result.rejects[0]
            got = f"{result.counts.rejected:,} rejects, first {first['place']}: {first['reason']}"
        self._publish_rejects()
        raise DataError(
            "nothing in this input is usable",
            where=info.uri,
            got=got,
            remedy=f"see {rejects_uri(self.dataset)}; state format: or field: if the input is sound",
        )

    def _publish_rejects(self) -> None:
        body = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self.rejects)
        storage.write_bytes(rejects_uri(self.dataset), body.encode())

    def complete(
        self, results: list[InputResult], identities: Sequence[Identity], extra: dict[str, str]
    ) -> dict[str, Any]:
        """Remove what is left of earlier preparations and write the marker."""
        dataset, total = self.dataset, Counts()
        for result in results:
            total.add(result.counts)
        shards = [shard for result in results for shard in result.shards]
        if not shards:
            raise DataError("the inputs of a dataset hold no record", where=dataset.name, got=", ".join(dataset.inputs))
        self._publish_rejects()
        current = {f"{dataset.state_name}/{_input_name(number)}" for number in range(len(results))}
        for name in sorted(self.sizes.keys() - {shard.name for shard in shards} - current):
            if dataset.is_shard_name(name) or name.startswith(f"{dataset.state_name}/input-"):
                storage.remove(storage.join(dataset.out, name))  # of an earlier preparation: readers would take it in
        marker = {
            "format_version": FORMAT_VERSION,
            "dataset": dataset.name,
            "type": dataset.type,
            **extra,
            "counts": asdict(total),
            "inputs": [
                {"name": self.masker.text(name), "bytes": size, "version": version}
                for name, size, version in identities
            ],
            "shards": [asdict(shard) for shard in shards],
        }
        _write_json(dataset, COMPLETE, marker)
        return marker


def _input_name(number: int) -> str:
    return f"input-{number:05d}.json"


def rejects_uri(dataset: Dataset) -> str:
    """The file of the first rejects."""
    return _state_uri(dataset, "rejects.jsonl")


def _state_uri(dataset: Dataset, *names: str) -> str:
    return storage.join(dataset.out, dataset.state_name, *names)


def _read_json(dataset: Dataset, name: str) -> dict[str, Any] | None:
    """A marker, or None where there is none or it cannot be one."""
    uri = _state_uri(dataset, name)
    if not storage.exists(uri):
        return None
    try:
        value = parse_json(storage.read_small(uri))
    except ValueError:
        value = None
    if not isinstance(value, dict):
        _say_damaged(uri)
        return None
    return value


def _say_damaged(uri: str) -> None:
    _log.warning("%s: not a marker; prepared anew", uri)


def _write_json(dataset: Dataset, name: str, value: dict[str, Any]) -> None:
    body = json.dumps(value, indent=1, ensure_ascii=False).encode() + b"\n"
    storage.write_bytes(_state_uri(dataset, name), body)
