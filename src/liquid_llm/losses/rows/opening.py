"""The form of row arithmetic that a plan names, for one loss; the eager one where that has no answer."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from liquid_llm.losses._sources import DenseRows
from liquid_llm.losses.divergences import SparseRows, read_spec
from liquid_llm.losses.objective import Objective
from liquid_llm.losses.plan import LossPlan
from liquid_llm.losses.rows.choice import COMPILED, EAGER, MEMORY, TRITON
from liquid_llm.losses.rows.compiled import CompiledRows
from liquid_llm.losses.rows.eager import RowLoss
from liquid_llm.losses.rows.giving_up import given_up, or_else
from liquid_llm.losses.rows.passes import NoPasses
from liquid_llm.losses.rows.two_passes import TwoPassRows
from liquid_llm.losses.signals import OutputHead


class Rows(Protocol):
    """The loss of rows; what is given and what comes out is that of ``eager.RowLoss.__call__``."""

    def __call__(
        self,
        raw: Tensor,
        labels: Tensor,
        teacher: DenseRows | SparseRows | None = None,
        reference: DenseRows | None = None,
        into: Tensor | None = None,
    ) -> Tensor: ...


def form_for(plan: LossPlan, objective: Objective, *, has_signal: bool, dtype: torch.dtype) -> str:
    """The form that a loss gets, which is the plan's or the eager one.

    Kernels are there for the forward KL; other divergences are compiled, where kernels can be.
    """
    if plan.rows == EAGER or plan.rows in given_up or dtype != torch.float32:
        return EAGER
    fits = not has_signal or read_spec(objective.divergence)[0] in TwoPassRows.DIVERGENCES
    if plan.rows in (TRITON, MEMORY) and fits:
        return plan.rows
    return COMPILED if plan.rows in (TRITON, COMPILED) and has_signal and COMPILED not in given_up else EAGER


def open_rows(
    plan: LossPlan, head: OutputHead, objective: Objective, *, has_signal: bool, dtype: torch.dtype, with_grad: bool
) -> Rows:
    """The rows of a loss: see ``form_for``, and ``eager.RowLoss`` for the other arguments."""
    form = form_for(plan, objective, has_signal=has_signal, dtype=dtype)
    if form == COMPILED:
        return CompiledRows(head, objective, dtype=dtype, with_grad=with_grad, looks=plan.looks)
    if form == MEMORY:
        return TwoPassRows(head, objective, NoPasses(), with_grad=with_grad)
    eager = RowLoss(head, objective, dtype=dtype, with_grad=with_grad, looks=plan.looks)
    if form == EAGER:
        return eager
    from liquid_llm.losses.rows.triton_passes import TritonPasses

    kernels = TwoPassRows(head, objective, TritonPasses(), with_grad=with_grad)

    def kernels_or_eager(*given: Any, **named: Any) -> Tensor:
        return or_else(TRITON, lambda: kernels(*given, **named), lambda: eager(*given, **named))

    return kernels_or_eager
