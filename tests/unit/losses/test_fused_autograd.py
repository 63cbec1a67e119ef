"""The fused loss as a citizen of autograd: scaling, accumulation, shared weights, what it refuses and leaves out."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from typing import Any

import pytest
import torch
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
from torch.utils._python_dispatch import TorchDispatchMode

from liquid_llm.losses import (
    DenseSignal,
    LossPlan,
    OutputHead,
    SparseSignal,
    products,
)

ARGUMENTS: dict[str, Any] = {"alpha": 0.3, "temperature": 2.0, "gamma": 0.2}


def arguments_for(kind: str, positions: int = 13, vocab_size: int = 29) -> dict[str, Any]:
    signal = make_signal(kind, positions, vocab_size, ARGUMENTS["temperature"])
    return {**ARGUMENTS, "signal": signal, "reference": make_dense(positions, vocab_size, seed=3)}


@pytest.mark.parametrize("factor", [1.0, 3.0, -0.01, 0.0])
@pytest.mark.parametrize("kind", SIGNALS)
def test_a_multiple_of_the_loss_has_the_multiple_of_its_gradient(kind: str, factor: float) -> None:
    problem = make_problem(bias=True)
    got = answer(fused_loss, problem, factor=factor, chunk_tokens=4, **arguments_for(kind))
    assert_same(got, answer(reference_loss, problem, factor=factor, **arguments_for(kind)), rtol=1e-9, atol=1e-11)


def test_a_kept_graph_can_be_differentiated_again_and_again() -> None:
    problem = make_problem(bias=True)
    loss = fused_loss(problem.hidden, problem.head, problem.labels).loss
    ones = torch.autograd.grad(loss, problem.parameters, retain_graph=True)
    copies = [gradient.clone() for gradient in ones]
    threes = torch.autograd.grad(3.0 * loss, problem.parameters, retain_graph=True)
    halves = torch.autograd.grad(0.5 * loss, problem.parameters)
    for one, copy, three, half in zip(ones, copies, threes, halves, strict=True):
        assert torch.equal(one, copy)
        torch.testing.assert_close(three, 3.0 * copy)
        torch.testing.assert_close(half, 0.5 * copy)


def test_gradients_are_added_to_those_already_there() -> None:
    problem = make_problem(bias=True)
    expected = [2.5 * gradient for gradient in answer(reference_loss, problem)[1]]
    for factor in (2.0, 0.5):
        (factor * fused_loss(problem.hidden, problem.head, problem.labels).loss).backward()
    torch.testing.assert_close([tensor.grad for tensor in problem.parameters], expected)


def test_a_tied_head_gets_both_parts_of_its_gradient() -> None:
    """The embedding that makes the hidden states is the head as well."""
    problem = make_problem()
    inputs = torch.randint(29, (13,))
    gradients = []
    for loss in (fused_loss, reference_loss):
        hidden = torch.tanh(problem.weight[inputs] * 1.7)
        output = loss(hidden, problem.head, problem.labels, signal=make_dense(13, 29), alpha=0.5)
        gradients.append(torch.autograd.grad(output.loss, [problem.weight]))
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("kind", SIGNALS)
@pytest.mark.parametrize("chunk_tokens", [1, 2, 5, 12, 13, 1000, None])
def test_the_chunk_size_does_not_matter(kind: str, chunk_tokens: int | None) -> None:
    problem = make_problem(bias=True)
    got = answer(fused_loss, problem, chunk_tokens=chunk_tokens, **arguments_for(kind))
    assert_same(got, answer(fused_loss, problem, chunk_tokens=7, **arguments_for(kind)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", SIGNALS)
@pytest.mark.parametrize("cuts", [(0, 6, 13), (0, 1, 2, 12, 13), (0, 0, 13)])
def test_micro_batches_add_up(kind: str, cuts: tuple[int, ...]) -> None:
    problem = make_problem(bias=True)
    whole = answer(fused_loss, problem, **arguments_for(kind))
    arguments = arguments_for(kind)
    parts = []
    for start, stop in itertools.pairwise(cuts):
        rows = slice(start, stop)
        signal, reference = arguments["signal"], arguments["reference"]
        piece = {"signal": None if signal is None else signal.part(rows), "reference": reference.part(rows)}
        hidden, labels = problem.hidden[rows], problem.labels[rows]
        parts.append(fused_loss(hidden, problem.head, labels, **{**arguments, **piece}))
    gradients = torch.autograd.grad(sum(part.loss for part in parts), problem.parameters)
    for name in ("loss", "ce", "kd", "l2", "num_positions", "num_signal"):
        total = sum(getattr(part, name) for part in parts)
        torch.testing.assert_close(torch.as_tensor(total), torch.as_tensor(getattr(whole[0], name)))
    torch.testing.assert_close(list(gradients), whole[1])


@pytest.mark.parametrize("kind", SIGNALS)
@pytest.mark.parametrize("positions", [0, 3])
def test_without_a_labelled_position_the_loss_is_a_differentiable_zero(kind: str, positions: int) -> None:
    problem = make_problem(positions, ignored=positions, bias=True, dtype=torch.bfloat16)
    output, gradients = answer(fused_loss, problem, **arguments_for(kind, positions))
    assert (output.loss.item(), output.num_positions, output.num_signal) == (0.0, 0, 0)
    assert [gradient.shape for gradient in gradients] == [tensor.shape for tensor in problem.parameters]
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("kind", SIGNALS)
def test_one_row(kind: str) -> None:
    problem = make_problem(1, ignored=0)
    arguments = arguments_for(kind, 1)
    assert_same(
        answer(fused_loss, problem, **arguments), answer(reference_loss, problem, **arguments), rtol=1e-9, atol=1e-11
    )


@pytest.mark.parametrize("wanted", ["hidden", "weight", "bias"])
def test_what_is_frozen_gets_no_gradient(wanted: str) -> None:
    problem = make_problem(bias=True)
    parts = {"hidden": problem.hidden, "weight": problem.weight, "bias": problem.bias}
    parts = {name: tensor if name == wanted else tensor.detach() for name, tensor in parts.items()}
    frozen = Problem(parts["hidden"], parts["weight"], parts["bias"], problem.labels)
    loss = fused_loss(frozen.hidden, frozen.head, frozen.labels, chunk_tokens=4, **arguments_for("dense")).loss
    (got,) = torch.autograd.grad(loss, [parts[wanted]])
    expected = reference_loss(frozen.hidden, frozen.head, frozen.labels, **arguments_for("dense")).loss
    torch.testing.assert_close(got, torch.autograd.grad(expected, [parts[wanted]])[0])


def test_teacher_and_reference_student_get_no_gradient() -> None:
    problem = make_problem()
    dense = make_dense(13, 29)
    teacher = DenseSignal(dense.hidden.requires_grad_(), OutputHead(dense.head.weight.requires_grad_()))
    output = fused_loss(problem.hidden, problem.head, problem.labels, signal=teacher, alpha=0.5, reference=teacher)
    output.loss.backward()
    assert teacher.hidden.grad is None
    assert teacher.head.weight.grad is None


def test_the_sums_beside_the_loss_carry_no_gradient() -> None:
    problem = make_problem()
    output = fused_loss(problem.hidden, problem.head, problem.labels, **arguments_for("dense"))
    assert output.loss.requires_grad
    assert not any(total.requires_grad for total in (output.ce, output.kd, output.l2))


@pytest.mark.parametrize("differentiate_twice", ["double backward", "gradient penalty"])
def test_differentiating_twice_is_refused(differentiate_twice: str) -> None:
    problem = make_problem()
    loss = fused_loss(problem.hidden, problem.head, problem.labels).loss
    factor = torch.ones((), dtype=torch.float64, requires_grad=differentiate_twice == "gradient penalty")
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(factor * loss, [problem.hidden], create_graph=True)


class Watch(TorchDispatchMode):
    """Counts operations by name and notes the shape and dtype of every tensor they return."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: set[tuple[tuple[int, ...], torch.dtype]] = set()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls[func.overloadpacket.__name__] += 1
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.tensors.add((tuple(tensor.shape), tensor.dtype))
        return result

    @property
    def num_products(self) -> int:
        return sum(self.calls[name] for name in ("mm", "addmm", "addmm_"))

    def larger_than(self, elements: int) -> set[tuple[int, ...]]:
        return {shape for shape, _ in self.tensors if math.prod(shape) > elements}


