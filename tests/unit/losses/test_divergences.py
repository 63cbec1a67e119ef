"""Every divergence, the example's too: zero between equals, true gradients, the fused value is the plain one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.support.distillation import (
    FORM_OF,
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
from liquid_llm.losses import DenseSignal, Objective, OutputHead, SparseSignal
from liquid_llm.losses.divergences import check_form, get_divergence
from liquid_llm.losses.signals import DRAWS, HEAD, HEAD_AND_DRAWS, WHOLE

EXAMPLES = Path(__file__).parents[3] / "examples" / "extending"
SPECS = [
    "forward_kl",
    "reverse_kl",
    "jsd",
    "jsd:beta=0.1",
    "skew_kl",
    "skew_kl:skew=0.6",
    "skew_reverse_kl",
    "decoupled_topk",
    "decoupled_topk:k=3",
    "tail_aware:k=3",
    "tail_aware:k=2:beta=0.5",
    "hellinger",
]
DENSE = ["dense", "logits"]
FORMS = {**FORM_OF, "sparse with tail": DRAWS}


@pytest.fixture(scope="module", autouse=True)
def _examples() -> Any:
    """Registers the examples' divergences as their one line would."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        patch.setitem(registry.DIVERGENCES, "hellinger", "hellinger:Hellinger")
        yield


def test_every_registered_divergence_is_here() -> None:
    assert set(registry.DIVERGENCES) == {spec.partition(":")[0] for spec in SPECS}


def signals(spec: str) -> list[str]:
    return DENSE + [kind for kind, form in FORMS.items() if form in get_divergence(spec).answers]


def asked_at(spec: str, temperature: float) -> float:
    return Objective(0.5, temperature, divergence=spec).signal_temperature


