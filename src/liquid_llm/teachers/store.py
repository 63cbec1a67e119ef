"""A signal store: the records of one teacher in one folder, local or behind any URL.

    store.json    in the folder: whose signal it holds, in which codec and layout
    layout        how records lie in the folder; ``pt`` is one file a sample
    missing       no record of a sample; stale: a record of other tokens, another teacher or too short a window;
                  corrupt: bytes that cannot be a whole record

A store belongs to one teacher, tokenizer, vocabulary and codec: a writer of another is refused, and so is a reader
that expects another. What concerns single samples is never an error: it is a ``Lookup`` with a reason.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol, TypeAlias

from liquid_llm import storage
from liquid_llm.data.types import Sample
from liquid_llm.errors import SignalError
from liquid_llm.models.loading import ModelIdentity
from liquid_llm.teachers.codecs import Codec, Payload, PayloadError, StoredSignal, get_codec
from liquid_llm.teachers.pt_layout import PtLayout
from liquid_llm.teachers.records import (
    FORMAT_VERSION,
    SUFFIX,
    Record,
    RecordError,
    RecordHeader,
    SignalIdentity,
    first_difference,
    from_bytes,
    token_hashes,
)

STORE_FILE = "store.json"
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
        signal: the decoded rows, where they were asked for.
    """

    status: Status
    reason: str = ""
    signal: StoredSignal | None = None


class Layout(Protocol):
    """How the records of a store lie in its folder."""

    def __len__(self) -> int:
        """Number of records, complete or not."""
        ...

    def has(self, sample_id: str) -> bool:
        """Whether there is something for the sample, without asking storage."""
        ...

    def read(self, sample_id: str) -> Record:
        """The sample's record. Raises RecordError or StorageError."""
        ...


class StoreReader:
    """Reads one store; safe to use from several threads. Made by :func:`open_store`.

    Attributes:
        uri: the folder.
        identity: whose signal it holds.
        codec: that decodes it.
    """

    def __init__(self, uri: str, identity: SignalIdentity, layout: Layout) -> None:
        self.uri = uri
        self.identity = identity
        self.codec: Codec = get_codec(identity.codec, identity.codec_version, identity.codec_options)
        self._layout = layout
        self._threads = ThreadPoolExecutor(_REMOTE_READERS, "signal") if storage.is_remote(uri) else None

    def __len__(self) -> int:
        return len(self._layout)

    def has(self, sample_id: str) -> bool:
        """Whether there is a record of that name; whether it is usable only :meth:`check` knows."""
        return self._layout.has(sample_id)

    def check(self, sample: Sample, window: int) -> Lookup:
        """Whether the first ``window`` tokens of ``sample`` have a usable record, without decoding it."""
        found = self._find(sample, window)
        return found if isinstance(found, Lookup) else Lookup("usable")

    def get(self, sample: Sample, window: int, temperature: float) -> Lookup:
        """The signal of the positions of a window: ``min(window, len(sample)) - 1`` rows at ``temperature``.

        Args:
            window: tokens from the sample's start; a record of a longer capture serves a shorter window.

        Raises:
            SignalError: the codec cannot answer at this temperature.
            StorageError: the store cannot be read.
        """
        found = self._find(sample, window)
        if isinstance(found, Lookup):
            return found
        num_rows = max(min(window, len(sample.input_ids)) - 1, 0)
        try:
            signal = self.codec.decode(found.payload, 0, num_rows, temperature, self.identity.vocab_size)
        except PayloadError as error:
            return Lookup("corrupt", f"the payload is not one of codec {self.codec.name!r}: {error}")
        return Lookup("usable", signal=signal)

    def get_many(self, samples: Sequence[Sample], windows: Sequence[int], temperature: float) -> list[Lookup]:
        """:meth:`get` for several samples; a remote store's records are fetched at the same time."""
        temperatures = [temperature] * len(samples)
        if self._threads is None:
            return list(map(self.get, samples, windows, temperatures))
        return list(self._threads.map(self.get, samples, windows, temperatures))

    def describe(self) -> dict[str, Any]:
        """What the store is, as plain values for provenance."""
        return {"uri": self.uri, "records": len(self), **asdict(self.identity)}

    def close(self) -> None:
        """End the threads of a remote store."""
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)

    def _find(self, sample: Sample, window: int) -> Record | Lookup:
        if not self._layout.has(sample.sample_id):
            return Lookup("missing", f"no record in {self.uri}")
        try:
            record = self._layout.read(sample.sample_id)
        except RecordError as error:
            return Lookup("corrupt", str(error))
        reason = stale_reason(record.header, self.identity, sample, window)
        return record if reason is None else Lookup("stale", reason)


