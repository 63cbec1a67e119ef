"""Texts as tokens, in batches, with the teacher's hidden states."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from liquid_llm.models.heads import hidden_states, output_head


@dataclass
class Texts:
    """Texts of one split.

    Attributes:
        ids: tokens of each.
        types: what kind of text each is.
        starts: [texts + 1], where the labelled positions of each begin.
        hidden: [positions, hidden], the teacher's states before every labelled position, on the device.
    """

    ids: list[NDArray[np.int64]]
    types: NDArray[np.str_]
    starts: NDArray[np.int64] = field(init=False)
    hidden: Tensor | None = None

    def __post_init__(self) -> None:
        self.starts = np.concatenate([[0], np.cumsum([one.size - 1 for one in self.ids])])

    def rows(self, chosen: Sequence[int]) -> Tensor:
        """The labelled positions of the chosen texts, one text after the other."""
        return torch.cat([torch.arange(self.starts[one], self.starts[one + 1]) for one in chosen])


def read_texts(path: Path, limit: int) -> dict[str, Texts]:
    """The splits, at most ``limit`` tokens of each type in each."""
    stored = np.load(path)
    lengths, types, splits = stored["lengths"], stored["types"], stored["splits"]
    ends, ids = np.cumsum(lengths), stored["ids"].astype(np.int64)
    chosen: dict[str, list[int]] = {}
    used: dict[tuple[str, str], int] = {}
    for number, (split, kind) in enumerate(zip(splits, types, strict=True)):
        most = limit // 4 if split == "held" else limit
        if used.get((split, kind), 0) < most:
            used[split, kind] = used.get((split, kind), 0) + int(lengths[number])
            chosen.setdefault(str(split), []).append(number)
    return {
        split: Texts([ids[ends[n] - lengths[n] : ends[n]] for n in numbers], types[numbers])
        for split, numbers in chosen.items()
    }


def padded(texts: Texts, chosen: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids [texts, longest], places of the labelled positions in them when flat, and the labels."""
    rows = [torch.from_numpy(texts.ids[one]) for one in chosen]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    longest = ids.shape[1]
    places = torch.cat([torch.arange(row.numel() - 1) + number * longest for number, row in enumerate(rows)])
    labels = torch.cat([row[1:] for row in rows])
    return tuple(one.to(device, non_blocking=True) for one in (ids, places, labels))  # type: ignore[return-value]


def batches_of(texts: Texts, tokens: int) -> Iterator[list[int]]:
    """Texts of near-equal length together, for scoring."""
    order = sorted(range(len(texts.ids)), key=lambda one: texts.ids[one].size)
    batch: list[int] = []
    for one in order:
        if batch and (len(batch) + 1) * texts.ids[one].size > tokens:
            yield batch
            batch = []
        batch.append(one)
    yield batch


@torch.inference_mode()
def score(model: Any, texts: Texts, device: torch.device, tokens: int) -> None:
    """Fill in the teacher's hidden states."""
    width = output_head(model).weight.shape[1]
    texts.hidden = torch.empty(int(texts.starts[-1]), width, dtype=output_head(model).weight.dtype, device=device)
    for chosen in batches_of(texts, tokens):
        ids, places, _ = padded(texts, chosen, device)
        texts.hidden[texts.rows(chosen).to(device)] = hidden_states(model, ids).flatten(0, 1)[places]


def draw_batches(texts: Texts, tokens: int, steps: int, seed: int) -> Iterator[list[int]]:
    """``steps`` batches of whole texts in random order, epoch after epoch, each as full as they allow."""
    generator = torch.Generator().manual_seed(seed)
    batch: list[int] = []
    room, done = tokens, 0
    while True:
        for one in torch.randperm(len(texts.ids), generator=generator).tolist():
            if batch and texts.ids[one].size > room:
                yield batch
                done += 1
                if done == steps:
                    return
                batch, room = [], tokens
            batch.append(one)
            room -= texts.ids[one].size
