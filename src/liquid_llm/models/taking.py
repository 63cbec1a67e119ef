"""Students that take weights of a teacher: a cut of it, or a preset with its embedding and output head.

The teacher is held only while the student is made of it. ``spec`` has the words that ask for either.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from liquid_llm.errors import ModelError
from liquid_llm.models.cut import read_sizes
from liquid_llm.models.cut_weights import cut_weights
from liquid_llm.models.embedding import take_embedding
from liquid_llm.models.importance import Text
from liquid_llm.models.loading import open_weights, quiet_transformers
from liquid_llm.models.quantised import require_whole
from liquid_llm.models.sources import Source
from liquid_llm.models.spec import StudentSpec, parse_student
from liquid_llm.models.student import finish_student, from_configuration, open_taken_config, prepare_config


@dataclass(frozen=True)
class TakenStudent:
    """A student with weights of a teacher.

    Attributes:
        model: as ``build_student`` gives it.
        facts: plain values that say what was taken: ``model`` and ``revision`` of the teacher, and whether it came from
            the Hugging Face hub; of a cut its ``layers`` as the teacher counts them and ``sizes``, what is
            counted -> how many of it student and teacher have; of an embedding see ``take_embedding``.
        teacher_loss: the teacher's mean cross-entropy on the calibration text; None where it was not asked.
    """

    model: Any
    facts: dict[str, Any]
    teacher_loss: float | None = None


def take_student(
    spec: str,
    *,
    vocab_size: int,
    bos_id: int,
    eos_id: int,
    block_size: int,
    seed: int,
    device: torch.device,
    text: Sequence[Text],
    token: str | None = None,
) -> TakenStudent:
    """Build the student that ``spec`` asks for; the arguments are those of ``student.build_student`` and

    Args:
        device: where the teacher is held and asked meanwhile.
        text: what it is asked, where importance decides what stays.

    Raises:
        ModelError: as ``build_student``; or the teacher cannot be cut, or has not as much as is asked for.
    """
    asked = parse_student(spec)
    source, config = open_taken_config(asked, token)
    facts = describe_source(source)
    teacher, loss = _open_teacher(asked, source, config, device, token), None
    if asked.cut is None:
        model = from_configuration(asked.base, vocab_size, bos_id, eos_id, seed)
        facts |= take_embedding(model, teacher, vocab_size, f"--student={spec}")
    else:
        prepared = copy.deepcopy(teacher.config)
        prepare_config(prepared, bos_id, eos_id)
        model, layers, found = cut_weights(teacher, asked.cut, vocab_size, f"--student={spec}", text, prepared)
        loss = found.loss
        facts |= {"layers": list(layers), "sizes": _sizes(model, teacher, f"--student={spec}")}
    del teacher
    return TakenStudent(finish_student(model, bos_id, eos_id, block_size), facts, loss)


def describe_source(source: Source) -> dict[str, Any]:
    """Which model weights are of: its name, its content, and whether it came from the Hugging Face hub."""
    return {"model": source.id, "revision": source.revision, "on_hub": source.commit is not None}


def _open_teacher(asked: StudentSpec, source: Source, config: Any, device: torch.device, token: str | None) -> Any:
    """In its own arithmetic on an accelerator, so that a large one fits; float32 on a CPU, which is faster there."""
    assert asked.teacher is not None
    own = getattr(config, "dtype", None)
    dtype = torch.float32
    if device.type != "cpu" and source.gguf_file is None and own in (torch.bfloat16, torch.float16):
        dtype = own
    require_whole(config, asked.teacher)
    model = open_weights(source, asked.teacher, dtype=dtype, device=device, attention="sdpa", token=token)
    with quiet_transformers():
        if model.get_output_embeddings() is None:
            raise ModelError("the model has no output head", where=asked.teacher)
    return model.requires_grad_(False)


def _sizes(ours: Any, theirs: Any, where: str) -> dict[str, list[int]]:
    """Of each thing that is counted, how many the student and the teacher have."""
    found = [
        {**asdict(read_sizes(model.config, where)), "vocabulary": int(model.get_output_embeddings().weight.shape[0])}
        for model in (ours, theirs)
    ]
    return {name: [found[0][name], found[1][name]] for name in found[0]}
