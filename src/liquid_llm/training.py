"""The loop: ``Trainer.train`` and ``Trainer.step``.

A step draws ``grad_accum`` micro-batches, each with its teacher signal, adds up the gradients of their *summed* losses
divided by the number of labelled positions of the whole step, and updates the weights once. What happens now and then
(metrics, evaluation, checkpoints) is a hook ``(fn, every)`` run after the step.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from liquid_llm.data.types import IGNORE_INDEX, MicroBatch
from liquid_llm.errors import CheckpointError, NumericalError
from liquid_llm.losses.fused import fused_loss
from liquid_llm.losses.signals import DenseSignal, LossOutput, Signal
from liquid_llm.models.heads import hidden_states, output_head
from liquid_llm.schedules import Schedule


@dataclass
class Progress:
    """Where a run is: what a checkpoint needs, beside tensors, to go on exactly."""

    step: int = 0
    tokens_seen: int = 0
    data_position: int = 0
    best_val_loss: float = math.inf


@dataclass(frozen=True)
class StepValues:
    """What the schedules say for one step."""

    kd_alpha: float
    kd_temperature: float
    l2_gamma: float
    lr: float


@dataclass(frozen=True)
class StepSchedules:
    """One schedule for each of ``StepValues``."""

    alpha: Schedule
    temperature: Schedule
    l2: Schedule
    lr: Schedule

    def at(self, step: int) -> StepValues:
        return StepValues(
            self.alpha.value(step), self.temperature.value(step), self.l2.value(step), self.lr.value(step)
        )


@dataclass(frozen=True)
class ScoredBatch:
    """A micro-batch and its loss."""

    batch: MicroBatch
    output: LossOutput


@dataclass(frozen=True)
class StepResult:
    """One optimizer step: its micro-batches' sums, and what was applied."""

    step: int
    values: StepValues
    scored: tuple[ScoredBatch, ...]
    grad_norm: float


class Student:
    """The student as the loss sees it: hidden states and a head, in the run's arithmetic.

    Args:
        model: the student; its parameters stay float32, products run in ``compute_dtype``.
        compute_dtype: float32, or bfloat16 by autocast.
        reference: the frozen student of the keep-old-logits term, or None.
    """

    def __init__(self, model: nn.Module, compute_dtype: torch.dtype, reference: nn.Module | None = None) -> None:
        self.model = model
        self.reference = reference
        self.compute_dtype = compute_dtype

    def loss(self, batch: MicroBatch, signal: Signal | None, values: StepValues) -> LossOutput:
        """The summed loss of a micro-batch; see ``losses/reference.py`` for the terms."""
        keep = labelled_rows(batch)
        labels = batch.labels.reshape(-1)[keep]
        with self._arithmetic():
            hidden = _rows(hidden_states(self.model, batch.input_ids), keep)
            old = self._reference_signal(batch, keep) if values.l2_gamma > 0 else None
            return fused_loss(
                hidden,
                output_head(self.model),
                labels,
                signal=signal,
                kd_alpha=values.kd_alpha,
                kd_temperature=values.kd_temperature,
                reference=old,
                l2_gamma=values.l2_gamma,
            )

    def _reference_signal(self, batch: MicroBatch, keep: Tensor) -> DenseSignal:
        if self.reference is None:
            raise ValueError("an L2 weight above zero needs a reference student")
        with torch.no_grad():
            hidden = _rows(hidden_states(self.reference, batch.input_ids), keep)
        return DenseSignal(hidden, output_head(self.reference))

    def _arithmetic(self) -> contextlib.AbstractContextManager[object]:
        if self.compute_dtype == torch.float32:
            return contextlib.nullcontext()
        device = next(self.model.parameters()).device.type
        return torch.autocast(device, dtype=self.compute_dtype)


def labelled_rows(batch: MicroBatch) -> Tensor:
    """Indices of the labelled positions in the flattened [batch * time] grid, in row-major order."""
    return (batch.labels.reshape(-1) != IGNORE_INDEX).nonzero().squeeze(1)


def _rows(hidden: Tensor, keep: Tensor) -> Tensor:
    return hidden.reshape(-1, hidden.shape[-1]).index_select(0, keep)


