"""How much of a micro-batch one forward and backward pass takes, and what happens when that does not fit.

pass    rows of a micro-batch that are computed together: all of them, as long as they fit
cut     a pass that ran out of memory is halved along its rows, and so is every later one that is as large

The loss is a sum over positions, so a micro-batch in several passes gives the same loss and the same gradient, up to
rounding. Cuts are remembered (``max_tokens`` is kept in checkpoints), so that a continued run rounds as it did before.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TypeVar

import torch

from liquid_llm.data.types import MicroBatch
from liquid_llm.device import is_out_of_memory, release_memory
from liquid_llm.errors import DeviceError
from liquid_llm.losses.signals import Signal

log = logging.getLogger(__name__)

Given = TypeVar("Given")
Result = TypeVar("Result")

SignalOf = Callable[[MicroBatch, slice], "Signal | None"]
"""The teacher signal of a part of a micro-batch: its rows, and which labelled positions of the whole they hold."""


@dataclass
class PassLimit:
    """Most padded tokens of one pass.

    Attributes:
        max_tokens: None until a pass has run out of memory.
        cuts: whether one that does is cut. Not where ranks compute together, each as many passes as the others.
    """

    max_tokens: int | None = None
    cuts: bool = True

    def parts(self, batch: MicroBatch) -> Iterator[tuple[MicroBatch, slice]]:
        """The passes of ``batch`` in order: rows as equal in number as can be, and their labelled positions."""
        num_rows, time = batch.input_ids.shape
        if self.max_tokens is None or batch.padded_tokens <= self.max_tokens:
            yield batch, slice(0, batch.num_positions)
            return
        passes = -(-num_rows // max(1, self.max_tokens // time))
        for number in range(passes):
            yield batch.rows(number * num_rows // passes, (number + 1) * num_rows // passes)

    def run(
        self,
        batches: Sequence[tuple[MicroBatch, Given]],
        compute: Callable[[MicroBatch, slice, Given], Result],
        undo: Callable[[], None],
        *,
        device: torch.device,
        where: str,
        consumers: Callable[[], str],
        last_pass: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> list[Result]:
        """What ``compute`` makes of each pass of ``batches``, in order; passes are cut until they fit into memory.

        One that failed may have left part of its work behind, so after a cut all passes are computed anew.

        Args:
            batches: each with what ``compute`` is given beside the pass and its labelled positions.
            undo: takes back what was computed.
            where, consumers: what was being done, and what takes most of the memory, in words.
            last_pass: gives what the last pass is computed in.

        Raises:
            DeviceError: a single row does not fit.
        """
        while True:
            done: list[Result] = []
            passes = [(*one, given) for batch, given in batches for one in self.parts(batch)]
            for number, (part, positions, given) in enumerate(passes, start=1):
                try:
                    with last_pass() if number == len(passes) else nullcontext():
                        done.append(compute(part, positions, given))
                    continue
                except RuntimeError as error:
                    if not is_out_of_memory(error):
                        raise
                break
            else:
                return done
            done.clear()
            undo()
            release_memory(device)
            self.cut(part, where=where, consumers=consumers())

    def cut(self, part: MicroBatch, *, where: str, consumers: str) -> None:
        """Halve the passes as large as ``part``, which ran out of memory.

        Raises:
            DeviceError: it was a single row already, or nothing is cut here.
        """
        num_rows, time = part.input_ids.shape
        if not self.cuts:
            raise DeviceError(
                f"{num_rows} x {time} tokens do not fit into memory, and what several processes compute together "
                "is not cut",
                where=where,
                got=consumers or None,
                remedy="take a smaller --batch_size with more --grad_accum, --grad_checkpoint or more processes; the "
                "last checkpoint is intact",
            )
        if num_rows == 1:
            raise DeviceError(
                f"a single row of {time} tokens does not fit into memory",
                where=where,
                got=consumers or None,
                remedy="shorten --block_size, use --grad_checkpoint, a smaller student or teacher, or a larger device; "
                "the last checkpoint is intact",
            )
        self.max_tokens = (num_rows + 1) // 2 * time
        log.warning(
            "%s: out of memory with %d x %d tokens, so it is cut in two, as every pass above %d tokens from now on; "
            "the result is the same. A smaller --batch_size with more --grad_accum, or --grad_checkpoint, would spare "
            "the cut",
            where,
            num_rows,
            time,
            self.max_tokens,
        )
