"""A record: the stored teacher signal of one sample.

    header         plain values: whose signal it is, of which tokens, in which codec
    payload        the codec's tensors
    token hashes   of all captured tokens, and short ones of the first 64, 128, ...: a record is used only for the very
                   tokens it was made from, and where a text has changed behind a window, for that window still
    runs           which next-token positions have a row, as the lengths of runs without and with rows in turn; none
                   where all have one. A record serves whoever learns at positions that have

How it becomes bytes is a matter of the layout: ``pt.py``, ``shards/file.py``.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from liquid_llm.framing import Framing
from liquid_llm.identity import ModelIdentity
from liquid_llm.signal_store.codecs import Codec, Payload

FORMAT_VERSION = 3  # 1 had a whole hash for every 64 tokens; 3 can leave positions out; all are read
WHOLE_VERSION = 2  # of a record with a row for every position: written as it always was
PREFIX_TOKENS = 64
WHOLE_BYTES, MARK_BYTES = 8, 4
_FRAMING = ("begin_id", "end_id")
_WORDS = {
    "positions": ("share of positions (--kd_positions)", 1.0),
    "begin id": ("begin token", "none"),
    "quantisation": ("quantisation of the teacher (--teacher_quantize)", "none"),
}
"""What a message calls a field of an identity, and what None stands for in it."""


class RecordError(Exception):
    """Bytes that are not a complete record."""


class RecordMissingError(RecordError):
    """There is no record of the sample."""


def _is_number(value: object, lowest: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and lowest <= value < 2**31


def _are_options(value: object) -> bool:
    return isinstance(value, dict) and all(
        isinstance(key, str) and type(one) in (int, float, str) for key, one in value.items()
    )


_FIELDS: dict[str, Callable[[Any], bool]] = {
    **{name: lambda value: isinstance(value, str) for name in ("teacher_id", "teacher_revision", "codec")},
    "tokenizer_hash": lambda value: isinstance(value, str),
    "vocab_size": lambda value: _is_number(value, 1),
    "codec_version": _is_number,
    "codec_options": _are_options,
    "begin_id": lambda value: value is None or _is_number(value),
    "end_id": lambda value: value is None or _is_number(value),
    "quantisation": lambda value: value is None or isinstance(value, str),
    "positions": lambda value: value is None or (type(value) in (int, float) and 0 < value <= 1),
}


@dataclass(frozen=True)
class SignalIdentity:
    """Whose signal this is and how it is encoded: the same for all records of a store.

    Attributes:
        teacher_id, teacher_revision: the model's name, and its commit or the fingerprint of its weights.
        vocab_size: entries the codec was given, after cutting the embedding's padding.
        codec, codec_version, codec_options: enough to make the codec again.
        begin_id, end_id: the tokens around each text, see ``framing``; both None in stores from before they were said.
        positions: the share of each record's learnt positions that has a row, those where the teacher is least sure;
            None: all.
        quantisation: what capture did to the teacher's weights (``int8``); None: nothing.
    """

    teacher_id: str
    teacher_revision: str
    tokenizer_hash: str
    vocab_size: int
    codec: str
    codec_version: int
    codec_options: dict[str, int | float | str]
    begin_id: int | None = None
    end_id: int | None = None
    positions: float | None = None
    quantisation: str | None = None

    def __post_init__(self) -> None:
        """Raises TypeError where a field is not what its annotation says: they are read from files of others."""
        for name, fits in _FIELDS.items():
            if not fits(getattr(self, name)):
                raise TypeError(f"{name} is {getattr(self, name)!r:.80}")

    @property
    def teacher(self) -> str:
        """Name, revision and what was done to its weights, in one word."""
        name = f"{self.teacher_id}@{self.teacher_revision[:12]}"
        return name if self.quantisation is None else f"{name}+{self.quantisation}"

    @property
    def framing(self) -> Framing | None:
        """What stands around each text; None in stores from before it was said, which have nothing before a text."""
        return None if self.end_id is None else Framing(self.begin_id, self.end_id)

    def plain(self) -> dict[str, Any]:
        """Plain values; an identity without framing, chosen positions or quantisation is written as it always was."""
        values = asdict(self)
        left_out = set(_FRAMING) if self.end_id is None else set()
        left_out |= {name for name in ("positions", "quantisation") if values[name] is None}
        return {name: value for name, value in values.items() if name not in left_out}

    def num_chosen(self, num_learnt: int) -> int:
        """How many rows a record of so many learnt positions has."""
        return num_learnt if self.positions is None else math.ceil(self.positions * num_learnt)

    def difference(self, other: SignalIdentity) -> tuple[str, object, object] | None:
        """The first field that differs: its name, this value, the other's; None when equal."""
        for field in fields(self):
            mine, others = getattr(self, field.name), getattr(other, field.name)
            if mine != others:
                return field.name.replace("_", " "), mine, others
        return None

    @classmethod
    def of(
        cls,
        codec: Codec,
        teacher: ModelIdentity,
        vocab_size: int,
        framing: Framing | None = None,
        positions: float | None = None,
    ) -> SignalIdentity:
        """What ``teacher``'s signal of texts in this framing is in this codec, at this share of the positions."""
        options = dict(codec.options)
        model = (teacher.id, teacher.revision, teacher.tokenizer_hash)
        begin_id, end_id = (None, None) if framing is None else (framing.begin_id, framing.end_id)
        made = cls(*model, vocab_size, codec.name, codec.version, options, begin_id, end_id, positions)
        return replace(made, quantisation=teacher.quantisation)


