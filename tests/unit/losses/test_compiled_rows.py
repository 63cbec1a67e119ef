"""What torch's compiler makes of divergences that have no kernels is the eager form; ``make test-kernels`` runs this.

It compiles for the CPU here, which takes half a minute a divergence and a C++ compiler, so it is skipped where Triton
is not, that is where nothing is ever compiled; and with Triton's interpreter, which torch's compiler does not go with.
"""

from __future__ import annotations

import functools
import itertools
import os
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.support.distillation import answer, assert_same, fused_loss, make_problem, make_signal

from liquid_llm.losses import LossPlan
from liquid_llm.losses.rows import compiled
from liquid_llm.losses.rows.choice import COMPILED, EAGER
from liquid_llm.losses.rows.giving_up import given_up

# Warnings are what torch says to itself while it compiles.
pytestmark = pytest.mark.filterwarnings("ignore:::torch.*", "ignore::DeprecationWarning")

pytest.importorskip("triton", reason="make test-kernels installs Triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("torch's compiler does not go with Triton's interpreter", allow_module_level=True)


@pytest.mark.parametrize("divergence", ["jsd:beta=0.3", "reverse_kl"])
def test_a_compiled_divergence_is_the_eager_one(divergence: str) -> None:
    """By torch's compiler for the CPU, which is not the one for a GPU; the objective changes and so do the rows."""
    torch._dynamo.reset()
    compiled._compile.cache_clear()
    for rows, alpha in ((6, 0.2), (9, 0.3), (11, 0.4)):
        problem = make_problem(rows, vocab_size=45, ignored=0, dtype=torch.float32)
        arguments: dict[str, Any] = {"signal": make_signal("dense", rows, 45, 2.0, dtype=torch.float32)}
        arguments |= {"alpha": alpha, "temperature": 2.0, "divergence": divergence, "all_labelled": True}
        plan = LossPlan(16, 16, "mixed", looks=False)
        expected = answer(fused_loss, problem, plan=plan, **arguments)
        got = answer(fused_loss, problem, plan=replace(plan, rows=COMPILED), **arguments)
        assert_same(got, expected, rtol=1e-5, atol=1e-5)
    assert not given_up
    assert compiled._compile.cache_info().hits == 2, "or the eager form is compared with itself"


def test_a_run_may_ask_for_more_kinds_than_torch_compiles_of_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A last chunk of one row, evaluation, T that ends at 1, teachers of two vocabularies: eight are torch's limit."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    compiled._compile.cache_clear()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    plan, before = LossPlan(5, 5, "mixed", looks=False, rows=COMPILED), counters["stats"]["unique_graphs"]
    for vocab_size, temperature, wants_gradient in itertools.product((21, 17), (2.0, 1.0), (True, False)):
        problem = make_problem(6, vocab_size=21, ignored=0, dtype=torch.float32)
        arguments: dict[str, Any] = {"alpha": 0.3, "temperature": temperature, "divergence": "reverse_kl"}
        arguments |= {"signal": make_signal("dense", 6, vocab_size, temperature, dtype=torch.float32)}
        with torch.set_grad_enabled(wants_gradient):
            got, expected = (
                fused_loss(problem.hidden, problem.head, problem.labels, plan=one, all_labelled=True, **arguments)
                for one in (plan, replace(plan, rows=EAGER))
            )
        assert got.kd.item() == pytest.approx(expected.kd.item(), rel=1e-5)
    assert not given_up
    assert counters["stats"]["unique_graphs"] - before > 8
    torch._dynamo.reset()
    compiled._compile.cache_clear()
