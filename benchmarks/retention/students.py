"""Students: their start, their steps, and what they are worth on held-out texts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from benchmarks.retention.data import Texts, batches_of, draw_batches, padded
from benchmarks.retention.stored import Kept
from numpy.typing import NDArray
from torch import Tensor

from liquid_llm.losses.fused import fused_loss
from liquid_llm.losses.objective import Objective
from liquid_llm.losses.signals import OutputHead, Signal
from liquid_llm.models.heads import hidden_states, output_head
from liquid_llm.models.student import build_student
from liquid_llm.schedules import WarmupCosine

KEYS = ("ce", "kl1", "kl2")  # of a held-out text: summed cross-entropy, KL(teacher || student) at T = 1 and T = 2


@dataclass(frozen=True)
class Case:
    """Tokens a step and the objective; alpha goes from one value to the other over the steps."""

    tokens: int
    temperature: float
    alphas: tuple[float, float]

    @classmethod
    def parse(cls, text: str) -> Case:
        tokens, temperature, alpha = text.split(":")
        first, _, last = alpha.partition("-")
        return cls(int(tokens), float(temperature), (float(first), float(last or first)))

    @property
    def name(self) -> str:
        first, last = self.alphas
        return f"{self.tokens}:{self.temperature:g}:{first:g}" + ("" if first == last else f"-{last:g}")

    def objective(self, progress: float) -> Objective:
        first, last = self.alphas
        return Objective(first + (last - first) * min(1.0, progress), self.temperature)


def parse_cases(text: str) -> list[Case]:
    return [Case.parse(case) for case in text.split(",") if case]


@dataclass
class Laboratory:
    """Everything a student's run needs.

    Attributes:
        texts: by split; "train" and "held" are scored.
        head: the teacher's.
        kept: (arm, temperature) -> what its store gives back.
        device: where all of it lies.
        preset: the student's shape.
        start_steps, start_tokens: of the plain steps that all arms begin after.
        steps: tokens a step -> steps.
        lr: tokens a step -> peak learning rate.
    """

    texts: dict[str, Texts]
    head: OutputHead
    kept: dict[tuple[str, float], Kept]
    device: torch.device
    preset: str
    start_steps: int
    start_tokens: int
    steps: dict[int, int]
    lr: dict[int, float]
    held_tokens: int = 16384

    def start(self, seed: int) -> Any:
        """A student after plain steps on texts that no arm trains on."""
        model = build_student(
            self.preset, vocab_size=self.head.vocab_size, bos_id=0, eos_id=0, block_size=512, seed=seed
        ).to(self.device)
        plan = list(draw_batches(self.texts["start"], self.start_tokens, self.start_steps, seed + 1000))
        self._train(model, self.texts["start"], plan, lambda _: None, lambda _: Objective(), 1e-3, floor=1.0)
        return model

    def run(self, start: Any, case: Case, arm: str, seed: int) -> Any:
        """A copy of ``start`` after the case's steps."""
        model = copy.deepcopy(start)
        texts, steps = self.texts["train"], self.steps[case.tokens]
        plan = list(draw_batches(texts, case.tokens, steps, seed))
        if arm == "ce":
            return self._train(model, texts, plan, lambda _: None, lambda _: Objective(), self.lr[case.tokens])
        assert texts.hidden is not None
        kept = Kept(0.0, hidden=texts.hidden, head=self.head) if arm == "full" else self.kept[arm, case.temperature]
        return self._train(model, texts, plan, kept.signal, case.objective, self.lr[case.tokens])

    def _train(
        self,
        model: Any,
        texts: Texts,
        plan: list[list[int]],
        signal: Callable[[Tensor], Signal | None],
        objective: Callable[[float], Objective],
        lr: float,
        floor: float = 0.1,
    ) -> Any:
        parameters = list(model.parameters())
        on_gpu = self.device.type == "cuda"
        optimizer = torch.optim.AdamW(parameters, lr=1.0, betas=(0.9, 0.95), weight_decay=0.1, fused=on_gpu)
        rates = WarmupCosine(lr, max(1, len(plan) // 10), len(plan), floor_ratio=floor)
        for step, chosen in enumerate(plan):
            for group in optimizer.param_groups:
                group["lr"] = rates.value(step)
            ids, places, labels = padded(texts, chosen, self.device)
            hidden = hidden_states(model, ids).flatten(0, 1)[places]
            rows = texts.rows(chosen).to(self.device, non_blocking=True)
            output = fused_loss(
                hidden,
                output_head(model),
                labels,
                signal=signal(rows),
                objective=objective(step / len(plan)),
                all_labelled=True,
            )
            (output.loss / output.num_positions).backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return model

    @torch.no_grad()
    def measure(self, model: Any) -> NDArray[np.float64]:
        """[texts, KEYS] of the held-out texts, summed over positions."""
        texts = self.texts["held"]
        found = np.zeros((len(texts.ids), len(KEYS)))
        assert texts.hidden is not None
        for chosen in batches_of(texts, self.held_tokens):
            ids, places, labels = padded(texts, chosen, self.device)
            hidden = hidden_states(model, ids).flatten(0, 1)[places]
            teacher = texts.hidden[texts.rows(chosen).to(self.device)]
            owner = np.repeat(chosen, [texts.ids[one].size - 1 for one in chosen])
            values = torch.cat(
                [
                    compare(z.float(), t.float(), y)
                    for z, t, y in zip(
                        (output_head(model).logits(part) for part in hidden.split(2048)),
                        (self.head.logits(part) for part in teacher.split(2048)),
                        labels.split(2048),
                        strict=True,
                    )
                ]
            )
            np.add.at(found, owner, values.double().cpu().numpy())
        return found


def compare(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """[positions, KEYS] of two rows of logits."""
    logs = torch.log_softmax(student, 1)
    columns = [-logs.gather(1, labels[:, None]).squeeze(1)]
    for temperature in (1.0, 2.0):
        p = torch.log_softmax(teacher / temperature, 1)
        q = logs if temperature == 1.0 else torch.log_softmax(student / temperature, 1)
        columns.append((p.exp() * (p - q)).sum(1))
    return torch.stack(columns, 1)
