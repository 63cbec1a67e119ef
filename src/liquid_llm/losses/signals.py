"""What a teacher says about a run of positions: the values the distillation loss consumes.

A *position* is one labelled next-token position. A *signal* has exactly one row per position, in the order of the
student's hidden states. The loss never asks where a signal came from.

    DenseSignal   hidden states and an output head: the whole distribution, computed chunk by chunk
    LogitsSignal  the whole distribution as stored 16-bit logits
    SparseSignal  a few ids per position, already at one temperature, from a signal store

What the host must know of a signal (how many rows have a record, whether any has a tail) is counted while its tensors
are on the CPU and goes along when they move (``dataclasses.replace``), so that nobody waits for a device to learn it.

The types live beside the loss, their only consumer, because imports go one way (see docs/decisions).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class OutputHead:
    """The last linear map of a language model and what its model does to the result.

    ``logits = soft_cap * tanh(scale * (hidden @ weight.T + bias) / soft_cap)``; without ``soft_cap`` only the scale
    applies.

    Attributes:
        weight: [vocab, hidden].
        bias: [vocab] or None.
        scale: factor on the logits (Cohere's ``logit_scale``, the inverse of Granite's ``logits_scaling``).
        soft_cap: Gemma 2's ``final_logit_softcapping``, or None.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    soft_cap: float | None = None

    @property
    def vocab_size(self) -> int:
        return self.weight.shape[0]

    def cut(self, vocab_size: int) -> OutputHead:
        """The same head over the first ``vocab_size`` entries only (drops an embedding's padding)."""
        if vocab_size >= self.vocab_size:
            return self
        bias = None if self.bias is None else self.bias[:vocab_size]
        return OutputHead(self.weight[:vocab_size], bias, self.scale, self.soft_cap)

    def logits(self, hidden: Tensor) -> Tensor:
        """Plain logits [positions, vocab] of ``hidden`` [positions, hidden], in the dtype of the product.

        Those of 16-bit numbers are rounded to 16 bits, as the model itself does it; what compares distributions takes
        them from ``products.HeadProducts`` instead.
        """
        raw = torch.nn.functional.linear(hidden, self.weight, self.bias)
        if self.scale != 1.0:
            raw = raw * self.scale
        if self.soft_cap is not None:
            raw = torch.tanh(raw / self.soft_cap) * self.soft_cap
        return raw


@dataclass(frozen=True)
class DenseSignal:
    """A model's own hidden states and head; logits are formed chunk by chunk inside the loss.

    Attributes:
        hidden: [positions, teacher_hidden], no gradient.
        head: the teacher's output head; its vocabulary may differ from the student's by padding only.
    """

    hidden: Tensor
    head: OutputHead

    @property
    def num_positions(self) -> int:
        return self.hidden.shape[0]


@dataclass(frozen=True)
class LogitsSignal:
    """Stored full logits (codec ``full``).

    Attributes:
        rows: [positions, vocab] in 16 bits, a teacher's logits up to a constant per position.
        mask: [positions] bool, False where no usable record exists.
        num_signal: how many rows of ``mask`` are True; None where that was never counted on the CPU.
    """

    rows: Tensor
    mask: Tensor
    num_signal: int | None = None

    def __post_init__(self) -> None:
        if self.num_signal is None and _is_readable(self.mask):
            object.__setattr__(self, "num_signal", int(self.mask.sum()))

    @property
    def num_positions(self) -> int:
        return self.rows.shape[0]


@dataclass(frozen=True)
class SparseSignal:
    """A teacher distribution at one temperature, held by K ids a position.

    The loss estimates ``KL(q || p)`` by
    ``sum_k weights[k] * (log_probs[k] - log p[ids[k]])  +  tail_mass * (log tail_mass - log(1 - sum_k p[ids[k]]))``:
    ``weights`` are an unbiased estimate of the teacher's probabilities (they are the probabilities themselves where ids
    are exact); ``tail_mass`` is the mass outside ``ids`` lumped into one bucket (a coarse-grained KL), zero for a codec
    that represents the tail by draws. Where ``tail_mass`` is positive the ids of a row with positive weight are
    distinct. Unused slots have weight 0, log_prob 0 and id 0.

    Attributes:
        ids: [positions, K] int64.
        weights: [positions, K] float32, non-negative.
        log_probs: [positions, K] float32, log of the teacher's probability of the id at ``temperature``.
        tail_mass: [positions] float32.
        mask: [positions] bool, False where no usable record exists.
        temperature: the temperature all of the above hold at; the loss refuses any other.
        num_signal: how many rows of ``mask`` are True; None where that was never counted on the CPU.
        any_tail: False only if no row has a tail; None where that was never looked at on the CPU.
    """

    ids: Tensor
    weights: Tensor
    log_probs: Tensor
    tail_mass: Tensor
    mask: Tensor
    temperature: float
    num_signal: int | None = None
    any_tail: bool | None = None

    def __post_init__(self) -> None:
        if self.num_signal is None and _is_readable(self.mask):
            object.__setattr__(self, "num_signal", int(self.mask.sum()))
        if self.any_tail is None and _is_readable(self.tail_mass):
            object.__setattr__(self, "any_tail", bool((self.tail_mass > 0).any()))

    @property
    def num_positions(self) -> int:
        return self.ids.shape[0]


Signal = DenseSignal | LogitsSignal | SparseSignal


def _is_readable(tensor: Tensor) -> bool:
    """Whether the host reads its values at no cost: it has some, and they lie on the CPU.

    Subclasses stand for tensors of another kind: without values, or on another device.
    """
    return type(tensor) is Tensor and tensor.device.type == "cpu"


@dataclass(frozen=True)
class LossOutput:
    """Sums over positions; one division by the global number of labelled positions makes them means.

    Attributes:
        loss: scalar, differentiable: the sum of every position's composite loss.
        ce: scalar, detached: summed cross-entropy of all labelled positions, nats.
        kd: scalar, detached: summed KL(teacher_T || student_T) of positions with a signal, nats, without T^2 and alpha.
        l2: scalar, detached: summed mean-over-vocabulary squared distance to the reference student's logits, without
            gamma.
        num_positions: number of labelled positions.
        num_signal: how many of them had a teacher signal.
    """

    loss: Tensor
    ce: Tensor
    kd: Tensor
    l2: Tensor
    num_positions: int
    num_signal: int
