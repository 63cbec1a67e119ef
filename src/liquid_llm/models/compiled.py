"""The blocks of a model compiled (``torch.compile``) for micro-batches of one shape, or of a few.

    block   one layer of the body, as ``heads.blocks_of`` has it. Blocks of a kind share what is compiled, so a model of
            30 layers is compiled in the time of one, and embedding, head and loss stay as they are
    on      a pass of a shape that was compiled for, forward and backward; anything else is computed as without this

Parameters, their names and whoever holds them are untouched: a checkpoint does not tell a compiled student from
another.
A shape that was not compiled for is never handed to the compiler, so it compiles once and not in the middle of a run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from torch import nn

INDUCTOR = "inductor"


class CompiledBlocks:
    """Blocks that are called compiled while ``during`` says so.

    Nothing is compiled before they are called the first time.

    Args:
        blocks: of a model, in any order.
        shapes: rows and tokens a row of the micro-batches that are computed by them.
        backend: of ``torch.compile``.
    """

    def __init__(
        self, blocks: Sequence[nn.Module], shapes: Collection[tuple[int, int]], *, backend: str = INDUCTOR
    ) -> None:
        self.shapes = frozenset(shapes)
        self._blocks = tuple(blocks)
        self._calls: list[Any] = []
        self._is_on = True
        for block in blocks:
            # Each shape is compiled as it is: with sizes left open, kernels would be slower and a second shape cheaper.
            block.compile(backend=backend, dynamic=False)
            self._calls.append(vars(block)["_compiled_call_impl"])
        self._switch(False)

    @contextlib.contextmanager
    def during(self, shape: tuple[int, ...] | None) -> Iterator[None]:
        """Forward and backward of a pass over ``shape`` [rows, time]; None for what is computed without gradients.

        Backward belongs to it: blocks that are computed again for it must be computed as they were before.
        """
        before = self._is_on
        self._switch(shape in self.shapes)
        try:
            yield
        finally:
            self._switch(before)

    def release(self) -> None:
        """Let the blocks be called as they were; these are of no use any more."""
        for block in self._blocks:
            vars(block).pop("_compiled_call_impl", None)
        self._blocks, self._calls = (), []

    def _switch(self, on: bool) -> None:
        if on == self._is_on:
            return
        self._is_on = on
        for block, call in zip(self._blocks, self._calls, strict=True):
            vars(block)["_compiled_call_impl"] = call if on else None  # what torch's own Module.compile sets
