"""Plans, and that without looking the loss neither waits for a device nor lets a shape depend on a value."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
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
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from liquid_llm.losses import (
    DenseSignal,
    LogitsSignal,
    LossPlan,
    OutputHead,
    Signal,
    SparseSignal,
    choose_plan,
)

MIB = 2**20


@pytest.mark.parametrize(
    ("device", "vocab_size", "amx", "expected"),
    [
        ("cpu", 128_256, False, LossPlan(196, 8, "widen", looks=True)),
        ("cpu", 128_256, True, LossPlan(196, 8, "tiles", looks=True)),
        ("cpu", 1000, False, LossPlan(384, 1048, "widen", looks=True)),
        ("cpu", 10_000_000, False, LossPlan(16, 1, "widen", looks=True)),
        ("cuda", 128_256, None, LossPlan(523, 523, "mixed", looks=False)),
        ("cuda:1", 49_152, True, LossPlan(1365, 1365, "mixed", looks=False)),
        ("mps", 49_152, None, LossPlan(1365, 1365, "widen", looks=False)),
    ],
)
def test_the_plan_of_a_device(device: str, vocab_size: int, amx: bool | None, expected: LossPlan) -> None:
    assert choose_plan(device, vocab_size, amx=amx) == expected
    assert choose_plan(torch.device(device), vocab_size, amx=amx) == expected
    limit = 96 * MIB if device == "cpu" else 256 * MIB
    assert expected.chunk_tokens == 16 or 4 * vocab_size * expected.chunk_tokens <= limit


@pytest.mark.parametrize("values", [(0, 1, "widen"), (1, 0, "widen"), (1, 1, "bfloat16")])
def test_a_plan_that_cannot_be_is_refused(values: tuple[int, int, str]) -> None:
    with pytest.raises(ValueError, match="must be"):
        LossPlan(*values, looks=True)


# ------------------------------------------------------------------------------------------------------------ waiting


class HostWaits(TorchDispatchMode):
    """Fails where the host reads a tensor's value, or a shape follows from values."""

    reading = ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal", "item", "unique", "_to_copy")

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = str(func).split(".")[1]
        converts = name == "_to_copy" and (kwargs or {}).get("device") is None
        assert name not in self.reading or converts, f"{func} waits for the device"
        if name in ("index", "index_put_", "index_put"):
            assert all(one is None or one.dtype != torch.bool for one in args[1]), "a boolean index waits"
        return func(*args, **(kwargs or {}))


def mixed_problem(positions: int = 57) -> Problem:
    """As under --precision=bfloat16: hidden states in bfloat16, a float32 head, every row labelled."""
    problem = make_problem(positions, vocab_size=301, width=16, ignored=0, bias=True, soft_cap=5.0).to(torch.float32)
    return Problem(
        problem.hidden.detach().bfloat16().requires_grad_(), problem.weight, problem.bias, problem.labels, 1.0, 5.0
    )


