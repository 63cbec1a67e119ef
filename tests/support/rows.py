"""Rows of logits with all that is compared with them, and a form of row arithmetic held against the eager one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from tests.support.distillation import SIGNALS, make_signal
from torch import Tensor

from liquid_llm.losses import LogitsSignal, Objective, OutputHead, SparseSignal
from liquid_llm.losses._sources import DenseRows
from liquid_llm.losses.divergences import SparseRows
from liquid_llm.losses.rows.eager import RowLoss
from liquid_llm.losses.rows.passes import Passes
from liquid_llm.losses.rows.two_passes import TwoPassRows


@dataclass(frozen=True)
class RowCase:
    """What is to be worked out.

    Attributes:
        kind: of signal; stored ones lack a record in some rows, and hold NaN there.
        shared: entries of the teacher's vocabulary, 0 for all.
        spread: standard deviation of the student's logits.
        confident: the student says next to nothing outside the signal's ids.
        capped: both models' heads have a scale and a soft-cap.
        narrow: the gradient is wanted in bfloat16, beside the logits.
    """

    kind: str
    rows: int = 7
    vocab_size: int = 37
    temperature: float = 2.0
    alpha: float = 0.4
    gamma: float | None = None
    min_entropy: float | None = None
    shared: int = 0
    spread: float = 2.0
    confident: bool = False
    capped: bool = False
    narrow: bool = False
    with_grad: bool = True

    def __str__(self) -> str:
        usual = RowCase(self.kind)
        changed = [f"{name} {value}" for name, value in vars(self).items() if value != getattr(usual, name)]
        return ", ".join([self.kind, *changed])


ROW_CASES = [
    *(RowCase(kind, temperature=t, gamma=gamma) for kind, t, gamma in product(SIGNALS, (1.0, 0.7, 2.0), (None, 0.3))),
    *(RowCase(kind, capped=True, gamma=0.3) for kind in (*SIGNALS, "head", "head and draws")),
    *(RowCase(kind, min_entropy=1.5, gamma=0.3) for kind in SIGNALS),
    *(RowCase(kind, narrow=True) for kind in SIGNALS),
    *(RowCase(kind, with_grad=False) for kind in SIGNALS),
    *(RowCase(kind, shared=20) for kind in ("dense", "logits")),
    *(RowCase(kind, spread=60.0, temperature=0.7) for kind in SIGNALS),
]


def compare_rows(passes: Passes, case: RowCase, dtype: torch.dtype, *, rtol: float, rounding: float = 2.0**-8) -> None:
    """Two passes by ``passes`` give what the eager form gives in float64.

    Args:
        dtype: of the logits of the two passes.
        rtol: of each row's gradient, relative to its largest entry; values likewise.
        rounding: what a number may lose on its way to bfloat16.
    """
    head = OutputHead(torch.empty(case.vocab_size, 1))
    if case.capped:
        head = replace(head, scale=1.4, soft_cap=3.0)
    objective = Objective(case.alpha, case.temperature, case.gamma or 0.0, min_entropy=case.min_entropy)
    values, gradients = [], []
    for one in (torch.float64, dtype):
        given = make_rows(case, head, one)
        raw, into = given[0], None
        rows: Any = TwoPassRows(head, objective, passes, with_grad=case.with_grad)
        if len(values) == 0:
            rows = RowLoss(head, objective, dtype=torch.float64, with_grad=case.with_grad, looks=True)
        elif case.narrow:
            into = torch.empty_like(raw, dtype=torch.bfloat16)
        before = raw.clone()
        values.append(rows(*given, into))
        if into is not None or (not case.with_grad and len(values) == 2):
            assert torch.equal(raw, before), "two passes leave the logits as they were"
        gradients.append(raw if into is None else into)
    scale = values[0].abs().amax().item()
    torch.testing.assert_close(values[1].double(), values[0], rtol=rtol, atol=rtol * scale)
    if case.with_grad:
        largest = gradients[0].abs().amax(dim=1, keepdim=True).clamp_min(1e-30)
        allowed = rounding if case.narrow else 0.0
        torch.testing.assert_close(gradients[1].double() / largest, gradients[0] / largest, rtol=allowed, atol=rtol)


def make_rows(case: RowCase, head: OutputHead, dtype: torch.dtype) -> tuple[Any, ...]:
    """Raw logits, labels, the teacher's rows and the reference student's, from the same numbers in each dtype."""
    random = torch.Generator().manual_seed(5)

    def normal(width: int, spread: float) -> Tensor:
        return (spread * torch.randn(case.rows, width, generator=random)).to(dtype)

    raw = normal(case.vocab_size, case.spread)
    labels = torch.randint(case.vocab_size, (case.rows,), generator=random)
    reference = None if case.gamma is None else DenseRows(normal(case.vocab_size, 2.0), head, None)
    shared = case.shared or case.vocab_size
    if case.kind == "none":
        return raw, labels, None, reference
    if case.kind == "dense":
        return raw, labels, DenseRows(normal(shared, 2.0), replace(head, scale=0.8), None), reference
    signal = make_signal(case.kind, case.rows, shared, case.temperature)
    if isinstance(signal, LogitsSignal):
        return raw, labels, DenseRows(signal.rows, None, signal.mask), reference
    assert isinstance(signal, SparseSignal)
    teacher = SparseRows.of(signal, lambda tensor: tensor, dtype)
    if case.confident:
        raw.scatter_add_(1, teacher.ids, torch.full_like(teacher.weights, 60.0))
    return raw, labels, teacher, reference