# Hidden states, head and stored slots all have fewer elements than a chunk of logits.
POSITIONS, VOCAB_SIZE, WIDTH, CHUNK_TOKENS = 400, 512, 8, 16


@pytest.mark.parametrize("ignored", [0, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("product", ["widen", "mixed"])
@pytest.mark.parametrize("kind", SIGNALS)
def test_no_tensor_is_larger_than_a_chunk_of_logits(
    kind: str, product: str, dtype: torch.dtype, ignored: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "_CPU_BLOCK_ELEMENTS", 1000)  # widened at once; the real number exceeds this head
    problem = make_problem(POSITIONS, vocab_size=VOCAB_SIZE, width=WIDTH, ignored=ignored, bias=True, dtype=dtype)
    arguments = arguments_for(kind, POSITIONS, VOCAB_SIZE)
    plan = LossPlan(CHUNK_TOKENS, CHUNK_TOKENS, product, looks=True)
    with MixedProducts(), Watch() as watch:
        output = fused_loss(problem.hidden, problem.head, problem.labels, plan=plan, **arguments)
        (0.5 * output.loss).backward()
    callers = {(POSITIONS, VOCAB_SIZE)} if kind == "logits" else set()  # the stored rows, seen as a view
    assert watch.larger_than(CHUNK_TOKENS * VOCAB_SIZE) == callers
    assert (CHUNK_TOKENS, VOCAB_SIZE) in {shape for shape, _ in watch.tensors}
    if dtype is torch.bfloat16:  # neither is there a float32 copy of the head or of its gradient in one piece
        assert ((VOCAB_SIZE, WIDTH), torch.float32) not in watch.tensors


def test_the_watch_sees_a_large_tensor() -> None:
    problem = make_problem(POSITIONS, vocab_size=VOCAB_SIZE, width=WIDTH)
    with Watch() as watch:
        reference_loss(problem.hidden, problem.head, problem.labels)
    assert watch.larger_than(CHUNK_TOKENS * VOCAB_SIZE) == {(POSITIONS - 2, VOCAB_SIZE)}


@pytest.mark.parametrize("kind", SIGNALS)
def test_evaluation_computes_no_gradient(kind: str) -> None:
    problem = make_problem(12, ignored=0)
    arguments = arguments_for(kind, 12)
    with torch.no_grad(), Watch() as watch:
        output = fused_loss(problem.hidden, problem.head, problem.labels, chunk_tokens=4, **arguments)
    assert not output.loss.requires_grad
    assert watch.num_products == 3 * (3 if kind == "dense" else 2)  # of each chunk: the logits of each model
    assert kind == "sparse with tail" or not watch.calls["scatter_add_"]
    expected = answer(reference_loss, problem, **arguments)[0]
    for name in ("loss", "ce", "kd", "l2"):
        torch.testing.assert_close(getattr(output, name), getattr(expected, name).detach())


def test_training_needs_three_products_with_the_students_head() -> None:
    problem = make_problem(12, ignored=0)
    with Watch() as watch:
        fused_loss(
            problem.hidden, problem.head, problem.labels, chunk_tokens=4, signal=make_dense(12, 29)
        ).loss.backward()
    assert watch.num_products == 3 * (3 + 1)


@pytest.mark.parametrize("num_draws", [1, 2])
def test_unbiased_draws_have_the_full_gradient_on_average(num_draws: int) -> None:
    """Every outcome of drawing ids from q, weighted by its probability: exact, no luck involved."""
    problem = make_problem(1, vocab_size=5, width=3, ignored=0)
    dense = make_dense(1, 5)
    log_q = torch.log_softmax(dense.head.logits(dense.hidden) / 2.0, dim=1)[0]
    outcomes = [
        (torch.tensor(ids), torch.full((num_draws,), 1.0 / num_draws), log_q[list(ids)].sum().exp().item())
        for ids in itertools.product(range(5), repeat=num_draws)
    ]
    assert_average_is_full(problem, dense, log_q, outcomes)


def test_unbiased_weights_that_do_not_sum_to_one_have_the_full_gradient_on_average() -> None:
    """Each id is kept by a coin of its own with chance c and then weighs q / c: all 32 outcomes."""
    problem = make_problem(1, vocab_size=5, width=3, ignored=0)
    dense = make_dense(1, 5)
    log_q = torch.log_softmax(dense.head.logits(dense.hidden) / 2.0, dim=1)[0]
    chance = torch.tensor([0.9, 0.3, 0.5, 0.7, 0.2], dtype=torch.float64)
    outcomes = []
    for kept in itertools.product((0.0, 1.0), repeat=5):
        flags = torch.tensor(kept, dtype=torch.float64)
        probability = torch.where(flags > 0, chance, 1.0 - chance).prod().item()
        outcomes.append((torch.arange(5), flags * log_q.exp() / chance, probability))
    assert_average_is_full(problem, dense, log_q, outcomes)


def assert_average_is_full(
    problem: Problem, dense: DenseSignal, log_q: Tensor, outcomes: list[tuple[Tensor, Tensor, float]]
) -> None:
    """``outcomes`` are (ids, weights, probability) of a sparse signal for the one position there is."""
    arguments: dict[str, Any] = {"alpha": 1.0, "temperature": 2.0}
    average_kd, average = 0.0, [torch.zeros_like(tensor) for tensor in problem.parameters]
    for ids, weights, probability in outcomes:
        one = torch.ones(1, dtype=torch.bool)
        signal = SparseSignal(ids[None], weights[None], log_q[ids][None], torch.zeros(1), one, 2.0)
        output, gradients = answer(fused_loss, problem, signal=signal, **arguments)
        average_kd += probability * output.kd.item()
        average = [total + probability * gradient for total, gradient in zip(average, gradients, strict=True)]
    output, gradients = answer(fused_loss, problem, signal=dense, **arguments)
    assert average_kd == pytest.approx(output.kd.item(), rel=1e-6)
    torch.testing.assert_close(average, gradients, rtol=1e-6, atol=1e-7)
