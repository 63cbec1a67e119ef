"""A signal store: the records of one teacher in one folder, local or behind any URL.

    store.json    in the folder: whose signal it holds, in which codec and layout
    layout        how records lie in the folder: ``pt`` is one file a sample, ``shards`` thousands in one
    missing       no record of a sample; stale: a record of other tokens, another teacher, too short a window or
                  without a row for a position that is learnt; corrupt: bytes that cannot be a whole record

A store belongs to one teacher, tokenizer, vocabulary and codec: a writer of another is refused, and so is a reader
that expects another. What concerns single samples is never an error: it is a ``Lookup`` with a reason.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from liquid_llm import storage
from liquid_llm.data.types import Sample
from liquid_llm.errors import SignalError
from liquid_llm.framing import Framing
from liquid_llm.identity import ModelIdentity
from liquid_llm.signal_store.codecs import Codec, Payload, PayloadError, StoredSignal, get_codec
from liquid_llm.signal_store.description import (
    STORE_FILE,
    present_layout,
    read_store_file,
    require_own,
    write_store_file,
)
from liquid_llm.signal_store.layout import Layout
from liquid_llm.signal_store.pt import PtLayout, is_record_file
from liquid_llm.signal_store.records import (
    FORMAT_VERSION,
    WHOLE_VERSION,
    Record,
    RecordError,
    RecordHeader,
    RecordMissingError,
    SignalIdentity,
    difference_in_words,
    first_difference,
    runs_of,
    token_hashes,
)
from liquid_llm.signal_store.shards.file import is_shard
from liquid_llm.signal_store.shards.folder import ShardsLayout
from liquid_llm.signal_store.shards.remote import ShardCache
from liquid_llm.signal_store.shards.writer import PART_SECONDS, SHARD_BYTES
from liquid_llm.signal_store.units import UnitsLayout, unit_folder
from liquid_llm.storage import FileInfo

log = logging.getLogger(__name__)

LAYOUTS: dict[str, Callable[[str, Iterable[FileInfo], ShardCache | None], Layout]] = {
    "pt": lambda uri, infos, cache: PtLayout(uri, infos),
    "shards": ShardsLayout,
    "units": UnitsLayout,
}
# "capture again" is said where that helps, and what costs less before it.
COPY_OR_CAPTURE = "copy it again from where it is whole, or capture again: the same command makes what is damaged anew"
_COPY = "copy the store again, whole, from where it was captured"
_OF_THIS = "name the store that was captured of this manifest, or capture it"
_TEXT = "train on the texts that were captured, or capture again: the same command makes what differs anew"
_LEARN = "give --learn and --chat_template as they were at capture, or capture again"
_NEWER = "install a newer liquid-llm"
_CAPTURE = (
    "liquid capture --mc-teacher-id=TEACHER --dataset-manifest=MANIFEST --math-logits-dir=DIR --code-logits-dir=DIR"
)
_REMOTE_READERS = 8  # one GET waits some 40 ms for its first byte: a batch's records are fetched together

Status: TypeAlias = Literal["usable", "missing", "stale", "corrupt"]


@dataclass(frozen=True)
class Lookup:
    """What a store has for a sample.

    Attributes:
        status: only "usable" has a record.
        reason: why not, in words; empty when usable.
        remedy: what would help, an imperative clause; empty when usable.
        signal: the decoded rows, where they were asked for.
    """

    status: Status
    reason: str = ""
    remedy: str = ""
    signal: StoredSignal | None = None


class StoreReader:
    """Reads one store; safe to use from several threads. Made by ``open_store``."""

    def __init__(self, uri: str, identity: SignalIdentity, layout: Layout, versions: Mapping[str, int]) -> None:
        self.uri, self.versions = uri, versions
        self.identity = identity
        self.codec: Codec = get_codec(identity.codec, identity.codec_version, identity.codec_options)
        self.layout = layout
        self._threads = ThreadPoolExecutor(_REMOTE_READERS, "signal") if storage.is_remote(uri) else None

    def __len__(self) -> int:
        return len(self.layout)

    def has(self, sample_id: str, shard: str | None = None) -> bool:
        """Whether there is a record of that name; whether it is usable only ``check`` knows.

        Args:
            shard: the data file that the sample is of; without it a store of units looks into all of them.
        """
        return self.layout.has(sample_id, shard)

    @property
    def complete_units(self) -> frozenset[str] | None:
        """Of a store of units, the data files whose signal is complete; None of any other."""
        return self.layout.complete if isinstance(self.layout, UnitsLayout) else None

    def check(self, sample: Sample, window: int) -> Lookup:
        """Whether the first ``window`` tokens of ``sample`` have a usable record, without decoding it."""
        found = self._find(sample, window)
        return found if isinstance(found, Lookup) else Lookup("usable")

    def get(self, sample: Sample, window: int, temperature: float) -> Lookup:
        """The signal of the learnt positions of a window, at most ``min(window, len(sample)) - 1`` rows.

        Args:
            window: tokens from the sample's start; a record of a longer capture serves a shorter window.

        Raises:
            SignalError: the codec cannot answer at this temperature.
            StorageError: the store cannot be read.
        """
        found = self._find(sample, window)
        if isinstance(found, Lookup):
            return found
        learnt = sample.learnt_positions(window)
        stored = found.header.positions()[: len(learnt)]
        try:
            signal = self.codec.decode(found.payload, 0, int(stored.sum()), temperature, self.identity.vocab_size)
        except PayloadError as error:
            return Lookup("corrupt", f"the payload is not one of codec {self.codec.name!r}: {error}", COPY_OR_CAPTURE)
        if not learnt[stored].all():  # a record of more than is learnt
            signal = signal.take(torch.from_numpy(np.flatnonzero(learnt[stored])))
        if self.identity.positions is not None:
            signal = signal.spread(torch.from_numpy(stored[learnt]))
        return Lookup("usable", signal=signal)

    def get_many(self, samples: Sequence[Sample], windows: Sequence[int], temperature: float) -> list[Lookup]:
        """``get`` for several samples; a remote store's records are fetched at the same time."""
        get_all = map if self._threads is None else self._threads.map
        return list(get_all(self.get, samples, windows, [temperature] * len(samples)))

    def describe(self) -> dict[str, Any]:
        """What the store is, as plain values for provenance."""
        about = {"uri": self.uri, "layout": self.layout.name, **self.layout.counts(), "versions": dict(self.versions)}
        return {**about, **self.identity.plain()}

    def close(self) -> None:
        """Close its files and end the threads of a remote store."""
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)
        self.layout.close()

    def _find(self, sample: Sample, window: int) -> Record | Lookup:
        if not self.layout.has(sample.sample_id, sample.shard):
            where = self.uri if self.complete_units is None or sample.shard is None else f"{self.uri}: {sample.shard}"
            return Lookup("missing", f"no record in {where}", _OF_THIS)
        try:
            record = self.layout.read(sample.sample_id, sample.shard)
        except RecordMissingError as error:
            return Lookup("missing", str(error), COPY_OR_CAPTURE)
        except RecordError as error:
            return Lookup("corrupt", str(error), COPY_OR_CAPTURE)
        stale = find_stale(record.header, self.identity, sample, window)
        return record if stale is None else Lookup("stale", *stale)


