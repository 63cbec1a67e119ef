"""Whether one way to train is better than another, by how much, and how sure that is. Numbers in, words out.

Both arms were trained with the same seeds and judged on the same texts, so every figure is a difference of a pair: same
seed, same text. Two things are drawn by chance, seeds and texts, and the interval holds both. With S seeds and T texts,
d[s, t] the difference of the sums of text t, and w[t] its positions:

    D      = mean over s of D_s,          D_s = sum_t d[s, t] / sum_t w[t]
    V_seed = variance of the D_s / S      (what a seed does, and what it does to single texts)
    V_all  = T / (T - 1) sum_t e_t^2,     e_t = (mean_s d[s, t] - D w[t]) / sum_t w[t]   (ratio of means, linearised)
    V_text = V_all - V_both               (what V_seed has too is taken out: the variance of the rest of d[s, t])
    D -+ sqrt(q(S - 1)^2 V_seed + q(T - 1)^2 V_text),   q(n) Student's 97.5 % quantile with n degrees of freedom

Each source of chance has an interval of its own, and the two are added as independent ones are (MOVER: Zou and Donner,
Statistics in Medicine 27, 2008). A bootstrap over seeds would be too sure of itself: three seeds drawn with replacement
know nothing of a fourth (docs/decisions/0019). With one seed the interval holds texts alone, and says so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

BETTER, NOT_BETTER, UNKNOWN = "better", "not better", "cannot tell yet"
MAX_SEEDS = 100  # more than anybody runs
_Z = 1.959963984540054  # 97.5 % of the normal distribution
_POWER_Z = 0.8416212335729143  # 80 % of it


@dataclass(frozen=True)
class Measure:
    """What is compared.

    Attributes:
        key: its name in files.
        title, unit: in words; ``unit`` of a difference.
        scale: what a figure is multiplied with to be shown.
        higher_is_better: whether more of it is better.
        is_share: whether each text is right or wrong (or, over seeds, some share of it), which needs more care near 0.
        least_gain: a gain of less does not matter: where the interval ends below it, the arm is not better.
    """

    key: str
    title: str
    unit: str
    scale: float = 1.0
    higher_is_better: bool = False
    is_share: bool = False
    least_gain: float = 0.01

    def show(self, value: float, *, sign: bool = False) -> str:
        """A figure with its unit: ``0.0213 nats a token``."""
        digits = 4 if self.scale == 1.0 else 1
        return f"{_number(value * self.scale, digits, sign)} {self.unit}"

    def show_interval(self, low: float, high: float) -> str:
        """``-0.0311 to -0.0115``, in the unit of ``show``."""
        digits = 4 if self.scale == 1.0 else 1
        return f"{_number(low * self.scale, digits, True)} to {_number(high * self.scale, digits, True)}"


def _number(value: float, digits: int, sign: bool) -> str:
    text = f"{value:+.{digits}f}" if sign else f"{value:.{digits}f}"
    return text.replace("-", "−")


MEASURES = {
    one.key: one
    for one in (
        Measure("ce", "held-out cross-entropy", "nats a token"),
        Measure("kl", "KL from the teacher at T=1", "nats a token"),
        Measure("agreement", "agreement with the teacher's first choice", "points", 100.0, True),
        Measure("overlap", "overlap with the teacher, sum of min(p, q)", "points", 100.0, True),
        Measure("answers", "marked answers", "points", 100.0, True, is_share=True),
    )
}


@dataclass(frozen=True)
class Verdict:
    """One arm against the baseline by one measure; differences are arm minus baseline.

    Attributes:
        arm, baseline: the means of both.
        difference, low, high: the difference and its 95 % interval.
        seed_error, text_error: standard errors that seeds (None with one seed) and texts bring in.
        word: ``better``, ``not better`` or ``cannot tell yet``.
        seeds_needed: where it cannot be told yet, how many seeds would tell four times in five, were the difference and
            the spread what they look like now; None where no number would, or where one seed shows no spread.
        texts_needed: where more seeds do not suffice, about how many texts would with the present seeds; None likewise.
        of_students: whether two students are compared and not two ways to train: no other seed is spoken of.
    """

    measure: Measure
    arm: float
    baseline: float
    difference: float
    low: float
    high: float
    num_seeds: int
    num_texts: int
    seed_error: float | None
    text_error: float
    word: str
    seeds_needed: int | None
    texts_needed: int | None
    of_students: bool = False

    @property
    def is_worse(self) -> bool:
        """Whether the whole interval lies on the worse side."""
        return self.low > 0 if not self.measure.higher_is_better else self.high < 0

    @property
    def sentence(self) -> str:
        """The verdict in one sentence, without the name of the arm."""
        measure = self.measure
        size = measure.show(abs(self.difference))
        side = "higher" if self.difference > 0 else "lower"
        interval = f"95 % interval of the difference {measure.show_interval(self.low, self.high)}"
        found = f"{measure.title} {size} {side} ({interval}; {self._say_counts()})"
        if self.word == BETTER:
            gain = max(self.low, self.high, key=abs)
            little = f", though the gain is below {measure.show(measure.least_gain)}"
            return f"better: {found}{little if abs(gain) < measure.least_gain else ''}."
        if self.is_worse:
            return f"not better, but worse: {found}."
        if self.word == NOT_BETTER:
            return f"not better: {found}; a gain of {measure.show(measure.least_gain)} is ruled out."
        return f"cannot tell yet: {found}; {self._what_would_tell()}."

    @property
    def brief(self) -> str:
        """The verdict in a few words: ``held-out cross-entropy better, −0.0213 (−0.0311 to −0.0115) nats a token``."""
        measure, word = self.measure, "worse" if self.is_worse else self.word
        interval = measure.show_interval(self.low, self.high)
        number, _, unit = measure.show(self.difference, sign=True).partition(" ")
        return f"{measure.title} {word}, {number} ({interval}) {unit}"

    def _say_counts(self) -> str:
        texts = _count(self.num_texts, "text")
        if self.of_students:
            return texts
        only = "" if self.num_seeds > 1 else "; one seed: the interval holds texts only"
        return f"{_count(self.num_seeds, 'seed')}, {texts}{only}"

    def _what_would_tell(self) -> str:
        if self.of_students:
            if self.texts_needed is not None:
                return f"about {self.texts_needed:,} held-out texts would tell"
            if self.num_texts == 1:
                return "a single text has no interval"
            return "not even a hundred times as many texts would tell: the difference is too small"
        if self.num_seeds == 1:
            return "run three seeds or more"
        if self.seeds_needed is not None:
            return f"about {self.seeds_needed} seeds would tell"
        if self.texts_needed is not None:
            return f"more seeds alone would not tell, about {self.texts_needed:,} held-out texts would"
        return f"neither {MAX_SEEDS} seeds nor more texts would tell: the difference is too small"

    def as_dict(self) -> dict[str, object]:
        """Plain data for a file; None for an end of the interval that is not known, as of a single text.

        The means are ``value`` and ``baseline_value``.
        """
        names = {"arm": "value", "baseline": "baseline_value"}
        plain = {
            names.get(name, name): None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in vars(self).items()
            if name not in ("measure", "of_students")
        }
        words = {"worse": self.is_worse, "sentence": self.sentence, "brief": self.brief}
        return {"measure": self.measure.key, **plain, **words}


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def compare(
    arm: ArrayLike, baseline: ArrayLike, weights: ArrayLike, measure: Measure, *, of_students: bool = False
) -> Verdict:
    """Judge an arm against the baseline.

    Args:
        arm, baseline: [seeds, texts] sums over a text's positions; row s of both has the same seed.
        weights: [texts] positions of each text; 1 for a marked answer.
        measure: what the sums are of.
        of_students: there is one row, and it is of two students that are compared as they are.

    Raises:
        ValueError: the shapes are no pairs, or a value is not finite.
    """
    first, second, positions = (np.asarray(one, dtype=np.float64) for one in (arm, baseline, weights))
    if first.ndim != 2 or first.shape != second.shape or first.shape[1:] != positions.shape or not first.size:
        raise ValueError(f"no pairs: {first.shape} against {second.shape} with {positions.shape} weights")
    if not all(np.isfinite(one).all() for one in (first, second, positions)) or positions.sum() <= 0:
        raise ValueError("a sum is not finite, or no text has a position")
    spread = _Spread.of(first - second, positions, measure.is_share)
    half = spread.half_width(spread.num_seeds, spread.num_texts)
    low, high = spread.centre - half, spread.centre + half
    if (
        measure.is_share
    ):  # no share differs by more than 1; of two prompts Student's quantile makes hundreds of per cent
        low, high = max(low, -1.0), min(high, 1.0)
    gains = (low, high) if measure.higher_is_better else (-high, -low)
    word = BETTER if gains[0] > 0 else NOT_BETTER if gains[1] < measure.least_gain else UNKNOWN
    gain = spread.difference if measure.higher_is_better else -spread.difference
    seeds = texts = None
    if word == UNKNOWN and of_students:
        texts = spread.find_texts(gain, measure.least_gain)
    elif word == UNKNOWN and spread.num_seeds > 1:
        seeds = spread.find_seeds(gain, measure.least_gain)
        texts = None if seeds is not None else spread.find_texts(gain, measure.least_gain)
    total = positions.sum()
    return Verdict(
        measure,
        arm=float(first.mean(0).sum() / total),
        baseline=float(second.mean(0).sum() / total),
        difference=spread.difference,
        low=low,
        high=high,
        num_seeds=spread.num_seeds,
        num_texts=spread.num_texts,
        seed_error=math.sqrt(spread.seed) if spread.num_seeds > 1 else None,
        text_error=math.sqrt(spread.text),
        word=word,
        seeds_needed=seeds,
        texts_needed=texts,
        of_students=of_students,
    )


@dataclass(frozen=True)
class _Spread:
    """A mean difference and where its variance comes from.

    Attributes:
        difference, centre: the difference, and the middle of its interval.
        seed, text: the variance that seeds bring in, and that texts bring in beside it.
        both: what of ``seed`` a seed does to single texts.
    """

    difference: float
    centre: float
    seed: float
    text: float
    both: float
    num_seeds: int
    num_texts: int

    @classmethod
    def of(cls, differences: Floats, weights: Floats, is_share: bool) -> _Spread:
        """From differences [seeds, texts] and weights [texts]."""
        seeds, texts = differences.shape
        total = weights.sum()
        by_seed = differences.sum(1) / total
        difference = float(by_seed.mean())
        mean = differences.mean(0)
        if is_share:
            # Near 0 and 1 a variance that is counted from the texts is too small; with none that differ it would be 0.
            # As Wilson's interval does: as if z^2 (about four) more had been answered, half of them in favour of each.
            count = texts + _Z**2
            centre = float(mean.sum()) / count
            every = (float(np.square(mean).sum()) + _Z**2) / count**2 - centre**2 / count
        else:
            centre = difference
            residuals = (mean - difference * weights) / total
            every = float(np.square(residuals).sum()) * texts / (texts - 1) if texts > 1 else math.inf
        if seeds == 1:
            return cls(difference, centre, 0.0, every, 0.0, seeds, texts)
        rest = (differences - mean - np.outer(by_seed - difference, weights)) / total
        both = float(np.square(rest).sum()) / (seeds * (seeds - 1))
        seed = float(by_seed.var(ddof=1)) / seeds
        return cls(difference, centre, seed, max(0.0, every - both), min(both, seed), seeds, texts)

    def half_width(self, num_seeds: int, num_texts: int) -> float:
        """Half the interval's width, as it is or as it would be with other numbers of seeds and texts."""
        seed, text = self._variances(num_seeds, num_texts)
        by_seed = quantile(num_seeds - 1) ** 2 * seed if num_seeds > 1 else 0.0
        return math.sqrt(by_seed + quantile(num_texts - 1) ** 2 * text)

    def _variances(self, num_seeds: int, num_texts: int) -> tuple[float, float]:
        """``seed`` and ``text`` with other numbers of seeds and texts."""
        fewer_seeds, fewer_texts = self.num_seeds / num_seeds, self.num_texts / num_texts
        return (self.seed - self.both + self.both * fewer_texts) * fewer_seeds, self.text * fewer_texts

    def find_seeds(self, gain: float, least_gain: float) -> int | None:
        """The fewest seeds that would tell; None where ``MAX_SEEDS`` would not."""
        more = range(self.num_seeds + 1, MAX_SEEDS + 1)
        return next((one for one in more if self._would_tell(gain, least_gain, one, self.num_texts)), None)

    def find_texts(self, gain: float, least_gain: float) -> int | None:
        """About how many texts would tell with these seeds; None where a hundred times as many would not."""
        for factor in (1.5, 2, 3, 4, 6, 8, 12, 16, 25, 50, 100):
            texts = round(self.num_texts * factor)
            if self._would_tell(gain, least_gain, self.num_seeds, texts):
                return texts
        return None

    def _would_tell(self, gain: float, least_gain: float, num_seeds: int, num_texts: int) -> bool:
        """Whether the difference as it is would be told, as better or as not better, four times in five."""
        error = math.sqrt(sum(self._variances(num_seeds, num_texts)))
        reach = self.half_width(num_seeds, num_texts) + _POWER_Z * error
        return gain > reach or gain + reach < least_gain


def quantile(freedom: int) -> float:
    """The 97.5 % quantile of Student's t (Cornish and Fisher's expansion, within 0.2 %; exact for 1 and 2)."""
    if freedom < 1:
        return math.inf
    if freedom == 1:
        return math.tan(math.pi * 0.475)
    if freedom == 2:
        return 0.95 / math.sqrt(2 * 0.975 * 0.025)
    z = _Z
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + float(sum(term / freedom**power for power, term in enumerate(terms, 1)))
