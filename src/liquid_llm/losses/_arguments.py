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
from liquid_llm.losses.divergences import check_form
from liquid_llm.losses.objective import Objective
from liquid_llm.losses.signals import DenseSignal, OutputHead, Signal, SparseSignal


def check_arguments(
    hidden: Tensor,
    head: OutputHead,
    labels: Tensor,
    *,
    signal: Signal | None,
    objective: Objective,
    reference: DenseSignal | None,
    all_labelled: bool = False,
    looks: bool = True,
) -> None:
    """Refuse arguments that do not fit together, before any product is formed.

    Values (labels, ids) are checked where the tensors lie on the CPU and the host ``looks``; shapes and dtypes always.
    What an objective, a signal or a head says of itself was checked when it was made.

    Raises:
        ValueError: shapes that do not fit, a label or id outside the vocabulary, a reference student with another
            vocabulary, a row without a label where ``all_labelled`` says that there is none.
        UsageError: a sparse signal that holds at another temperature, or that the divergence cannot answer.
    """
    if hidden.ndim != 2 or not hidden.is_floating_point():
        raise ValueError(f"hidden must be a floating [positions, hidden], got {hidden.dtype} {list(hidden.shape)}")
    num_rows = hidden.shape[0]
    if labels.shape != (num_rows,) or labels.dtype != torch.int64:
        raise ValueError(f"labels must be int64 [{num_rows}], got {labels.dtype} {list(labels.shape)}")
    if head.weight.shape[1] != hidden.shape[1]:
        raise ValueError(f"head.weight must be [vocab, {hidden.shape[1]}], got {list(head.weight.shape)}")
    for name, rows in (("reference", reference), ("signal", signal)):
        if rows is not None and rows.num_positions != num_rows:
            raise ValueError(
                f"{name} has {rows.num_positions} rows, hidden has {num_rows}: they must be aligned row by row"
            )
    if reference is not None and reference.head.vocab_size != head.vocab_size:
        raise ValueError(f"the reference student has {reference.head.vocab_size} logits, the student {head.vocab_size}")
    looks = looks and labels.device.type == "cpu"
    if looks:
        _check_labels(labels, head.vocab_size, all_labelled=all_labelled)
    if isinstance(signal, SparseSignal):
        check_form(objective.divergence, signal.form, "divergence")
        _check_temperature(signal.temperature, objective.signal_temperature)
        if looks:
            _check_ids(signal, labels, head.vocab_size)


def _check_labels(labels: Tensor, vocab_size: int, *, all_labelled: bool) -> None:
    if bool(((labels >= vocab_size) | ((labels < 0) & (labels != IGNORE_INDEX))).any()):
        raise ValueError(f"labels must lie in [0, {vocab_size}) or be {IGNORE_INDEX}")
    if all_labelled and bool((labels == IGNORE_INDEX).any()):
        raise ValueError("a row without a label, where all_labelled says that there is none")


def _check_temperature(stored: float, asked: float) -> None:
    if not math.isclose(stored, asked, rel_tol=1e-6):
        raise UsageError(
            "the stored teacher signal holds at one temperature only",
            where="kd_temperature",
            got=f"{asked:g}",
            expected=f"{stored:g}",
            remedy="train at the stored temperature or capture the signal again at the new one",
        )


def _check_ids(signal: SparseSignal, labels: Tensor, vocab_size: int) -> None:
    used = (signal.mask & (labels != IGNORE_INDEX)).unsqueeze(1) & (signal.weights != 0)
    if bool((used & ((signal.ids < 0) | (signal.ids >= vocab_size))).any()):
        raise ValueError(f"signal.ids must lie in [0, {vocab_size})")