class StoreWriter:
    """Writes records of one teacher into a folder; safe to use from several threads and processes.

    Args:
        uri: the folder; made when missing.
        vocab_size: entries given to the codec.
        layout: ``pt`` or ``shards``; ``units`` with a ``unit``.
        unit: the data file whose records these are, in a store of units.
        framing: of the samples; None adds to a store from before it was said.
        positions: the share of each record's positions that is kept; None: all.
        versions: that the records of a new store were made with, this release's if None.
        shard_bytes, part_seconds: of layout ``shards``, see ``ShardsWriter``.

    Raises:
        SignalError: the folder holds another teacher's signal, or signal in another codec or layout, or foreign files.
        StorageError: the folder cannot be read or written.
    """

    def __init__(
        self,
        uri: str,
        teacher: ModelIdentity,
        codec: Codec,
        *,
        vocab_size: int,
        layout: str = "pt",
        framing: Framing | None = None,
        positions: float | None = None,
        versions: Mapping[str, int] | None = None,
        shard_bytes: int = SHARD_BYTES,
        part_seconds: float = PART_SECONDS,
        unit: str | None = None,
    ) -> None:
        self.uri = uri
        self.codec = codec
        self.identity = SignalIdentity.of(codec, teacher, vocab_size, framing, positions)
        folder = uri if unit is None else unit_folder(uri, unit)
        infos = storage.list_files(folder)
        names = {info.name for info in infos} if unit is None else set()
        if STORE_FILE in names or storage.exists(storage.join(uri, STORE_FILE)):
            require_own(uri, self.identity, layout)
        else:
            _refuse_foreign_files(uri, names)
            write_store_file(uri, self.identity, layout, versions)
        self._layout = LAYOUTS[layout if unit is None else ShardsLayout.name](folder, infos, None)
        self._writer = self._layout.writer(self.identity, shard_bytes=shard_bytes, part_seconds=part_seconds)

    def has(self, sample_id: str) -> bool:
        """Whether a record of that name was there when the writer was made."""
        return self._layout.has(sample_id)

    def complete(self, sample: Sample, window: int) -> bool:
        """Whether a whole record is there that serves the first ``window`` tokens of ``sample``. Reads it."""
        header = self._read_header(sample.sample_id)
        return header is not None and find_stale(header, self.identity, sample, window) is None

    def holds(self, record: Record) -> bool:
        """Whether a whole record of the same tokens was there when the writer was made. Reads it."""
        mine, there = record.header, self._read_header(record.header.sample_id)
        return there is not None and (there.type, there.num_tokens, there.token_hashes, there.runs) == (
            mine.type,
            mine.num_tokens,
            mine.token_hashes,
            mine.runs,
        )

    def write(
        self, sample: Sample, num_tokens: int, payload: Payload, positions: NDArray[np.bool_] | None = None
    ) -> int:
        """Store the first ``num_tokens`` tokens of ``sample``, replacing any record; returns its bytes.

        The payload has a row for each learnt position of them, or of ``positions`` [num_tokens - 1].

        Layout ``pt`` publishes it at once, ``shards`` with others, all of them by ``finish``.
        """
        hashes = token_hashes(sample.input_ids[:num_tokens])
        runs = runs_of(sample.learnt_positions(num_tokens) if positions is None else positions)
        version = FORMAT_VERSION if runs else WHOLE_VERSION
        names = (sample.sample_id, sample.type, self.identity)
        return self.put(Record(RecordHeader(version, *names, num_tokens, hashes, runs), payload))

    def put(self, record: Record) -> int:
        """Store a record that is made already, of this store's identity; otherwise as ``write``."""
        return self._writer.write(record)

    def finish(self) -> int:
        """Publish what is held back; returns the bytes of files beyond those told by ``write``. More may be written.

        Raises:
            StorageError: something could not be published.
        """
        return self._writer.finish()

    def _read_header(self, sample_id: str) -> RecordHeader | None:
        try:
            return self._layout.read(sample_id).header if self.has(sample_id) else None
        except RecordError:
            return None


