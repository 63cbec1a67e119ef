"""Counts the bytes of every storage alive, by what it is for.

consumer   what a storage is for: the student's weights, activations, ... Decided when it is made, from what was being
           done then; a gradient is told apart when it reaches its parameter
stage      what is being done: the teacher's pass, the forward pass, ... A stage has a peak of its own

The counter sees what operations return. What a kernel takes for itself while it runs is not seen; an allowance stands
for it (``prediction``). It works on real tensors and on fake ones alike, so that a test can hold the two equal.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

BLOCK_BYTES = 512  # what CUDA's allocator rounds every request up to


class StorageCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While entered, every new storage is counted until it is freed.

    Args:
        block_bytes: sizes are rounded up to multiples of it.

    Attributes:
        now: bytes alive by consumer.
        stages: the most bytes alive at the same time, by stage.
        peak: bytes by consumer at the moment when most bytes were alive, since ``restart``.
        peak_stage: the stage of that moment.
        current_stage: what is being done now.
    """

    def __init__(self, block_bytes: int = BLOCK_BYTES) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.block_bytes = block_bytes
        self.now: Counter[str] = Counter()
        self.stages: dict[str, int] = {}
        self.peak: dict[str, int] = {}
        self.peak_stage = ""
        self._alive: dict[int, _Storage] = {}
        self._total = self._most = 0
        self.current_stage = self._consumer = ""

    @property
    def total(self) -> int:
        """Bytes alive now."""
        return self._total

    def restart(self) -> None:
        """Forget peaks; what is alive stays counted."""
        self.stages, self.peak, self.peak_stage, self._most = {}, {}, "", 0

    @contextmanager
    def stage(self, stage: str, consumer: str) -> Iterator[None]:
        """What is made inside is for ``consumer`` and belongs to ``stage``."""
        before = self.current_stage, self._consumer
        self.current_stage, self._consumer = stage, consumer
        try:
            self._note()
            yield
        finally:
            self.current_stage, self._consumer = before

    def hold(self, tensors: Iterable[Tensor | None], consumer: str) -> None:
        """Count ``tensors``, whether or not they were seen before, as ``consumer``'s."""
        for tensor in tensors:
            if tensor is not None:
                self._see(tensor)
                self._alive[tensor.untyped_storage()._cdata].move(consumer)

    def leave_out(self, tensors: Iterable[Tensor]) -> None:
        """Count nothing for ``tensors``, nor for what shares their storage."""
        for tensor in tensors:
            self._see(tensor)
            self._alive[tensor.untyped_storage()._cdata].resize(0)

    def hold_model(self, model: nn.Module, consumer: str) -> None:
        """Count a model's parameters and buffers as ``consumer``'s."""
        self.hold([*model.parameters(), *model.buffers()], consumer)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self._see(out)
        elif out is not None:
            for leaf in tree_leaves(out):
                if isinstance(leaf, Tensor):
                    self._see(leaf)
        return out

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._alive:
            self._alive[key] = _Storage(self, storage, key)
            self._note()

    def _note(self) -> None:
        if self._total > self._most:
            self._most, self.peak_stage = self._total, self.current_stage
            self.peak = {consumer: size for consumer, size in self.now.items() if size}
        if self._total > self.stages.get(self.current_stage, 0):
            self.stages[self.current_stage] = self._total


class _Storage:
    """One storage alive: it counts itself when it is made and takes that back when it is freed."""

    __slots__ = ("consumer", "counter", "key", "reference", "size")

    def __init__(self, counter: StorageCounter, storage: torch.UntypedStorage, key: int) -> None:
        self.counter, self.key, self.consumer = counter, key, counter._consumer
        self.size = -(-storage.nbytes() // counter.block_bytes) * counter.block_bytes
        self.reference = weakref.ref(storage, self._freed)
        counter.now[self.consumer] += self.size
        counter._total += self.size

    def move(self, consumer: str) -> None:
        self.counter.now[self.consumer] -= self.size
        self.counter.now[consumer] += self.size
        self.consumer = consumer

    def resize(self, size: int) -> None:
        self.counter.now[self.consumer] += size - self.size
        self.counter._total += size - self.size
        self.size = size

    def _freed(self, _: object) -> None:
        self.counter._alive.pop(self.key, None)
        self.counter.now[self.consumer] -= self.size
        self.counter._total -= self.size
