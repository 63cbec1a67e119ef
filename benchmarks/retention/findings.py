"""``retention.json``, and the tables made of it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


class Results:
    """``retention.json``, written anew after each run."""

    def __init__(self, folder: Path, about: dict[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = folder / "retention.json"
        self.contents: dict[str, Any] = {**about, "rows": []}

    def add(self, case: str, seed: int, arm: str, found: NDArray[np.float64], seconds: float) -> None:
        row = {"case": case, "seed": seed, "arm": arm, "seconds": round(seconds, 2)}
        row["texts"] = np.round(found, 3).tolist()
        self.contents["rows"].append(row)
        self.save()

    def save(self) -> None:
        part = self._file.with_suffix(".part")
        part.write_text(json.dumps(self.contents))
        part.replace(self._file)


def gains(contents: dict[str, Any], case: str, arm: str, kind: str, key: int) -> NDArray[np.float64] | None:
    """[seeds, texts, 2]: summed differences of ``ce`` less arm and ``ce`` less full; None where no seed has all."""
    rows = {(row["case"], row["seed"], row["arm"]): row["texts"] for row in contents["rows"]}
    tokens = case.split(":")[0]
    mask = np.array([kind in ("all", one) for one in contents["types"]])
    found = []
    for seed in sorted({row["seed"] for row in contents["rows"]}):
        trio = [rows.get(place) for place in ((tokens, seed, "ce"), (case, seed, arm), (case, seed, "full"))]
        if all(one is not None for one in trio):
            ce, mine, full = (np.array(one)[mask, key] for one in trio)
            found.append(np.stack([ce - mine, ce - full], 1))
    return np.stack(found) if found else None


def retention(values: NDArray[np.float64], draws: int = 2000) -> tuple[float, float, float]:
    """The share kept, and the ends of its 95 % interval: seeds are drawn again, and texts within each."""
    rng = np.random.default_rng(0)
    seeds, texts, _ = values.shape
    which = rng.integers(texts, size=(draws, texts))
    sums = np.stack([values[seed][which].sum(1) for seed in range(seeds)])  # [seeds, draws, 2]
    again = rng.integers(seeds, size=(draws, seeds))
    total = sums[again, np.arange(draws)[:, None]].sum(1)
    low, high = np.quantile(total[:, 0] / total[:, 1], (0.025, 0.975))
    whole = values.sum((0, 1))
    return float(whole[0] / whole[1]), float(low), float(high)


def report(contents: dict[str, Any]) -> str:
    """Tables in Markdown: per case and arm the gain and what is retained of it, by type."""
    positions = np.array(contents["positions"])
    types = list(dict.fromkeys(contents["types"]))
    lines = [f"{contents['machine']}; bytes a position: {contents['bytes']}"]
    cases = list(dict.fromkeys(row["case"] for row in contents["rows"] if ":" in row["case"]))
    for key, name in ((0, "CE"), (1, "KL at T=1"), (2, "KL at T=2")):
        lines += ["", f"**{name}**: gain of full logits (nats a position), share retained (95 % interval)", ""]
        lines += [f"| case | arm | seeds | all | {' | '.join(types)} |", "|---" * (4 + len(types)) + "|"]
        for case in cases:
            for arm in dict.fromkeys(row["arm"] for row in contents["rows"] if row["case"] == case):
                cells = []
                for kind in ("all", *types):
                    values = gains(contents, case, arm, kind, key)
                    if values is None:
                        cells.append("-")
                    elif arm == "full":
                        mask = np.array([kind in ("all", one) for one in contents["types"]])
                        each = values[:, :, 1].sum(1) / positions[mask].sum()
                        error = each.std(ddof=1) / math.sqrt(len(each)) if len(each) > 1 else math.nan
                        cells.append(f"{each.mean():.4f} ± {error:.4f}")
                    else:
                        share, low, high = retention(values)
                        cells.append(f"{100 * share:.1f} ({100 * low:.1f} to {100 * high:.1f})")
                seeds = sum(row["case"] == case and row["arm"] == arm for row in contents["rows"])
                lines.append(f"| {case} | {arm} | {seeds} | {' | '.join(cells)} |")
    return "\n".join(lines)
