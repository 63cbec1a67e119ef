"""Row arithmetic in two passes is the eager form: values and gradients, and where which of them is used and said."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.support.distillation import SIGNALS, Problem, answer, assert_same, fused_loss, make_problem, make_signal
from tests.support.products import MixedProducts
from tests.support.rows import ROW_CASES, RowCase, compare_rows, make_rows

from liquid_llm.losses.objective import Objective
from liquid_llm.losses.plan import LossPlan, choose_plan
from liquid_llm.losses.rows import giving_up, opening
from liquid_llm.losses.rows.choice import COMPILED, EAGER, MEMORY, TRITON, choose_rows
from liquid_llm.losses.rows.eager import RowLoss
from liquid_llm.losses.rows.giving_up import or_else
from liquid_llm.losses.rows.opening import form_for
from liquid_llm.losses.rows.passes import PlainPasses
from liquid_llm.losses.rows.two_passes import TwoPassRows
from liquid_llm.losses.signals import OutputHead


@pytest.mark.parametrize("case", ROW_CASES, ids=str)
def test_two_passes_are_the_eager_form(case: RowCase) -> None:
    compare_rows(PlainPasses(), case, torch.float64, rtol=1e-9)


@given(
    rows=st.integers(1, 9),
    vocab_size=st.integers(7, 70),
    kind=st.sampled_from((*SIGNALS, "head", "head and draws")),
    temperature=st.sampled_from((1.0, 2.0, 0.7)),
    alpha=st.sampled_from((0.0, 0.4, 1.0)),
    min_entropy=st.sampled_from((None, 1.5)),
    spread=st.sampled_from((0.1, 2.0, 40.0)),
)
def test_two_passes_are_the_eager_form_whatever_the_sizes(
    rows: int,
    vocab_size: int,
    kind: str,
    temperature: float,
    alpha: float,
    min_entropy: float | None,
    spread: float,
) -> None:
    case = RowCase(kind, rows, vocab_size, temperature, alpha, min_entropy=min_entropy, spread=spread)
    compare_rows(PlainPasses(), case, torch.float64, rtol=1e-8)


def test_a_tail_that_a_student_says_next_to_nothing_of() -> None:
    """What is left outside the ids is summed, not subtracted from all: neither value nor gradient cancels."""
    case = RowCase("sparse with tail", 6, 29, 1.0, 0.5, confident=True)
    compare_rows(PlainPasses(), case, torch.float64, rtol=1e-8)


# ------------------------------------------------------------------------------------------------- which form, and why


def form(rows: str, divergence: str = "forward_kl", *, has_signal: bool = True, dtype: Any = torch.float32) -> str:
    plan = LossPlan(10, 10, "mixed", looks=False, rows=rows)
    return form_for(plan, Objective(divergence=divergence), has_signal=has_signal, dtype=dtype)


def test_kernels_take_what_they_can_and_compilers_the_rest() -> None:
    assert form(TRITON) == TRITON
    assert form(TRITON, "jsd", has_signal=False) == TRITON, "plain cross-entropy"
    assert form(TRITON, "jsd:beta=0.3") == COMPILED
    assert form(TRITON, dtype=torch.float64) == EAGER
    assert form(MEMORY) == MEMORY
    assert form(MEMORY, "jsd") == EAGER
    assert {form(EAGER), form(EAGER, "jsd")} == {EAGER}


def test_a_choice_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_rows("cpu").value == choose_rows("mps").value == EAGER
    assert "mps" in choose_rows("mps").reason
    monkeypatch.setenv("LIQUID_LOSS_ROWS", "eager")
    assert choose_rows("cuda").reason == "LIQUID_LOSS_ROWS asks for it"
    assert choose_plan("cuda", 301).rows == EAGER


def test_a_form_that_there_is_not_is_refused() -> None:
    with pytest.raises(ValueError, match="rows must be one of eager"):
        LossPlan(1, 1, "mixed", looks=False, rows="fast")


def fail(error: Exception, calls: list[int]) -> torch.Tensor:
    calls.append(1)
    raise error


def compilers_error() -> Exception:
    from torch._dynamo.exc import Unsupported

    return Unsupported("no such thing\nand more")


@pytest.fixture
def nothing_given_up(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    given_up: set[str] = set()
    for module in (opening, giving_up):
        monkeypatch.setattr(module, "given_up", given_up)
    return given_up


def test_what_cannot_be_compiled_is_said_once_and_done_eagerly(
    nothing_given_up: set[str], caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[int] = []
    with caplog.at_level(logging.WARNING):
        assert or_else(TRITON, lambda: fail(compilers_error(), calls), lambda: "eager") == "eager"
        assert or_else(TRITON, lambda: fail(compilers_error(), calls), lambda: "eager") == "eager"
    assert len(calls) == 1
    assert [one.getMessage().count("slower") for one in caplog.records] == [1]
    assert "no such thing" in caplog.text
    assert form(TRITON) == EAGER, "nor is it tried by the next loss"
    assert form(COMPILED, "jsd") == COMPILED


def test_memory_that_runs_out_is_no_fault_of_a_compiler(nothing_given_up: set[str]) -> None:
    """Whoever catches it cuts the pass in two."""
    with pytest.raises(torch.OutOfMemoryError):
        or_else(TRITON, lambda: fail(torch.OutOfMemoryError("CUDA out of memory"), []), lambda: "eager")
    assert not nothing_given_up


class WithoutPlace(PlainPasses):
    """Passes of which the last cannot be compiled, as whoever launches a kernel finds out."""

    def prepare_place(self, *given: torch.Tensor) -> None:
        self.place(*given)

    def place(self, *_: torch.Tensor) -> None:
        raise compilers_error()


@pytest.mark.parametrize("kind", ["sparse", "sparse with tail"])
def test_what_cannot_be_compiled_has_written_nothing(kind: str, nothing_given_up: set[str]) -> None:
    """The gradient takes the place of the logits, which the eager form starts from again."""
    found, head = [], OutputHead(torch.empty(37, 1))
    for passes in (None, WithoutPlace()):
        given = make_rows(RowCase(kind), head, torch.float32)
        eager = RowLoss(head, Objective(0.4, 2.0), dtype=torch.float32, with_grad=True, looks=True)
        if passes is None:
            values = eager(*given)
        else:
            rows = TwoPassRows(head, Objective(0.4, 2.0), passes, with_grad=True)
            values = or_else(TRITON, partial(rows, *given), partial(eager, *given))
        found.append((values, given[0]))
    assert nothing_given_up == {TRITON}
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("bias", [False, True])
def test_a_gradient_written_as_an_operand_is_the_one_that_is_rounded_to_it(
    bias: bool,
) -> None:
    """Only a bias asks for the gradient as it was before."""
    problem = make_problem(13, vocab_size=301, width=16, ignored=0, bias=bias).to(torch.float32)
    hidden = problem.hidden.detach().bfloat16().requires_grad_()
    problem = Problem(hidden, problem.weight, problem.bias, problem.labels)
    signal = make_signal("dense", 13, 301, 2.0, dtype=torch.bfloat16)
    arguments: dict[str, Any] = {"signal": signal, "alpha": 0.4, "temperature": 2.0, "all_labelled": True}
    with MixedProducts() as products:
        whole = answer(fused_loss, problem, plan=LossPlan(13, 13, "mixed", looks=False), **arguments)
        parts = answer(fused_loss, problem, plan=LossPlan(13, 5, "mixed", looks=False), **arguments)
    assert products.calls["aten.mm.dtype_out"] > 0
    assert_same(parts, whole, rtol=1e-5, atol=1e-5)
