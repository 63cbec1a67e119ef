"""Real parts for a shape that the model of memory was asked about, and what is counted when they really run."""

from __future__ import annotations

import gc
import itertools
from dataclasses import dataclass, replace
from typing import Any

import torch

from liquid_llm.data.types import MicroBatch
from liquid_llm.distributed import Engine
from liquid_llm.evaluation import MEASURED, Evaluator
from liquid_llm.identity import ModelIdentity
from liquid_llm.losses.signals import LogitsSignal, Signal, SparseSignal
from liquid_llm.memory.counter import StorageCounter
from liquid_llm.memory.shapes import BatchShape, ModelShape, TrainingShape
from liquid_llm.memory.training import loss_plan
from liquid_llm.models.heads import blocks_of, body_of
from liquid_llm.models.loading import LoadedModel, quiet_transformers
from liquid_llm.models.lora import add_adapter
from liquid_llm.models.student import enable_gradient_checkpointing, student_config
from liquid_llm.optimizers import build_optimizer
from liquid_llm.runtime import torch_dtype
from liquid_llm.schedules import Constant, StepSchedules
from liquid_llm.sharding import deal_out_frozen, deal_out_trained
from liquid_llm.teachers.online import OnlineTeacher
from liquid_llm.teachers.router import TeacherRouter
from liquid_llm.training import Progress, Student, Trainer

VOCAB_SIZE = 384
CPU = torch.device("cpu")
ALONE = Engine()


def preset(name: str, vocab_size: int = VOCAB_SIZE, dtype: str = "float32", **changes: Any) -> ModelShape:
    """A student preset without weights."""
    config = student_config(name, vocab_size=vocab_size, bos_id=0, eos_id=0)
    for key, value in changes.items():
        setattr(config, key, value)
    return ModelShape.of(config, dtype)


FULL_VOCAB_SIZE = 128_256
LLAMA_3B = ModelShape(
    {
        "model_type": "llama",
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": FULL_VOCAB_SIZE,
        "tie_word_embeddings": True,
        "max_position_embeddings": 8192,
    },
    "bfloat16",
)
TEACHER = preset("llama-test", hidden_size=48, num_hidden_layers=3)


def shape_of(student: str, *batches: BatchShape, **settings: Any) -> TrainingShape:
    """A job on the CPU; what ``TrainingShape`` does not know changes the student's configuration."""
    known = {name: settings.pop(name) for name in list(settings) if name in TrainingShape.__dataclass_fields__}
    values = {"compute_dtype": "float32", "vocab_size": VOCAB_SIZE, "device": "cpu", **known}
    return TrainingShape(student=preset(student, **settings), batches=batches, **values)


def real_model(shape: ModelShape) -> Any:
    """With weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    values = dict(shape.config)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    with quiet_transformers():
        return AutoModelForCausalLM.from_config(
            config, attn_implementation="sdpa", dtype=torch_dtype(shape.dtype)
        ).eval()


@dataclass(frozen=True)
class Counted:
    """Most bytes alive in the second step, and bytes alive after it."""

    peak_bytes: int
    rest_bytes: int


def counted_step(shape: TrainingShape) -> Counted:
    """The second step of the real trainer on real tensors, on the first of the shape's batches."""
    student, teacher = _parts(shape)
    trainer, batch = _trainer(shape, student, teacher, CPU)
    counter = _counter(student, teacher)
    trainer.step()
    counter.hold((value for state in trainer.optimizer.state.values() for value in state.values()), "")
    counter.hold((batch.input_ids, batch.labels, batch.positions, batch.targets), "")
    with counter:
        trainer.step()
    return Counted(sum(counter.peak.values()), counter.total)


def profiled_step(shape: TrainingShape, engine: Engine) -> Counted:
    """What torch's own allocator says that one rank of a job had, in that of three steps in which it had least.

    gloo's threads let go of what an exchange took when they come to it, which may be late.
    """
    gc.collect()
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        student, teacher = _parts(shape)
        if shape.teacher_dealt_out:
            assert teacher is not None
            teacher.model.requires_grad_(False)
            teacher.deal_out(CPU)
        if shape.student_dealt_out:
            deal_out_trained(student, blocks_of(student.model), CPU, methods=("states", "loss"))
            student.is_dealt_out = True
            if student.reference is not None:
                frozen = student.reference
                deal_out_frozen(frozen, body_of(frozen), blocks_of(frozen), CPU)
        trainer, batch = _trainer(shape, student, teacher, CPU, engine)
        for number in range(4):
            with torch.profiler.record_function(f"step {number}"):
                trainer.step()
            gc.collect()
    events = profile.profiler.kineto_results.events()
    steps = [one for one in events if one.name() in ("step 1", "step 2", "step 3")]
    now, peaks = 0, dict.fromkeys((one.name() for one in steps), 0)
    for one in sorted((one for one in events if one.name() == "[memory]"), key=lambda one: one.start_ns()):
        now += one.nbytes()
        for step in steps:
            if 0 <= one.start_ns() - step.start_ns() < step.duration_ns():
                peaks[step.name()] = max(peaks[step.name()], now)
    del batch
    return Counted(min(peaks.values()), now)


