"""Samples through the teacher and the codec: hidden states of a batch, logits and rows of a chunk, rows of a sample."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from liquid_llm.capture.fetching import Fetcher
from liquid_llm.capture.plan import Window
from liquid_llm.data.types import to_device
from liquid_llm.errors import SignalError
from liquid_llm.losses.plan import choose_product
from liquid_llm.losses.products import HeadProducts
from liquid_llm.losses.signals import OutputHead
from liquid_llm.signal_store.codecs import Codec, Rows
from liquid_llm.signal_store.codecs.base import SPILT, TOP, Run, require_finite

log = logging.getLogger(__name__)

# Float32 logits that exist at the same time. Elsewhere than on a CPU more rows share one reading of the head.
_CPU_CHUNK_BYTES, _CHUNK_BYTES = 64 * 2**20, 512 * 2**20
_MAX_CHUNK_ROWS = 1024
_FEWEST_CHUNK_ROWS = 64  # below it the logits are small beside what a teacher's layers take


Scored: TypeAlias = tuple[Window, Rows | SignalError, NDArray[np.bool_]]
"""A sample, its encoded rows or why it has none, and which positions they are of."""

NOWHERE = np.zeros(0, dtype=bool)  # the positions of a sample that has no rows


class HasStates(Protocol):
    """A teacher as far as scoring needs one; see ``OnlineTeacher`` for the names."""

    head: OutputHead

    @property
    def device(self) -> torch.device: ...

    def hidden(self, input_ids: Tensor) -> Tensor: ...


class Scratch:
    """Memory for one chunk of logits, used for every chunk: to touch as much anew costs a fifth of computing them.

    Args:
        device: whose chunks and products to use; None is where the hidden states are.
    """

    def __init__(self, device: torch.device | str | None = None) -> None:
        self._device = device
        self._memory = torch.empty(0, 0)
        self._products: HeadProducts | None = None
        self._fetcher: Fetcher | None = None
        self._halvings = 0
        self._has_spilt = False

    def rows(self, vocab_size: int, device: torch.device | str) -> int:
        """Most positions in a chunk."""
        return max(1, chunk_rows(vocab_size, self._device or device) >> self._halvings)

    def halve(self, head: OutputHead, device: torch.device) -> bool:
        """Give the memory back and take half as much from now on; False where a chunk is a few positions already.

        Records do not depend on how they are cut into chunks.
        """
        self._memory, self._products = torch.empty(0, 0), None
        if self._fetcher is not None:
            self._fetcher.settle()
        if self.rows(head.vocab_size, device) <= _FEWEST_CHUNK_ROWS:
            return False
        self._halvings += 1
        return True

    def logits(self, head: OutputHead, hidden: Tensor) -> Tensor:
        """Logits of ``hidden`` [positions, hidden], at most a chunk, in float32; to be used before the next call.

        They are float32 out of the product: what is stored of a teacher in bfloat16 is not rounded on the way.
        """
        device = self._device or hidden.device
        if self._memory.shape[1] != head.vocab_size or self._memory.device != hidden.device:
            self._memory = torch.empty(self.rows(head.vocab_size, device), head.vocab_size, device=hidden.device)
        products = self._products
        if products is None or products.head is not head or products.hidden_dtype != hidden.dtype:
            products = self._products = HeadProducts(head, hidden.dtype, choose_product(device))
        return products.logits(hidden, self._memory[: hidden.shape[0]])

    def fetcher(self, device: torch.device) -> Fetcher:
        """What brings rows from ``device`` to the host."""
        if self._fetcher is None:
            self._fetcher = Fetcher(device)
        return self._fetcher

    def say_spilt(self) -> None:
        """Log, once, that positions are encoded a second time."""
        if not self._has_spilt:
            log.info(
                "some positions have more likely ids than there is room for: their chunk is encoded again, more slowly"
            )
        self._has_spilt = True


def score(
    teacher: HasStates,
    batch: Sequence[Window],
    codecs: Mapping[str, Codec],
    scratch: Scratch,
    count: Callable[[Window, int], int] = lambda window, learnt: learnt,
) -> Iterator[Scored]:
    """The encoded rows of each sample of a batch, or why it has none, and which positions they are of.

    A row is of a position that is learnt; of the others no logits are formed. One forward pass, logits chunk by chunk;
    where positions are chosen they are formed twice, for what the teacher's entropies are and for what is kept. The
    rows of a chunk are encoded together, whatever samples they are of, and waited for while the next chunk's are made.

    Args:
        batch: samples of near-equal length.
        codecs: type -> codec.
        scratch: the same for all batches.
        count: how many of a sample's learnt positions are kept: those where the teacher is least sure.

    Raises:
        RuntimeError, IndexError: the teacher or a codec failed; samples already yielded are finished.
    """
    vocab_size = teacher.head.vocab_size
    good: list[Taken] = []
    for window in batch:
        sample = window.sample()
        ids = sample.input_ids[: window.num_tokens]
        if not ids.size:
            yield window, SignalError("the sample has no tokens"), NOWHERE
        elif (largest := int(ids.max())) >= vocab_size:
            error = SignalError("a token outside the vocabulary", got=largest, expected=f"under {vocab_size}")
            yield window, error, NOWHERE
        else:
            places = sample.learnt_positions(window.num_tokens)
            good.append(Taken(window, ids, places, codecs[window.type], row=len(good)))
    if not good:
        return
    with torch.inference_mode():
        hidden = teacher.hidden(to_device(padded_ids([one.input_ids for one in good]), teacher.device))
        good.sort(key=lambda one: one.kind)  # those of one codec together; each knows its row of the states
        kept = [count(one.window, one.num_rows) for one in good]
        if any(most < one.num_rows for most, one in zip(kept, good, strict=True)):
            _keep_least_sure(teacher.head, _States(hidden), good, kept, scratch)
        yield from encoded(teacher.head, hidden, good, scratch)


def encoded(head: OutputHead, hidden: Tensor, samples: Sequence[Taken], scratch: Scratch) -> Iterator[Scored]:
    """The rows of all samples, of their hidden states [batch, time, hidden]; see ``score``.

    Args:
        samples: those of one codec together.
        scratch: may be used for other logits when the last sample is there.
    """
    states = _States(hidden)
    states.choose(samples)
    before: _Chunk | None = None
    for runs in chunks([one.num_rows for one in samples], scratch.rows(head.vocab_size, hidden.device)):
        taken = states.take(sum(stop - start for _, start, stop in runs))
        chunk = _Chunk(head, taken, samples, runs, scratch)
        if before is not None:
            yield from before.finish()
        before = chunk
    if before is not None:
        yield from before.finish()


class LocalTeacher:
    """A teacher whose model is here, as a job asks it; the other kind is ``served.ServedTeacher``."""

    def __init__(self, model: HasStates) -> None:
        self._model = model
        self.head: OutputHead | None = model.head
        self.device = model.device

    def ahead(
        self, work: Sequence[Sequence[Window]], stopping: Callable[[], bool] = lambda: False
    ) -> Iterable[Sequence[Window]]:
        """The batches of ``work``: of what comes later nothing is asked before its turn."""
        return work

    def score(
        self,
        batch: Sequence[Window],
        codecs: Mapping[str, Codec],
        scratch: Scratch,
        count: Callable[[Window, int], int],
    ) -> Iterator[Scored]:
        """As ``score``."""
        return score(self._model, batch, codecs, scratch, count)

    def end(self, *, abandon: bool) -> None:
        """Nothing is under way."""


class Taken:
    """A sample under way: what is scored of it, and the rows that are there.

    Args:
        window: of the sample.
        input_ids: of its tokens, as the teacher sees them.
        places: which positions have a row.
        codec: that they are encoded by.
        row: of the batch's hidden states that are its own.
    """

    def __init__(
        self, window: Window, input_ids: NDArray[np.int32], places: NDArray[np.bool_], codec: Codec, *, row: int
    ) -> None:
        self.window, self.input_ids, self.places, self.codec, self.row = window, input_ids, places, codec, row
        self.kind = (codec.name, codec.version, sorted(codec.options.items()))
        self.seed = record_seed(window.sample_id)
        self._added = 0
        self._parts: list[Rows] = []
        self._error: SignalError | None = None

    @property
    def num_rows(self) -> int:
        return int(self.places.sum())

    def add(self, rows: Rows) -> None:
        """The next rows, with their largest logits."""
        try:
            require_finite(rows[TOP][:, None], self._added)
        except SignalError as error:
            self._error = self._error or error
        self._added += len(rows[TOP])
        self._parts.append({name: tensor for name, tensor in rows.items() if name != TOP})

    def outcome(self) -> Scored:
        if self._error is not None:
            return self.window, self._error, self.places
        first, *rest = self._parts
        whole = {name: torch.cat([part[name] for part in self._parts]) for name in first} if rest else first
        return self.window, whole, self.places


class _States:
    """Hidden states [batch, time, hidden] of a batch, by position."""

    def __init__(self, hidden: Tensor) -> None:
        self._rows, self._time = hidden.reshape(-1, hidden.shape[-1]), hidden.shape[1]
        self._taken = 0

    def choose(self, samples: Sequence[Taken]) -> None:
        """Let the next to be taken be those of the samples' places, one sample after the other."""
        where = [one.row * self._time + np.flatnonzero(one.places) for one in samples]
        self._where, self._taken = to_device(torch.from_numpy(np.concatenate(where)), self._rows.device), 0

    def take(self, count: int) -> Tensor:
        """The next states [count, hidden]."""
        self._taken += count
        return self._rows.index_select(0, self._where[self._taken - count : self._taken])