class StoreWriter:
    """Writes records of one teacher into a folder; safe to use from several threads and processes.

    Args:
        uri: the folder; made when missing.
        teacher: what the teacher is.
        codec: that encodes the records.
        vocab_size: entries given to the codec.

    Raises:
        SignalError: the folder holds another teacher's signal, or signal in another codec, or foreign ``.pt`` files.
        StorageError: the folder cannot be read or written.
    """

    def __init__(self, uri: str, teacher: ModelIdentity, codec: Codec, *, vocab_size: int) -> None:
        self.uri = uri
        self.codec = codec
        self.identity = SignalIdentity.of(
            codec,
            teacher_id=teacher.id,
            teacher_revision=teacher.revision,
            tokenizer_hash=teacher.tokenizer_hash,
            vocab_size=vocab_size,
        )
        names = {info.name for info in storage.list_files(uri)}
        self._layout = PtLayout(uri, names)
        if STORE_FILE in names or storage.exists(storage.join(uri, STORE_FILE)):
            self._require_own()
        else:
            self._refuse_foreign_files(names)
            contents = {"format_version": FORMAT_VERSION, "layout": "pt", **asdict(self.identity)}
            storage.write_bytes(storage.join(uri, STORE_FILE), json.dumps(contents, indent=1).encode())

    def has(self, sample_id: str) -> bool:
        """Whether a record of that name was there when the writer was made."""
        return self._layout.has(sample_id)

    def complete(self, sample: Sample, window: int) -> bool:
        """Whether a whole record is there that serves the first ``window`` tokens of ``sample``. Reads it."""
        if not self.has(sample.sample_id):
            return False
        try:
            header = self._layout.read(sample.sample_id).header
        except RecordError:
            return False
        return stale_reason(header, self.identity, sample, window) is None

    def write(self, sample: Sample, num_tokens: int, payload: Payload) -> int:
        """Publish the record of the first ``num_tokens`` tokens of ``sample``, replacing any; returns its bytes."""
        header = RecordHeader(
            FORMAT_VERSION,
            sample.sample_id,
            sample.type,
            self.identity,
            num_tokens,
            token_hashes(sample.input_ids[:num_tokens]),
        )
        return self._layout.write(Record(header, payload))

    def _require_own(self) -> None:
        there, _ = _read_store_file(self.uri)
        difference = there.difference(self.identity)
        if difference is not None:
            name, theirs, ours = difference
            raise SignalError(
                f"this folder holds the signal of {there.teacher}, codec {there.codec!r}: the {name} differs",
                where=self.uri,
                got=ours,
                expected=theirs,
                remedy="write to another folder, or remove this one first",
            )

    def _refuse_foreign_files(self, names: set[str]) -> None:
        foreign = sorted(name for name in names if name.endswith(SUFFIX))
        if foreign:
            raise SignalError(
                f"this folder has .pt files but no {STORE_FILE}: they are not records of this program",
                where=self.uri,
                got=f"{len(foreign)} such files, the first {foreign[0]}",
                remedy="write to another folder",
            )


