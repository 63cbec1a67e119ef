"""Fits or not; when not, the changes that make it fit, each tried with the model of memory itself.

option    a change of the command line; the list of options begins with the smallest change
step      a step keeps its tokens: a smaller micro-batch comes with as many more of them
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Protocol, TypeVar

from liquid_llm.errors import ModelError
from liquid_llm.formatting import format_bytes
from liquid_llm.memory.prediction import MemoryPrediction
from liquid_llm.memory.shapes import CaptureShape, TrainingShape

PATIENCE_SECONDS = 15.0  # for options; those that are left then are not looked for


class Need(Protocol):
    """Something with a price in memory."""

    @property
    def needed_bytes(self) -> int: ...


N = TypeVar("N", bound=Need)


@dataclass(frozen=True)
class Option:
    """A change that makes a job fit: words for the command line, and the bytes it then needs."""

    change: str
    needed_bytes: int


@dataclass(frozen=True)
class Verdict:
    """Whether a job fits.

    Attributes:
        fits: what is needed, allowances included, is at most what is free.
        needed_bytes, free_bytes: the two.
        options: what makes it fit, the smallest change first; empty when it fits, or nothing tried makes it.
        largest: the largest consumers, in words.
    """

    fits: bool
    needed_bytes: int
    free_bytes: int
    options: tuple[Option, ...]
    largest: str

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "options": [asdict(option) for option in self.options]}

    @property
    def words(self) -> str:
        """One sentence: yes; no, with the smallest change; or that nothing tried suffices, and what takes most."""
        figures = f"{format_bytes(self.needed_bytes)} of {format_bytes(self.free_bytes)}"
        if self.fits:
            return f"yes, it fits: {figures}"
        if self.options:
            least = self.options[0]
            return f"no, it does not fit: {figures}; with {least.change} it does: {format_bytes(least.needed_bytes)}"
        return f"no, it does not fit: {figures}, and no option makes it; most is taken by {self.largest}"


def fits(
    prediction: MemoryPrediction, free_bytes: int, options: Callable[[], Iterable[tuple[str, MemoryPrediction]]]
) -> Verdict:
    """Compare what a job needs with what is free.

    Args:
        options: gives changes in words with what they lead to, the smallest first; asked only when it does not fit.
    """
    enough = prediction.needed_bytes <= free_bytes
    found: list[Option] = []
    if not enough:
        started = time.monotonic()
        for change, other in options():
            if other.needed_bytes <= free_bytes:
                found.append(Option(change, other.needed_bytes))
            if time.monotonic() - started > PATIENCE_SECONDS:
                break
    return Verdict(enough, prediction.needed_bytes, free_bytes, tuple(found), prediction.largest())


def training_options(
    shape: TrainingShape,
    batch_size: int,
    grad_accum: int,
    free_bytes: int,
    predict: Callable[[TrainingShape], MemoryPrediction],
) -> Iterator[tuple[str, MemoryPrediction]]:
    """Changes of a training job, the smallest first, each with what it needs.

    Of smaller batches only the largest that fits. Several changes at once are tried where no single one suffices.
    """
    smaller = partial(_smaller_batch, batch_size, grad_accum, free_bytes, predict)
    enough = False
    for change, found in _single_changes(shape, predict, smaller):
        enough = enough or found.needed_bytes <= free_bytes
        yield change, found
    if enough:
        return
    least, words = shape, ""
    if not shape.grad_checkpoint:
        least, words = replace(least, grad_checkpoint=True), "--grad_checkpoint=true "
        try:
            found_smaller = smaller(least)
        except ModelError:
            found_smaller, least, words = None, shape, ""
        if found_smaller is not None:
            yield words + found_smaller[0], found_smaller[1]
            return
    if shape.reference:
        found_smaller = smaller(replace(least, reference=False), with_itself=True)
        if found_smaller is not None:
            yield f"{words}--keep_old_logit_l2=0 {found_smaller[0]}".strip(), found_smaller[1]


def _single_changes(
    shape: TrainingShape,
    predict: Callable[[TrainingShape], MemoryPrediction],
    smaller: Callable[[TrainingShape], tuple[str, MemoryPrediction] | None],
) -> Iterator[tuple[str, MemoryPrediction]]:
    if not shape.grad_checkpoint:
        with contextlib.suppress(ModelError):  # an architecture that does not support it
            yield "--grad_checkpoint=true", predict(replace(shape, grad_checkpoint=True))
    found = smaller(shape)
    if found is not None:
        yield found
    if shape.reference:
        yield "--keep_old_logit_l2=0", predict(replace(shape, reference=False))
    if shape.compute_dtype == "float32" and shape.device != "cpu":
        yield "--precision=bfloat16", predict(replace(shape, compute_dtype="bfloat16"))


def _smaller_batch(
    batch_size: int,
    grad_accum: int,
    free_bytes: int,
    predict: Callable[[TrainingShape], MemoryPrediction],
    shape: TrainingShape,
    *,
    with_itself: bool = False,
) -> tuple[str, MemoryPrediction] | None:
    """The largest divisor of ``batch_size`` that fits, with as many more micro-batches; None if not even 1 does."""

    def needs(size: int) -> MemoryPrediction:
        return predict(replace(shape.with_rows(batch_size, size), accumulates=grad_accum * batch_size > size))

    found = largest_that_fits(divisors(batch_size)[0 if with_itself else 1 :], needs, free_bytes)
    if found is None:
        return None
    size, prediction = found
    words = "" if size == batch_size else f"--batch_size={size} --grad_accum={grad_accum * batch_size // size}"
    return words, prediction


def largest_that_fits(sizes: Sequence[int], needs: Callable[[int], N], free_bytes: int) -> tuple[int, N] | None:
    """The first of ``sizes``, which fall, whose needs fit, by halving; None, after one question, if the last does not.

    A smaller size is taken to need no more than a larger one.
    """
    if not sizes:
        return None
    low, best = len(sizes) - 1, needs(sizes[-1])
    if best.needed_bytes > free_bytes:
        return None
    high = -1  # of those known not to fit
    while low - high > 1:
        middle = (low + high) // 2
        found = needs(sizes[middle])
        if found.needed_bytes <= free_bytes:
            low, best = middle, found
        else:
            high = middle
    return sizes[low], best


def capture_options(
    shape: CaptureShape, batch_size: int, free_bytes: int, predict: Callable[[CaptureShape], MemoryPrediction]
) -> Iterator[tuple[str, MemoryPrediction]]:
    """The largest smaller batch of a capture job that fits, and 16 bits for its teacher."""

    def needs(size: int) -> MemoryPrediction:
        return predict(replace(shape, rows=max(1, shape.rows * size // batch_size)))

    found = largest_that_fits(divisors(batch_size)[1:], needs, free_bytes)
    if found is not None:
        yield f"--batch_size={found[0]}", found[1]
    if shape.teacher.dtype == "float32" and shape.device != "cpu":
        sixteen = replace(shape, teacher=replace(shape.teacher, dtype="bfloat16"))
        yield "--teacher_precision=bfloat16", predict(sixteen)


def divisors(number: int) -> list[int]:
    """All divisors, the largest first."""
    return [one for one in range(number, 0, -1) if number % one == 0]


@dataclass(frozen=True)
class BatchChoice:
    """A batch that fits: ``batch_size * block_size * grad_accum`` are the tokens asked for."""

    batch_size: int
    grad_accum: int
    grad_checkpoint: bool
    needed_bytes: int


def largest_batch(
    build: Callable[[int, int, bool], TrainingShape],
    predict: Callable[[TrainingShape], MemoryPrediction],
    *,
    blocks_per_step: int,
    free_bytes: int,
    most_blocks: int | None = None,
    checkpointing: tuple[bool, ...] = (False, True),
) -> BatchChoice | None:
    """The largest micro-batch that fits at a constant number of blocks a step.

    Checkpointing costs a third more time and a larger batch saves less: it is taken only where not even the smallest
    micro-batch fits without it.

    Args:
        build: (batch_size, grad_accum, grad_checkpoint) -> the job's shape.
        blocks_per_step: ``tokens_per_step / block_size``.
        most_blocks: of a micro-batch that is tried.
        checkpointing: what may be tried, in this order.

    Returns:
        None where nothing fits.
    """

    def attempt(size: int, checkpoint: bool) -> BatchChoice:
        accumulation = blocks_per_step // size
        needed = predict(build(size, accumulation, checkpoint)).needed_bytes
        return BatchChoice(size, accumulation, checkpoint, needed)

    sizes = [one for one in divisors(blocks_per_step) if most_blocks is None or one <= most_blocks]
    for checkpoint in checkpointing:
        # Memory grows with the batch, but for the whole step at once, where no gradients are kept beside a loss.
        whole = attempt(sizes[0], checkpoint)
        if whole.needed_bytes <= free_bytes:
            return whole
        found = largest_that_fits(sizes[1:], lambda size, tried=checkpoint: attempt(size, tried), free_bytes)  # type: ignore[misc]
        if found is not None:
            return found[1]
    return None