class _Chunk:
    """Positions whose logits exist at the same time: encoded, and on their way to the host.

    Args:
        states: of its positions, [positions, hidden].
        runs: sample, first and end of its rows there, one after the other.
    """

    def __init__(
        self,
        head: OutputHead,
        states: Tensor,
        samples: Sequence[Taken],
        runs: Sequence[tuple[int, int, int]],
        scratch: Scratch,
    ) -> None:
        self._head, self._states, self._scratch = head, states, scratch
        parts = [(samples[number], start, stop) for number, start, stop in runs]
        self._groups = [list(group) for _, group in groupby(parts, key=lambda part: part[0].kind)]
        self._fetch = scratch.fetcher(states.device).start(list(self._encode()))

    def _encode(self, exhaustive: bool = False) -> Iterator[Rows]:
        """The rows of each group of positions that are of one codec."""
        logits, at = self._scratch.logits(self._head, self._states), 0
        for group in self._groups:
            runs = [Run(sample.seed, start, stop - start) for sample, start, stop in group]
            begin, at = at, at + sum(run.count for run in runs)
            yield group[0][0].codec.encode_runs(logits[begin:at], runs, exhaustive)

    def finish(self) -> Iterator[Scored]:
        """Wait for the rows and give each sample its own; what came of those that are whole then."""
        found = self._fetch.result()
        if any(bool(rows[SPILT].any()) for rows in found if SPILT in rows):
            self._scratch.say_spilt()
            found = [{name: tensor.cpu() for name, tensor in rows.items()} for rows in self._encode(exhaustive=True)]
        for group, rows in zip(self._groups, found, strict=True):
            at = 0
            for sample, start, stop in group:
                part = slice(at, at + stop - start)
                sample.add({name: tensor[part] for name, tensor in rows.items() if name != SPILT})
                at = part.stop
                if stop == sample.num_rows:
                    yield sample.outcome()


