"""The signals of single samples put together into the signal of a micro-batch, and repeated ids summed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from liquid_llm.data.types import to_device
from liquid_llm.losses.signals import LogitsSignal, Signal, SparseSignal
from liquid_llm.signal_store.codecs import StoredSignal


def assemble(signals: Sequence[StoredSignal | None], num_rows: Sequence[int]) -> StoredSignal:
    """One signal for samples in order.

    Args:
        signals: of each sample; None where it has no usable record. At least one is not None, and all are of one kind.
        num_rows: labelled positions of each sample; those of a sample without signal are masked.
    """
    logits = [signal for signal in signals if isinstance(signal, LogitsSignal)]
    sparse = [signal for signal in signals if isinstance(signal, SparseSignal)]
    if (not logits) == (not sparse):
        raise ValueError(f"{len(logits)} signals of logits, {len(sparse)} sparse ones: need some, all of one kind")
    for signal, rows in zip(signals, num_rows, strict=True):
        if signal is not None and signal.num_positions != rows:
            raise ValueError(f"a signal of {signal.num_positions} rows for {rows} positions")
    if logits:
        return _assemble_logits(signals, num_rows, logits[0])
    return _assemble_sparse(signals, num_rows, sparse)


def _assemble_logits(
    signals: Sequence[StoredSignal | None], num_rows: Sequence[int], like: LogitsSignal
) -> LogitsSignal:
    rows, mask = [], []
    for signal, count in zip(signals, num_rows, strict=True):
        if isinstance(signal, LogitsSignal):
            rows.append(signal.rows)
            mask.append(signal.mask)
        else:
            rows.append(like.rows.new_zeros(count, like.rows.shape[1]))
            mask.append(like.mask.new_zeros(count))
    return LogitsSignal(torch.cat(rows), torch.cat(mask))


def _assemble_sparse(
    signals: Sequence[StoredSignal | None], num_rows: Sequence[int], present: Sequence[SparseSignal]
) -> SparseSignal:
    like = present[0]
    if any(signal.temperature != like.temperature for signal in present):
        raise ValueError("signals at different temperatures")
    slots = max(signal.ids.shape[1] for signal in present)

    def column(name: str) -> Tensor:
        parts = []
        for signal, count in zip(signals, num_rows, strict=True):
            if isinstance(signal, SparseSignal):
                part: Tensor = getattr(signal, name)
                parts.append(F.pad(part, (0, slots - part.shape[1])) if part.dim() == 2 else part)
            else:
                empty: Tensor = getattr(like, name)
                parts.append(empty.new_zeros((count, slots) if empty.dim() == 2 else (count,)))
        return torch.cat(parts)

    return SparseSignal(
        column("ids"), column("weights"), column("log_probs"), column("tail_mass"), column("mask"), like.temperature
    )


def merge_repeats(signal: SparseSignal) -> SparseSignal:
    """The same estimate with each id of a row in one slot.

    A codec that draws gives an id that was drawn twice two slots; the loss adds them up, and on a GPU in an order that
    is not always the same. Weights are summed, and log-probabilities weighted, so that ``sum(weights * log_probs)`` of
    an id is what it was. Slots that become free have weight 0, log_prob 0 and id 0, as unused ones have.
    """
    ids, order = signal.ids.sort(dim=1, stable=True)
    weights, log_probs = signal.weights.gather(1, order), signal.log_probs.gather(1, order)
    new = torch.ones_like(ids, dtype=torch.bool)
    new[:, 1:] = ids[:, 1:] != ids[:, :-1]
    slot = new.cumsum(dim=1) - 1
    summed = torch.zeros_like(weights).scatter_add_(1, slot, weights)
    crossed = torch.zeros_like(weights).scatter_add_(1, slot, weights * log_probs)
    used = summed > 0
    return replace(
        signal,
        ids=torch.where(used, torch.zeros_like(ids).scatter_(1, slot, ids), 0),
        weights=summed,
        log_probs=torch.where(used, crossed / summed.clamp_min(torch.finfo(summed.dtype).tiny), 0.0),
    )


def _tensors(signal: Signal) -> dict[str, Tensor]:
    return {name: value for name, value in vars(signal).items() if isinstance(value, Tensor)}


def nbytes(signal: Signal) -> int:
    """Bytes of its tensors."""
    return sum(tensor.nbytes for tensor in _tensors(signal).values())


def pin(signal: Signal) -> Signal:
    """The same in pinned memory."""
    changed: dict[str, Any] = {name: tensor.pin_memory() for name, tensor in _tensors(signal).items()}
    return replace(signal, **changed)


def part_of(signal: Signal, positions: slice) -> Signal:
    """The rows ``positions`` of a signal."""
    changed: dict[str, Any] = {name: tensor[positions] for name, tensor in _tensors(signal).items()}
    changed |= {name: None for name in ("num_signal", "any_tail") if hasattr(signal, name)}  # counted anew
    return replace(signal, **changed)


def move(signal: Signal, device: torch.device) -> Signal:
    """The same on ``device``."""
    changed: dict[str, Any] = {name: to_device(tensor, device) for name, tensor in _tensors(signal).items()}
    return replace(signal, **changed)
