"""Samples through the teacher and the codec: hidden states of a batch, logits of a chunk, rows of a sample."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from liquid_llm.capture.plan import Window
from liquid_llm.errors import SignalError
from liquid_llm.losses.plan import choose_product
from liquid_llm.losses.products import HeadProducts
from liquid_llm.losses.signals import OutputHead
from liquid_llm.signal_store.codecs import Codec, Rows

# Float32 logits that exist at the same time. Elsewhere than on a CPU more rows share one reading of the head.
_CPU_CHUNK_BYTES, _CHUNK_BYTES = 64 * 2**20, 512 * 2**20
_MAX_CHUNK_ROWS = 1024
_FEWEST_CHUNK_ROWS = 64  # below it the logits are small beside what a teacher's layers take


Scored: TypeAlias = tuple[Window, Rows | SignalError, NDArray[np.bool_]]
"""A sample, its encoded rows or why it has none, and which positions they are of."""


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
        self._halvings = 0

    def rows(self, vocab_size: int, device: torch.device | str) -> int:
        """Most positions in a chunk."""
        return max(1, chunk_rows(vocab_size, self._device or device) >> self._halvings)

    def halve(self, head: OutputHead, device: torch.device) -> bool:
        """Give the memory back and take half as much from now on; False where a chunk is a few positions already.

        Records do not depend on how they are cut into chunks.
        """
        self._memory, self._products = torch.empty(0, 0), None
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


def score(
    teacher: HasStates,
    batch: Sequence[Window],
    codecs: Mapping[str, Codec],
    scratch: Scratch,
    count: Callable[[Window, int], int] = lambda window, learnt: learnt,
) -> Iterator[Scored]:
    """The encoded rows of each sample of a batch, or why it has none, and which positions they are of.

    A row is of a position that is learnt; of the others no logits are formed. One forward pass, logits chunk by chunk;
    where positions are chosen they are formed twice, for what the teacher's entropies are and for what is kept.

    Args:
        batch: samples of near-equal length.
        codecs: type -> codec.
        scratch: the same for all batches.
        count: how many of a sample's learnt positions are kept: those where the teacher is least sure.

    Raises:
        RuntimeError, IndexError: the teacher or a codec failed; samples already yielded are finished.
    """
    vocab_size = teacher.head.vocab_size
    input_ids: list[np.ndarray] = []
    good: list[Window] = []
    places: list[NDArray[np.bool_]] = []  # the learnt positions
    for window in batch:
        sample = window.sample()
        ids = sample.input_ids[: window.num_tokens]
        if not ids.size:
            yield window, SignalError("the sample has no tokens"), _NOWHERE
        elif (largest := int(ids.max())) >= vocab_size:
            error = SignalError("a token outside the vocabulary", got=largest, expected=f"under {vocab_size}")
            yield window, error, _NOWHERE
        else:
            good.append(window)
            input_ids.append(ids)
            places.append(sample.learnt_positions(window.num_tokens))
    if not good:
        return
    with torch.inference_mode():
        hidden = teacher.hidden(padded_ids(input_ids))
        encoders = [_Encoder(window, codecs[window.type]) for window in good]
        for number, window in enumerate(good):
            kept = count(window, int(places[number].sum()))
            if kept < places[number].sum():
                where = np.flatnonzero(places[number])
                entropies = _entropies(teacher.head, _at(hidden[number], places[number]), scratch)
                surest_last = entropies.sort(descending=True, stable=True).indices[:kept]
                places[number] = np.isin(np.arange(len(places[number])), where[surest_last.cpu().numpy()])
        states = [_at(hidden[number], where) for number, where in enumerate(places)]
        num_rows = [len(one) for one in states]
        for chunk in chunks(num_rows, scratch.rows(vocab_size, teacher.device)):
            rows = torch.cat([states[number][start:stop] for number, start, stop in chunk])
            parts = torch.split(scratch.logits(teacher.head, rows), [stop - start for _, start, stop in chunk])
            for (number, _, stop), part in zip(chunk, parts, strict=True):
                encoders[number].add(part)
                if stop == num_rows[number]:
                    yield good[number], encoders[number].result(), places[number]


_NOWHERE = np.zeros(0, dtype=bool)


def _at(hidden: Tensor, places: NDArray[np.bool_]) -> Tensor:
    """The states [time, hidden] at the positions that are True."""
    if places.all():
        return hidden[: len(places)]
    return hidden.index_select(0, torch.from_numpy(np.flatnonzero(places)).to(hidden.device))


def _entropies(head: OutputHead, states: Tensor, scratch: Scratch) -> Tensor:
    """The teacher's entropy at each position [positions], nats, at T = 1."""
    found = [states.new_empty(0, dtype=torch.float32)]
    for part in torch.split(states, scratch.rows(head.vocab_size, states.device)):
        logits = scratch.logits(head, part)
        totals = logits.logsumexp(dim=1)
        found.append(totals - torch.linalg.vecdot(torch.softmax(logits, dim=1), logits))
    return torch.cat(found)


class _Encoder:
    """Collects the rows of one sample."""

    def __init__(self, window: Window, codec: Codec) -> None:
        self._codec = codec
        self._seed = record_seed(window.sample_id)
        self._num_rows = 0
        self._parts: list[Rows] = []
        self._error: SignalError | None = None

    def add(self, logits: Tensor) -> None:
        if self._error is not None:
            return
        try:
            rows = self._codec.encode(logits, self._seed, self._num_rows)
        except SignalError as error:
            self._error = error
        else:
            self._parts.append({name: tensor.cpu() for name, tensor in rows.items()})
            self._num_rows += logits.shape[0]

    def result(self) -> Rows | SignalError:
        if self._error is not None:
            return self._error
        first = self._parts[0]
        return (
            first
            if len(self._parts) == 1
            else {name: torch.cat([part[name] for part in self._parts]) for name in first}
        )


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
