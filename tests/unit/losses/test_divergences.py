"""Every divergence, the example's too: zero between equals, true gradients, the fused value is the plain one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.support.distillation import (
    Problem,
    answer,
    assert_same,
    fused_loss,
    make_dense,
    make_problem,
    make_signal,
    reference_loss,
)
from torch import Tensor
from torch.autograd import gradcheck

from liquid_llm import registry
from liquid_llm.errors import UsageError
from liquid_llm.losses import DenseSignal, Objective, OutputHead
from liquid_llm.losses.divergences import get_divergence

EXAMPLES = Path(__file__).parents[3] / "examples" / "extending"
NAMES = ["forward_kl", "reverse_kl"]
DENSE = ["dense", "logits"]
SPARSE = ["sparse", "sparse with tail"]


@pytest.fixture(scope="module", autouse=True)
def _examples() -> Any:
    """Registers the examples' divergences as their one line would."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        patch.setitem(registry.DIVERGENCES, "reverse_kl", "reverse_kl:ReverseKL")
        yield


def test_every_registered_divergence_is_here() -> None:
    assert sorted(registry.DIVERGENCES) == sorted(NAMES)


def signals(name: str) -> list[str]:
    return DENSE + (SPARSE if get_divergence(name).answers_sparse else [])


@given(
    name=st.sampled_from(NAMES),
    kind=st.sampled_from(DENSE + SPARSE),
    positions=st.integers(0, 20),
    ignored=st.integers(0, 20),
    vocab_size=st.integers(7, 50),
    teacher_vocab=st.integers(-6, 6),
    chunk_tokens=st.integers(1, 25),
    temperature=st.sampled_from([1.0, 2.0, 0.7]),
)
def test_the_fused_loss_is_the_plain_formula(
    name: str,
    kind: str,
    positions: int,
    ignored: int,
    vocab_size: int,
    teacher_vocab: int,
    chunk_tokens: int,
    temperature: float,
) -> None:
    if kind not in signals(name):
        return
    problem = make_problem(positions, vocab_size=vocab_size, ignored=ignored, bias=True, scale=1.3, soft_cap=6.0)
    signal = make_signal(kind, positions, vocab_size + (teacher_vocab if kind in DENSE else 0), temperature)
    arguments = {"signal": signal, "alpha": 0.7, "temperature": temperature, "divergence": name}
    got = answer(fused_loss, problem, chunk_tokens=chunk_tokens, **arguments)
    assert_same(got, answer(reference_loss, problem, **arguments), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("loss", [fused_loss, reference_loss])
def test_gradients_by_finite_differences(loss: Any, temperature: float, name: str) -> None:
    for kind in signals(name):
        problem = make_problem(5, vocab_size=9, width=3, ignored=1, bias=True, scale=1.2, soft_cap=4.0)
        signal = make_signal(kind, 5, 9, temperature)

        def value(
            hidden: Tensor, weight: Tensor, bias: Tensor, problem: Problem = problem, signal: Any = signal
        ) -> Tensor:
            head = OutputHead(weight, bias, problem.scale, problem.soft_cap)
            stated = {"alpha": 0.6, "temperature": temperature, "divergence": name}
            return loss(hidden, head, problem.labels, signal=signal, **stated).loss

        assert gradcheck(value, problem.parameters)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_it_is_zero_between_equals_and_positive_otherwise(temperature: float, name: str) -> None:
    problem = make_problem(bias=True)
    arguments = {"alpha": 1.0, "temperature": temperature, "divergence": name}
    same = DenseSignal(problem.hidden.detach(), problem.head)
    output, gradients = answer(fused_loss, problem, signal=same, **arguments)
    assert abs(output.kd.item()) < 1e-12
    assert max(gradient.abs().max().item() for gradient in gradients) < 1e-12
    assert fused_loss(problem.hidden, problem.head, problem.labels, signal=make_dense(13, 29), **arguments).kd > 1.0


def test_the_example_is_the_other_direction() -> None:
    """KL(p || q) is KL(q || p) with the two exchanged."""
    student, teacher = (torch.randn(6, 11, dtype=torch.float64).log_softmax(1) for _ in range(2))
    forward, reverse = get_divergence("forward_kl"), get_divergence("reverse_kl")
    torch.testing.assert_close(reverse.plain(student, teacher), forward.plain(teacher, student))
    assert not torch.allclose(reverse.plain(student, teacher), forward.plain(student, teacher))


@pytest.mark.parametrize("kind", SPARSE)
@pytest.mark.parametrize("loss", [fused_loss, reference_loss])
def test_a_signal_that_it_cannot_answer_is_refused_and_a_codec_named(loss: Any, kind: str) -> None:
    problem = make_problem()
    with pytest.raises(UsageError, match=r"reverse_kl needs whole distributions.*--codec=full"):
        answer(loss, problem, signal=make_signal(kind, 13, 29, 1.0), alpha=0.5, divergence="reverse_kl")


def test_an_objective_checks_itself() -> None:
    for field, value in (
        ("alpha", 1.5),
        ("alpha", -0.1),
        ("temperature", 0.0),
        ("temperature", float("inf")),
        ("gamma", -0.1),
        ("gamma", float("nan")),
        ("divergence", "kl"),
    ):
        with pytest.raises(ValueError, match=f"{field} must be|{field} must lie"):
            Objective(**{field: value})
    assert Objective() == Objective(0.0, 1.0, 0.0, "forward_kl")