@given(
    spec=st.sampled_from(SPECS),
    kind=st.sampled_from([*DENSE, *FORMS]),
    positions=st.integers(0, 20),
    ignored=st.integers(0, 20),
    vocab_size=st.integers(7, 50),
    teacher_vocab=st.integers(-6, 6),
    chunk_tokens=st.integers(1, 25),
    temperature=st.sampled_from([1.0, 2.0, 0.7]),
)
def test_the_fused_loss_is_the_plain_formula(
    spec: str,
    kind: str,
    positions: int,
    ignored: int,
    vocab_size: int,
    teacher_vocab: int,
    chunk_tokens: int,
    temperature: float,
) -> None:
    if kind not in signals(spec):
        return
    problem = make_problem(positions, vocab_size=vocab_size, ignored=ignored, bias=True, scale=1.3, soft_cap=6.0)
    asked = asked_at(spec, temperature)
    signal = make_signal(kind, positions, vocab_size + (teacher_vocab if kind in DENSE else 0), asked)
    arguments = {"signal": signal, "alpha": 0.7, "temperature": temperature, "divergence": spec}
    got = answer(fused_loss, problem, chunk_tokens=chunk_tokens, **arguments)
    assert_same(got, answer(reference_loss, problem, **arguments), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("loss", [fused_loss, reference_loss])
def test_gradients_by_finite_differences(loss: Any, temperature: float, spec: str) -> None:
    for kind in signals(spec):
        problem = make_problem(5, vocab_size=9, width=3, ignored=1, bias=True, scale=1.2, soft_cap=4.0)
        signal = make_signal(kind, 5, 9, asked_at(spec, temperature))

        def value(
            hidden: Tensor, weight: Tensor, bias: Tensor, problem: Problem = problem, signal: Any = signal
        ) -> Tensor:
            head = OutputHead(weight, bias, problem.scale, problem.soft_cap)
            stated = {"alpha": 0.6, "temperature": temperature, "divergence": spec}
            return loss(hidden, head, problem.labels, signal=signal, **stated).loss

        assert gradcheck(value, problem.parameters, fast_mode=True)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_it_is_zero_between_equals_and_positive_otherwise(temperature: float, spec: str) -> None:
    problem = make_problem(bias=True)
    arguments = {"alpha": 1.0, "temperature": temperature, "divergence": spec}
    same = DenseSignal(problem.hidden.detach(), problem.head)
    output, gradients = answer(fused_loss, problem, signal=same, **arguments)
    assert abs(output.kd.item()) < 1e-12
    assert max(gradient.abs().max().item() for gradient in gradients) < 1e-12
    assert fused_loss(problem.hidden, problem.head, problem.labels, signal=make_dense(13, 29), **arguments).kd > 0.5


@pytest.mark.parametrize("spec", SPECS)
def test_a_factor_and_a_cut_into_parts_change_nothing(spec: str) -> None:
    """As a mean over positions and a micro-batch in two passes do."""
    for kind in signals(spec):
        problem, signal = make_problem(13, ignored=3), make_signal(kind, 13, 29, asked_at(spec, 2.0))
        assert signal is not None
        stated: dict[str, Any] = {"alpha": 0.7, "temperature": 2.0, "divergence": spec}
        whole, gradients = answer(fused_loss, problem, signal=signal, factor=-3.5, **stated)
        parts = [
            fused_loss(problem.hidden[rows], problem.head, problem.labels[rows], signal=signal.part(rows), **stated)
            for rows in (slice(0, 4), slice(4, 13))
        ]
        torch.testing.assert_close(sum(one.kd for one in parts), whole.kd)
        loss = sum(one.loss for one in parts)
        torch.testing.assert_close(loss.detach(), whole.loss.detach())
        (-3.5 * loss).backward()
        torch.testing.assert_close([one.grad for one in problem.parameters], gradients)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_float32(spec: str, temperature: float) -> None:
    """Also with logits of 50 and more, and beyond the range of exp."""
    for kind in signals(spec):
        problem = make_problem(37, vocab_size=301, width=16, bias=True)
        signal = make_signal(kind, 37, 301, asked_at(spec, temperature))
        for scale in (1.0, 12.0):
            scaled = Problem(problem.hidden, problem.weight, problem.bias, problem.labels, scale)
            arguments = {"signal": signal, "alpha": 0.3, "temperature": temperature, "divergence": spec}
            got = answer(fused_loss, scaled.to(torch.float32), chunk_tokens=10, **arguments)
            assert_same(got, answer(reference_loss, scaled, **arguments), rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("who", ["teacher", "student", "both"])
def test_minus_infinity_in_a_bias_is_no_nan(spec: str, who: str) -> None:
    """A masked token has the probability 0: where the other does not say it either, nothing else changes."""
    banned = torch.zeros(29, dtype=torch.float64)
    banned[[3, 28]] = -torch.inf
    problem, teacher = make_problem(ignored=0, bias=True, seed=5), make_dense(13, 29)
    labels = problem.labels.clamp(4, 27)
    mine, theirs = (banned if who in (one, "both") else banned.clamp(min=0.0) for one in ("student", "teacher"))
    student_bias = (problem.bias + mine).detach().requires_grad_()
    assert teacher.head.bias is not None
    plain = OutputHead(teacher.head.weight, teacher.head.bias + theirs)  # a soft-cap would bound it
    masked = Problem(problem.hidden, problem.weight, student_bias, labels)
    arguments = {"signal": DenseSignal(teacher.hidden, plain), "alpha": 0.7, "temperature": 2.0, "divergence": spec}
    got, expected = (answer(loss, masked, **arguments) for loss in (fused_loss, reference_loss))
    assert all(bool(gradient.isfinite().all()) for gradient in got[1])
    assert bool(got[0].loss.isfinite())
    assert_same(got, expected, rtol=1e-9, atol=1e-11)
    if who == "both":
        kept = [number for number in range(29) if number not in (3, 28)]
        places = torch.zeros(29, dtype=torch.int64).scatter(0, torch.tensor(kept), torch.arange(27))
        small = Problem(problem.hidden, problem.weight[kept], student_bias[kept], places[labels])
        cut = DenseSignal(teacher.hidden, OutputHead(plain.weight[kept], plain.bias[kept]))
        without = answer(fused_loss, small, **{**arguments, "signal": cut})
        torch.testing.assert_close(got[0].loss.detach(), without[0].loss.detach())
        torch.testing.assert_close(got[1][0], without[1][0])


# ---------------------------------------------------------------------------------------------------- what each one is


def pair() -> tuple[Tensor, Tensor]:
    """Log-probabilities of a student and of a teacher [6, 11]."""
    numbers = torch.Generator().manual_seed(4)
    student, teacher = (torch.randn(6, 11, dtype=torch.float64, generator=numbers).log_softmax(1) for _ in range(2))
    return student, teacher


def kl(left: Tensor, right: Tensor) -> Tensor:
    return (left * (left / right).log()).sum(dim=1)


def test_reverse_is_the_other_direction() -> None:
    """KL(p || q) is KL(q || p) with the two exchanged."""
    student, teacher = pair()
    forward, reverse = get_divergence("forward_kl"), get_divergence("reverse_kl")
    torch.testing.assert_close(reverse.plain(student, teacher), forward.plain(teacher, student))
    assert not torch.allclose(reverse.plain(student, teacher), forward.plain(student, teacher))


def test_the_limits_of_mixtures_are_the_two_kls() -> None:
    student, teacher = pair()
    forward, reverse = kl(teacher.exp(), student.exp()), kl(student.exp(), teacher.exp())
    small = 1e-6
    for spec, factor, limit in (
        (f"jsd:beta={small:.6f}", small, forward),
        (f"jsd:beta={1 - small:.6f}", small, reverse),
        (f"skew_kl:skew={small:.6f}", 1.0, forward),
        (f"skew_reverse_kl:skew={small:.6f}", 1.0, reverse),
    ):
        found = get_divergence(spec).plain(student, teacher) / factor
        torch.testing.assert_close(found, limit, rtol=1e-4, atol=0.0)
    half = get_divergence("jsd").plain(student, teacher)
    torch.testing.assert_close(half, get_divergence("jsd:beta=0.5").plain(teacher, student))  # symmetric
    mixture = (student.exp() + teacher.exp()) / 2
    torch.testing.assert_close(half, (kl(teacher.exp(), mixture) + kl(student.exp(), mixture)) / 2)


def test_decoupled_parts_are_a_mass_and_a_share_of_it() -> None:
    """Written out entry by entry, at T = 1 and at another."""
    student, teacher = pair()
    for temperature in (1.0, 2.0):
        found = get_divergence("decoupled_topk:k=4", temperature).plain(student, teacher)
        for row in range(6):
            ids = teacher[row].topk(4).indices
            q, p = teacher[row, ids].exp(), student[row, ids].exp()
            masses = (torch.stack([one.sum(), 1 - one.sum()]).unsqueeze(0) for one in (q, p))
            shares = ((one ** (1 / temperature)).unsqueeze(0) for one in (q, p))
            inside = kl(*(one / one.sum() for one in shares))
            torch.testing.assert_close(found[row : row + 1], kl(*masses) + q.sum() * inside)


def test_decoupled_at_one_is_a_bucket_and_from_one_store_at_every_temperature() -> None:
    """k log-probabilities at T = 1 tell what the whole distribution does; a forward KL needs them anew at each T."""
    problem, teacher = make_problem(13), make_dense(13, 29)
    log_probs, ids = teacher.head.logits(teacher.hidden).log_softmax(1).topk(5, dim=1)
    stored = SparseSignal(
        ids,
        log_probs.exp(),
        log_probs,
        1 - log_probs.exp().sum(1),
        torch.ones(13, dtype=torch.bool),
        1.0,
        form=HEAD,
        num_exact=torch.full((13,), 5),
    )
    for temperature in (0.7, 1.0, 2.0, 4.0):
        stated = {"alpha": 0.8, "temperature": temperature, "divergence": "decoupled_topk:k=5"}
        got, expected = (answer(fused_loss, problem, signal=one, **stated) for one in (stored, teacher))
        assert_same(got, expected, rtol=1e-9, atol=1e-11)
    bucket = answer(fused_loss, problem, signal=stored, alpha=0.8)
    at_one = answer(fused_loss, problem, signal=stored, alpha=0.8, divergence="decoupled_topk:k=5")
    assert_same(at_one, bucket, rtol=1e-9, atol=1e-11)


def test_tail_aware_counts_the_tails_part_beta_times() -> None:
    student, teacher = pair()
    whole = get_divergence("forward_kl").plain(student, teacher)
    torch.testing.assert_close(get_divergence("tail_aware:k=4:beta=1").plain(student, teacher), whole)
    found = get_divergence("tail_aware:k=4:beta=3").plain(student, teacher)
    for row in range(6):
        held = torch.zeros(11, dtype=torch.bool).scatter(0, teacher[row].topk(4).indices, True)
        q, p = teacher[row].exp(), student[row].exp()
        tail = kl((q[~held] / q[~held].sum()).unsqueeze(0), (p[~held] / p[~held].sum()).unsqueeze(0))
        torch.testing.assert_close(found[row : row + 1], whole[row] + 2 * q[~held].sum() * tail)


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("loss", [fused_loss, reference_loss])
@pytest.mark.parametrize(
    ("spec", "kind", "codec"),
    [
        ("reverse_kl", "sparse", "full"),
        ("jsd:beta=0.3", "head", "full"),
        ("skew_kl", "head and draws", "full"),
        ("skew_reverse_kl", "sparse with tail", "full"),
        ("decoupled_topk", "sparse", "topk"),
        ("tail_aware", "head", "tail"),
        ("tail_aware", "sparse", "tail"),
    ],
)
def test_a_signal_that_it_cannot_answer_is_refused_and_a_codec_named(
    loss: Any, spec: str, kind: str, codec: str
) -> None:
    problem = make_problem()
    name = spec.partition(":")[0]
    with pytest.raises(UsageError, match=rf"{name} needs whole distributions.*--codec={codec}"):
        answer(loss, problem, signal=make_signal(kind, 13, 29, 1.0), alpha=0.5, divergence=spec)


def test_what_each_answers_is_stated() -> None:
    every = {WHOLE, HEAD, HEAD_AND_DRAWS, DRAWS}
    expected = {"forward_kl": every, "decoupled_topk": every - {DRAWS}, "tail_aware": {WHOLE, HEAD_AND_DRAWS}}
    for spec in SPECS:
        name = spec.partition(":")[0]
        assert get_divergence(spec).answers == expected.get(name, {WHOLE}), name


def test_a_store_of_too_few_ids_is_refused() -> None:
    check_form("decoupled_topk:k=16", HEAD, "math_tool", 16)
    with pytest.raises(UsageError, match=r"math_tool: .*got 16 ids.*at least 17.*--topk=17"):
        check_form("decoupled_topk:k=17", HEAD, "math_tool", 16)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("kl", "divergence must be one of"),
        ("forward_kl:beta=1", "forward_kl has no option 'beta', it takes none"),
        ("jsd:skew=1", "jsd has no option 'skew', it takes only beta"),
        ("jsd:beta=0", "between 0 and 1, got 0 .forward_kl is its limit at 0, reverse_kl at 1"),
        ("jsd:beta=1.0", "between 0 and 1"),
        ("jsd:beta", "expected option=number"),
        ("jsd:beta=high", "expected option=number"),
        ("skew_kl:skew=-0.1", "between 0 and 1"),
        ("decoupled_topk:k=0", "at least 1, got 0"),
        ("decoupled_topk:k=2.5", "whole number"),
        ("decoupled_topk:k=1e400", "whole number"),
        ("tail_aware:k=5:beta=0", "beta must be above 0"),
    ],
)
def test_a_spec_that_is_none_is_refused(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Objective(divergence=spec)


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