def open_store(
    uri: str,
    *,
    teacher_id: str | None = None,
    teacher_revision: str | None = None,
    tokenizer_hash: str | None = None,
    vocab_size: int | None = None,
) -> StoreReader:
    """Open a store for reading; the folder is listed once, so that a missing record costs no request.

    Args:
        uri: the folder.
        teacher_id, teacher_revision: the teacher expected, as its ``ModelIdentity`` says; None takes any.
        tokenizer_hash, vocab_size: likewise.

    Raises:
        SignalError: there is no store or no record, or it is of another teacher, tokenizer or vocabulary, or it was
            written by a newer program.
        StorageError: the folder cannot be read.
    """
    names = {info.name for info in storage.list_files(uri)}
    if STORE_FILE not in names:
        kind = f"no {STORE_FILE} in it" if names else "there is no signal store here (missing or empty folder)"
        raise SignalError(kind, where=uri, remedy=f"capture the teacher's signal first: {_CAPTURE}")
    identity, layout_name = _read_store_file(uri)
    _require(uri, identity, "teacher", identity.teacher_id, teacher_id)
    _require(uri, identity, "revision of the teacher", identity.teacher_revision, teacher_revision)
    _require(uri, identity, "tokenizer", identity.tokenizer_hash, tokenizer_hash)
    _require(uri, identity, "vocabulary size", identity.vocab_size, vocab_size)
    if layout_name != "pt":
        raise SignalError(
            "a store in a layout that this program does not know",
            where=storage.join(uri, STORE_FILE),
            got=repr(layout_name),
            expected="'pt'",
            remedy="install a newer liquid-llm",
        )
    layout = PtLayout(uri, names)
    if not len(layout):
        raise SignalError("the signal store has no record", where=uri, remedy=f"capture them first: {_CAPTURE}")
    return StoreReader(uri, identity, layout)


def read_header(uri: str | os.PathLike[str]) -> RecordHeader:
    """The header of one ``.pt`` record. Raises SignalError where the file is not a whole record."""
    try:
        return from_bytes(storage.read_bytes(os.fspath(uri))).header
    except RecordError as error:
        raise SignalError("not a record of teacher signal", where=uri, got=str(error)) from error


def stale_reason(header: RecordHeader, identity: SignalIdentity, sample: Sample, window: int) -> str | None:
    """Why a whole record cannot serve the first ``window`` tokens of ``sample`` in a store of ``identity``, or None."""
    if header.format_version != FORMAT_VERSION:
        return f"record format {header.format_version}, this program reads {FORMAT_VERSION}"
    difference = header.identity.difference(identity)
    if difference is not None:
        name, theirs, stores = difference
        return f"captured with {name} {theirs}, the store is of {stores}"
    if (header.sample_id, header.type) != (sample.sample_id, sample.type):
        return f"it is the record of {header.type} sample {header.sample_id!r}"
    needed = min(window, len(sample.input_ids))
    difference_at = first_difference(header, sample.input_ids)
    if difference_at is not None:
        return difference_at
    if header.num_tokens < needed:
        return f"captured at {header.num_tokens} tokens, {needed} wanted"
    return None


def _read_store_file(uri: str) -> tuple[SignalIdentity, str]:
    """Identity and layout as ``store.json`` says."""
    where = storage.join(uri, STORE_FILE)
    try:
        values = json.loads(storage.read_bytes(where))
        version, layout = int(values.pop("format_version")), str(values.pop("layout"))
        identity = None if version > FORMAT_VERSION else SignalIdentity(**values)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise SignalError(
            "not a description of a signal store",
            where=where,
            got=f"{type(error).__name__}: {error}",
            remedy="capture into an empty folder",
        ) from error
    if identity is None:
        raise SignalError(
            "the store was written by a newer program",
            where=where,
            got=f"format {version}",
            expected=f"at most {FORMAT_VERSION}",
            remedy="install a newer liquid-llm",
        )
    return identity, layout


def _require(uri: str, identity: SignalIdentity, what: str, stored: object, expected: object) -> None:
    if expected is not None and stored != expected:
        raise SignalError(
            f"the store is of another {what}",
            where=uri,
            got=stored if what == "teacher" else f"{stored} (of {identity.teacher})",
            expected=expected,
            remedy="name the folder captured with the expected one, or capture again into another folder",
        )
