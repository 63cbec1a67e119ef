"""The files of a tokenised dataset, written in one pass with flat memory.

column: one file with one number a sample; location number: where a record came from, kept while writing, for messages.

    tokens      all samples' tokens, one after another, 2 or 4 bytes each
    starts      where each sample begins in tokens          lengths     its tokens
    ids         all sample ids, UTF-8, without separators   id_starts, id_lengths  where each lies
    fates       64-bit hash of each sample id, by which samples are held out
    learnt      which tokens are learnt, a byte each (0 or 1), and
    first_learnt  the first learnt token after a sample's first; these two only where some token is not
    meta.json   see DatasetMeta

Beside the folder ``.NAME.sha256`` has the hash of each of its files. A dataset of an earlier release has none.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from liquid_llm import storage
from liquid_llm.data.records import LINES_PER_FILE
from liquid_llm.errors import DataError
from liquid_llm.parsing import ParseError, parse_json
from liquid_llm.sources import default_layout

FORMAT_VERSION = 1
META = "meta.json"
COLUMNS = {"starts": "<i8", "lengths": "<i8", "id_starts": "<i8", "id_lengths": "<i8", "fates": "<u8"}
LEARNT, FIRST_LEARNT = "learnt", "first_learnt"
TEXT, PROMPT, MESSAGES = "text", "prompt", "messages"
_LOCATIONS = "locations"
_BLOCK_BYTES = 1 << 20
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DatasetMeta:
    """What ``meta.json`` says beside the arrays.

    Attributes:
        type: of every sample.
        layout: ``blocks`` or ``samples``, which decides how a text ends (``tokens``).
        token_dtype: ``<u2`` where every token id fits, else ``<u4``.
        num_short: records left out for having fewer than two tokens: there is nothing to predict in them.
        num_repeated: records left out for repeating another's sample id and text.
        sizes: bytes of each file; a dataset whose files differ is not used.
        framing: version of how the texts became tokens (``liquid_llm.versions``).
        forms: of the records: ``text``, ``prompt`` (and completion), ``messages``.
        num_unlearnt: records left out because nothing of them is learnt.
        file_samples: samples of each input file, in the order of the files; of one file nothing is said.

    What is as it always was (the first framing, the layout that a type has by itself, texts alone) is not written down:
    a description of such data stays byte for byte what it always was.
    """

    format_version: int
    type: str
    token_dtype: str
    num_short: int
    num_repeated: int
    sizes: dict[str, int]
    framing: int = 1
    layout: str = ""
    forms: Sequence[str] = (TEXT,)
    num_unlearnt: int = 0
    file_samples: Sequence[int] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "layout", self.layout or default_layout(self.type))
        object.__setattr__(self, "forms", tuple(self.forms))
        object.__setattr__(self, "file_samples", tuple(self.file_samples))

    def plain(self) -> dict[str, Any]:
        """What ``meta.json`` holds."""
        layout = default_layout(self.type)
        usual = (("framing", 1), ("layout", layout), ("forms", (TEXT,)), ("num_unlearnt", 0), ("file_samples", ()))
        return {name: value for name, value in asdict(self).items() if (name, value) not in usual}


def read_meta(directory: Path, framing: int = 1) -> DatasetMeta | None:
    """The description of the dataset in ``directory``; None where it is absent, damaged, of another format or framing.

    A cache is never refused: what this release cannot use is made anew, under another name.
    """
    try:
        values = parse_json((directory / META).read_bytes())
        if values.get("format_version") != FORMAT_VERSION:
            return None
        meta = DatasetMeta(**values)
        complete = all((directory / name).stat().st_size == size for name, size in meta.sizes.items())
    except (FileNotFoundError, NotADirectoryError, ValueError, TypeError, AttributeError):
        return None
    return meta if complete and meta.framing == framing else None


def write_hashes(directory: Path, meta: DatasetMeta) -> dict[str, str]:
    """Keep the hash of each file of a published dataset beside its folder; returns them."""
    hashes = {name: storage.sha256(directory / name) for name in (META, *meta.sizes)}
    storage.write_bytes(str(_hashes_of(directory)), json.dumps(hashes, indent=1).encode())
    return hashes


def read_hashes(directory: Path, *, say: bool) -> dict[str, str] | None:
    """The hashes of a dataset's files, which the files have; {} where none were kept; None where they are damaged.

    Everything is read.

    Args:
        say: whether a warning tells what is damaged.
    """
    place = _hashes_of(directory)
    hashes: dict[str, str] | None
    try:
        hashes = parse_json(place.read_bytes())
    except FileNotFoundError:
        return {}
    except ParseError:
        hashes = None
    if not isinstance(hashes, dict) or META not in hashes:
        damaged = [place.name]
    else:
        damaged = [name for name, digest in hashes.items() if _hash_of(directory / name) != digest]
    if damaged and say:
        said = "%s: this cache of tokens is damaged (%s) and is made again"
        _log.warning(said, directory, ", ".join(damaged))
    return None if damaged else hashes


def _hashes_of(directory: Path) -> Path:
    return directory.with_name(f".{directory.name}.sha256")


def _hash_of(path: Path) -> str | None:
    return storage.sha256(path) if path.is_file() else None


def split_hash(sample_id: str) -> int:
    """64 bits that depend on a sample's id alone: they decide its split."""
    return int.from_bytes(hashlib.blake2b(sample_id.encode(), digest_size=8, person=b"held-out").digest(), "little")


