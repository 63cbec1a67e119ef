"""Texts, batches and models that all contestants share."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from liquid_llm.data.buckets import plan_buckets
from liquid_llm.demo.word_problems import word_problems
from liquid_llm.models.loading import LoadedModel, load_teacher
from liquid_llm.models.student import build_student
from liquid_llm.models.tokenizers import end_of_text_id

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LR, DECAY, BETAS, CLIP = 1e-4, 0.1, (0.9, 0.95), 1.0
_LENGTHS = (5.1, 0.45)  # of the logarithm: GSM8K's have a mean of about 181 tokens, 95 % are below 312


@dataclass(frozen=True)
class Setting:
    """What a process is told.

    Attributes:
        teacher: a model id.
        student: a preset.
        device: where models and batches are.
        precision: of products, of all contestants.
        threads: of each process.
        batch_size: texts in a batch.
        rounds: batches, beside one that warms up.
        folder: where ``texts.json`` is, and the captured signal.
    """

    teacher: str
    student: str
    device: str
    precision: str
    threads: int
    batch_size: int
    rounds: int
    folder: str

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.precision]

    def token_ids(self) -> list[NDArray[np.int32]]:
        rows = json.loads((Path(self.folder) / "texts.json").read_text())
        return [np.array(row, np.int32) for row in rows]

    def batches(self) -> list[list[int]]:
        """Texts of each round as they come: the numbers of ``batch_size`` in a row. The first one warms up."""
        return [list(range(n, n + self.batch_size)) for n in range(0, self.num_texts, self.batch_size)]

    def own_batches(self) -> list[list[int]]:
        """The same texts as this project puts them together, by length, with about as many tokens in each batch."""
        lengths = np.array([len(row) for row in self.token_ids()])
        plan = plan_buckets(lengths, self.batch_size, int(lengths.mean()))
        samples, order = plan.order(0)
        return [samples[plan.bounds[n] : plan.bounds[n + 1]].tolist() for n in order.tolist()]

    @property
    def num_texts(self) -> int:
        return (self.rounds + 1) * self.batch_size

    def load_teacher(self) -> LoadedModel:
        return load_teacher(self.teacher, dtype=self.dtype, device=self.device)

    def build_student(self, tokenizer: Any) -> Any:
        """The same weights in every process."""
        end = end_of_text_id(tokenizer)
        made = build_student(self.student, vocab_size=len(tokenizer), bos_id=end, eos_id=end, block_size=2048, seed=0)
        return made.to(self.device)

    def wait(self) -> None:
        """Let the device finish."""
        if self.device != "cpu":
            torch.get_device_module(self.device).synchronize()


def texts_of(path: Path | None, count: int) -> list[str]:
    """Question and answer of a JSONL file, or made-up problems joined to texts about as long as GSM8K's."""
    if path is not None:
        rows = islice((json.loads(line) for line in path.open(encoding="utf-8")), count)
        found = [
            row["text"] if "text" in row else f"Question: {row['question']}\nAnswer: {row['answer']}" for row in rows
        ]
        if len(found) < count:
            raise SystemExit(f"{path} has {len(found)} records, and {count} are needed: take fewer rounds")
        return found
    rng = random.Random(0)
    problems = (f"Question: {one.question}\nAnswer: {one.answer}" for one in word_problems(20 * count, 0))
    wanted = [4 * rng.lognormvariate(*_LENGTHS) for _ in range(count)]  # characters
    texts = []
    for length in wanted:
        parts = [next(problems)]
        while sum(map(len, parts)) < length:
            parts.append(next(problems))
        texts.append("\n".join(parts))
    return texts


def write_texts(texts: list[str], tokenizer: Any, folder: Path) -> list[int]:
    """Tokenise ``texts`` into the folder; the length of each."""
    end = end_of_text_id(tokenizer)
    rows = [[*row, end] for row in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    (folder / "texts.json").write_text(json.dumps(rows))
    return [len(row) for row in rows]