@dataclass(frozen=True)
class RecordHeader:
    """What a record says about itself.

    Attributes:
        num_tokens: tokens scored, a window from the sample's start.
        token_hashes: see ``token_hashes``, of those tokens.
        runs: see the module; the payload has a row for each position that they say has one, and where there are none,
            one fewer than tokens.
    """

    format_version: int
    sample_id: str
    type: str
    identity: SignalIdentity
    num_tokens: int
    token_hashes: bytes
    runs: tuple[int, ...] = ()

    @property
    def num_rows(self) -> int:
        """Rows of the payload."""
        return sum(self.runs[1::2]) if self.runs else max(self.num_tokens - 1, 0)

    def positions(self) -> np.ndarray:
        """Which positions have a row: [num_tokens - 1] bool."""
        if not self.runs:
            return np.ones(max(self.num_tokens - 1, 0), dtype=bool)
        return np.repeat(np.arange(len(self.runs)) % 2 == 1, self.runs)


def runs_of(positions: np.ndarray) -> tuple[int, ...]:
    """Inverse of ``RecordHeader.positions``: () where all positions have a row."""
    if positions.all():
        return ()
    borders = np.flatnonzero(np.diff(positions)) + 1
    lengths = np.diff(np.concatenate(([0], borders, [len(positions)]))).tolist()
    return tuple([0, *lengths] if positions[0] else lengths)


@dataclass(frozen=True)
class Record:
    """A header and the payload it describes."""

    header: RecordHeader
    payload: Payload


def token_hashes(input_ids: np.ndarray) -> bytes:
    """Hash of all tokens (8 bytes of blake2b), then of the first 64, 128, ... as far as they go (4 bytes each).

    Another text passes for this one with odds of 2^-64. The short ones cost a sixteenth of a byte a token and let a
    window be used of a text that has changed behind it; one that has changed inside passes with odds of 2^-32 or less.
    """
    data = np.ascontiguousarray(input_ids, dtype="<i4")
    running = hashlib.blake2b(digest_size=WHOLE_BYTES)
    full = len(data) // PREFIX_TOKENS * PREFIX_TOKENS
    marks = []
    for start in range(0, full, PREFIX_TOKENS):
        running.update(data[start : start + PREFIX_TOKENS].data)
        marks.append(running.digest()[:MARK_BYTES])
    running.update(data[full:].data)
    return running.digest() + b"".join(marks)


def tokens_agreeing(header: RecordHeader, input_ids: np.ndarray) -> int:
    """How many leading tokens of a text are known to be those a record was made from."""
    n = header.num_tokens
    if len(input_ids) >= n:
        data = np.ascontiguousarray(input_ids[:n], dtype="<i4")
        if hashlib.blake2b(data.data, digest_size=WHOLE_BYTES).digest() == header.token_hashes[:WHOLE_BYTES]:
            return n
    now, then = (
        np.frombuffer(hashes[WHOLE_BYTES:], np.dtype((np.void, MARK_BYTES)))
        for hashes in (token_hashes(input_ids[:n]), header.token_hashes)
    )
    shared = min(now.size, then.size)
    return int(np.argmin(np.append(now[:shared] == then[:shared], False))) * PREFIX_TOKENS


def difference_in_words(name: str, mine: object, others: object) -> tuple[str, object, object]:
    """A difference of two identities as messages say it."""
    words, usual = _WORDS.get(name, (name, "none"))
    return words, usual if mine is None else mine, usual if others is None else others


def first_difference(header: RecordHeader, input_ids: np.ndarray, window: int) -> str | None:
    """Where the captured tokens of a text's first ``window`` part from the text; None where they agree."""
    agreeing = tokens_agreeing(header, input_ids)
    if agreeing >= min(window, header.num_tokens):
        return None
    if len(input_ids) < header.num_tokens and agreeing == len(input_ids) // PREFIX_TOKENS * PREFIX_TOKENS:
        return f"the text has {len(input_ids)} tokens, {header.num_tokens} were captured"
    return f"the text differs from the captured one after token {agreeing}"


def compact(tensor: Tensor) -> Tensor:
    """The same values with memory of its own in the usual order, also where a single entry hides odd strides."""
    if tensor.dim() and tensor.stride(-1) == 1 and tensor.nbytes == tensor.untyped_storage().nbytes():
        return tensor.contiguous()
    return tensor.clone(memory_format=torch.contiguous_format)
