"""Small teachers and samples for the tests of the teacher side."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tests.support.models import tiny_model

from liquid_llm.data.loader import collate
from liquid_llm.data.types import MicroBatch, Sample
from liquid_llm.identity import ModelIdentity
from liquid_llm.models.loading import LoadedModel

VOCAB = 300  # the shared vocabulary; the tiny teacher's embedding is padded to 320
IDENTITY = ModelIdentity("org/teacher", "commit-1", "tokenizer-1")
HARD_IDS = [
    "plain",
    "a/b/c",
    "../../etc/passwd",
    "/etc/passwd",
    "..",
    ".",
    ".hidden",
    "",
    " ",
    "with spaces and\ttabs\nand lines",
    "naïve-日本語-🙂",
    "x" * 300,
    "C:\\windows\\con",
    "CON",
    "a?b*c[d]",
    "gs://bucket/object",
    "nul\x00byte",
    "\ud800 lone surrogate",
]


def tiny_teacher(
    name: str = "llama", *, seed: int = 0, identity: ModelIdentity = IDENTITY, **changes: Any
) -> LoadedModel:
    """A two-layer teacher with random weights, scaled up so that its distributions are far from uniform."""
    model = tiny_model(name, vocab_size=320, seed=seed, **{"max_position_embeddings": 256, **changes})
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(40.0)
    return LoadedModel(model, None, identity)


class ListSource:
    """Samples held in a list, with the interface of ``TokenDataset``."""

    def __init__(self, samples: Iterable[Sample]) -> None:
        self.samples = list(samples)

    @property
    def lengths(self) -> NDArray[np.int64]:
        return np.array([len(sample.input_ids) for sample in self.samples], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.samples)

    def sample_id(self, index: int) -> str:
        return self.samples[index].sample_id

    def sample(self, index: int) -> Sample:
        return self.samples[index]


def make_samples(
    count: int, *, type: str = "math_tool", low: int = 2, high: int = 150, seed: int = 0, prefix: str = "s"
) -> list[Sample]:
    """Random samples of ``low`` to ``high`` tokens, the same for the same arguments."""
    rng = np.random.default_rng(seed)
    return [
        Sample(f"{prefix}/{n}", type, rng.integers(0, VOCAB, int(rng.integers(low, high + 1))).astype(np.int32))
        for n in range(count)
    ]


def batch_of(samples: Sequence[Sample], block_size: int = 1024, *, type: str | None = None) -> MicroBatch:
    """The micro-batch the loader makes of whole samples."""
    rows = [sample.input_ids[:block_size] for sample in samples]
    learnt = [None if sample.learnt is None else sample.learnt[:block_size] for sample in samples]
    return collate(type or samples[0].type, rows, tuple(samples), learnt)


def with_prompts(samples: Sequence[Sample], *, seed: int = 0) -> list[Sample]:
    """The same samples of which only some tokens are learnt, in runs; of the first all but a prompt."""
    rng = np.random.default_rng(seed)
    masks = [np.repeat(rng.random(len(one.input_ids)) < 0.5, 4)[: len(one.input_ids)] for one in samples]
    masks[0] = np.arange(len(masks[0])) >= len(masks[0]) // 2
    for mask in masks:
        mask[-1] = True
    return [replace(one, learnt=mask) for one, mask in zip(samples, masks, strict=True)]


def random_logits(rows: int, vocab: int, *, seed: int = 0, spread: float = 4.0) -> torch.Tensor:
    """Logits [rows, vocab] with a few clear favourites a row, like a language model's."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocab, generator=generator) * spread
    return logits + 30.0 * torch.rand(rows, 1, generator=generator)  # a row's constant means nothing