def _keep_least_sure(
    head: OutputHead, states: _States, samples: Sequence[Taken], kept: Sequence[int], scratch: Scratch
) -> None:
    """Leave of each sample's places those where the teacher's entropy is largest, as many as are kept."""
    states.choose(samples)
    counts = [int(one.places.sum()) for one in samples]
    most_rows = scratch.rows(head.vocab_size, head.weight.device)
    found = [torch.empty(0, device=head.weight.device)]
    for start in range(0, sum(counts), most_rows):
        found.append(_entropies(scratch.logits(head, states.take(min(most_rows, sum(counts) - start)))))
    entropies = torch.cat(found).cpu()
    for sample, most, of_sample in zip(samples, kept, torch.split(entropies, counts), strict=True):
        surest_last = of_sample.sort(descending=True, stable=True).indices[:most]
        where = np.flatnonzero(sample.places)[surest_last.numpy()]
        sample.places = np.isin(np.arange(len(sample.places)), where)


def _entropies(logits: Tensor) -> Tensor:
    """The entropy of each row [positions], nats, at T = 1."""
    mean: Tensor = torch.linalg.vecdot(torch.softmax(logits, dim=1), logits)
    return logits.logsumexp(dim=1) - mean


def record_seed(sample_id: str) -> int:
    """What the random numbers of a sample's record follow from: the same in every capture of it."""
    digest = hashlib.blake2b(sample_id.encode("utf-8", "surrogatepass"), digest_size=8, person=b"signal").digest()
    return int.from_bytes(digest, "little") >> 1


def padded_ids(windows: Sequence[np.ndarray]) -> Tensor:
    """Windows right-padded with 0 to the longest: [batch, time] int64."""
    ids = np.zeros((len(windows), max(map(len, windows))), dtype=np.int64)
    for row, window in zip(ids, windows, strict=True):
        row[: len(window)] = window
    return torch.from_numpy(ids)


def chunks(num_rows: Sequence[int], limit: int) -> Iterator[list[tuple[int, int, int]]]:
    """Runs of positions ``(sample, start, stop)``, a chunk being the ``limit`` that have their logits at the same time.

    Samples are cut at multiples of a chunk from their own start, whatever their neighbours are, so that a codec that
    draws sees the same calls in every batch. A sample without positions has one empty run.
    """
    chunk: list[tuple[int, int, int]] = []
    held = 0
    for sample, count in enumerate(num_rows):
        for start in range(0, max(count, 1), limit):
            stop = min(start + limit, count)
            if chunk and held + stop - start > limit:
                yield chunk
                chunk, held = [], 0
            chunk.append((sample, start, stop))
            held += stop - start
    if chunk:
        yield chunk


def chunk_rows(vocab_size: int, device: torch.device | str = "cpu") -> int:
    """Most positions whose logits exist at the same time."""
    if torch.device(device).type == "cpu":
        return max(1, _CPU_CHUNK_BYTES // (4 * vocab_size))
    return max(1, min(_MAX_CHUNK_ROWS, _CHUNK_BYTES // (4 * vocab_size)))
