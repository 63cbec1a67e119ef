"""The fused loss is the reference: values and gradients, over signals, temperatures, weights, sizes and dtypes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
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
from torch import Tensor

from liquid_llm.data.types import IGNORE_INDEX
from liquid_llm.errors import UsageError
from liquid_llm.losses import (
    DenseSignal,
    LogitsSignal,
    LossPlan,
    OutputHead,
    SparseSignal,
    plan,
    products,
)

TEMPERATURES = (1.0, 2.0, 0.7)
ALPHAS = (0.0, 0.3, 1.0)
HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"scale": 0.3},
    "soft cap": {"bias": True, "scale": 1.4, "soft_cap": 3.0},
}


def both(problem: Problem, *, rtol: float = 1e-9, atol: float = 1e-11, chunk_tokens: int = 4, **arguments: Any) -> None:
    expected = answer(reference_loss, problem, **arguments)
    assert_same(answer(fused_loss, problem, chunk_tokens=chunk_tokens, **arguments), expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("gamma", [None, 0.0, 0.4])
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("kind", SIGNALS)
def test_every_signal(kind: str, temperature: float, alpha: float, gamma: float | None) -> None:
    both(
        make_problem(bias=True),
        signal=make_signal(kind, 13, 29, temperature),
        alpha=alpha,
        temperature=temperature,
        reference=None if gamma is None else make_dense(13, 29, seed=3),
        gamma=gamma or 0.0,
    )


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("kind", SIGNALS)
def test_every_kind_of_head(kind: str, temperature: float, head: str) -> None:
    both(
        make_problem(**HEADS[head]),
        signal=make_signal(kind, 13, 29, temperature),
        alpha=0.3,
        temperature=temperature,
        reference=make_dense(13, 29, seed=3),
        gamma=0.4,
    )


@pytest.mark.parametrize("vocab_size", [21, 40])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("kind", ["dense", "logits"])
def test_a_vocabulary_that_differs_by_padding(kind: str, temperature: float, vocab_size: int) -> None:
    signal = make_signal(kind, 13, vocab_size, temperature)
    both(make_problem(), signal=signal, alpha=0.6, temperature=temperature)


@given(
    positions=st.integers(0, 40),
    ignored=st.integers(0, 40),
    vocab_size=st.integers(7, 70),
    chunk_tokens=st.integers(1, 50),
    kind=st.sampled_from(SIGNALS),
    temperature=st.sampled_from(TEMPERATURES),
)
def test_sizes_that_are_no_multiple_of_anything(
    positions: int, ignored: int, vocab_size: int, chunk_tokens: int, kind: str, temperature: float
) -> None:
    problem = make_problem(positions, vocab_size=vocab_size, ignored=ignored, bias=True)
    signal = make_signal(kind, positions, vocab_size, temperature)
    both(problem, signal=signal, alpha=0.3, temperature=temperature, chunk_tokens=chunk_tokens)


@pytest.mark.parametrize("kind", SIGNALS)
@pytest.mark.parametrize("elements", [1, 60, 100])
def test_slices_of_a_chunk(kind: str, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "_SLICE_ELEMENTS", elements)  # the real number exceeds these problems
    both(
        make_problem(),
        signal=make_signal(kind, 13, 29, 2.0),
        alpha=0.3,
        temperature=2.0,
        reference=make_dense(13, 29, seed=3),
        gamma=0.1,
        chunk_tokens=7,
    )


@pytest.mark.parametrize("kind", SIGNALS)
def test_gradients_by_finite_differences(kind: str) -> None:
    problem = make_problem(5, vocab_size=9, width=3, ignored=1, bias=True, scale=1.2, soft_cap=4.0)
    signal = make_signal(kind, 5, 9, 2.0)

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return fused_loss(
            hidden,
            OutputHead(weight, bias, problem.scale, problem.soft_cap),
            problem.labels,
            signal=signal,
            alpha=0.3,
            temperature=2.0,
            reference=make_dense(5, 9),
            gamma=0.4,
            chunk_tokens=2,
        ).loss

    assert torch.autograd.gradcheck(loss, problem.parameters)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_temperature_squared_is_in_value_and_gradient(temperature: float) -> None:
    logits = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(5, 8, dtype=torch.float64)
    identity = OutputHead(torch.eye(8, dtype=torch.float64))
    labels = torch.zeros(5, dtype=torch.int64)
    signal = DenseSignal(teacher, identity)
    output = fused_loss(logits, identity, labels, signal=signal, alpha=1.0, temperature=temperature)
    p, q = torch.softmax(logits / temperature, dim=1).detach(), torch.softmax(teacher / temperature, dim=1)
    torch.testing.assert_close(output.loss.detach(), temperature**2 * (q * (q / p).log()).sum())
    torch.testing.assert_close(torch.autograd.grad(output.loss, [logits])[0], temperature * (p - q))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_equal_models_have_no_divergence(temperature: float, dtype: torch.dtype) -> None:
    problem = make_problem(dtype=dtype, soft_cap=5.0)
    same = DenseSignal(problem.hidden.detach(), problem.head)
    output, gradients = answer(
        fused_loss, problem, signal=same, alpha=1.0, temperature=temperature, reference=same, gamma=1.0
    )
    assert output.kd == 0
    assert output.l2 == 0
    assert max(gradient.abs().max().item() for gradient in gradients) < 1e-6


@pytest.mark.parametrize("shift", [-500.0, -96.0, 84.0, 500.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("kind", SIGNALS)
def test_logits_far_from_zero(kind: str, temperature: float, shift: float) -> None:
    """exp of these over- or underflows without a shift by the maximum; a common shift changes no softmax."""
    problem = make_problem(ignored=0, bias=True)
    far = Problem(problem.hidden, problem.weight, (problem.bias + shift).detach().requires_grad_(), problem.labels)
    signal = make_signal(kind, 13, 29, temperature)
    if isinstance(signal, DenseSignal):
        signal = DenseSignal(signal.hidden, OutputHead(signal.head.weight, signal.head.bias + shift))
    arguments: dict[str, Any] = {"signal": signal, "alpha": 0.3, "temperature": temperature}
    got = answer(fused_loss, far.to(torch.float32), chunk_tokens=4, **arguments)
    assert_same(got, answer(reference_loss, far, **arguments), rtol=2e-4, atol=2e-4)


def test_exponentials_close_to_overflow() -> None:
    """exp(87) still fits float32, 20 times it does not."""
    identity = OutputHead(torch.eye(3))
    student = torch.tensor([[67.0, 66.0, 65.0]], requires_grad=True)
    signal = DenseSignal(torch.tensor([[87.0, 86.0, 86.5]]), identity)
    problem = Problem(student, identity.weight.requires_grad_(), None, torch.tensor([0]))
    got = answer(fused_loss, problem, signal=signal, alpha=1.0)
    expected = answer(reference_loss, problem.to(torch.float64), signal=signal, alpha=1.0)
    assert_same(got, expected, rtol=1e-4, atol=1e-4)


def test_logits_far_apart() -> None:
    problem = make_problem(ignored=0, scale=100.0)
    signal = DenseSignal(problem.hidden.detach().flip(0), OutputHead(problem.weight.detach(), scale=100.0))
    got = answer(fused_loss, problem.to(torch.float32), signal=signal, alpha=0.5)
    assert_same(got, answer(reference_loss, problem, signal=signal, alpha=0.5), rtol=1e-4, atol=1e-4)


def test_a_thin_student_tail_is_exact() -> None:
    """1 - (sum of the held) is 0 in float32 here; the tail's part of the loss and of its gradient must not be."""
    logits = torch.tensor([[30.0, 29.0, 0.0, 1.0, -1.0]], requires_grad=True)
    identity = OutputHead(torch.eye(5))
    weights = torch.tensor([[0.5, 0.2]])
    signal = SparseSignal(
        torch.tensor([[0, 1]]), weights, weights.log(), torch.tensor([0.3]), torch.tensor([True]), 1.0
    )
    arguments: dict[str, Any] = {"signal": signal, "alpha": 0.8}
    problem = Problem(logits, identity.weight, None, torch.tensor([3]))
    output = fused_loss(logits, identity, problem.labels, **arguments)
    exact = logits.detach().double().requires_grad_()
    expected = reference_loss(exact, OutputHead(torch.eye(5).double()), problem.labels, **arguments)
    torch.testing.assert_close(output.loss.double(), expected.loss, rtol=1e-6, atol=0.0)
    got, wanted = torch.autograd.grad(output.loss, [logits])[0], torch.autograd.grad(expected.loss, [exact])[0]
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------- dtypes


