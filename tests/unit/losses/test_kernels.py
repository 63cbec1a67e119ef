"""Triton's kernels, in its interpreter on a CPU: they are the eager form in float64, and the specification.

``make test-kernels`` installs Triton and sets TRITON_INTERPRET; without both these tests are skipped.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.distillation import (
    SIGNALS,
    Problem,
    answer,
    assert_same,
    fused_loss,
    make_dense,
    make_problem,
    make_signal,
    reference_loss,
)
from tests.support.products import MixedProducts
from tests.support.rows import ROW_CASES, RowCase, compare_rows, make_rows

from liquid_llm.losses import LossPlan, Objective, OutputHead
from liquid_llm.losses.rows.choice import EAGER, TRITON, kernel_error
from liquid_llm.losses.rows.opening import open_rows

pytest.importorskip("triton", reason="make test-kernels installs Triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("kernels run on a CPU with TRITON_INTERPRET=1 alone: make test-kernels", allow_module_level=True)

# NumPy, which the interpreter computes with, says where a number that is then left out was infinite.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")


def passes(**blocks: int) -> Any:
    from liquid_llm.losses.rows.triton_passes import TritonPasses

    return TritonPasses(**blocks)


@pytest.mark.parametrize("case", ROW_CASES, ids=str)
def test_kernels_are_the_eager_form(case: RowCase) -> None:
    """Blocks of 16 entries: each row takes several, and the last is not full.

    The interpreter cuts a number off on its way to bfloat16, where a GPU rounds it.
    """
    compare_rows(passes(measured_block=16, filled_block=16), case, torch.float32, rtol=3e-5, rounding=2.0**-7)


@given(
    rows=st.integers(1, 4),
    vocab_size=st.integers(7, 140),
    slots=st.sampled_from(("none", "dense", "sparse", "head", "sparse with tail")),
    temperature=st.floats(0.3, 6.0),
    spread=st.sampled_from((0.1, 3.0, 50.0)),
    blocks=st.sampled_from((2, 8, 64, 8192)),
)
@settings(max_examples=30)
def test_kernels_are_the_eager_form_whatever_the_sizes(
    rows: int, vocab_size: int, slots: str, temperature: float, spread: float, blocks: int
) -> None:
    case = RowCase(slots, rows, vocab_size, temperature, spread=spread, gamma=0.1)
    compare_rows(passes(measured_block=blocks, filled_block=blocks), case, torch.float32, rtol=1e-4)


def test_a_tail_that_a_student_says_next_to_nothing_of() -> None:
    case = RowCase("sparse with tail", 6, 29, 1.0, 0.5, confident=True)
    compare_rows(passes(measured_block=16), case, torch.float32, rtol=1e-5)


def test_kernels_are_as_good_as_float32_lets_them_be() -> None:
    assert kernel_error(torch.device("cpu"), vocab_size=10_000) < 1e-6


class NotCompiled:
    """A kernel that its compiler does not take."""

    def __getitem__(self, grid: Any) -> Any:
        from triton.compiler.errors import CompilationError

        def launch(*_: Any, **__: Any) -> None:
            raise CompilationError("", None, "no such thing")

        return launch


def test_a_last_kernel_that_is_not_compiled_leaves_the_logits_to_the_eager_form(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from liquid_llm.losses.rows import giving_up, kernels, opening, triton_passes

    given_up: set[str] = set()
    for module in (opening, giving_up):
        monkeypatch.setattr(module, "given_up", given_up)
    monkeypatch.setattr(triton_passes, "_placed", set())
    monkeypatch.setattr(kernels, "place", NotCompiled())
    head, found = OutputHead(torch.empty(37, 1)), []
    for form in (EAGER, TRITON):
        given = make_rows(RowCase("sparse with tail"), head, torch.float32)
        plan = LossPlan(8, 8, "mixed", looks=True, rows=form)
        rows = open_rows(plan, head, Objective(0.4, 2.0), has_signal=True, dtype=torch.float32, with_grad=True)
        found.append((rows(*given), given[0]))
    assert given_up == {TRITON}
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("kind", SIGNALS)
def test_a_loss_by_kernels_is_the_specification(kind: str, temperature: float) -> None:
    """Products in bfloat16 and all: as on a card, but for who multiplies."""
    problem = make_problem(13, vocab_size=45, ignored=0, width=16, soft_cap=5.0).to(torch.float32)
    hidden = problem.hidden.detach().bfloat16().requires_grad_()
    problem = Problem(hidden, problem.weight, None, problem.labels, 1.0, 5.0)
    arguments: dict[str, Any] = {"signal": make_signal(kind, 13, 45, temperature, dtype=torch.bfloat16)}
    arguments |= {"reference": make_dense(13, 45, dtype=torch.bfloat16, seed=3), "gamma": 0.2}
    arguments |= {"alpha": 0.3, "temperature": temperature}
    plan = LossPlan(8, 8, "mixed", looks=False, rows=TRITON)
    with MixedProducts():
        got = answer(fused_loss, problem, plan=plan, all_labelled=True, **arguments)
    rounded = Problem(hidden, problem.weight.detach().bfloat16(), None, problem.labels, 1.0, 5.0).to(torch.float32)
    assert_same(got, answer(reference_loss, rounded, **arguments), rtol=2e-2, atol=1e-2)
