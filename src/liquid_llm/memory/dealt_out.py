"""A model that is dealt out among processes, on tensors without memory: what one of them holds, and when.

The model itself is whole, and its weights are not counted. In their places this rank's parts are, and what FSDP2
(``liquid_llm.sharding``) takes for an exchange, at the moments at which it does:

    flat     what the ranks have of a block, as it arrives; one is on its way while another is computed
    whole    its weights, copied out of that, until it is computed
    summed   its gradients on their way to the ranks that keep them; until the next block's are
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from liquid_llm.memory.counter import StorageCounter
from liquid_llm.memory.prediction import EXCHANGE, GRADIENTS
from liquid_llm.models.heads import body_of


@dataclass(eq=False)
class _Group:
    """Weights that are gathered together, and what there is of them."""

    weights: list[nn.Parameter]
    parts: list[nn.Parameter]
    ranks: int
    flat: Tensor | None = None
    whole: list[Tensor] = field(default_factory=list)
    in_backward: bool = False
    gradients: int = 0  # that backward has found

    @property
    def flat_size(self) -> int:
        return self.ranks * sum(one.numel() for one in self.parts)


class DealtOut:
    """One rank's part of a model, and the exchanges of a pass.

    Args:
        model: whole, on tensors without memory.
        blocks: those that are gathered one by one.
        ranks: among how many processes.
        consumer: what its weights count for.
        device: on a CPU the exchange (gloo) works on a copy of what it is given.

    Attributes:
        parts: this rank's, the largest; of a model that is only asked, of its blocks.
    """

    def __init__(
        self,
        counter: StorageCounter,
        model: nn.Module,
        blocks: Sequence[nn.Module],
        ranks: int,
        consumer: str,
        device: str,
    ) -> None:
        self._counter, self._copies = counter, device == "cpu"
        trained = any(one.requires_grad for one in model.parameters())
        inside = {id(one) for block in blocks for one in block.parameters()}
        rest = [one for one in model.parameters() if id(one) not in inside]
        self._groups = [self._group(list(block.parameters()), ranks) for block in blocks]
        self._rest = self._group(rest if trained else [], ranks)
        everything = [*self._groups, self._rest]
        self.parts = [one for group in everything for one in group.parts]
        counter.leave_out(one for group in everything for one in group.weights)
        counter.hold([*self.parts, *model.buffers(), *(() if trained else rest)], consumer)
        self._last_flat: Tensor | None = None
        self._summed: Tensor | None = None
        for block, group in zip(blocks, self._groups, strict=True):
            self._watch(block, group, trained)
        if not trained:
            body_of(model).register_forward_hook(lambda *_: self.end())
        for group in everything if trained else ():
            for weight in group.weights:
                weight.register_post_accumulate_grad_hook(lambda one, of=group: self._found_gradient(of, one))  # type: ignore[no-untyped-call]

    def _group(self, weights: list[nn.Parameter], ranks: int) -> _Group:
        def part(one: nn.Parameter) -> nn.Parameter:
            rows = math.ceil(one.shape[0] / ranks)
            return nn.Parameter(torch.empty(rows, *one.shape[1:], dtype=one.dtype), requires_grad=one.requires_grad)

        return _Group(weights, [part(one) for one in weights], ranks)

    def gather_rest(self) -> None:
        """Before a pass: what is in no block is there until its end."""
        self._gather(self._rest)

    def begin_backward(self) -> None:
        """Before the backward pass."""
        self._last_flat = None
        self._before_backward(self._rest)

    def end(self) -> None:
        """After a pass."""
        self._rest.whole.clear()
        self._last_flat = self._summed = None

    def _watch(self, block: nn.Module, group: _Group, trained: bool) -> None:
        def after(_: nn.Module, __: Any, output: Any) -> None:
            if group.in_backward:
                return  # activations are computed anew
            group.whole.clear()
            first = output[0] if isinstance(output, tuple) else output
            if trained and first.requires_grad:
                first.register_hook(lambda _: self._before_backward(group))

        block.register_forward_pre_hook(lambda *_: self._gather(group))
        block.register_forward_hook(after)

    def _take(self, size: int, like: nn.Parameter) -> Tensor:
        with self._counter.stage(self._counter.current_stage, EXCHANGE):
            return torch.empty(size, dtype=like.dtype)

    def _exchange(self, group: _Group) -> Tensor:
        """What the ranks exchange of a group."""
        flat = self._take(group.flat_size, group.weights[0])
        if self._copies:
            self._take(group.flat_size, group.weights[0])
        return flat

    def _gather(self, group: _Group) -> None:
        if group.whole or not group.weights:
            return
        if group.flat is None:
            group.flat = self._exchange(group)
        self._last_flat = None
        group.whole = [self._take(one.numel(), one) for one in group.weights]
        if not group.in_backward:
            self._last_flat = group.flat
        group.flat = None

    def _before_backward(self, group: _Group) -> None:
        group.in_backward = True
        self._gather(group)
        index = self._groups.index(group) if group is not self._rest else len(self._groups)
        if index > 0:
            following = self._groups[index - 1]
            if following.flat is None and not following.whole:
                following.flat = self._exchange(following)

    def _found_gradient(self, group: _Group, weight: nn.Parameter) -> None:
        self._counter.hold([weight.grad], GRADIENTS)
        group.gradients += 1
        if group.gradients == len(group.weights):
            self._after_backward(group)

    def _after_backward(self, group: _Group) -> None:
        """Its gradients are summed, and this rank keeps its part."""
        group.whole.clear()
        self._summed = None
        self._summed = self._take(group.flat_size, group.weights[0])
        for weight in group.weights:
            weight.grad = None
        received = self._take(group.flat_size // group.ranks, group.weights[0])
        if self._copies:
            self._take(group.flat_size, group.weights[0])
        for part, own in zip(group.parts, torch.split(received, [one.numel() for one in group.parts]), strict=True):
            if part.grad is None:
                part.grad = own.view_as(part)
                self._counter.hold([received], GRADIENTS)
        group.in_backward, group.gradients = False, 0
