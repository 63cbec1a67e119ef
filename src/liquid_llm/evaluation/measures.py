"""What is measured of a student at each labelled position, beside its teacher where that answers.

    p, q         the student's and the teacher's distribution of the next token, at temperature 1; y: the one that came
    ce           -log p(y), nats; teacher_ce: -log q(y)
    kl           KL(q || p) = sum_v q(v) (log q(v) - log p(v)), nats
    agreement    1 where the likeliest token of p is that of q, else 0
    overlap      sum_v min(p(v), q(v)): the chance that a token drawn from p is kept by speculative sampling with q
                 (Leviathan et al. 2023, arXiv 2211.17192, corollary 3.6), and 1 minus the total variation distance
    confidence   max_v p(v), and right: 1 where that v is y; see ``sums`` for what calibration makes of them

What a teacher tells decides what is measured: hidden states or whole logits give everything; a sparse signal with a
head its likeliest token (agreement, the teacher's confidence) and an estimate of KL; draws the estimate of KL alone.
What a signal does not tell is left out. Logits exist for a chunk of positions at a time and in float32 (float64 of
float64 hidden states), as in the loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from liquid_llm.losses.objective import Objective
from liquid_llm.losses.plan import LossPlan, choose_plan
from liquid_llm.losses.products import HeadProducts
from liquid_llm.losses.reference import measure
from liquid_llm.losses.signals import DenseSignal, LogitsSignal, OutputHead, Signal, SparseSignal

NUM_BINS = 15
"""Bins of equal width that confidences fall into, as in Guo et al. 2017 (arXiv 1706.04599)."""

_AT_ONE = Objective()


@dataclass(frozen=True)
class PositionMeasures:
    """Measures of some labelled positions, each [positions]; None: not measured at all.

    Attributes:
        ce, confidence, right: of the student.
        kl: where ``has_signal``.
        agreement, teacher_confidence, teacher_right: where ``tells_best``.
        teacher_ce, overlap: where ``has_signal``, of a signal that tells the whole distribution.
        has_signal: bool, where the teacher answers; None without a teacher.
        tells_best: bool, where it tells its likeliest token; None where it never does.
    """

    ce: Tensor
    confidence: Tensor
    right: Tensor
    kl: Tensor | None = None
    agreement: Tensor | None = None
    teacher_confidence: Tensor | None = None
    teacher_right: Tensor | None = None
    teacher_ce: Tensor | None = None
    overlap: Tensor | None = None
    has_signal: Tensor | None = None
    tells_best: Tensor | None = None

    @staticmethod
    def join(parts: Sequence[PositionMeasures]) -> PositionMeasures:
        """Those of consecutive positions as one, on the CPU."""
        columns = {one.name: [getattr(part, one.name) for part in parts] for one in fields(PositionMeasures)}
        found = {name: None if those[0] is None else torch.cat(those).cpu() for name, those in columns.items()}
        return PositionMeasures(**found)  # type: ignore[arg-type]


@dataclass(frozen=True)
class _Teacher:
    """What a teacher says of some rows at T=1: ``log_probs`` [rows, vocab] where it tells the whole distribution,
    ``best`` and ``confidence`` where it ``tells_best``."""

    has_signal: Tensor
    log_probs: Tensor | None = None
    best: Tensor | None = None
    confidence: Tensor | None = None
    tells_best: Tensor | None = None


def compare(
    students: Sequence[tuple[Tensor, OutputHead]],
    labels: Tensor,
    signal: Signal | None,
    *,
    plan: LossPlan | None = None,
) -> list[PositionMeasures]:
    """The measures of each student; what the teacher says is worked out once for all of them.

    Args:
        students: hidden states [positions, hidden] and head of each; its vocabulary may differ from the teacher's by
            padding only, and what the student gives to its own padding counts against it.
        labels: [positions] int64, all real.
        signal: one row for each position, that holds at temperature 1; None: no teacher.
        plan: how many positions at a time; None is what suits the device.
    """
    with torch.no_grad(), torch.autocast(labels.device.type, enabled=False):
        chosen = plan or choose_plan(labels.device, max(head.vocab_size for _, head in students))
        sources = [_Logits(hidden, head, chosen) for hidden, head in students]
        teacher = _open_teacher(signal, min(head.vocab_size for _, head in students), chosen)
        parts: list[list[PositionMeasures]] = [[] for _ in students]
        for start in range(0, len(labels), chosen.slice_tokens):
            stop = min(start + chosen.slice_tokens, len(labels))
            said = None if teacher is None else teacher(start, stop)
            for found, source in zip(parts, sources, strict=True):
                log_probs = source(start, stop)
                found.append(_measure(log_probs, labels[start:stop], said, signal, slice(start, stop)))
        return [PositionMeasures.join(one) for one in parts]


class _Logits:
    """Log-probabilities of runs of positions; the logits of a chunk are formed together."""

    def __init__(self, hidden: Tensor, head: OutputHead, plan: LossPlan) -> None:
        self._hidden, self._size = hidden.detach(), plan.chunk_tokens
        self._products = HeadProducts(head, hidden.dtype, plan.product)
        shape = (min(self._size, len(hidden)), head.vocab_size)
        self._space = hidden.new_empty(shape, dtype=self._products.dtype)
        self._held = range(0)

    def __call__(self, start: int, stop: int) -> Tensor:
        if stop > self._held.stop or start < self._held.start:
            self._held = range(start, min(start + max(self._size, stop - start), len(self._hidden)))
            if len(self._held) > len(self._space):
                self._space = self._space.new_empty(len(self._held), self._space.shape[1])
            rows = self._hidden[self._held.start : self._held.stop]
            self._products.logits(rows, self._space[: len(rows)])
        first = start - self._held.start
        return torch.log_softmax(self._space[first : first + stop - start], dim=-1)


class _Whole:
    """A teacher whose whole distribution is known: it is asked for runs of positions."""

    def __init__(self, signal: DenseSignal | LogitsSignal, vocab_size: int, plan: LossPlan) -> None:
        self._logits = self._rows = None
        self._mask = signal.mask
        if isinstance(signal, DenseSignal):
            self._logits = _Logits(signal.hidden, signal.head.cut(vocab_size), plan)
        else:
            self._rows = signal.rows[:, :vocab_size]

    def __call__(self, start: int, stop: int) -> _Teacher:
        if self._logits is not None:
            log_probs = self._logits(start, stop)
        else:
            assert self._rows is not None
            log_probs = torch.log_softmax(self._rows[start:stop].float().nan_to_num(), dim=-1)
        has_signal = log_probs.new_ones(stop - start, dtype=torch.bool)
        if self._mask is not None:
            has_signal = self._mask[start:stop]
        top, best = log_probs.max(dim=-1)
        return _Teacher(has_signal, log_probs, best, top.exp(), has_signal)


class _Sparse:
    """A teacher of which a few ids are known, the first of them the likeliest where it has a head."""

    def __init__(self, signal: SparseSignal) -> None:
        self._signal = signal

    def __call__(self, start: int, stop: int) -> _Teacher:
        one = self._signal
        has_signal = one.mask[start:stop]
        if one.num_exact is None:
            return _Teacher(has_signal)
        tells_best = has_signal & (one.num_exact[start:stop] > 0)
        return _Teacher(has_signal, None, one.ids[start:stop, 0], one.log_probs[start:stop, 0].exp(), tells_best)


def _open_teacher(signal: Signal | None, vocab_size: int, plan: LossPlan) -> _Whole | _Sparse | None:
    if signal is None:
        return None
    if not isinstance(signal, SparseSignal):
        return _Whole(signal, vocab_size, plan)
    if signal.temperature != 1.0:
        raise ValueError(f"a signal at temperature {signal.temperature:g} says nothing of the measures at 1")
    return _Sparse(signal)


def _measure(
    log_probs: Tensor, labels: Tensor, teacher: _Teacher | None, signal: Signal | None, rows: slice
) -> PositionMeasures:
    """The measures of a slice; ``log_probs`` [rows, vocab] are the student's."""
    picked = labels.unsqueeze(1)
    top, best = log_probs.max(dim=-1)
    ce = -log_probs.gather(1, picked).squeeze(1)
    own = PositionMeasures(ce, top.exp(), best == labels)
    if teacher is None or signal is None:
        return own
    known = teacher.has_signal
    agreement, teacher_right, teacher_ce, overlap = None, None, None, None
    if teacher.best is not None and teacher.tells_best is not None:
        agreement, teacher_right = ((teacher.best == other) & teacher.tells_best for other in (best, labels))
    if teacher.log_probs is None:
        kl = measure(log_probs, signal, rows, _AT_ONE)[0]
    else:
        theirs = teacher.log_probs
        mine = log_probs[:, : theirs.shape[1]]
        probs = theirs.exp()
        kl = torch.linalg.vecdot(probs, theirs - mine)
        overlap = torch.minimum(probs, mine.exp()).sum(dim=-1)
        teacher_ce = -theirs.gather(1, picked).squeeze(1)
    return PositionMeasures(
        ce,
        own.confidence,
        own.right,
        kl.where(known, 0.0),
        agreement,
        teacher.confidence,
        teacher_right,
        None if teacher_ce is None else teacher_ce.where(known, 0.0),
        None if overlap is None else overlap.where(known, 0.0),
        known,
        teacher.tells_best,
    )
