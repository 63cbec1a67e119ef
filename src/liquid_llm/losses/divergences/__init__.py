"""How far the student's distribution is from its teacher's: one file a divergence, named in ``registry.DIVERGENCES``.

Let u be the student's logits divided by the temperature and p = softmax(u); q is the teacher's distribution at the same
temperature. A divergence says D(q, p) of a position twice: in plain torch, for the specification (``reference``),
and for a slice of rows with the gradient by u, for the loss that trains. The factors alpha and T^2 and the positions
without a signal are not its business.

spec    how a divergence is named: ``NAME`` or ``NAME:option=number``, more options after more colons
form    what a signal tells of a position, a key of ``signals.FORMS``; a divergence says which it can be worked out from
head    the likeliest ids of the teacher, which some divergences treat in another way than the rest
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from liquid_llm import registry
from liquid_llm.errors import UsageError
from liquid_llm.losses.signals import DRAWS, FORMS, HEAD, HEAD_AND_DRAWS, WHOLE, SparseSignal


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
        num_exact: [rows], how many slots the head has, or None where the signal does not say.
    """

    ids: Tensor
    weights: Tensor
    log_probs: Tensor
    tail_mass: Tensor
    mask: Tensor | None
    any_tail: bool
    num_exact: Tensor | None = None

    @staticmethod
    def of(signal: SparseSignal, take: Callable[[Tensor], Tensor], dtype: torch.dtype) -> SparseRows:
        """The rows of ``signal`` that ``take`` chooses of each of its tensors, floating numbers in ``dtype``."""
        mask = take(signal.mask)
        weights = torch.where(mask.unsqueeze(1), take(signal.weights).to(dtype), 0.0)
        used, num_exact = weights > 0, None
        if signal.num_exact is not None:  # the head is the head, even where a weight is too small for its dtype
            num_exact = torch.where(mask, take(signal.num_exact), 0)
            used = used | _first(num_exact, weights)
        return SparseRows(
            ids=torch.where(used, take(signal.ids), 0),
            weights=torch.where(used, weights, 0.0),
            log_probs=torch.where(used, take(signal.log_probs).to(dtype), 0.0),
            tail_mass=torch.where(mask, take(signal.tail_mass).to(dtype), 0.0),
            mask=None if signal.num_signal == signal.num_positions else mask,
            any_tail=signal.any_tail is not False,
            num_exact=num_exact,
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
            num_exact=None if self.num_exact is None else self.num_exact[start:stop],
        )

    def head(self, k: int) -> tuple[Tensor, Tensor]:
        """Which slots are among the k likeliest ids [rows, K], and the teacher's mass on all other ids [rows]."""
        assert self.num_exact is not None, "a signal without a head"
        inside = _first(self.num_exact.clamp(max=k), self.weights)
        return inside, self.tail_mass + self.weights.masked_fill(inside, 0.0).sum(dim=1)


def _first(counts: Tensor, like: Tensor) -> Tensor:
    """The first ``counts`` [rows] slots of each row: bool of the shape of ``like`` [rows, K]."""
    return torch.arange(like.shape[1], device=like.device) < counts.unsqueeze(1)


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
    """D(q, p) of positions. Its options are the keywords of its constructor, numbers all, which raises ValueError.

    Attributes:
        answers: the forms of signal from which its gradient comes out without bias; the sparse methods are there for
            those that are no whole distributions.
        tempers: it divides by the temperature itself: all that it is given, u and the signal too, is at T = 1.
        temperature: of the objective.
        k: ids of the teacher's head that it needs.
    """

    answers: ClassVar[frozenset[str]] = frozenset({WHOLE})
    tempers: ClassVar[bool] = False
    temperature: float = 1.0
    k: int = 0

    @abstractmethod
    def plain(self, student: Tensor, teacher: Tensor) -> Tensor:
        """D [positions] in plain torch.

        Args:
            student: [positions, vocab], log p.
            teacher: [positions, shared vocab], log q over the first entries; q is 0 on the rest.
        """

    def plain_sparse(self, student: Tensor, teacher: SparseRows) -> Tensor:
        """An estimate of D [positions] in plain torch, whose gradient is unbiased; ``student`` as in ``plain``."""
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


def empty_places(student: Softmax, ids: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
    """Take the student's exponentials at ``ids`` [rows, K], where ``inside``, out of its rows.

    What is left is summed instead of subtracted from the total: 1 - (their sum) would cancel where it is thin.

    Returns:
        What was taken out [rows, K], and the student's mass on all other ids [rows], above 0.
    """
    held = torch.where(inside, student.exps.gather(1, ids), 0.0)
    student.exps.scatter_add_(1, ids, -held)
    return held, (student.exps.sum(dim=1) / student.total).clamp_min_(torch.finfo(held.dtype).tiny)


def read_spec(spec: str) -> tuple[str, dict[str, float]]:
    """The name in a spec, and the options.

    Raises:
        ValueError: no such divergence, or what follows its name is not ``option=number``.
    """
    name, *parts = spec.split(":")
    if name not in registry.DIVERGENCES:
        raise ValueError(f"divergence must be one of {', '.join(registry.DIVERGENCES)}, got {name!r}")
    options: dict[str, float] = {}
    for part in parts:
        option, _, text = part.partition("=")
        try:
            options[option] = float(text) if set(text) & set(".eE") else int(text)
        except ValueError:
            raise ValueError(f"divergence {spec!r}: got {part!r}, expected option=number") from None
    return name, options


def get_divergence(spec: str, temperature: float = 1.0) -> Divergence:
    """The divergence that ``spec`` names, for an objective of this temperature.

    Raises:
        ValueError: there is none of that name, or an option that it does not take.
    """
    name, options = read_spec(spec)
    made: Callable[..., Divergence] = registry.load(registry.DIVERGENCES, name)
    known = list(inspect.signature(made).parameters) if options else []
    for option in options:
        if option not in known:
            takes = f"only {', '.join(known)}" if known else "none"
            raise ValueError(f"divergence {name} has no option {option!r}, it takes {takes}")
    try:
        divergence = made(**options)
    except ValueError as error:
        raise ValueError(f"divergence {spec!r}: {error}") from None
    divergence.temperature = temperature
    return divergence


def check_form(spec: str, form: str, where: object, most_ids: int | None = None) -> None:
    """Refuse a form of signal that the divergence cannot be worked out from without bias.

    Args:
        most_ids: the most ids a position of the signal has, where that is known.

    Raises:
        UsageError: naming codecs that can.
    """
    divergence = get_divergence(spec)
    answers = divergence.answers
    if form == HEAD and form in answers and most_ids is not None and divergence.k > most_ids:
        raise UsageError(
            f"the divergence {spec} needs more ids than the stored signal has",
            where=where,
            got=f"{most_ids} ids a position",
            expected=f"at least {divergence.k}",
            remedy=f"ask for fewer (k={most_ids}), or capture with --codec=topk --topk={divergence.k}",
        )
    if form in answers:
        return
    able = [f"--codec={codec}" for of, codec in _CODECS.items() if of in answers]
    raise UsageError(
        f"the divergence {spec.partition(':')[0]} needs {', or '.join(FORMS[one] for one in FORMS if one in answers)}",
        where=where,
        got=f"a signal of {FORMS[form]}",
        remedy=f"capture with {' or '.join(able)}, ask an online teacher, or use --divergence=forward_kl",
    )


_CODECS = {WHOLE: "full", HEAD: "topk", HEAD_AND_DRAWS: "tail", DRAWS: "sampled"}