_TOKENS = (
    "give all types teachers of one tokenizer, with the same added tokens, or train with that of the store's teacher; "
    "to capture again helps only where that teacher's own files have changed since"
)


def open_store(
    uri: str,
    *,
    teacher_id: str | None = None,
    tokenizer_hash: str | None = None,
    vocab_size: int | None = None,
    cache: ShardCache | None = None,
) -> StoreReader:
    """Open a store for reading; the folder is listed once, so that a missing record costs no request.

    Args:
        teacher_id: the teacher expected, as its ``ModelIdentity`` says; None takes any.
        tokenizer_hash, vocab_size: likewise.
        cache: where whole shards of a remote store are kept; a temporary folder when None.

    Raises:
        SignalError: there is no store or no record, or it is of another teacher, tokenizer or vocabulary, or it was
            written by a newer program.
        StorageError: the folder cannot be read.
    """
    of_units = present_layout(uri) == UnitsLayout.name  # such a folder is not listed: it may hold millions of files
    infos = [] if of_units else storage.list_files(uri)
    names = {STORE_FILE} if of_units else {info.name for info in infos}
    if STORE_FILE not in names:
        inside = sorted(name.rpartition("/")[0] for name in names if name.endswith(f"/{STORE_FILE}"))
        if inside:
            raise SignalError(
                "this folder is no signal store and holds one", where=uri, remedy=f"name {storage.join(uri, inside[0])}"
            )
        if any(is_record_file(name) or is_shard(name) for name in names):
            remedy = f"{_COPY}, or capture into an empty folder: {_CAPTURE}"
            raise SignalError(f"records and no {STORE_FILE} in it", where=uri, remedy=remedy)
        problem = f"no {STORE_FILE} in it" if names else "there is no signal store here (missing or empty folder)"
        raise SignalError(problem, where=uri, remedy=f"capture the teacher's signal first: {_CAPTURE}")
    identity, layout_name, versions = read_store_file(uri)
    for what, stored, expected in (
        ("teacher", identity.teacher_id, teacher_id),
        ("tokenizer", identity.tokenizer_hash, tokenizer_hash),
        ("vocabulary size", identity.vocab_size, vocab_size),
    ):
        if expected is not None and stored != expected:
            raise SignalError(
                f"the store is of another {what}",
                where=uri,
                got=stored if what == "teacher" else f"{stored} (of {identity.teacher})",
                expected=expected,
                remedy=_TOKENS
                if what == "tokenizer"
                else "name the folder captured with the expected one, or capture again into another folder",
            )
    if layout_name not in LAYOUTS:
        raise SignalError(
            "a store in a layout that this program does not know",
            where=storage.join(uri, STORE_FILE),
            got=repr(layout_name),
            expected=" or ".join(map(repr, LAYOUTS)),
            remedy="install a newer liquid-llm",
        )
    layout = LAYOUTS[layout_name](uri, infos, cache)
    problems = layout.problems()
    if layout.is_empty():
        got = "; ".join(problems) or None
        raise SignalError("the signal store has no record", where=uri, got=got, remedy=f"capture first: {_CAPTURE}")
    for problem in problems:
        log.warning("%s: %s", uri, problem)
    return StoreReader(uri, identity, layout, versions)


