"""Checks of the loss's arguments, the same for the reference and the fused implementation.

Mistakes of a caller (shapes, ranges) are ``ValueError``; a stored signal at another temperature than the run's is the
user's to mend and raises ``UsageError``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from liquid_llm.data.types import IGNORE_INDEX
from liquid_llm.errors import UsageError
from liquid_llm.losses.signals import DenseSignal, LogitsSignal, OutputHead, Signal, SparseSignal


def check_arguments(
    hidden: Tensor,
    head: OutputHead,
    labels: Tensor,
    *,
    signal: Signal | None,
    kd_alpha: float,
    kd_temperature: float,
    reference: DenseSignal | None,
    l2_gamma: float,
    all_labelled: bool = False,
    looks: bool = True,
) -> None:
    """Refuse arguments that cannot mean anything, before any product is formed.

    Values (labels, ids, what a signal says of itself) are checked where the tensors lie on the CPU and the host
    ``looks``; shapes, dtypes and numbers always.

    Raises:
        ValueError: shapes that do not fit, a label or id outside the vocabulary, alpha outside [0, 1], a temperature
            that is not positive, a negative gamma, a reference student with another vocabulary, a row without a label
            where ``all_labelled`` says that there is none, a signal whose counts are not its tensors'.
        UsageError: a sparse signal that holds at another temperature than ``kd_temperature``.
    """
    if not 0.0 <= kd_alpha <= 1.0:
        raise ValueError(f"kd_alpha must lie in [0, 1], got {kd_alpha}")
    if not (kd_temperature > 0.0 and math.isfinite(kd_temperature)):
        raise ValueError(f"kd_temperature must be positive and finite, got {kd_temperature}")
    if not (l2_gamma >= 0.0 and math.isfinite(l2_gamma)):
        raise ValueError(f"l2_gamma must be finite and not negative, got {l2_gamma}")
    if hidden.ndim != 2 or not hidden.is_floating_point():
        raise ValueError(f"hidden must be a floating [positions, hidden], got {hidden.dtype} {list(hidden.shape)}")
    num_rows = hidden.shape[0]
    if labels.shape != (num_rows,) or labels.dtype != torch.int64:
        raise ValueError(f"labels must be int64 [{num_rows}], got {labels.dtype} {list(labels.shape)}")
    _check_head("head", hidden, head)
    looks = looks and labels.device.type == "cpu"
    if looks:
        _check_labels(labels, head.vocab_size, all_labelled=all_labelled)
    if reference is not None:
        _check_rows("reference", reference.num_positions, num_rows)
        _check_head("reference.head", reference.hidden, reference.head)
        if reference.head.vocab_size != head.vocab_size:
            raise ValueError(
                f"the reference student has {reference.head.vocab_size} logits, the student {head.vocab_size}"
            )
    if signal is not None:
        _check_rows("signal", signal.num_positions, num_rows)
        _check_signal(signal, kd_temperature)
        if looks and not isinstance(signal, DenseSignal):
            _check_values(signal, labels, head.vocab_size)


def _check_labels(labels: Tensor, vocab_size: int, *, all_labelled: bool) -> None:
    if bool(((labels >= vocab_size) | ((labels < 0) & (labels != IGNORE_INDEX))).any()):
        raise ValueError(f"labels must lie in [0, {vocab_size}) or be {IGNORE_INDEX}")
    if all_labelled and bool((labels == IGNORE_INDEX).any()):
        raise ValueError("a row without a label, where all_labelled says that there is none")


def _check_rows(name: str, got: int, expected: int) -> None:
    if got != expected:
        raise ValueError(f"{name} has {got} rows, hidden has {expected}: they must be aligned row by row")


def _check_head(name: str, hidden: Tensor, head: OutputHead) -> None:
    if head.weight.ndim != 2 or head.weight.shape[1] != hidden.shape[-1]:
        raise ValueError(f"{name}.weight must be [vocab, {hidden.shape[-1]}], got {list(head.weight.shape)}")
    if head.bias is not None and head.bias.shape != (head.vocab_size,):
        raise ValueError(f"{name}.bias must be [{head.vocab_size}], got {list(head.bias.shape)}")
    if head.soft_cap is not None and not head.soft_cap > 0.0:
        raise ValueError(f"{name}.soft_cap must be positive, got {head.soft_cap}")


def _check_signal(signal: Signal, kd_temperature: float) -> None:
    rows = signal.num_positions
    if isinstance(signal, DenseSignal):
        _check_head("signal.head", signal.hidden, signal.head)
        return
    if signal.mask.shape != (rows,) or signal.mask.dtype != torch.bool:
        raise ValueError(f"signal.mask must be bool [{rows}], got {signal.mask.dtype} {list(signal.mask.shape)}")
    if isinstance(signal, LogitsSignal):
        if signal.rows.ndim != 2:
            raise ValueError(f"signal.rows must be [positions, vocab], got {list(signal.rows.shape)}")
        return
    _check_sparse(signal)
    if not math.isclose(signal.temperature, kd_temperature, rel_tol=1e-6):
        raise UsageError(
            "the stored teacher signal holds at one temperature only",
            where="kd_temperature",
            got=f"{kd_temperature:g}",
            expected=f"{signal.temperature:g}",
            remedy="train at the stored temperature or capture the signal again at the new one",
        )


def _check_sparse(signal: SparseSignal) -> None:
    rows, slots = signal.num_positions, signal.ids.shape[-1]
    if signal.ids.shape != (rows, slots) or signal.ids.dtype != torch.int64:
        raise ValueError(f"signal.ids must be int64 [positions, K], got {signal.ids.dtype} {list(signal.ids.shape)}")
    for name, tensor, shape in (
        ("weights", signal.weights, (rows, slots)),
        ("log_probs", signal.log_probs, (rows, slots)),
        ("tail_mass", signal.tail_mass, (rows,)),
    ):
        if tensor.shape != shape:
            raise ValueError(f"signal.{name} must be {list(shape)}, got {list(tensor.shape)}")


def _check_values(signal: LogitsSignal | SparseSignal, labels: Tensor, vocab_size: int) -> None:
    num_signal = int(signal.mask.sum())
    if signal.num_signal not in (None, num_signal):
        raise ValueError(f"signal.num_signal is {signal.num_signal}, but {num_signal} rows of its mask are True")
    if isinstance(signal, LogitsSignal):
        return
    recorded = signal.mask & (labels != IGNORE_INDEX)
    if signal.any_tail is False and bool((recorded & (signal.tail_mass > 0)).any()):
        raise ValueError("signal.any_tail is False, but a row has a tail")
    used = recorded.unsqueeze(1) & (signal.weights != 0)
    if bool((used & ((signal.ids < 0) | (signal.ids >= vocab_size))).any()):
        raise ValueError(f"signal.ids must lie in [0, {vocab_size})")
