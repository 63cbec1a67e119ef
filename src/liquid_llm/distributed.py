"""How many processes take a step together, and what they agree on: the one seam for more than one.

    rank     this process's number among ``world_size``; rank 0 is the main one, which alone writes files
    engine   adds tensors and gradients up over all ranks, and lets them decide together

The loss gives sums and the step divides them once by the global number of positions, so ranks add up as micro-batches
do: a step's ``grad_accum`` micro-batches are dealt out among them, and what each has is summed by the engine. All that
may import ``torch.distributed`` is here. One process is a world of 1, in which nothing is exchanged; it is the only one
there is yet.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.nn import Parameter

from liquid_llm.errors import UsageError


class Engine:
    """One process, a world of 1; an engine of several overrides ``rank``, ``world_size`` and ``sum``.

    Each method is called by all ranks, in the same order.
    """

    rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and speaks for all."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """What all ranks give, of the same shape and dtype, added up: the same bits on all of them."""
        return tensor

    def sum_gradients(self, parameters: Iterable[Parameter]) -> None:
        """Replace each parameter's gradient by the sum over ranks; it stays None where no rank has one."""
        parameters = list(parameters)
        has_gradient = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.int32)
        for parameter, ranks in zip(parameters, self.sum(has_gradient).tolist(), strict=True):
            if ranks:
                own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = self.sum(own)

    def agree(self, flag: bool) -> bool:
        """Whether any rank says so."""
        return bool(self.sum(torch.tensor(int(flag))))


def read_rank() -> tuple[int, int]:
    """Rank and world size as a launcher such as torchrun sets them; (0, 1) without one.

    Raises:
        UsageError: they are set to something else.
    """
    rank, world_size = os.environ.get("RANK") or "0", os.environ.get("WORLD_SIZE") or "1"
    if not (rank.isdigit() and world_size.isdigit() and int(rank) < int(world_size)):
        raise UsageError(
            "not a rank of a world",
            where="environment",
            got=f"RANK={rank} WORLD_SIZE={world_size}",
            expected="0 <= RANK < WORLD_SIZE",
            remedy="unset both, or use torchrun",
        )
    return int(rank), int(world_size)


def start_engine(environment: Mapping[str, str] | None = None) -> Engine:
    """The engine for the processes that a launcher has started, as it says in the environment.

    Raises:
        UsageError: there are several.
    """
    given = os.environ if environment is None else environment
    world_size = given.get("WORLD_SIZE", "1").strip() or "1"
    if world_size != "1":
        raise UsageError(
            "training with several processes is not supported yet",
            where="WORLD_SIZE in the environment",
            got=world_size,
            expected="1",
            remedy="start one process (without torchrun, or with --nproc_per_node=1); more micro-batches a step by "
            "--grad_accum give the same gradient",
        )
    return Engine()
