"""Small random problems for the distillation loss, and a way to compare two answers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from liquid_llm import losses
from liquid_llm.data.types import IGNORE_INDEX
from liquid_llm.losses import DenseSignal, LogitsSignal, LossOutput, Objective, OutputHead, Signal, SparseSignal
from liquid_llm.losses.signals import DRAWS, HEAD, HEAD_AND_DRAWS

SIGNALS = ("none", "dense", "logits", "sparse", "sparse with tail")
FORM_OF = {"sparse": DRAWS, "head": HEAD, "head and draws": HEAD_AND_DRAWS}
TEACHER_WIDTH = 5


@dataclass(frozen=True)
class Problem:
    """A student's hidden states, head and labels. ``hidden``, ``weight`` and ``bias`` want a gradient."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    scale: float = 1.0
    soft_cap: float | None = None

    @property
    def head(self) -> OutputHead:
        return OutputHead(self.weight, self.bias, self.scale, self.soft_cap)

    @property
    def parameters(self) -> list[Tensor]:
        return [tensor for tensor in (self.hidden, self.weight, self.bias) if tensor is not None]

    def to(self, dtype: torch.dtype) -> Problem:
        """The same numbers in another dtype, as fresh leaves."""
        hidden, weight = (tensor.detach().to(dtype).requires_grad_() for tensor in (self.hidden, self.weight))
        bias = None if self.bias is None else self.bias.detach().to(dtype).requires_grad_()
        return Problem(hidden, weight, bias, self.labels, self.scale, self.soft_cap)


def make_problem(
    positions: int = 13,
    *,
    vocab_size: int = 29,
    width: int = 7,
    ignored: int = 2,
    bias: bool = False,
    scale: float = 1.0,
    soft_cap: float | None = None,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Problem:
    """Random numbers with logits of standard deviation about 2; ``ignored`` rows, spread out, have no label."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(vocab_size, (positions,), generator=random)
    labels[torch.randperm(positions, generator=random)[:ignored]] = IGNORE_INDEX
    return Problem(
        _normal(random, dtype, positions, width).requires_grad_(),
        _normal(random, dtype, vocab_size, width).requires_grad_(),
        _normal(random, dtype, vocab_size).requires_grad_() if bias else None,
        labels,
        scale,
        soft_cap,
    )


def _normal(random: torch.Generator, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, generator=random, dtype=torch.float64).to(dtype)


def make_dense(positions: int, vocab_size: int, *, dtype: torch.dtype = torch.float64, seed: int = 1) -> DenseSignal:
    """A teacher of another width, with a bias, a scale and a soft-cap of its own."""
    random = torch.Generator().manual_seed(seed)
    head = OutputHead(
        _normal(random, dtype, vocab_size, TEACHER_WIDTH),
        _normal(random, dtype, vocab_size),
        scale=0.7,
        soft_cap=9.0,
    )
    return DenseSignal(_normal(random, dtype, positions, TEACHER_WIDTH), head)


def make_signal(
    kind: str, positions: int, vocab_size: int, temperature: float, *, dtype: torch.dtype = torch.float64
) -> Signal | None:
    """One of ``SIGNALS``, or of ``FORM_OF``. Stored kinds lack a record in some rows, and hold NaN and nonsense there.

    With a head the rows differ in its length: its ids are exact, and the other slots hold draws of the rest.
    """
    if kind == "none":
        return None
    if kind == "dense":
        return make_dense(positions, vocab_size, dtype=dtype)
    random = torch.Generator().manual_seed(2)
    mask = torch.rand(positions, generator=random) < 0.7
    logits = 2.0 * torch.randn(positions, vocab_size, generator=random)
    if kind == "logits":
        logits[~mask] = torch.nan
        return LogitsSignal(logits.to(torch.bfloat16), mask)
    slots = 6
    log_probs, ids = torch.log_softmax(logits / temperature, dim=1).topk(slots, dim=1)
    weights, tail_mass = log_probs.exp(), torch.zeros(positions)
    num_exact = None
    if kind.startswith("head"):
        num_exact = 1 + torch.arange(positions) % (slots if kind == "head" else 4)
        outside = torch.arange(slots) >= num_exact.unsqueeze(1)
        drawn = torch.rand(positions, slots, generator=random) / slots if kind == "head and draws" else 0.0
        weights = torch.where(outside, drawn, weights)
        if kind == "head":
            tail_mass = 1.0 - weights.sum(dim=1)
    elif kind == "sparse with tail":
        tail_mass = torch.where(torch.arange(positions) % 3 == 0, 0.0, 1.0 - weights.sum(dim=1))
    else:  # draws: weights that do not sum to 1, and an id drawn twice
        weights = torch.rand(positions, slots, generator=random)
        ids[:, 1], log_probs[:, 1] = ids[:, 0], log_probs[:, 0]
    if num_exact is None:
        weights[::2, -2:] = 0.0
    log_probs[weights == 0], ids[weights == 0] = 0.0, 0
    weights[~mask], log_probs[~mask], tail_mass[~mask], ids[~mask] = torch.nan, torch.nan, torch.nan, 10**9
    form = FORM_OF.get(kind, DRAWS)
    return SparseSignal(ids, weights, log_probs, tail_mass, mask, temperature, form=form, num_exact=num_exact)


def spell_out(loss: Callable[..., LossOutput]) -> Callable[..., LossOutput]:
    """``loss`` with the fields of its objective as keywords of their own: ``alpha=0.3, temperature=2.0``."""

    @functools.wraps(loss)
    def spelled(*args: Any, **given: Any) -> LossOutput:
        own = {field.name: given.pop(field.name) for field in fields(Objective) if field.name in given}
        return loss(*args, **({"objective": Objective(**own)} if own else {}), **given)

    return spelled


fused_loss, reference_loss = spell_out(losses.fused_loss), spell_out(losses.reference_loss)


def answer(
    loss: Callable[..., LossOutput], problem: Problem, *, factor: float = 1.0, **arguments: Any
) -> tuple[LossOutput, list[Tensor]]:
    """The loss and the gradients of ``factor`` times it with respect to ``problem.parameters``."""
    output = loss(problem.hidden, problem.head, problem.labels, **arguments)
    return output, list(torch.autograd.grad(factor * output.loss, problem.parameters))


def assert_same(
    got: tuple[LossOutput, list[Tensor]], expected: tuple[LossOutput, list[Tensor]], *, rtol: float, atol: float
) -> None:
    """Values, counts and gradients agree; ``atol`` of a gradient is relative to its largest entry."""
    for name in ("loss", "ce", "kd", "l2"):
        torch.testing.assert_close(
            getattr(got[0], name).detach(),
            getattr(expected[0], name).detach(),
            rtol=rtol,
            atol=atol,
            check_dtype=False,
            msg=lambda text, name=name: f"{name}: {text}",
        )
    assert (got[0].num_positions, got[0].num_signal) == (expected[0].num_positions, expected[0].num_signal)
    for mine, theirs in zip(got[1], expected[1], strict=True):
        scale = theirs.abs().max().item() if theirs.numel() else 0.0
        torch.testing.assert_close(mine, theirs, rtol=rtol, atol=atol * max(scale, 1e-30), check_dtype=False)
