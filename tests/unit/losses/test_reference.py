"""The specification itself, against formulas written out another way and against torch's own losses."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.support.distillation import SIGNALS, answer, make_dense, make_problem, make_signal, reference_loss
from torch import Tensor
from torch.nn import functional as F

from liquid_llm.data.types import IGNORE_INDEX
from liquid_llm.errors import UsageError
from liquid_llm.losses import DenseSignal, LogitsSignal, OutputHead, SparseSignal

TEMPERATURES = (1.0, 2.0, 0.7)


def exact_kl(teacher_logits: Tensor, student_logits: Tensor, temperature: float) -> float:
    """Sum over rows of KL(teacher || student), entry by entry in Python floats."""
    total = 0.0
    for teacher_row, student_row in zip(teacher_logits.tolist(), student_logits.tolist(), strict=True):
        q = [math.exp(value / temperature) for value in teacher_row]
        p = [math.exp(value / temperature) for value in student_row]
        total += sum(a / sum(q) * math.log(a / sum(q) / (b / sum(p))) for a, b in zip(q, p, strict=True))
    return total


def test_without_a_signal_it_is_cross_entropy() -> None:
    problem = make_problem(bias=True)
    output, gradients = answer(reference_loss, problem)
    logits = F.linear(problem.hidden, problem.weight, problem.bias)
    plain = F.cross_entropy(logits, problem.labels, reduction="sum", ignore_index=IGNORE_INDEX)
    torch.testing.assert_close(output.loss, plain)
    torch.testing.assert_close(output.ce, plain.detach())
    torch.testing.assert_close(gradients, list(torch.autograd.grad(plain, problem.parameters)))
    assert (output.num_positions, output.num_signal) == (11, 0)
    assert output.kd == 0
    assert output.l2 == 0


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_value_against_sums_in_python(temperature: float, alpha: float) -> None:
    problem = make_problem(ignored=0)
    signal = make_dense(13, 29)
    output = reference_loss(
        problem.hidden, problem.head, problem.labels, signal=signal, alpha=alpha, temperature=temperature
    )
    student = F.linear(problem.hidden, problem.weight).detach()
    kd = exact_kl(signal.head.logits(signal.hidden), student, temperature)
    ce = F.cross_entropy(student, problem.labels, reduction="sum").item()
    assert output.kd.item() == pytest.approx(kd, rel=1e-12)
    assert output.loss.item() == pytest.approx(alpha * temperature**2 * kd + (1 - alpha) * ce, rel=1e-12)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_temperature_squared_is_in_the_gradient_too(temperature: float) -> None:
    """d/dz of T^2 KL(q_T || p_T) is T (p_T - q_T): with an identity for a head, that is the gradient of ``hidden``."""
    logits = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(5, 8, dtype=torch.float64)
    identity = OutputHead(torch.eye(8, dtype=torch.float64))
    labels = torch.zeros(5, dtype=torch.int64)
    output = reference_loss(
        logits, identity, labels, signal=DenseSignal(teacher, identity), alpha=1.0, temperature=temperature
    )
    (gradient,) = torch.autograd.grad(output.loss, [logits])
    p, q = torch.softmax(logits / temperature, dim=1), torch.softmax(teacher / temperature, dim=1)
    torch.testing.assert_close(gradient, temperature * (p - q))


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_equal_models_have_no_divergence(temperature: float) -> None:
    problem = make_problem(bias=True, scale=1.3, soft_cap=4.0)
    same = DenseSignal(problem.hidden.detach(), problem.head)
    output, gradients = answer(
        reference_loss, problem, signal=same, alpha=1.0, temperature=temperature, reference=same, gamma=1.0
    )
    assert abs(output.kd.item()) < 1e-12
    assert output.l2 == 0
    assert max(gradient.abs().max().item() for gradient in gradients) < 1e-12


def test_scale_and_soft_cap_follow_the_formula() -> None:
    problem = make_problem(bias=True, scale=0.25, soft_cap=3.0, ignored=0)
    raw = problem.hidden @ problem.weight.T + problem.bias
    expected = F.cross_entropy(3.0 * torch.tanh(0.25 * raw / 3.0), problem.labels, reduction="sum")
    torch.testing.assert_close(answer(reference_loss, problem)[0].loss, expected)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_a_padded_teacher_is_cut(temperature: float) -> None:
    problem = make_problem()
    wide = make_dense(13, 40)
    cut = DenseSignal(wide.hidden, wide.head.cut(29))
    arguments: dict[str, Any] = {"alpha": 0.3, "temperature": temperature}
    got, expected = (answer(reference_loss, problem, signal=signal, **arguments)[0] for signal in (wide, cut))
    assert got.loss == expected.loss
    rows = wide.head.logits(wide.hidden)
    mask = torch.ones(13, dtype=torch.bool)
    stored = answer(reference_loss, problem, signal=LogitsSignal(rows, mask), **arguments)[0]
    torch.testing.assert_close(stored.loss, expected.loss)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_a_narrower_teacher_says_zero_on_the_rest(temperature: float) -> None:
    problem = make_problem(ignored=0)
    narrow = make_dense(13, 20)
    output = answer(reference_loss, problem, signal=narrow, alpha=1.0, temperature=temperature)[0]
    q = torch.softmax(narrow.head.logits(narrow.hidden) / temperature, dim=1)
    p = torch.softmax(problem.head.logits(problem.hidden) / temperature, dim=1).detach()
    torch.testing.assert_close(output.kd, (q * (q / p[:, :20]).log()).sum())


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_a_sparse_signal_of_the_whole_vocabulary_is_dense(temperature: float) -> None:
    problem = make_problem(ignored=0)
    dense = make_dense(13, 29)
    log_probs, ids = torch.log_softmax(dense.head.logits(dense.hidden) / temperature, dim=1).sort(dim=1)
    none, every = torch.zeros(13, dtype=torch.float64), torch.ones(13, dtype=torch.bool)
    sparse = SparseSignal(ids, log_probs.exp(), log_probs, none, every, temperature)
    arguments: dict[str, Any] = {"alpha": 0.3, "temperature": temperature}
    got, expected = (answer(reference_loss, problem, signal=signal, **arguments) for signal in (sparse, dense))
    torch.testing.assert_close(got[0].loss, expected[0].loss)
    torch.testing.assert_close(got[1], expected[1])


def test_a_tail_is_one_bucket_more() -> None:
    """Exact ids with a tail bucket: the KL of both distributions with everything else lumped into one entry."""
    problem = make_problem(ignored=0)
    signal = make_signal("sparse with tail", 13, 29, 2.0)
    assert isinstance(signal, SparseSignal)
    output = answer(reference_loss, problem, signal=signal, alpha=1.0, temperature=2.0)[0]
    student = torch.softmax(problem.head.logits(problem.hidden) / 2.0, dim=1).tolist()
    total = 0.0
    for row in range(13):
        if not signal.mask[row]:
            continue
        kept = [slot for slot in range(6) if signal.weights[row, slot] > 0]
        ids = [int(signal.ids[row, slot]) for slot in kept]
        for slot, index in zip(kept, ids, strict=True):
            weight, log_prob = signal.weights[row, slot].item(), signal.log_probs[row, slot].item()
            total += weight * (log_prob - math.log(student[row][index]))
        tail = signal.tail_mass[row].item()
        rest = sum(probability for index, probability in enumerate(student[row]) if index not in ids)
        total += tail * math.log(tail / rest) if tail else 0.0
    assert output.kd.item() == pytest.approx(total, rel=1e-9)


@pytest.mark.parametrize("kind", ["logits", "sparse", "sparse with tail"])
def test_rows_without_a_record_get_plain_cross_entropy(kind: str) -> None:
    problem = make_problem()
    signal = make_signal(kind, 13, 29, 2.0)
    assert isinstance(signal, LogitsSignal | SparseSignal)
    labels = torch.where(signal.mask, IGNORE_INDEX, problem.labels)
    arguments: dict[str, Any] = {"signal": signal, "alpha": 0.9, "temperature": 2.0}
    output = reference_loss(problem.hidden, problem.head, labels, **arguments)
    plain = reference_loss(problem.hidden, problem.head, labels)
    got = torch.autograd.grad(output.loss, problem.parameters)
    torch.testing.assert_close(got, torch.autograd.grad(plain.loss, problem.parameters))
    assert output.loss == plain.loss
    assert (output.num_signal, output.kd.item()) == (0, 0.0)


@pytest.mark.parametrize("kind", SIGNALS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_finite_differences(kind: str, temperature: float) -> None:
    problem = make_problem(5, vocab_size=9, width=3, ignored=1, bias=True, scale=1.2, soft_cap=4.0)
    signal = make_signal(kind, 5, 9, temperature)

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return reference_loss(
            hidden,
            OutputHead(weight, bias, problem.scale, problem.soft_cap),
            problem.labels,
            signal=signal,
            alpha=0.3,
            temperature=temperature,
            reference=make_dense(5, 9),
            gamma=0.4,
        ).loss

    assert torch.autograd.gradcheck(loss, problem.parameters)


def test_a_sparse_signal_at_another_temperature_is_refused() -> None:
    problem = make_problem()
    with pytest.raises(UsageError, match=r"one temperature only; got 1; expected 2\."):
        answer(reference_loss, problem, signal=make_signal("sparse", 13, 29, 2.0), alpha=0.5)


def sparse_of(**changed: Any) -> SparseSignal:
    weights = torch.full((13, 2), 0.5)
    fields = {
        "ids": torch.zeros(13, 2, dtype=torch.int64),
        "weights": weights,
        "log_probs": weights.log(),
        "tail_mass": torch.zeros(13),
        "mask": torch.ones(13, dtype=torch.bool),
    }
    return SparseSignal(**(fields | changed), temperature=1.0)


MASK = torch.ones(13, dtype=torch.bool)
BAD_ARGUMENTS: dict[str, Callable[[], dict[str, Any]]] = {
    "alpha must": lambda: {"alpha": 1.5},
    "temperature must": lambda: {"temperature": 0.0},
    "gamma must": lambda: {"gamma": -0.1},
    "signal has 12 rows": lambda: {"signal": make_dense(12, 29)},
    "reference has 12 rows": lambda: {"reference": make_dense(12, 29)},
    "the reference student has 30 logits": lambda: {"reference": make_dense(13, 30)},
    "do not fit": lambda: {"signal": DenseSignal(torch.zeros(13, 4), OutputHead(torch.zeros(29, 5)))},
    "signal.rows": lambda: {"signal": LogitsSignal(torch.zeros(13), MASK)},
    "signal.mask": lambda: {"signal": LogitsSignal(torch.zeros(13, 29), MASK.float())},
    "signal.ids must be int64": lambda: {"signal": sparse_of(ids=torch.zeros(13, 2, dtype=torch.int32))},
    "signal.ids must lie": lambda: {"signal": sparse_of(ids=torch.full((13, 2), 29))},
    "signal.log_probs": lambda: {"signal": sparse_of(log_probs=torch.zeros(13, 3))},
    "signal.tail_mass": lambda: {"signal": sparse_of(tail_mass=torch.zeros(1))},
    "signal.num_signal is 3": lambda: {"signal": sparse_of(num_signal=3)},
    "signal.any_tail is False": lambda: {"signal": sparse_of(tail_mass=torch.ones(13), any_tail=False)},
    "labels must lie": lambda: {"labels": torch.full((13,), 29)},
    "labels must be int64": lambda: {"labels": torch.zeros(13)},
    "hidden must be": lambda: {"hidden": torch.zeros(13, 7, dtype=torch.int64)},
    "head.weight": lambda: {"head": OutputHead(torch.zeros(29, 8))},
    "head.bias": lambda: {"head": OutputHead(torch.zeros(29, 7), torch.zeros(28))},
    "head.soft_cap": lambda: {"head": OutputHead(torch.zeros(29, 7), soft_cap=0.0)},
}


@pytest.mark.parametrize("message", BAD_ARGUMENTS)
def test_arguments_that_do_not_fit_are_refused(message: str) -> None:
    """Some when they are made, the others when the loss is asked for."""
    problem = make_problem()
    arguments = {"hidden": problem.hidden, "head": problem.head, "labels": problem.labels}
    with pytest.raises(ValueError, match=message):
        reference_loss(**(arguments | BAD_ARGUMENTS[message]()))