@pytest.mark.parametrize("kind", SIGNALS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_float32(kind: str, temperature: float) -> None:
    problem = make_problem(57, vocab_size=301, width=16, bias=True)
    arguments: dict[str, Any] = {
        "signal": make_signal(kind, 57, 301, temperature),
        "alpha": 0.3,
        "temperature": temperature,
        "reference": make_dense(57, 301),
        "gamma": 0.2,
    }
    got = answer(fused_loss, problem.to(torch.float32), chunk_tokens=10, **arguments)
    assert all(gradient.dtype == torch.float32 for gradient in got[1])
    assert got[0].loss.dtype == torch.float32
    assert_same(got, answer(reference_loss, problem, **arguments), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("product", plan.PRODUCTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", SIGNALS)
def test_sixteen_bits(kind: str, dtype: torch.dtype, product: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference forms products of the same rounded numbers in float32; results are rounded once at the end."""
    monkeypatch.setattr(products, "_CPU_BLOCK_ELEMENTS", 1000)  # so that the head is widened in several blocks
    problem = make_problem(57, vocab_size=301, width=16, bias=True).to(dtype)
    teacher = make_dense(57, 301, dtype=dtype)
    arguments: dict[str, Any] = {
        "signal": teacher if kind == "dense" else make_signal(kind, 57, 301, 2.0),
        "alpha": 0.3,
        "temperature": 2.0,
        "reference": make_dense(57, 301, dtype=dtype, seed=3),
        "gamma": 0.2,
    }
    with MixedProducts():
        got = answer(fused_loss, problem, plan=LossPlan(10, 10, product, looks=True), **arguments)
    assert all(gradient.dtype == dtype for gradient in got[1])
    assert got[0].loss.dtype == torch.float32
    expected = answer(reference_loss, problem.to(torch.float32), **arguments)
    for name in ("loss", "ce", "kd", "l2"):
        torch.testing.assert_close(getattr(got[0], name), getattr(expected[0], name), rtol=1e-5, atol=0.0)
    rounding = torch.finfo(dtype).eps
    assert_same(got, expected, rtol=2 * rounding, atol=2 * rounding)


def test_the_weight_gradient_is_accumulated_in_float32() -> None:
    """600 equal contributions: a bfloat16 sum would stop growing at 256 of them."""
    hidden = torch.ones(600, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.zeros(600, dtype=torch.int64)
    for product in plan.PRODUCTS:
        one_by_one = LossPlan(1, 1, product, looks=True)
        with MixedProducts():
            output = fused_loss(hidden, OutputHead(weight), labels, plan=one_by_one)
        (gradient,) = torch.autograd.grad(output.loss, [weight])
        assert gradient.flatten().tolist() == [-300.0, 300.0]


def test_float16_keeps_gradients_below_its_own_range() -> None:
    """4,000 rows put 3e-8 each on the second token: nothing in float16 one by one, 1.2e-4 together."""
    hidden = torch.ones(4000, 1, dtype=torch.float16)
    weight = torch.tensor([[0.0], [-17.3]], dtype=torch.float16, requires_grad=True)
    output = fused_loss(hidden, OutputHead(weight), torch.zeros(4000, dtype=torch.int64), chunk_tokens=100)
    expected = 4000 * torch.sigmoid(weight[1, 0].double()).item()
    assert torch.autograd.grad(output.loss, [weight])[0][1, 0].item() == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("kept", [False, True])
def test_the_gradient_of_hidden_states_is_rounded_once(kept: bool) -> None:
    """At the end: the loss is divided by the number of positions in between."""
    problem = make_problem(57, vocab_size=301, width=16, dtype=torch.float32)
    weight, labels = problem.weight, problem.labels
    rounded = problem.hidden.detach().bfloat16()
    gradients = []
    for hidden in (rounded.clone().requires_grad_(), rounded.float().requires_grad_()):
        loss = fused_loss(hidden, OutputHead(weight), labels, chunk_tokens=10).loss / 55
        gradients.append(torch.autograd.grad(loss, [hidden], retain_graph=kept)[0])
    assert gradients[0].dtype == torch.bfloat16
    assert torch.equal(gradients[0], gradients[1].bfloat16())


@pytest.mark.parametrize("product", plan.PRODUCTS)
def test_under_autocast(product: str) -> None:
    """Hidden states in bfloat16, a float32 head: the answer without autocast, gradients in their tensors' dtypes."""
    problem = make_problem(33, vocab_size=65, dtype=torch.float32, bias=True)
    hidden = problem.hidden.detach().bfloat16().requires_grad_()
    mixed = Problem(hidden, problem.weight, problem.bias, problem.labels)
    signal = make_dense(33, 65, dtype=torch.float32)
    chunks = LossPlan(8, 8, product, looks=True)
    arguments: dict[str, Any] = {"signal": signal, "alpha": 0.5, "plan": chunks}
    with MixedProducts():
        outside = answer(fused_loss, mixed, **arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with MixedProducts():
            inside = answer(fused_loss, mixed, **arguments)
        specified = reference_loss(hidden, mixed.head, mixed.labels, signal=signal, alpha=0.5)
    assert [gradient.dtype for gradient in inside[1]] == [torch.bfloat16, torch.float32, torch.float32]
    assert_same(inside, outside, rtol=0.0, atol=0.0)
    rounding = 1e-2 if product == "mixed" else 1e-6  # the head is narrowed for mixed products
    torch.testing.assert_close(inside[0].loss, specified.loss, rtol=rounding, atol=0.0)
    assert_same(inside, answer(reference_loss, mixed, signal=signal, alpha=0.5), rtol=1e-2, atol=1e-2)


def test_errors_are_those_of_the_reference() -> None:
    problem = make_problem()
    with pytest.raises(UsageError, match="one temperature only"):
        answer(fused_loss, problem, signal=make_signal("sparse", 13, 29, 2.0), alpha=0.5)
    with pytest.raises(ValueError, match="signal has 12 rows"):
        answer(fused_loss, problem, signal=make_dense(12, 29))
    with pytest.raises(ValueError, match="chunk_tokens"):
        answer(fused_loss, problem, chunk_tokens=0)


def test_the_callers_tensors_are_left_alone() -> None:
    """Buffers are overwritten freely inside; stored float32 rows, labels and hidden states are not ours."""
    problem = make_problem(ignored=0, dtype=torch.float32, soft_cap=5.0)
    rows = torch.randn(13, 29)
    signal = LogitsSignal(rows, torch.arange(13) < 9)
    reference = make_dense(13, 29, dtype=torch.float32)
    given_tensors = [*problem.parameters, problem.labels, rows, reference.hidden, reference.head.weight]
    before = [tensor.detach().clone() for tensor in given_tensors]
    answer(fused_loss, problem, signal=signal, alpha=0.5, temperature=2.0, reference=reference, gamma=1.0)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(given_tensors, before, strict=True))


def test_rows_without_a_label_may_hold_anything() -> None:
    problem = make_problem(ignored=4)
    hidden = problem.hidden.detach().clone()
    hidden[problem.labels == IGNORE_INDEX] = torch.nan
    dirty = Problem(hidden.requires_grad_(), problem.weight, None, problem.labels)
    signal = make_dense(13, 29)
    got = answer(fused_loss, dirty, signal=signal, alpha=0.5)
    assert_same(got, answer(reference_loss, problem, signal=signal, alpha=0.5), rtol=1e-9, atol=1e-9)
    assert not got[1][0][problem.labels == IGNORE_INDEX].any()
