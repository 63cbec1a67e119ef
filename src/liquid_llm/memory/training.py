"""Memory of a training job: its real parts take a step on tensors without memory, and every storage is counted.

The student's loss, the online teacher, the optimizer and gradient checkpointing are those of a run. What a step keeps
from the one before it (the moments) exists before the step that is counted.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from liquid_llm.data.types import IGNORE_INDEX, MicroBatch
from liquid_llm.evaluation.measures import compare
from liquid_llm.identity import ModelIdentity
from liquid_llm.losses.fused import fused_loss
from liquid_llm.losses.objective import Objective
from liquid_llm.losses.plan import CHUNK_BYTES, LossPlan, choose_plan
from liquid_llm.losses.rows.choice import EAGER, MEMORY, TRITON
from liquid_llm.losses.signals import DenseSignal, LogitsSignal, Signal, SparseSignal
from liquid_llm.memory.counter import StorageCounter
from liquid_llm.memory.dealt_out import DealtOut
from liquid_llm.memory.fake import autocast_as_on_accelerators, build, fake_tensors
from liquid_llm.memory.prediction import (
    ACTIVATIONS,
    BATCH,
    EXCHANGE,
    GRADIENTS,
    LOSS,
    MOMENTS,
    REFERENCE,
    SIGNAL,
    STUDENT,
    TEACHER,
    TEACHER_WORK,
    MemoryPrediction,
)
from liquid_llm.memory.shapes import BatchShape, TrainingShape
from liquid_llm.models.heads import blocks_of, output_head
from liquid_llm.models.loading import LoadedModel
from liquid_llm.models.lora import add_adapter
from liquid_llm.models.student import enable_gradient_checkpointing
from liquid_llm.optimizers import build_optimizer, load_torchao
from liquid_llm.options import ADAMW8BIT
from liquid_llm.runtime import torch_dtype
from liquid_llm.step_sums import split_into_buckets
from liquid_llm.teachers.online import OnlineTeacher
from liquid_llm.training import Student

_ALPHA, _GAMMA, _LR = 0.5, 0.1, 1e-3  # any values at which every term is computed


def work_out_training(shape: TrainingShape) -> MemoryPrediction:
    """Memory of a training job; takes a second or two for models of a few billion parameters.

    Raises:
        ModelError: a configuration that no model can be built from.
    """
    if shape.optimizer == ADAMW8BIT:
        load_torchao()
    with fake_tensors():
        job = _Job(shape)
        job.warm_up()
        found = [job.step(batch) for batch in shape.batches]
        found += [job.evaluate(batch) for batch in shape.evaluations]
    return combine(found, job.rest_bytes, shape.device)


def loss_plan(device: str, vocab_size: int, chunk_bytes: int = CHUNK_BYTES[-1], loss_rows: str = EAGER) -> LossPlan:
    """How the loss goes about it on the device meant, without looking at results: fake tensors have none. Of its
    chunks, which are as large as each other, a few are gone through."""
    rows = MEMORY if loss_rows == TRITON else EAGER
    return replace(choose_plan(device, vocab_size, chunk_bytes=chunk_bytes), looks=False, rows=rows, every=False)


def online_teacher(model: nn.Module, vocab_size: int, pass_tokens: int | None = None) -> OnlineTeacher:
    """The online teacher of a model that has no tokenizer and no identity."""
    return OnlineTeacher(LoadedModel(model, None, ModelIdentity("", "", "")), vocab_size, max_tokens=pass_tokens)


@dataclass(frozen=True)
class Peaks:
    """What one counted step or evaluation found; see ``MemoryPrediction``."""

    batch: BatchShape
    stages: dict[str, int]
    consumers: dict[str, int]
    stage: str

    @property
    def peak_bytes(self) -> int:
        return sum(self.consumers.values())


def take_peaks(counter: StorageCounter, batch: BatchShape) -> Peaks:
    """What was counted since the last restart; counts anew."""
    found = Peaks(batch, counter.stages, counter.peak, counter.peak_stage)
    counter.restart()
    return found


def combine(found: Iterable[Peaks], rest_bytes: int, device: str, measured_part: str = "") -> MemoryPrediction:
    """The largest of what was found, and the largest of each stage."""
    found = list(found)
    most = max(found, key=lambda one: one.peak_bytes)
    stages: dict[str, int] = {}
    for one in found:
        for name, size in one.stages.items():
            stages[name] = max(size, stages.get(name, 0))
    return MemoryPrediction(
        peak_bytes=most.peak_bytes,
        rest_bytes=rest_bytes,
        stages=stages,
        consumers=dict(sorted(most.consumers.items(), key=lambda item: -item[1])),
        peak_stage=most.stage,
        peak_batch=str(most.batch),
        device=device,
        measured_part=measured_part,
    )


class _Job:
    """The parts of a job on fake tensors, and what its steps and evaluations take."""

    def __init__(self, shape: TrainingShape) -> None:
        self._accumulates, self._vocab_size, self._ranks = shape.accumulates, shape.vocab_size, shape.ranks
        self._measures, self._teacher_elsewhere = shape.measures, shape.teacher_elsewhere
        self._teacher_beside = shape.teacher_beside
        self._objective = Objective(_ALPHA, shape.temperature, _GAMMA if shape.reference else 0.0)
        self._counter = StorageCounter()
        student = self._build(shape, STUDENT, ACTIVATIONS).train()
        if shape.grad_checkpoint:
            enable_gradient_checkpointing(student)
        reference = None
        if shape.reference:
            own = shape.lora is not None
            reference = student if own else self._build(shape, REFERENCE, REFERENCE).requires_grad_(False)
        own_vocab = output_head(student).vocab_size
        plan = loss_plan(shape.device, own_vocab, shape.chunk_bytes, shape.loss_rows)
        # Of what is measured beside the loss.
        self._usual_plan = loss_plan(shape.device, own_vocab, loss_rows=shape.loss_rows)
        self._student = Student(student, torch_dtype(shape.compute_dtype), reference, plan=plan)
        self._teacher = None
        if shape.teacher is not None:
            teacher = build(shape.teacher)
            self._teacher = online_teacher(teacher, shape.vocab_size, shape.teacher_pass_tokens)
            if shape.teacher_elsewhere:
                self._counter.hold([self._teacher.head.weight, self._teacher.head.bias], TEACHER)
            elif shape.teacher_dealt_out:
                teacher.requires_grad_(False)
                DealtOut(self._counter, teacher, blocks_of(teacher), shape.ranks, TEACHER, shape.device)
            else:
                self._counter.hold_model(teacher, TEACHER)
        self._dealt_out = self._own_part(student, shape, STUDENT)
        if reference is not None and reference is not student:
            self._own_part(reference, shape, REFERENCE)
        held = student if self._dealt_out is None else nn.ParameterList(self._dealt_out.parts)
        asked: dict[str, Any] = {"kind": shape.optimizer, "device_type": torch.device(shape.device).type}
        self._optimizer = build_optimizer(held, lr=_LR, weight_decay=0.1, betas=(0.9, 0.95), **asked)
        self._parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
        for parameter in self._parameters if self._dealt_out is None else ():
            parameter.register_post_accumulate_grad_hook(lambda one: self._counter.hold([one.grad], GRADIENTS))

    def _build(self, shape: TrainingShape, weights: str, activations: str) -> Any:
        model = build(shape.student)
        if shape.device != "cpu":
            autocast_as_on_accelerators(model)
        if shape.lora is not None and weights == STUDENT:
            add_adapter(model, shape.lora, 0)
        if not shape.student_dealt_out:
            self._counter.hold_model(model, weights)
        _tell(self._counter, model, activations)
        return model

    def _own_part(self, model: nn.Module, shape: TrainingShape, weights: str) -> DealtOut | None:
        """What this rank has of a model that is dealt out; None of one that is not."""
        if not shape.student_dealt_out:
            return None
        return DealtOut(self._counter, model, blocks_of(model), shape.ranks, weights, shape.device)

    @property
    def rest_bytes(self) -> int:
        """Bytes alive between two steps."""
        return self._counter.total

    def warm_up(self) -> None:
        """Make the moments, with gradients of zero: the step that is counted is never the first."""
        with self._counter:
            self._zero_gradients()
            self._update()
        self._counter.restart()

    def step(self, shape: BatchShape) -> Peaks:
        """Count one optimizer step on ``shape``; the last micro-batch of several, if the job accumulates."""
        with self._counter:
            batch = self._batch(shape, "teacher")
            if self._accumulates:
                self._zero_gradients()
            signal = self._signal(batch, shape, self._objective.temperature, "teacher")
            kept = self._work_kept(shape)
            with self._counter.stage("forward and loss", LOSS):
                if self._dealt_out is not None:
                    self._dealt_out.gather_rest()
                output = self._student(batch, signal, replace(self._objective, divergence=shape.divergence))
            with self._counter.stage("backward", ACTIVATIONS):
                if self._dealt_out is not None:
                    self._dealt_out.begin_backward()
                (output.loss / batch.num_positions).backward()
                if self._dealt_out is not None:
                    self._dealt_out.end()
                self._sum_over_ranks()
            self._update()
            del batch, signal, output, kept
        return take_peaks(self._counter, shape)

    def evaluate(self, shape: BatchShape) -> Peaks:
        """Count the evaluation of one batch."""
        model = self._student.model
        training = model.training
        model.eval()
        with self._counter, torch.no_grad():
            batch = self._batch(shape, "evaluation")
            signal = self._signal(batch, shape, 1.0, "evaluation")
            with self._counter.stage("evaluation", LOSS):
                if self._dealt_out is not None:
                    self._dealt_out.gather_rest()
                hidden = self._student.states(batch)
                self._student.loss(hidden, batch, signal, Objective(_ALPHA))
                if self._measures:
                    # Of a sparse signal's positions some have a rest, which asks for values; its ids take little.
                    whole = None if isinstance(signal, SparseSignal) else signal
                    compare([(hidden, self._student.head)], batch.targets, whole, plan=self._usual_plan)
                del hidden
                if isinstance(signal, DenseSignal):
                    fused_loss(signal.hidden, signal.head, batch.targets, plan=self._usual_plan, all_labelled=True)
            del batch, signal
            if self._dealt_out is not None:
                self._dealt_out.end()
        model.train(training)
        return take_peaks(self._counter, shape)

    def _batch(self, shape: BatchShape, stage: str) -> MicroBatch:
        with self._counter.stage(stage, BATCH):
            return make_batch(shape)

    def _signal(self, batch: MicroBatch, shape: BatchShape, temperature: float, stage: str) -> Signal | None:
        if shape.signal == "dense":
            if self._teacher is None:
                raise ValueError("a dense signal needs a teacher")
            if self._teacher_elsewhere:
                head = self._teacher.head
                with self._counter.stage(stage, SIGNAL):
                    size = batch.num_positions, head.weight.shape[1]
                    return DenseSignal(torch.zeros(*size, dtype=head.weight.dtype), head)
            with self._counter.stage(stage, TEACHER_WORK):
                dense = self._teacher.signal(batch)
            self._counter.hold([dense.hidden], SIGNAL)
            return dense
        with self._counter.stage(stage, SIGNAL):
            return stored_signal(shape, batch.num_positions, self._vocab_size, temperature)

    def _work_kept(self, shape: BatchShape) -> Tensor | None:
        """What the teacher's pass took and has given back, where that stays its stream's: no other work has it."""
        if not self._teacher_beside or shape.signal != "dense" or self._teacher_elsewhere:
            return None
        with self._counter.stage("teacher", TEACHER_WORK):
            return torch.empty(max(0, self._counter.stages["teacher"] - self._counter.total), dtype=torch.uint8)

    def _sum_over_ranks(self) -> None:
        """What ranks that have whole gradients take to sum them: a bucket, as those before it stand for gradients."""
        if self._ranks == 1 or self._dealt_out is not None:
            return
        buckets = split_into_buckets([one for one in self._parameters if one.grad is not None])
        largest = max((sum(one.numel() for one in bucket) for bucket in buckets), default=0)
        with self._counter.stage(self._counter.current_stage, EXCHANGE):
            torch.empty(largest)

    def _zero_gradients(self) -> None:
        for parameter in self._parameters:
            parameter.grad = torch.zeros_like(parameter)
            self._counter.hold([parameter.grad], GRADIENTS)

    def _update(self) -> None:
        with self._counter.stage("optimizer", MOMENTS):
            nn.utils.clip_grad_norm_(self._parameters, 1.0)
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)


def _tell(counter: StorageCounter, model: Any, consumer: str) -> None:
    """Let what the body of ``model`` makes in its forward pass count for ``consumer``."""
    body = model.base_model if model.base_model is not model else model.get_decoder()
    entered: list[Any] = []

    def before(*_: object) -> None:
        entered.append(counter.stage(counter.current_stage, consumer))
        entered[-1].__enter__()

    def after(*_: object) -> None:
        entered.pop().__exit__(None, None, None)

    body.register_forward_pre_hook(before)
    body.register_forward_hook(after, always_call=True)


def make_batch(shape: BatchShape) -> MicroBatch:
    """A micro-batch whose rows are all full, and what a run has of it on the device."""
    ids = torch.zeros(shape.rows, shape.time, dtype=torch.int64)
    labels = torch.zeros_like(ids)
    labels[:, -1] = IGNORE_INDEX
    grid = torch.arange(shape.rows * shape.time).view(shape.rows, shape.time)
    positions = grid[:, :-1].reshape(-1)
    del grid
    # What the host reads has numbers, and is of numpy: tensors made here have none.
    lengths: Any = np.full(shape.rows, shape.time)
    type = "lm" if shape.signal in ("dense", "none") else "math_tool"
    places = torch.zeros_like(ids) if shape.documents else None
    return MicroBatch(type, ids, labels, lengths, (), positions, torch.zeros_like(positions), lengths - 1, places)


def stored_signal(shape: BatchShape, num_rows: int, vocab_size: int, temperature: float) -> Signal | None:
    """What a store would say of ``num_rows`` positions; None for another kind of signal."""
    mask = torch.ones(num_rows, dtype=torch.bool)
    if shape.signal == "logits":
        return LogitsSignal(torch.zeros(num_rows, vocab_size, dtype=torch.float16), mask, num_signal=num_rows)
    if shape.signal != "sparse":
        return None

    def floats(*sizes: int) -> Tensor:
        return torch.zeros(*sizes)

    slots = max(1, shape.slots)
    return SparseSignal(
        ids=torch.zeros(num_rows, slots, dtype=torch.int64),
        weights=floats(num_rows, slots),
        log_probs=floats(num_rows, slots),
        tail_mass=floats(num_rows),
        mask=mask,
        temperature=temperature,
        num_signal=num_rows,
        any_tail=True,
    )