class TokenWriter:
    """Writes a dataset into an existing empty directory; to be used in ``with``, then ``finish``.

    Args:
        directory: where the files go.
        type, layout: of every sample.
        token_dtype: ``<u2`` or ``<u4``.
        location: turns a location number into words.
        framing: version of how the texts became tokens.
        num_files: that the records are of.
    """

    def __init__(
        self,
        directory: Path,
        type: str,
        token_dtype: str,
        location: Callable[[int], str],
        framing: int = 1,
        layout: str = "",
        num_files: int = 1,
    ) -> None:
        self._num_files = num_files
        self._framing, self.layout = framing, layout
        self._directory = directory
        self._type = type
        self._token_dtype = token_dtype
        self._location = location
        self._files: dict[str, BinaryIO] = {}
        self._open = ExitStack()  # closes them all, even when one cannot be flushed
        self._id_bytes = 0
        self._num_short = self._num_unlearnt = 0
        self._masked = False  # some token is not learnt
        self._forms: set[str] = set()
        self.num_tokens = 0

    def __enter__(self) -> TokenWriter:
        with self._open:  # where one of them cannot be opened
            for name in ("tokens", "ids", _LOCATIONS, FIRST_LEARNT, *COLUMNS):
                self._files[name] = self._open.enter_context((self._directory / name).open("xb"))
            self._open = self._open.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def add(
        self,
        sample_ids: Sequence[str],
        token_ids: Sequence[Sequence[int]],
        locations: Sequence[int],
        learnt: Sequence[Sequence[bool] | None] | None = None,
        forms: Iterable[str] = (TEXT,),
    ) -> None:
        """Append samples, leaving out those too short to learn from, or of which nothing is learnt.

        Args:
            learnt: which tokens of each are learnt; None: all.
            forms: of the records behind them.
        """
        masks: Sequence[Sequence[bool] | None] = [None] * len(token_ids) if learnt is None else learnt
        long = [row for row, tokens in enumerate(token_ids) if len(tokens) >= 2]
        kept = [row for row in long if (mask := masks[row]) is None or any(mask[1:])]
        self._num_short += len(token_ids) - len(long)
        self._num_unlearnt += len(long) - len(kept)
        self._forms.update(forms)
        self._write_learnt([masks[row] for row in kept], [len(token_ids[row]) for row in kept])
        lengths = np.array([len(token_ids[row]) for row in kept], dtype=np.int64)
        ids = [sample_ids[row].encode() for row in kept]
        id_lengths = np.array([len(name) for name in ids], dtype=np.int64)
        flat = np.fromiter(chain.from_iterable(token_ids[row] for row in kept), self._token_dtype, int(lengths.sum()))
        self._write("tokens", flat)
        self._write("starts", self.num_tokens + np.cumsum(lengths) - lengths)
        self._write("lengths", lengths)
        self._files["ids"].write(b"".join(ids))
        self._write("id_starts", self._id_bytes + np.cumsum(id_lengths) - id_lengths)
        self._write("id_lengths", id_lengths)
        self._write("fates", np.array([split_hash(sample_ids[row]) for row in kept], dtype=np.uint64))
        self._write(_LOCATIONS, np.array([locations[row] for row in kept], dtype=np.int64))
        self.num_tokens += int(lengths.sum())
        self._id_bytes += int(id_lengths.sum())

    def _write_learnt(self, masks: Sequence[Sequence[bool] | None], lengths: Sequence[int]) -> None:
        """The masks of samples to come next; no file is begun before some token is not learnt."""
        first = [1 if mask is None else 1 + list(mask[1:]).index(True) for mask in masks]
        self._write(FIRST_LEARNT, np.array(first, dtype=np.int64))
        if not self._masked and any(mask is not None and not all(mask) for mask in masks):
            self._masked = True
            self._files[LEARNT] = self._open.enter_context((self._directory / LEARNT).open("xb"))
            for start in range(0, self.num_tokens, _BLOCK_BYTES):
                self._files[LEARNT].write(b"\1" * min(_BLOCK_BYTES, self.num_tokens - start))
        if self._masked:
            whole = (b"\1" * n if mask is None else bytes(mask) for mask, n in zip(masks, lengths, strict=True))
            self._files[LEARNT].write(b"".join(whole))

    def finish(self, *, may_be_empty: bool = False) -> DatasetMeta:
        """Close the files, leave out repeated samples and write the description.

        Raises:
            DataError: two different texts under one sample id, with both locations; no sample left, unless that may be.
        """
        self._open.close()
        if not self.num_tokens and not may_be_empty:
            raise self._nothing()
        repeated = self._repeated()
        columns = (*COLUMNS, FIRST_LEARNT)
        if repeated.any():
            for name in columns:
                (self._directory / name).write_bytes(self._read(name)[~repeated].tobytes())
        file_of = self._read(_LOCATIONS)[~repeated] // LINES_PER_FILE
        file_samples = np.bincount(file_of, minlength=self._num_files).tolist() if self._num_files > 1 else ()
        (self._directory / _LOCATIONS).unlink()
        if not self._masked:
            (self._directory / FIRST_LEARNT).unlink()
        names = ("tokens", "ids", *((*columns, LEARNT) if self._masked else COLUMNS))
        meta = DatasetMeta(
            FORMAT_VERSION,
            self._type,
            self._token_dtype,
            self._num_short,
            int(repeated.sum()),
            {name: (self._directory / name).stat().st_size for name in names},
            self._framing,
            self.layout,
            sorted(self._forms),
            self._num_unlearnt,
            file_samples,
        )
        (self._directory / META).write_text(json.dumps(meta.plain(), indent=1))
        return meta

    def _write(self, name: str, values: NDArray[Any]) -> None:
        # not ndarray.tofile: its error for a full disk says nothing of a disk
        self._files[name].write(values.astype(COLUMNS.get(name, values.dtype), copy=False).tobytes())

    def _read(self, name: str, dtype: str | None = None) -> NDArray[Any]:
        return np.fromfile(self._directory / name, dtype or COLUMNS.get(name, "<i8"))

    def _nothing(self) -> DataError:
        where = self._location(0)
        if self._num_unlearnt:
            remedy = "give records with a completion or an assistant's turn, or --learn=all"
            return DataError("nothing is learnt from any record", where=where, remedy=remedy)
        return DataError("no record has two tokens or more", where=where, remedy="give records with text")

    def _repeated(self) -> NDArray[np.bool_]:
        """[samples] whether a sample repeats an earlier one; sorting hashes spares a table of all ids in memory."""
        hashes = self._read("fates")
        repeated = np.zeros(len(hashes), dtype=bool)
        order = np.argsort(hashes, kind="stable")
        hashes = hashes[order]
        follows = np.flatnonzero(hashes[1:] == hashes[:-1]) + 1
        if not follows.size:
            return repeated
        id_starts, id_lengths = self._read("id_starts"), self._read("id_lengths")
        ids = np.memmap(self._directory / "ids", np.uint8, "r")
        first: dict[bytes, int] = {}
        previous = -1
        for position in follows.tolist():
            begin = position
            if position != previous + 1:  # a new run of equal hashes
                begin, first = position - 1, {}
            for row in order[begin : position + 1].tolist():
                name = ids[id_starts[row] : id_starts[row] + id_lengths[row]].tobytes()
                repeated[row] = name in first
                self._require_same(name, first.setdefault(name, row), row)
            previous = position
        return repeated

    def _require_same(self, name: bytes, first: int, second: int) -> None:
        starts, lengths, locations = (
            np.memmap(self._directory / column, "<i8", "r") for column in ("starts", "lengths", _LOCATIONS)
        )
        columns = [("text", "tokens", self._token_dtype)]
        columns += [("text, of which something else is learnt,", LEARNT, "u1")] if self._masked else []
        for what, column, dtype in columns:
            values = np.memmap(self._directory / column, dtype, "r")
            one, other = (values[starts[row] : starts[row] + lengths[row]] for row in (first, second))
            if not np.array_equal(one, other):
                raise DataError(
                    f"sample_id {name.decode()!r} names two different texts",
                    where=self._location(int(locations[second])),
                    got=f"another {what} at {self._location(int(locations[first]))}",
                    remedy="give each record its own sample_id, or none",
                )