def _refuse_foreign_files(uri: str, names: set[str]) -> None:
    foreign = sorted(name for name in names if is_record_file(name) or is_shard(name))
    if foreign:
        what = "shards" if is_shard(foreign[0]) else ".pt files"
        raise SignalError(
            f"this folder has {what} but no {STORE_FILE}: they are not records of this program",
            where=uri,
            got=f"{len(foreign)} such files, the first {foreign[0]}",
            remedy="write to another folder",
        )


class Stale(NamedTuple):
    """Why a whole record cannot serve, and what would help."""

    reason: str
    remedy: str


def find_stale(header: RecordHeader, identity: SignalIdentity, sample: Sample, window: int) -> Stale | None:
    """Why a whole record cannot serve the first ``window`` tokens of ``sample`` in a store of ``identity``, or None."""
    if header.format_version > FORMAT_VERSION:
        return Stale(f"record format {header.format_version}, this program reads {FORMAT_VERSION}", _NEWER)
    difference = header.identity.difference(identity)
    if difference is not None:
        name, theirs, stores = difference_in_words(*difference)
        return Stale(f"captured with {name} {theirs}, the store is of {stores}", _COPY)
    if (header.sample_id, header.type) != (sample.sample_id, sample.type):
        return Stale(f"it is the record of {header.type} sample {header.sample_id!r}", _OF_THIS)
    needed = min(window, len(sample.input_ids))
    reason = first_difference(header, sample.input_ids, needed)
    if reason is not None:
        return Stale(reason, _TEXT)
    if header.num_tokens < needed:
        remedy = f"train with --seq_len={header.num_tokens} or less, or capture again with --seq_len={needed} or more"
        return Stale(f"captured at {header.num_tokens} tokens, {needed} wanted", remedy)
    reason = _other_positions(header, identity, sample, needed)
    return None if reason is None else Stale(reason, _LEARN)


def _other_positions(header: RecordHeader, identity: SignalIdentity, sample: Sample, needed: int) -> str | None:
    """How the positions of a record are not those that are learnt of the first ``needed`` tokens, or None."""
    if identity.positions is not None:
        learnt, stored = sample.learnt_positions(header.num_tokens), header.positions()
        if len(stored) != len(learnt):
            return f"captured of {header.num_tokens} tokens of which there are {len(learnt) + 1} now"
        if (stored & ~learnt).any() or stored.sum() != identity.num_chosen(int(learnt.sum())):
            return "captured for other positions than are learnt"
    elif header.runs:
        lacking = sample.learnt_positions(needed) & ~header.positions()[: needed - 1]
        if lacking.any():
            return f"captured for other positions than are learnt: {int(lacking.sum())} of these have no row"
    return None