def arguments_for(kind: str, temperature: float, positions: int = 57, **more: Any) -> dict[str, Any]:
    return {
        "signal": make_signal(kind, positions, 301, temperature, dtype=torch.bfloat16),
        "reference": make_dense(positions, 301, dtype=torch.bfloat16, seed=3),
        "alpha": 0.3,
        "temperature": temperature,
        "gamma": 0.2,
        **more,
    }


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("kind", SIGNALS)
def test_on_a_device_nothing_waits(kind: str, temperature: float) -> None:
    """Rows without a record hold NaN here, and the answer is that of the specification all the same."""
    problem = mixed_problem()
    arguments = arguments_for(kind, temperature)
    plan = replace(choose_plan("cuda", 301), chunk_tokens=10, slice_tokens=10)
    with HostWaits(), MixedProducts() as products:
        got = answer(fused_loss, problem, factor=0.5, plan=plan, all_labelled=True, **arguments)
    assert products.calls["aten.mm.dtype_out"] > 0
    rounded = Problem(problem.hidden, problem.weight.detach().bfloat16(), problem.bias, problem.labels, 1.0, 5.0)
    exact = rounded.to(torch.float32)
    assert_same(got, answer(reference_loss, exact, factor=0.5, **arguments), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(
        got[0].loss, reference_loss(exact.hidden, exact.head, exact.labels, **arguments).loss, rtol=1e-4, atol=0.0
    )
    assert [gradient.dtype for gradient in got[1]] == [torch.bfloat16, torch.float32, torch.float32]


def test_evaluation_on_a_device_waits_no_more() -> None:
    problem, arguments = mixed_problem(), arguments_for("sparse with tail", 1.0)
    arguments.update(plan=choose_plan("cuda", 301), all_labelled=True)
    with HostWaits(), MixedProducts(), torch.no_grad():
        output = fused_loss(problem.hidden, problem.head, problem.labels, **arguments)
    assert not output.loss.requires_grad


@pytest.mark.parametrize("change", [{"all_labelled": False}, {"plan": choose_plan("cpu", 301)}])
def test_the_watch_sees_a_wait(change: dict[str, Any]) -> None:
    problem, arguments = mixed_problem(), arguments_for("logits", 1.0)
    arguments.update(plan=choose_plan("cuda", 301), all_labelled=True)
    arguments.update(change)
    with HostWaits(), MixedProducts(), pytest.raises(AssertionError, match="waits"):
        answer(fused_loss, problem, **arguments)


def fake(mode: FakeTensorMode, signal: Signal | None) -> Signal | None:
    """A signal whose tensors have no values; what the host knows of it goes along, as when it moves to a device."""
    if signal is None:
        return None
    if isinstance(signal, DenseSignal):
        head = signal.head
        bias = None if head.bias is None else mode.from_tensor(head.bias)
        there = OutputHead(mode.from_tensor(head.weight), bias, head.scale, head.soft_cap)
        return DenseSignal(mode.from_tensor(signal.hidden), there)
    values = {one.name: getattr(signal, one.name) for one in fields(signal)}
    return replace(
        signal, **{name: mode.from_tensor(value) for name, value in values.items() if isinstance(value, Tensor)}
    )


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("kind", SIGNALS)
def test_the_loss_runs_on_tensors_without_values(kind: str, temperature: float) -> None:
    """So that its memory on a card can be worked out where there is none."""
    problem, arguments = mixed_problem(), arguments_for(kind, temperature)
    mode = FakeTensorMode()
    for name in ("signal", "reference"):
        arguments[name] = fake(mode, arguments[name])
    hidden, weight, bias, labels = (
        mode.from_tensor(one) for one in (problem.hidden, problem.weight, problem.bias, problem.labels)
    )
    with mode:
        output, gradients = answer(
            fused_loss,
            Problem(hidden, weight, bias, labels, 1.0, 5.0),
            plan=choose_plan("cuda", 301),
            all_labelled=True,
            **arguments,
        )
    assert output.loss.shape == ()
    assert [(one.shape, one.dtype) for one in gradients] == [(one.shape, one.dtype) for one in problem.parameters]
    real = arguments_for(kind, temperature)["signal"]
    expected = 0 if real is None else real.num_signal
    assert (output.num_positions, output.num_signal) == (57, expected)


def test_tensors_without_values_cannot_be_looked_at() -> None:
    """That the test above would fail."""
    mode = FakeTensorMode()
    problem = mixed_problem()
    hidden, weight, labels = (mode.from_tensor(one) for one in (problem.hidden, problem.weight, problem.labels))
    for plan, labelled in ((choose_plan("cpu", 301), True), (choose_plan("cuda", 301), False)):
        with mode, pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
            fused_loss(hidden, OutputHead(weight), labels, plan=plan, all_labelled=labelled)


# ------------------------------------------------------------------------------------------------------ all labelled


@pytest.mark.parametrize("kind", SIGNALS)
def test_rows_known_to_be_labelled_have_the_same_bits(kind: str) -> None:
    problem = make_problem(57, vocab_size=301, width=16, ignored=0, bias=True, dtype=torch.float32)
    arguments = arguments_for(kind, 2.0, chunk_tokens=10)
    known = answer(fused_loss, problem, all_labelled=True, **arguments)
    assert_same(known, answer(fused_loss, problem, **arguments), rtol=0.0, atol=0.0)


def test_a_row_without_a_label_among_rows_said_to_have_one() -> None:
    problem = make_problem(ignored=1)
    with pytest.raises(ValueError, match="a row without a label"):
        answer(fused_loss, problem, all_labelled=True)


# -------------------------------------------------------------------------------------- what the host knows of a signal


def test_a_signal_is_counted_where_it_is_made() -> None:
    mask = torch.tensor([True, False, True])
    assert LogitsSignal(torch.zeros(3, 2), mask).num_signal == 2
    slots = torch.zeros(3, 1)
    for tail, expected in (([0.0, torch.nan, 0.0], False), ([0.0, 0.0, 0.1], True)):
        signal = SparseSignal(slots.long(), slots, slots, torch.tensor(tail), mask, 1.0)
        assert (signal.num_signal, signal.any_tail) == (2, expected)


def test_what_was_counted_moves_along_and_nothing_is_counted_elsewhere() -> None:
    signal = make_signal("sparse with tail", 13, 29, 1.0)
    assert isinstance(signal, SparseSignal)
    moved = fake(FakeTensorMode(), signal)
    assert isinstance(moved, SparseSignal)
    assert (moved.num_signal, moved.any_tail) == (signal.num_signal, True)
    unknown = replace(moved, num_signal=None, any_tail=None)
    assert (unknown.num_signal, unknown.any_tail) == (None, None)


@pytest.mark.parametrize("kind", ["logits", "sparse", "sparse with tail"])
def test_a_signal_that_was_never_counted_gives_the_same_answer(kind: str) -> None:
    """It is counted then, and waited for."""
    problem = mixed_problem(13)
    signal = make_signal(kind, 13, 301, 1.0)
    assert signal is not None
    uncounted = replace(signal)
    for name in ("num_signal", "any_tail"):
        if hasattr(uncounted, name):
            object.__setattr__(uncounted, name, None)
    arguments: dict[str, Any] = {"alpha": 0.5, "plan": replace(choose_plan("cuda", 301)), "all_labelled": True}
    with MixedProducts():
        expected = answer(fused_loss, problem, signal=signal, **arguments)
        assert_same(answer(fused_loss, problem, signal=uncounted, **arguments), expected, rtol=1e-6, atol=1e-6)