@dataclass
class Trainer:
    """Takes optimizer steps from ``progress.step`` to ``total_steps``.

    Attributes:
        student: gives the loss.
        optimizer: its parameter groups take the scheduled learning rate.
        schedules: applied before each step.
        batches: micro-batches from ``progress.data_position`` on, each with its teacher signal.
        grad_accum: micro-batches a step.
        grad_clip: largest gradient norm, 0 for none.
        hooks: ``(fn, every)``: ``fn(result)`` after every ``every``-th step, in order.
        stopping: says that the process was asked to stop.
    """

    student: Student
    optimizer: torch.optim.Optimizer
    schedules: StepSchedules
    batches: Iterator[tuple[MicroBatch, Signal | None]]
    progress: Progress
    total_steps: int
    grad_accum: int
    grad_clip: float
    hooks: list[tuple[Callable[[StepResult], None], int]] = field(default_factory=list)
    stopping: Callable[[], bool] = lambda: False

    def train(self) -> bool:
        """Run to the end; False when it stopped early because the process was asked to."""
        while self.progress.step < self.total_steps:
            result = self.step()
            for hook, every in self.hooks:
                if self.progress.step % every == 0:
                    hook(result)
            if self.stopping():
                return self.progress.step >= self.total_steps
        return True

    def step(self) -> StepResult:
        """One optimizer step.

        Raises:
            NumericalError: the loss or the gradient norm is not finite; the weights are as before the step.
        """
        values = self.schedules.at(self.progress.step)
        self._release_reference(values)
        for group in self.optimizer.param_groups:
            group["lr"] = values.lr
        drawn = [next(self.batches) for _ in range(self.grad_accum)]
        num_positions = sum(batch.num_positions for batch, _ in drawn)
        scored = []
        for batch, signal in drawn:
            output = self.student.loss(batch, signal, values)
            (output.loss / num_positions).backward()  # type: ignore[no-untyped-call]
            scored.append(ScoredBatch(batch, output))
        grad_norm = self._clip()
        self._require_finite(scored, grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.progress.step += 1
        self.progress.data_position += self.grad_accum
        self.progress.tokens_seen += sum(batch.num_tokens for batch, _ in drawn)
        return StepResult(self.progress.step, values, tuple(scored), grad_norm)

    def _release_reference(self, values: StepValues) -> None:
        # The L2 weight only falls: at zero the reference student is never needed again and its memory is given back.
        if values.l2_gamma == 0:
            self.student.reference = None

    def _clip(self) -> float:
        parameters = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        limit = self.grad_clip if self.grad_clip > 0 else math.inf
        return float(nn.utils.clip_grad_norm_(parameters, limit))

    def _require_finite(self, scored: list[ScoredBatch], grad_norm: float) -> None:
        losses = [float(one.output.loss.detach()) for one in scored]
        if math.isfinite(grad_norm) and all(map(math.isfinite, losses)):
            return
        self.optimizer.zero_grad(set_to_none=True)
        raise NumericalError(
            "the loss or its gradient is not finite",
            where=f"step {self.progress.step}",
            got=f"loss sums {losses} of types {[one.batch.type for one in scored]}, gradient norm {grad_norm}",
            remedy="lower --lr, lengthen --warmup_steps or use --precision=float32; the last checkpoint is intact",
        )


def build_optimizer(
    model: nn.Module, *, lr: float, weight_decay: float, betas: tuple[float, float]
) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) with decay on matrices only.

    Norms, biases and every other one-dimensional parameter are not decayed. ``fused`` is used where the device has it.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    fused = bool(parameters) and parameters[0].device.type in ("cpu", "cuda")
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=fused)


def load_optimizer(
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    *,
    where: object,
    resize: Mapping[nn.Parameter, Callable[[Tensor], Tensor]] | None = None,
) -> None:
    """Give ``optimizer`` the moments of a saved one; learning rate, decay and betas stay its own.

    Args:
        optimizer: newly built, of the same architecture.
        state: its ``state_dict()`` as it was saved.
        where: the checkpoint, for messages.
        resize: what was done to a parameter since, to be done to its moments too.

    Raises:
        CheckpointError: the state is of other parameters. torch compares no shapes when it loads, and its fused kernel
            then reads past the end.
    """
    own = optimizer.state_dict()["param_groups"]
    saved = [list(group["params"]) for group in state["param_groups"]]
    if [len(group) for group in saved] != [len(group["params"]) for group in own]:
        raise _foreign_moments(where, f"groups of {[len(group) for group in saved]} parameters")
    moments = {}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for parameter, index in zip(parameters, [index for group in saved for index in group], strict=True):
        change = (resize or {}).get(parameter)
        kept = {
            name: change(value) if change is not None and value.dim() else value
            for name, value in state["state"].get(index, {}).items()
        }
        for name, value in kept.items():
            if value.dim() and value.shape != parameter.shape:
                raise _foreign_moments(where, f"{name} {tuple(value.shape)} for a parameter {tuple(parameter.shape)}")
        if kept:
            moments[index] = kept
    groups = [{**group, "params": indices} for group, indices in zip(own, saved, strict=True)]
    optimizer.load_state_dict({"state": moments, "param_groups": groups})


def _foreign_moments(where: object, got: str) -> CheckpointError:
    return CheckpointError(
        "the optimizer's state is of other parameters than the student's",
        where=where,
        got=got,
        remedy="start the optimizer afresh with --reset_optim, or choose another checkpoint",
    )
