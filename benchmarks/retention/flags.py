"""What ``bench_noise`` found: which settings ended worse than plain training, and which of them were flagged."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from liquid_llm.signal_store.survey import DrawnVariance
from liquid_llm.wiring.noise import Noise, most_cost

Row = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """What a run is told."""

    shape: str
    tokens: int
    temperature: float
    alpha: float
    draws: str

    def name_of(self, arm: str) -> str:
        """Arms that do not differ in what they are told have one name."""
        if arm == "ce":
            return f"{self.shape} {self.tokens} ce"
        rest = f"{self.shape} {self.tokens} T={self.temperature:g} alpha={self.alpha:g}"
        return f"{rest} full" if arm == "full" else f"{rest} draws={self.draws}"


def predict(row: Row) -> float:
    """What the run would say, in nats."""
    return Noise.of_step(row["alpha"], row["temperature"], DrawnVariance(*row["variance"]), row["positions"]).cost


def compare(one: Row, other: Row, draws: int = 2000) -> tuple[float, float, float]:
    """Cross-entropy of ``one`` less that of ``other``, nats a position, and the ends of its 95 % interval."""
    mine, its = np.array(one["texts"]), np.array(other["texts"])
    difference, counts = mine[:, 0] - its[:, 0], mine[:, 1]
    which = np.random.default_rng(0).integers(len(counts), size=(draws, len(counts)))
    low, high = np.quantile(difference[which].sum(1) / counts[which].sum(1), (0.025, 0.975))
    return float(difference.sum() / counts.sum()), float(low), float(high)


def interval(count: int, total: int) -> str:
    """A share and its 95 % interval (Wilson 1927)."""
    if not total:
        return "none"
    z, share = 1.96, count / total
    middle, half = share + z * z / (2 * total), z * math.sqrt(share * (1 - share) / total + (z / (2 * total)) ** 2)
    low, high = ((middle + sign * half) / (1 + z * z / total) for sign in (-1, 1))
    return f"{count} of {total} ({100 * max(0.0, low):.0f} to {100 * min(1.0, high):.0f} %)"


def report(rows: Sequence[Row]) -> str:
    """A line a setting, and the rates."""
    by_name = {row["run"]: row for row in rows}
    lines = ["| setting | predicted cost | flagged | less plain training | full less plain | stored less full |"]
    lines.append("|---" * 6 + "|")
    flagged: dict[bool, list[bool]] = {True: [], False: []}
    for row in rows:
        if row["arm"] != "stored":
            continue
        setting = Setting(*(row[name] for name in ("shape", "tokens", "temperature", "alpha", "draws")))
        plain, full = by_name[setting.name_of("ce")], by_name.get(setting.name_of("full"))
        found, low, high = compare(row, plain)
        said = predict(row) >= most_cost(row["alpha"])
        flagged[found > 0].append(said)
        cells = [row["run"], f"{predict(row):.3f}", "yes" if said else "no"]
        cells.append(f"{found:+.3f} ({low:+.3f} to {high:+.3f})")
        cells += ["", ""] if full is None else [f"{compare(full, plain)[0]:+.3f}", f"{compare(row, full)[0]:+.3f}"]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", f"worse than plain and flagged: {interval(sum(flagged[True]), len(flagged[True]))}"]
    lines.append(f"not worse, and flagged: {interval(sum(flagged[False]), len(flagged[False]))}")
    return "\n".join(lines)