def allocated_step(shape: TrainingShape, device: torch.device) -> int:
    """The most bytes of this job that ``device`` itself says were allocated in the second step of the real trainer."""
    module = torch.get_device_module(device)
    gc.collect()
    before = module.memory_allocated(device)
    student, teacher = _parts(shape, device)
    student.plan = None  # as a run has it: the device's own
    trainer, _ = _trainer(shape, student, teacher, device)
    trainer.step()
    module.reset_peak_memory_stats(device)
    trainer.step()
    return int(module.max_memory_allocated(device)) - before


def _trainer(
    shape: TrainingShape, student: Student, teacher: OnlineTeacher | None, device: torch.device, engine: Engine = ALONE
) -> tuple[Trainer, MicroBatch]:
    optimizer = build_optimizer(student.model, lr=1e-3, weight_decay=0.1, betas=(0.9, 0.95), kind=shape.optimizer)
    gamma = 0.1 if shape.reference else 0.0
    batch = _batch(shape.batches[0]).to(device)

    def signal_of(part: MicroBatch, _: slice) -> Signal | None:
        signal = _signal(shape, shape.batches[0], part, teacher, shape.temperature)
        return None if signal is None else signal.to(device)

    trainer = Trainer(
        student,
        optimizer,
        StepSchedules(
            Constant(0.5),
            Constant(shape.temperature),
            Constant(gamma),
            Constant(1e-3),
            divergence=shape.batches[0].divergence,
        ),
        itertools.repeat((batch, signal_of)),
        Progress(),
        total_steps=4,
        grad_accum=(2 if shape.accumulates else 1) * engine.world_size,
        grad_clip=1.0,
        engine=engine,
    )
    return trainer, batch


def counted_evaluation(shape: TrainingShape, long: BatchShape) -> int:
    """Most bytes alive while the student is scored on ``long``, with moments."""
    student, teacher = _parts(shape)
    optimizer = build_optimizer(student.model, lr=1e-3, weight_decay=0.1, betas=(0.9, 0.95))
    for parameter in student.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    counter = _counter(student, teacher)
    counter.hold((value for state in optimizer.state.values() for value in state.values()), "")
    batch = _batch(long)
    counter.hold((batch.input_ids, batch.labels, batch.positions, batch.targets), "")
    student.model.eval()
    with counter, torch.no_grad():
        if shape.measures:
            router = TeacherRouter({} if teacher is None else {batch.type: teacher})
            Evaluator({long.time: {batch.type: [batch]}}, long.time, (), router, measures=True)(student)
        else:
            student(batch, _signal(shape, long, batch, teacher, 1.0), MEASURED)
    return sum(counter.peak.values())


def _parts(shape: TrainingShape, device: torch.device = CPU) -> tuple[Student, OnlineTeacher | None]:
    model = real_model(shape.student).train()
    if shape.lora is not None:
        add_adapter(model, shape.lora, 0)
    model.to(device)
    reference = None
    if shape.reference:
        own = shape.lora is not None
        reference = model if own else real_model(shape.student).requires_grad_(False).to(device)
    if shape.grad_checkpoint:
        enable_gradient_checkpointing(model)
    teacher = None
    if shape.teacher is not None:
        loaded = LoadedModel(real_model(shape.teacher).to(device), None, ModelIdentity("", "", ""))
        teacher = OnlineTeacher(loaded, shape.vocab_size, max_tokens=shape.teacher_pass_tokens)
    plan = replace(loss_plan(shape.device, shape.vocab_size, shape.chunk_bytes, shape.loss_rows), every=True)
    return Student(model, torch_dtype(shape.compute_dtype), reference, plan), teacher


def _counter(student: Student, teacher: OnlineTeacher | None) -> StorageCounter:
    counter = StorageCounter()
    counter.hold_model(student.model, "")
    if student.reference is not None:
        counter.hold_model(student.reference, "")
    if teacher is not None:
        counter.hold_model(teacher.model, "")
    return counter


def _batch(shape: BatchShape) -> MicroBatch:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, VOCAB_SIZE, (shape.rows, shape.time), generator=generator)
    labels = ids.roll(-1, 1)
    labels[:, -1] = -100
    return MicroBatch("lm", ids, labels, torch.full((shape.rows,), shape.time))


def _signal(
    shape: TrainingShape, batch: BatchShape, part: MicroBatch, teacher: OnlineTeacher | None, temperature: float
) -> Signal | None:
    rows = part.num_positions
    mask = torch.ones(rows, dtype=torch.bool)
    if batch.signal == "dense":
        assert teacher is not None
        return teacher.signal(part)
    if batch.signal == "logits":
        return LogitsSignal(torch.randn(rows, shape.vocab_size).half(), mask)
    if batch.signal == "none":
        return None
    ids = torch.rand(rows, shape.vocab_size).topk(batch.slots, dim=1).indices
    weights = torch.full((rows, batch.slots), 0.9 / batch.slots)
    return SparseSignal(ids, weights, weights.log(), torch.full((rows,), 0.1), mask, temperature)
