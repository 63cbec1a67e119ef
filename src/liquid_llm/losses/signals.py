"""What a teacher says about a run of positions: the values the distillation loss consumes.

A *position* is one labelled next-token position. A *signal* has exactly one row per position, in the order of the
student's hidden states. The loss never asks where a signal came from.

    DenseSignal   hidden states and an output head: the whole distribution, computed chunk by chunk
    LogitsSignal  the whole distribution as stored 16-bit logits
    SparseSignal  a few ids per position, already at one temperature, from a signal store

Each of them says ``num_positions``, which rows it answers for (``mask``: None where all) and how many (``num_signal``),
moves (``to``, ``pinned``) and gives the signal of some of its rows (``part``); those that are stored are joined from
the signals of single samples (``join``). What the host must know of a signal (how many rows have a record, whether any
has a tail) is counted while its tensors are on the CPU and goes along when they move, so that nobody waits for a device
to learn it.

The types live beside the loss, their only consumer, because imports go one way (see docs/decisions).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from liquid_llm.data.types import to_device

LEAST_BIAS = -1e4
"""Minus infinity in a head's bias is taken for this: a masked token's probability is 0, and no difference is NaN."""

_MOST_PINNED_BYTES = 64 * 2**20

WHOLE, HEAD, HEAD_AND_DRAWS, DRAWS = "whole", "head", "head and draws", "draws"
FORMS = {
    WHOLE: "whole distributions",
    HEAD: "the likeliest ids exactly and the mass of the rest",
    HEAD_AND_DRAWS: "the likeliest ids exactly and draws of the rest",
    DRAWS: "draws",
}
"""What a signal may tell of a position, in words; a divergence says which of these it can be worked out from."""


def finished(raw: Tensor, scale: float, soft_cap: float | None, out: Tensor | None = None) -> Tensor:
    """What a model does to raw logits of any shape: ``soft_cap * tanh(scale * raw / soft_cap)``, or the scale alone.

    Where there is nothing to do, ``raw`` itself; else what is written into ``out``, which may be ``raw``, or is new.
    """
    if scale != 1.0:
        raw = torch.mul(raw, scale, out=out)
    if soft_cap is not None:
        raw = torch.mul(torch.tanh(torch.div(raw, soft_cap, out=out), out=out), soft_cap, out=out)
    return raw


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

    Raises:
        ValueError: shapes that do not fit together, or a soft-cap that is not positive.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    soft_cap: float | None = None

    def __post_init__(self) -> None:
        if self.weight.ndim != 2:
            raise ValueError(f"head.weight must be [vocab, hidden], got {list(self.weight.shape)}")
        if self.bias is not None and self.bias.shape != (self.vocab_size,):
            raise ValueError(f"head.bias must be [{self.vocab_size}], got {list(self.bias.shape)}")
        if self.soft_cap is not None and not self.soft_cap > 0.0:
            raise ValueError(f"head.soft_cap must be positive, got {self.soft_cap}")

    @property
    def vocab_size(self) -> int:
        return self.weight.shape[0]

    def cut(self, vocab_size: int) -> OutputHead:
        """The same head over the first ``vocab_size`` entries only (drops an embedding's padding)."""
        if vocab_size >= self.vocab_size:
            return self
        bias = None if self.bias is None else self.bias[:vocab_size]
        return replace(self, weight=self.weight[:vocab_size], bias=bias)

    def logits(self, hidden: Tensor) -> Tensor:
        """Plain logits [positions, vocab] of ``hidden`` [positions, hidden], in the dtype of the product.

        Those of 16-bit numbers are rounded to 16 bits, as the model itself does it; what compares distributions takes
        them from ``products.HeadProducts`` instead.
        """
        return self.finish(F.linear(hidden, self.weight, self.bias))

    def finish(self, raw: Tensor, *, in_place: bool = False) -> Tensor:
        """Logits of raw ones, which are a product with the weight, plus the bias: the scale and the soft-cap."""
        return finished(raw, self.scale, self.soft_cap, raw if in_place else None)


_Rows = TypeVar("_Rows", bound="_SignalRows")
_Stored = TypeVar("_Stored", bound="_StoredRows")


class _SignalRows:
    """What all signals do alike with their tensors, whose first dimension is the position."""

    _TENSORS: ClassVar[tuple[str, ...]]
    _COUNTS: ClassVar[tuple[str, ...]] = ()  # what was counted of all rows
    form: str = WHOLE

    @property
    def _names(self) -> list[str]:
        """Those of ``_TENSORS`` that are there."""
        return [name for name in self._TENSORS if getattr(self, name) is not None]

    @property
    def num_positions(self) -> int:
        """Rows: one for each labelled position."""
        size: int = getattr(self, self._TENSORS[0]).shape[0]
        return size

    @property
    def nbytes(self) -> int:
        """Bytes of the rows."""
        return sum(getattr(self, name).nbytes for name in self._names)

    def to(self: _Rows, device: torch.device) -> _Rows:
        """The same with its rows on ``device``; a head stays where it is."""
        if getattr(self, self._TENSORS[0]).device == device:
            return self
        return self._changed({name: to_device(getattr(self, name), device) for name in self._names})

    def part(self: _Rows, positions: slice) -> _Rows:
        """The rows ``positions``, of which what the host must know is counted anew: to be cut on the CPU."""
        if positions == slice(0, self.num_positions):
            return self
        rows: dict[str, Any] = {name: getattr(self, name)[positions] for name in self._names}
        return self._changed(rows | dict.fromkeys(self._COUNTS))

    def take(self: _Rows, rows: Tensor) -> _Rows:
        """The rows whose numbers are given, [n] int64, in that order; on the CPU, as ``part``."""
        taken: dict[str, Any] = {name: getattr(self, name)[rows] for name in self._names}
        return self._changed(taken | dict.fromkeys(self._COUNTS))

    def pinned(self: _Rows) -> _Rows:
        """The same in memory from which a copy to a device runs beside the computation; to be done ahead of need.

        More than 64 MiB (whole logits) stay as they are: several micro-batches of them, locked, could be all the host
        has. So does what is on a device already.
        """
        if self.nbytes > _MOST_PINNED_BYTES or getattr(self, self._TENSORS[0]).device.type != "cpu":
            return self
        return self._changed({name: getattr(self, name).pin_memory() for name in self._names})

    def _changed(self: _Rows, fields: dict[str, Any]) -> _Rows:
        return replace(self, **fields)  # type: ignore[type-var]


@dataclass(frozen=True)
class DenseSignal(_SignalRows):
    """A model's own hidden states and head; logits are formed chunk by chunk inside the loss.

    Attributes:
        hidden: [positions, teacher_hidden], no gradient.
        head: the teacher's output head; its vocabulary may differ from the student's by padding only.

    Raises:
        ValueError: hidden states that the head does not take.
    """

    hidden: Tensor
    head: OutputHead

    _TENSORS = ("hidden",)

    def __post_init__(self) -> None:
        if self.hidden.ndim != 2 or self.hidden.shape[1] != self.head.weight.shape[1]:
            got = f"{list(self.hidden.shape)} and {list(self.head.weight.shape)}"
            raise ValueError(f"hidden [positions, hidden] and head.weight [vocab, hidden] do not fit: {got}")

    @property
    def mask(self) -> None:
        """Every row has a signal."""
        return None

    @property
    def num_signal(self) -> int:
        return self.num_positions


class _StoredRows(_SignalRows):
    """What signals from a store do alike: some rows may lack a record, and those of samples are joined."""

    _COUNTS: ClassVar[tuple[str, ...]] = ("num_signal",)
    _ALIKE: ClassVar[str]  # what parts must have in common

    mask: Tensor
    num_signal: int | None

    @classmethod
    def join(cls: type[_Stored], parts: Sequence[_StoredRows | None], num_rows: Sequence[int]) -> _Stored:
        """One signal for samples in order; where some have fewer ids a position, unused slots are added.

        Args:
            parts: the signal of each sample, at least one; None where it has no usable record.
            num_rows: labelled positions of each sample; those of a sample without signal are masked.

        Raises:
            ValueError: parts that do not fit together or have other lengths, or none.
        """
        present = [part for part in parts if isinstance(part, cls)]
        if not present or len(present) < len(parts) - sum(part is None for part in parts):
            raise ValueError(f"{len(present)} signals to join: need some, all of one class")
        if len({getattr(part, cls._ALIKE) for part in present}) > 1:
            raise ValueError(f"signals to join differ in {cls._ALIKE}")
        for part, rows in zip(parts, num_rows, strict=True):
            if part is not None and part.num_positions != rows:
                raise ValueError(f"a signal of {part.num_positions} rows for {rows} positions")
        widest = max(present, key=lambda part: int(getattr(part, cls._TENSORS[0]).shape[1]))
        columns: dict[str, Any] = {}
        for name in widest._names:
            like: Tensor = getattr(widest, name)
            tensors = [
                like.new_zeros(rows, *like.shape[1:]) if part is None else _widen(getattr(part, name), like)
                for part, rows in zip(parts, num_rows, strict=True)
            ]
            columns[name] = torch.cat(tensors)
        return widest._changed(columns | dict.fromkeys(cls._COUNTS))

    def spread(self: _Stored, places: Tensor) -> _Stored:
        """The rows at the places that are True [n] bool, in order, and rows without a record at the others."""
        columns: dict[str, Any] = {}
        for name in self._names:
            rows: Tensor = getattr(self, name)
            columns[name] = rows.new_zeros(len(places), *rows.shape[1:])
            columns[name][places] = rows
        return self._changed(columns | dict.fromkeys(self._COUNTS))

    def _check_mask(self) -> None:
        """Check the mask, and count it or compare the count that was given, where that costs nothing."""
        mask, rows = self.mask, self.num_positions
        if mask.shape != (rows,) or mask.dtype != torch.bool:
            raise ValueError(f"signal.mask must be bool [{rows}], got {mask.dtype} {list(mask.shape)}")
        if not _is_readable(mask):
            return
        num_signal = int(mask.sum())
        if self.num_signal not in (None, num_signal):
            raise ValueError(f"signal.num_signal is {self.num_signal}, but {num_signal} rows of its mask are True")
        object.__setattr__(self, "num_signal", num_signal)


@dataclass(frozen=True)
class LogitsSignal(_StoredRows):
    """Stored full logits (codec ``full``).

    Attributes:
        rows: [positions, vocab] in 16 bits, a teacher's logits up to a constant per position.
        mask: [positions] bool, False where no usable record exists.
        num_signal: how many rows of ``mask`` are True; None where that was never counted on the CPU.

    Raises:
        ValueError: shapes that do not fit together, or a count that is not the mask's.
    """

    rows: Tensor
    mask: Tensor
    num_signal: int | None = None

    _TENSORS = ("rows", "mask")
    _ALIKE = "vocab_size"

    def __post_init__(self) -> None:
        if self.rows.ndim != 2:
            raise ValueError(f"signal.rows must be [positions, vocab], got {list(self.rows.shape)}")
        self._check_mask()

    @property
    def vocab_size(self) -> int:
        return self.rows.shape[1]

    def merge_repeats(self) -> LogitsSignal:
        """The same: no id occurs twice."""
        return self


@dataclass(frozen=True)
class SparseSignal(_StoredRows):
    """A teacher distribution at one temperature, held by K ids a position.

    The loss estimates ``KL(q || p)`` by
    ``sum_k weights[k] * (log_probs[k] - log p[ids[k]])  +  tail_mass * (log tail_mass - log(1 - sum_k p[ids[k]]))``:
    ``weights`` are an unbiased estimate of the teacher's probabilities (they are the probabilities themselves where ids
    are exact); ``tail_mass`` is the mass outside ``ids`` lumped into one bucket (a coarse-grained KL), zero for a codec
    that represents the tail by draws. Where ``tail_mass`` is positive the ids of a row with positive weight are
    distinct. Unused slots have weight 0, log_prob 0 and id 0.

    What a row tells is its ``form``, and where it has a head ``num_exact`` says which slots that is: the first ones,
    likeliest first, whose weights are the teacher's probabilities up to the rounding of what is stored.

    Attributes:
        ids: [positions, K] int64.
        weights: [positions, K] float32, non-negative.
        log_probs: [positions, K] float32, log of the teacher's probability of the id at ``temperature``.
        tail_mass: [positions] float32.
        mask: [positions] bool, False where no usable record exists.
        temperature: the temperature all of the above hold at; the loss refuses any other.
        form: ``HEAD`` (the rest is ``tail_mass``), ``HEAD_AND_DRAWS`` (the rest is drawn) or ``DRAWS``.
        num_exact: [positions] int64, how many slots the head has; None for ``DRAWS``.
        num_signal: how many rows of ``mask`` are True; None where that was never counted on the CPU.
        any_tail: False only if no row has a tail; None where that was never looked at on the CPU.

    Raises:
        ValueError: shapes that do not fit together, or counts that are not the tensors'.
    """

    ids: Tensor
    weights: Tensor
    log_probs: Tensor
    tail_mass: Tensor
    mask: Tensor
    temperature: float
    num_signal: int | None = None
    any_tail: bool | None = None
    form: str = DRAWS
    num_exact: Tensor | None = None

    _TENSORS = ("ids", "weights", "log_probs", "tail_mass", "mask", "num_exact")
    _COUNTS = ("num_signal", "any_tail")
    _ALIKE = "temperature"

    def __post_init__(self) -> None:
        if self.ids.ndim != 2 or self.ids.dtype != torch.int64:
            raise ValueError(f"signal.ids must be int64 [positions, K], got {self.ids.dtype} {list(self.ids.shape)}")
        for name, tensor, shape in (
            ("weights", self.weights, self.ids.shape),
            ("log_probs", self.log_probs, self.ids.shape),
            ("tail_mass", self.tail_mass, self.ids.shape[:1]),
        ):
            if tensor.shape != shape:
                raise ValueError(f"signal.{name} must be {list(shape)}, got {list(tensor.shape)}")
        if (self.num_exact is None) != (self.form == DRAWS):
            raise ValueError(f"signal.num_exact goes with a head, and the form is {self.form!r}")
        if self.num_exact is not None and self.num_exact.shape != self.ids.shape[:1]:
            raise ValueError(f"signal.num_exact must be {list(self.ids.shape[:1])}, got {list(self.num_exact.shape)}")
        self._check_mask()
        if not _is_readable(self.tail_mass):
            return
        if self.any_tail is None:
            object.__setattr__(self, "any_tail", bool((self.tail_mass > 0).any()))
        elif not self.any_tail and bool((self.mask & (self.tail_mass > 0)).any()):
            raise ValueError("signal.any_tail is False, but a row has a tail")

    def merge_repeats(self) -> SparseSignal:
        """The same estimate with each id of a row in one slot.

        A codec that draws gives an id that was drawn twice two slots; the loss adds them up, and on a GPU in an order
        that is not always the same. Weights are summed, and log-probabilities weighted, so that
        ``sum(weights * log_probs)`` of an id is what it was. Slots that become free are unused ones; a head stays first
        and in its order.
        """
        keys = self.ids
        if self.num_exact is not None:  # its ids are drawn nowhere else
            places = torch.arange(keys.shape[1], device=keys.device)
            keys = torch.where(places < self.num_exact.unsqueeze(1), places - keys.shape[1], keys)
        keys, order = keys.sort(dim=1, stable=True)
        ids = self.ids.gather(1, order)
        weights, log_probs = self.weights.gather(1, order), self.log_probs.gather(1, order)
        new = torch.ones_like(ids, dtype=torch.bool)
        new[:, 1:] = keys[:, 1:] != keys[:, :-1]
        slot = new.cumsum(dim=1) - 1
        summed = torch.zeros_like(weights).scatter_add_(1, slot, weights)
        crossed = torch.zeros_like(weights).scatter_add_(1, slot, weights * log_probs)
        used = summed > 0
        return replace(
            self,
            ids=torch.where(used, torch.zeros_like(ids).scatter_(1, slot, ids), 0),
            weights=summed,
            log_probs=torch.where(used, crossed / summed.clamp_min(torch.finfo(summed.dtype).tiny), 0.0),
        )


Signal = DenseSignal | LogitsSignal | SparseSignal


def _is_readable(tensor: Tensor) -> bool:
    """Whether the host reads its values at no cost: it has some, and they lie on the CPU.

    Subclasses stand for tensors of another kind: without values, or on another device.
    """
    return type(tensor) is Tensor and tensor.device.type == "cpu"


def _widen(tensor: Tensor, like: Tensor) -> Tensor:
    """``tensor`` with zeros after its columns, up to as many as ``like`` has."""
    return F.pad(tensor, (0, like.shape[1] - tensor.shape[1])) if like.ndim == 2 else tensor


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
        entropies: [labelled positions], detached: the student's at T = 1, nats, and -1 where there is no signal; None
            where the objective does not look at them, or there is no signal at all.
        num_distilled: scalar, detached: how many had a KD term; None where that is ``num_signal``.
    """

    loss: Tensor
    ce: Tensor
    kd: Tensor
    l2: Tensor
    num_positions: int
    num_signal: int
    entropies: Tensor | None = None
    num_distilled: Tensor | None = None

    @staticmethod
    def count_distilled(entropies: Tensor, min_entropy: float) -> Tensor:
        """How many rows with a signal reach the entropy asked for, float32."""
        return (entropies >= max(min_entropy, 0.0)).sum(dtype=torch.float32)
