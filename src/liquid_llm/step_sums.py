"""What the ranks of a run exchange in a step: gradients, while backward still runs, and one row of numbers.

tally     what a rank tells the others of a step: counts, its limit of passes, what it asks for
bucket    gradients that are summed in one exchange
begun     of a bucket: its sum is under way; what was given is given, and the gradients come back with the sum

Losses are sums, which are divided by the labelled positions of all ranks before backward, as one process does it: were
the summed gradients divided instead, products in bfloat16 would round in another way. So a rank draws its micro-batches
a step ahead, and how many positions they have travels with what the step before has to tell.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Parameter

from liquid_llm.distributed import Engine

_BUCKET_BYTES = 25 * 2**20  # as torch's own wrapper has it: small beside a step's backward, large for a network


@dataclass(frozen=True)
class Tally:
    """What a rank, or all of them together, have to tell after a step.

    Attributes:
        positions: labelled positions of the next step.
        tokens: its real tokens.
        max_tokens: the limit of passes, as ``PassLimit`` has it; of all ranks the smallest.
        stop: whether a rank was asked to stop.
        save: whether a rank asks for a checkpoint.
    """

    positions: int
    tokens: int
    max_tokens: int | None = None
    stop: bool = False
    save: bool = False


class StepSums:
    """Of one process, which has nobody to exchange with; ``RankSums`` and ``DealtOutSums`` of several."""

    def last_pass(self) -> contextlib.AbstractContextManager[object]:
        """Around the last pass of a step, forward and backward; entered anew where the passes are computed anew."""
        return contextlib.nullcontext()

    def sum(self, own: Tally, loss: Tensor) -> tuple[Tally, Tensor]:
        """After the last pass: the tally and the summed loss of all ranks.

        From here on each parameter's gradient is the sum over ranks, None where no rank has one.

        Args:
            loss: a scalar on the device of the gradients; the host does not wait for its sum.
        """
        return own, loss


@dataclass(frozen=True)
class _Begun:
    """A bucket whose sum is under way.

    Attributes:
        flat: its gradients one after the other, zeros where there is none, and what goes beside them; what is summed.
        beside: that, as this rank gave it: the loss, or nothing.
        has_gradient: which of its parameters have one on this rank.
        wait: returns when ``flat`` is the sum.
    """

    flat: Tensor
    beside: Tensor
    has_gradient: list[bool]
    wait: Callable[[], None]


class RankSums(StepSums):
    """Of several processes.

    Buckets follow from the parameters alone, so a continued run adds up as it did before. All ranks begin them in one
    order, each once a step: as soon as backward has the last gradient of a bucket, the rest after it. A pass that runs
    out of memory may have begun some. They stay: all of their gradients were there. What the pass that is computed anew
    finds for them is dropped.

    Args:
        parameters: those that are trained, in the order in which the model uses them.
    """

    def __init__(self, engine: Engine, parameters: Iterable[Parameter]) -> None:
        self._engine = engine
        self._buckets = list(split_into_buckets(list(parameters)[::-1]))  # backward finds the last used first
        self._begun: list[_Begun] = []

    @contextlib.contextmanager
    def last_pass(self) -> Iterator[None]:
        found: set[int] = set()

        def begin_what_is_whole(parameter: Tensor) -> None:
            found.add(id(parameter))
            # The last bucket is not whole before backward has ended anyway, and takes the loss along.
            while len(self._begun) < len(self._buckets) - 1:
                if not found.issuperset(map(id, self._buckets[len(self._begun)])):
                    return
                self._begin()

        every = [one for bucket in self._buckets for one in bucket]
        handles = [one.register_post_accumulate_grad_hook(begin_what_is_whole) for one in every]  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def sum(self, own: Tally, loss: Tensor) -> tuple[Tally, Tensor]:
        while len(self._begun) < len(self._buckets) - 1:
            self._begin()
        self._begin(loss.reshape(1))
        has_gradient = [one for begun in self._begun for one in begun.has_gradient]
        told, ranks_with_gradient = _exchange(self._engine, own, has_gradient)
        for bucket, begun in zip(self._buckets, self._begun, strict=True):
            begun.wait()
            parts = torch.split(begun.flat, [one.numel() for one in [*bucket, begun.beside]])
            for parameter, part in zip(bucket, parts[:-1], strict=True):
                parameter.grad = _laid_out_as(parameter, part) if next(ranks_with_gradient) else None
        loss = parts[-1]
        self._begun.clear()
        return told, loss

    def _begin(self, beside: Tensor | None = None) -> None:
        """Give away the gradients of the next bucket; memory that runs out here leaves them where they are."""
        bucket = self._buckets[len(self._begun)]
        has_gradient = [one.grad is not None for one in bucket]
        own = [torch.zeros_like(one) if one.grad is None else one.grad for one in bucket]
        beside = own[0].new_empty(0) if beside is None else beside.to(own[0])
        flat = torch.cat([*(one.reshape(-1) for one in own), beside])
        self._begun.append(_Begun(flat, beside, has_gradient, self._engine.begin_sum(flat)))
        for one in bucket:
            one.grad = None


class DealtOutSums(StepSums):
    """Of several processes, each of which has a part of the weights only: backward itself has summed the gradients."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def sum(self, own: Tally, loss: Tensor) -> tuple[Tally, Tensor]:
        total = loss.clone()
        wait = self._engine.begin_sum(total)
        told, _ = _exchange(self._engine, own, [])
        wait()
        return told, total


def _exchange(engine: Engine, own: Tally, has_gradient: Sequence[bool]) -> tuple[Tally, Iterator[float]]:
    """The tally of all ranks, and for each place in ``has_gradient`` on how many ranks it holds."""
    limits = [0] * engine.world_size
    limits[engine.rank] = own.max_tokens or 0
    numbers = [own.positions, own.tokens, own.stop, own.save, *limits, *has_gradient]
    found = iter(engine.sum(torch.tensor(numbers, dtype=torch.float64)).tolist())
    positions, tokens, stop, save = (int(next(found)) for _ in range(4))
    given = [int(one) for _, one in zip(limits, found, strict=False) if one > 0]
    return Tally(positions, tokens, min(given, default=None), stop > 0, save > 0), found


def make_step_sums(engine: Engine, parameters: Iterable[Parameter], *, dealt_out: bool = False) -> StepSums:
    """What adds up the steps of ``engine``'s ranks.

    Args:
        parameters: those that are trained, in the order in which the model uses them.
        dealt_out: whether each rank has a part of them only (``sharding``).
    """
    if engine.world_size == 1:
        return StepSums()
    return DealtOutSums(engine) if dealt_out else RankSums(engine, parameters)


def _laid_out_as(parameter: Parameter, flat: Tensor) -> Tensor:
    """The gradient in the layout of its parameter: torch's fused AdamW goes through both without looking."""
    gradient = flat.view_as(parameter)
    return gradient if parameter.is_contiguous() else torch.empty_like(parameter).copy_(gradient)


def split_into_buckets(parameters: Sequence[Parameter]) -> Iterator[list[Parameter]]:
    """Runs of parameters of one dtype and device, of at most ``_BUCKET_BYTES`` or a single one."""
    bucket: list[Parameter] = []
    held = 0
    for one in parameters:
        size = one.numel() * one.element_size()
        alike = bucket and (one.dtype, one.device) == (bucket[0].dtype, bucket[0].device)
        if bucket and (not alike or held + size > _BUCKET_BYTES):
            yield bucket
            bucket, held = [], 0
        bucket.append(one)
        held += size
    if bucket:
        yield bucket
