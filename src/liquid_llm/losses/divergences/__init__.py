"""How far the student's distribution is from its teacher's: one file a divergence, named in ``registry.DIVERGENCES``.

Let u be the student's logits divided by the temperature and p = softmax(u); q is the teacher's distribution at the same
temperature. A divergence says D(q, p) of a position twice: in plain torch, for the specification (``reference``),
and for a slice of rows with the gradient by u, for the loss that trains. The factors alpha and T^2 and the positions
without a signal are not its business.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from liquid_llm import registry
from liquid_llm.errors import UsageError
from liquid_llm.losses.signals import SparseSignal


@dataclass(frozen=True)
class Softmax:
    """Rows of logits at the temperature: ``log_softmax = logits - log(total)``, ``softmax = exps / total``.

    Dividing at the end saves the passes of a softmax over each row.

    Attributes:
        logits: [rows, vocab], up to a constant a row.
        exps: [rows, vocab], their exponentials.
        total: [rows], the sums of those.
    """

    logits: Tensor
    exps: Tensor
    total: Tensor


@dataclass(frozen=True)
class SparseRows:
    """A sparse signal's rows with unused slots cleared: weight 0, log-prob 0, id 0, also in rows without a record.

    Attributes:
        ids, weights, log_probs: [rows, K]; tail_mass: [rows]; mask: [rows] bool, or None where every row has a record.
        any_tail: False only if no row of the whole signal has a tail.
    """

    ids: Tensor
    weights: Tensor
    log_probs: Tensor
    tail_mass: Tensor
    mask: Tensor | None
    any_tail: bool

    @staticmethod
    def of(signal: SparseSignal, take: Callable[[Tensor], Tensor], dtype: torch.dtype) -> SparseRows:
        """The rows of ``signal`` that ``take`` chooses of each of its tensors, floating numbers in ``dtype``."""
        mask = take(signal.mask)
        weights = torch.where(mask.unsqueeze(1), take(signal.weights).to(dtype), 0.0)
        used = weights > 0
        return SparseRows(
            ids=torch.where(used, take(signal.ids), 0),
            weights=torch.where(used, weights, 0.0),
            log_probs=torch.where(used, take(signal.log_probs).to(dtype), 0.0),
            tail_mass=torch.where(mask, take(signal.tail_mass).to(dtype), 0.0),
            mask=None if signal.num_signal == signal.num_positions else mask,
            any_tail=signal.any_tail is not False,
        )

    def slice(self, start: int, stop: int) -> SparseRows:
        """Rows ``start`` to ``stop``."""
        return replace(
            self,
            ids=self.ids[start:stop],
            weights=self.weights[start:stop],
            log_probs=self.log_probs[start:stop],
            tail_mass=self.tail_mass[start:stop],
            mask=None if self.mask is None else self.mask[start:stop],
        )


@dataclass(frozen=True)
class SliceGradient:
    """The gradient of a slice by its logits, which a divergence completes: ``start``, then add to what that gives.

    Attributes:
        weight: [rows], the factor of the gradient by u of each row: alpha T, 0 where there is no signal.
        student: what the divergence is given too; ``start`` uses it up.
        exps, factor: the cross-entropy's part, ``factor[:, None] * exps`` [rows, vocab]; ``exps`` are those of
            ``student`` at T = 1, so that a divergence that changes them owes the cross-entropy what it took.
    """

    weight: Tensor
    student: Softmax
    exps: Tensor
    factor: Tensor

    @property
    def is_shared(self) -> bool:
        """Whether the cross-entropy takes the exponentials of ``student``."""
        return self.student.exps is self.exps

    def start(self, factor: Tensor) -> Tensor:
        """The cross-entropy's part and ``factor[:, None] * student.exps``, in the place of the student's logits."""
        out, tempered = self.student.logits, self.student.exps
        if self.is_shared:
            return torch.mul(self.exps, (self.factor + factor).unsqueeze(1), out=out)
        return torch.add(self.exps.mul_(self.factor.unsqueeze(1)), tempered.mul_(factor.unsqueeze(1)), out=out)


class Divergence(ABC):
    """D(q, p) of positions; it has no state.

    Attributes:
        answers_sparse: whether a sparse signal is enough for an unbiased estimate; the sparse methods are there then.
    """

    answers_sparse = False

    @abstractmethod
    def plain(self, student: Tensor, teacher: Tensor) -> Tensor:
        """D [positions] in plain torch.

        Args:
            student: [positions, vocab], log p.
            teacher: [positions, shared vocab], log q over the first entries; q is 0 on the rest.
        """

    def plain_sparse(self, student: Tensor, teacher: SparseRows) -> Tensor:
        """An unbiased estimate of D [positions] in plain torch; ``student`` as in ``plain``."""
        raise NotImplementedError

    @abstractmethod
    def dense(self, student: Softmax, teacher: Softmax, gradient: SliceGradient | None) -> Tensor:
        """D [rows], and its gradient where one is wanted.

        Args:
            student: [rows, vocab]; logits and exponentials may be overwritten.
            teacher: [rows, shared vocab], likewise.
            gradient: to be completed; None where the value alone is asked for.
        """

    def sparse(self, student: Softmax, teacher: SparseRows, gradient: SliceGradient | None) -> Tensor:
        """The estimate of D [rows], and its gradient where one is wanted; ``teacher`` is not to be overwritten."""
        raise NotImplementedError


def get_divergence(name: str) -> Divergence:
    """The divergence ``name``, a key of ``registry.DIVERGENCES``."""
    divergence: Divergence = registry.load(registry.DIVERGENCES, name)()
    return divergence


def check_sparse(name: str, where: object) -> None:
    """Refuse sparse signal for a divergence that it cannot answer without bias.

    Raises:
        UsageError: naming a codec that can.
    """
    if not get_divergence(name).answers_sparse:
        raise UsageError(
            f"the divergence {name} needs whole distributions",
            where=where,
            got="a signal of some ids a position",
            remedy="capture with --codec=full, ask an online teacher, or use --divergence=forward_kl",
        )
