"""The models and batches of the session: the reference's shape on a GPU, tiny ones elsewhere. Weights are random.

Models are made on the device itself, so that no copy exists on the host.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from liquid_llm.data.loader import collate
from liquid_llm.data.types import MicroBatch
from liquid_llm.identity import ModelIdentity
from liquid_llm.losses.plan import LossPlan
from liquid_llm.losses.signals import Signal, SparseSignal
from liquid_llm.models.loading import LoadedModel
from liquid_llm.models.student import PRESETS
from liquid_llm.optimizers import build_optimizer
from liquid_llm.passes import SignalOf
from liquid_llm.schedules import Constant, StepSchedules
from liquid_llm.teachers.online import OnlineTeacher
from liquid_llm.training import Progress, Student, Trainer

GIB = 2**30
CAP_BYTES = 22 * GIB  # what a 24 GB card gives a process, about
SLOTS = 64  # ids a position of a sparse signal
TEMPERATURE, ALPHA = 2.0, 0.5
_COMMON = {"model_type": "llama", "max_position_embeddings": 8192, "bos_token_id": 0, "eos_token_id": 0}
_LOGIT_SPREAD = 3.5  # standard deviation of logits, about that of a trained model


@dataclass(frozen=True)
class Scale:
    """How large everything is.

    Attributes:
        vocab_size: of all models.
        time: tokens in a block.
        rows: blocks in a micro-batch.
        student: a preset.
        teacher, big_teacher: settings of Llama-shaped models, about 3B and 8B parameters.
        short: tokens of a short sample.
    """

    vocab_size: int
    time: int
    rows: int
    student: str
    teacher: dict[str, Any]
    big_teacher: dict[str, Any]
    short: int


def llama(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, *, tied: bool) -> dict[str, Any]:
    sizes = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers}
    heads_of = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": hidden // heads}
    return {**_COMMON, **sizes, **heads_of, "tie_word_embeddings": tied}


FULL = Scale(
    vocab_size=128_256,
    time=1024,
    rows=8,
    student="liquid-350m",
    teacher=llama(3072, 8192, 28, 24, 8, tied=True),
    big_teacher=llama(4096, 14336, 32, 32, 8, tied=False),
    short=180,
)
TINY = Scale(
    vocab_size=4096,
    time=48,
    rows=2,
    student="liquid-test",
    teacher=llama(48, 96, 2, 4, 2, tied=True),
    big_teacher=llama(64, 128, 2, 4, 2, tied=False),
    short=9,
)


def scale_for(device: torch.device) -> Scale:
    return FULL if device.type == "cuda" else TINY


def compute_dtype(device: torch.device) -> torch.dtype:
    """The dtype of products."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def student_config(scale: Scale) -> Any:
    """The student's transformers configuration."""
    from transformers import AutoConfig

    preset = PRESETS[scale.student]
    tokens = {"vocab_size": scale.vocab_size, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    return AutoConfig.for_model(preset.model_type, tie_word_embeddings=True, **{**preset.settings, **tokens})


def teacher_config(settings: dict[str, Any], vocab_size: int) -> Any:
    """A teacher's transformers configuration."""
    from transformers import AutoConfig

    values = {key: value for key, value in settings.items() if key != "model_type"}
    return AutoConfig.for_model(settings["model_type"], vocab_size=vocab_size, **values)


def build(config: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """A model with random weights, made on ``device``."""
    from transformers import AutoModelForCausalLM

    with device:
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=dtype)


def build_teacher(settings: dict[str, Any], scale: Scale, device: torch.device) -> OnlineTeacher:
    """An online teacher whose distributions are about as sharp as a trained model's."""
    model = build(teacher_config(settings, scale.vocab_size), device, compute_dtype(device)).eval()
    head = model.get_output_embeddings().weight
    with torch.no_grad():  # its input is normalised: each logit has the variance of a row times the width
        head.mul_(_LOGIT_SPREAD / (float(head[:512].float().std()) * math.sqrt(head.shape[1])))
    identity = ModelIdentity("made-up", "0", "0")
    return OnlineTeacher(LoadedModel(model, None, identity), scale.vocab_size)


def build_student(scale: Scale, device: torch.device) -> Any:
    return build(student_config(scale), device, torch.float32).train()


def lm_batch(scale: Scale, device: torch.device, rows: int | None = None, type: str = "lm") -> MicroBatch:
    """Full blocks of random tokens."""
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, scale.vocab_size, (rows or scale.rows, scale.time), dtype=np.int64)
    return collate(type, list(blocks)).to(device)


def sparse_signal(num_positions: int, vocab_size: int, device: torch.device, slots: int = SLOTS) -> SparseSignal:
    """Made-up ids and weights for every position, as draws give them: no tail mass, all rows there."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(num_positions, slots, generator=generator)
    weights /= weights.sum(dim=1, keepdim=True)
    # ids of a row differ, as a store's do once it is decoded
    first = torch.randint(vocab_size, (num_positions, 1), generator=generator)
    step = max(1, vocab_size // slots)
    ids = (first + step * torch.arange(slots)) % vocab_size
    mask = torch.ones(num_positions, dtype=torch.bool)
    signal = SparseSignal(ids, weights, weights.log(), torch.zeros(num_positions), mask, TEMPERATURE)
    return move(signal, device)


def move(signal: SparseSignal, device: torch.device) -> SparseSignal:
    """The same on ``device``; what the host knows of it stays known."""
    import dataclasses

    names = [f.name for f in dataclasses.fields(signal) if isinstance(getattr(signal, f.name), Tensor)]
    return dataclasses.replace(signal, **{name: getattr(signal, name).to(device) for name in names})


def trainer(
    student: Any,
    batches: Iterator[tuple[MicroBatch, SignalOf | None]],
    dtype: torch.dtype,
    *,
    reference: Any = None,
    optimizer: torch.optim.Optimizer | None = None,
    plan: LossPlan | None = None,
) -> Trainer:
    """The product's trainer, for as many steps as are asked for; with a ``reference`` the L2 term is on."""
    gamma = 0.0 if reference is None else 0.1
    return Trainer(
        Student(student, dtype, reference, plan=plan),
        optimizer or new_optimizer(student),
        StepSchedules(Constant(ALPHA), Constant(TEMPERATURE), Constant(gamma), Constant(1e-5)),
        batches,
        Progress(),
        total_steps=10**9,
        grad_accum=1,
        grad_clip=1.0,
    )


def new_optimizer(student: Any) -> torch.optim.Optimizer:
    return build_optimizer(student, lr=1e-5, weight_decay=0.1, betas=(0.9, 0.95))


def endless(batch: MicroBatch, signal_of: SignalOf | None) -> Iterator[tuple[MicroBatch, SignalOf | None]]:
    """One micro-batch for ever."""
    while True:
        yield batch, signal_of


def online_signal(teacher: OnlineTeacher) -> SignalOf:
    """The teacher's signal of each pass, formed when it is asked for."""
    return lambda part, _: teacher.signal(part)


def stored_signal(signal: SparseSignal) -> SignalOf:
    """A signal that is there already; a pass that holds only part of the batch gets its part."""

    def of(part: MicroBatch, positions: slice) -> Signal:
        if positions == slice(0, signal.num_positions):
            return signal
        import dataclasses

        names = [f.name for f in dataclasses.fields(signal) if isinstance(getattr(signal, f.name), Tensor)]
        return dataclasses.replace(signal, **{name: getattr(signal, name)[positions] for name in names})

    return of
