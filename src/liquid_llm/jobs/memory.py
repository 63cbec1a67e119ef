"""``liquid memory``: what a job would take, before there is data, weights or a GPU; from options to exit code.

Only configurations are read: of the student a preset, a ``config.json``, a folder or the id of a model; of the teacher
the same but a preset. The micro-batch is the largest that the options allow.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from liquid_llm import storage
from liquid_llm.checkpoint.discovery import DATA_SUFFIX, SIDECAR_SUFFIX
from liquid_llm.config import NOWHERE, CaptureConfig, RunConfig, build_config_to_measure
from liquid_llm.distributed import read_rank
from liquid_llm.distributed_link import require_training_ranks
from liquid_llm.errors import DeviceError, UsageError
from liquid_llm.formatting import format_bytes
from liquid_llm.jobs.capture import codec_of
from liquid_llm.memory.free import available_bytes
from liquid_llm.memory.prediction import MemoryPrediction
from liquid_llm.memory.shapes import CaptureShape, ModelShape
from liquid_llm.memory.verdict import Verdict
from liquid_llm.models.spec import parse_student
from liquid_llm.models.student import PRESETS, student_config
from liquid_llm.parsing import parse_json
from liquid_llm.runtime import Choice, choose_device, choose_dtype
from liquid_llm.terminal import print_facts, setup_logging
from liquid_llm.wiring.fitting import LOSS_CHUNK, Fit, choose_chunk, judge, judge_capture, resolve_auto
from liquid_llm.wiring.shapes import Models, nominal_shape, open_shape, open_teachers, stored_codec, with_positions
from liquid_llm.wiring.sharding import require_several
from liquid_llm.wiring.tokens import read_token

_L4_BYTES = 22 * 2**30  # 24 GB less what the context takes


@dataclass(frozen=True)
class Card:
    """The memory a job is compared with, and where that number comes from; ``kind`` of device it is on."""

    kind: str
    bytes: int
    origin: str


def run_memory(face: str, given: Mapping[str, object]) -> int:
    """Say what a job of ``face`` takes and whether it fits: a table on stderr, one JSON object on stdout.

    Returns:
        0 when it fits, 6 when it does not.

    Raises:
        LiquidError: any problem a user can cause.
    """
    setup_logging("WARNING")
    options = dict(given)
    asked = options.pop("gpu_memory", None)
    price = options.pop("price_per_hour", None)
    ranks = int(str(options.pop("ranks", None) or read_rank()[1]))
    config = build_config_to_measure(face, options)
    card = _card(config.device, asked)
    found = _capture(config, card) if isinstance(config, CaptureConfig) else _training(config, card, price, ranks)
    job, fit, choices, notes = found
    prediction, verdict = fit.prediction, fit.verdict
    assert prediction is not None
    assert verdict is not None
    lines = [("job", job), *((name, f"{choice.value} ({choice.reason})") for name, choice in choices.items())]
    lines += [*_lines(prediction, verdict, card), *(("note", note) for note in notes)]
    print_facts("memory, worked out from configurations, not measured", lines)
    report = {
        "job": job,
        "measured": False,
        "prediction": prediction.as_dict(),
        "available": vars(card),
        "verdict": verdict.as_dict(),
        "choices": {name: vars(choice) for name, choice in choices.items()},
        "notes": notes,
    }
    print(json.dumps(report, indent=2))
    return 0 if verdict.fits else DeviceError.exit_code


def _card(requested: str, asked: object) -> Card:
    """The device that is meant: the one here, or one that is not here yet."""
    if asked is not None:
        kind = "cpu" if requested == "cpu" else "cuda"
        return Card(kind, int(str(asked)), "--gpu_memory")
    meant_for_cuda = requested == "auto" or torch.device(requested).type == "cuda"
    if meant_for_cuda and not torch.cuda.is_available():
        return Card("cuda", _L4_BYTES, "an NVIDIA L4's: no GPU is here, and --gpu_memory is not given")
    device = torch.device(choose_device(requested).value)
    free = available_bytes(device)
    if free is None:
        raise UsageError(
            "what is free on this device is not known", where=f"--device={requested}", remedy="give --gpu_memory"
        )
    return Card(device.type, free, f"free on {device} now")


# What is asked about in words, whether it fits, the choices made and what else there is to say.
_Found = tuple[str, Fit, Mapping[str, Choice], list[str]]


def _training(config: RunConfig, card: Card, price: object, ranks: int) -> _Found:
    if ranks > 1:
        require_training_ranks(config.teacher.ranks, ranks)
        ranks -= config.teacher.ranks
    require_several(config, ranks, "say how many there are: --ranks=8")
    token = read_token(config.teacher)
    teacher, held_bytes = open_teachers(config, _dtype(config.teacher.precision, card), token, ranks)
    named = config.teacher.online_id  # one that is asked nothing still says whose tokenizer it is
    speaker = teacher if teacher is not None or named is None else open_shape(named, "float32", token)
    student = _student(config, speaker, token)
    compute_dtype, vocab_size = _dtype(config.student.precision, card), _vocab_size(speaker or student)
    models = Models(student, teacher, compute_dtype, vocab_size, stored_codec(config), held_bytes, ranks)
    free = card.bytes - held_bytes
    settled, choices = resolve_auto(config, models, free, card.kind, ranks=ranks)
    shape = nominal_shape(settled, models, card.kind)
    if card.kind != "cpu":
        choices[LOSS_CHUNK] = choose_chunk(shape, free)
        shape = replace(shape, chunk_bytes=int(choices[LOSS_CHUNK].value) << 20)
    fit = judge(settled, shape, free)
    notes = []
    if price is not None:
        notes.append("the cost follows from the speed, which only a run on the card says: --dry_run --price_per_hour")
    words = f"{config.face}, {settled.data.batch_size} x {settled.data.block_size} tokens a micro-batch"
    return words + (f", one of {ranks} processes" if ranks > 1 else ""), fit, choices, notes


def _capture(config: CaptureConfig, card: Card) -> _Found:
    teacher_id = config.teacher.stored_id
    assert teacher_id is not None
    if config.served.url is not None:
        raise UsageError(
            "a teacher behind a server takes the server's memory and little here",
            where=f"--teacher_url={config.served.url}",
            remedy="leave --teacher_url out to see what a capture with the model itself takes",
        )
    asked = config.teacher
    teacher = open_shape(teacher_id, _dtype(asked.precision, card), read_token(asked), asked.quantisation)
    codec = codec_of(config.store)
    shape = CaptureShape(
        teacher=teacher,
        rows=config.data.batch_size,
        time=config.data.seq_len,
        vocab_size=_vocab_size(teacher),
        codec=codec.name,
        options=dict(codec.options),
        device=card.kind,
    )
    fit = judge_capture(shape, config.data.batch_size, card.bytes)
    measured = "" if fit.prediction is None else fit.prediction.measured_part
    return f"capture, {shape.rows} x {shape.time} tokens a batch", fit, {}, [measured] if measured else []


def _dtype(requested: str, card: Card) -> str:
    """As a run on that device would choose; a GPU that is not here is taken to compute in bfloat16."""
    if requested == "auto" and card.kind != "cpu" and not torch.cuda.is_available():
        return "bfloat16"
    return choose_dtype(requested, card.kind).value


def _vocab_size(model: ModelShape) -> int:
    return int(model.config.get("vocab_size") or model.config["text_config"]["vocab_size"])


def _student(config: RunConfig, teacher: ModelShape | None, token: str | None) -> ModelShape:
    """The student that is named, else the one that is resumed."""
    uri = config.student.resume_uri
    if uri not in (None, NOWHERE) and "student" not in config.given:
        return ModelShape(_read_resumed_config(str(uri)))
    spec = config.student.spec
    student = parse_student(spec)
    named = student.teacher or student.base
    if teacher is None and named in PRESETS:
        raise UsageError(
            "nothing says how large the vocabulary is",
            where=f"--student={spec}",
            remedy="name a teacher, or a model or config.json as --student",
        )
    vocab_size = _vocab_size(teacher or open_shape(named, "float32", token))
    made = student_config(spec, vocab_size=vocab_size, bos_id=0, eos_id=0, token=token)
    return ModelShape.of(with_positions(made, config))


def _read_resumed_config(uri: str) -> Mapping[str, Any]:
    """The configuration of a checkpoint's student, from the small file beside the weights."""
    where = storage.join(uri, "config.json")
    if uri.endswith(DATA_SUFFIX):
        where = uri.removesuffix(DATA_SUFFIX) + SIDECAR_SUFFIX
    elif uri.endswith(".zip"):
        raise UsageError("a zip is not opened for its configuration", where=uri, remedy="name its shape with --student")
    try:
        found = parse_json(storage.read_small(where))
        config = found["student"]["config"] if uri.endswith(DATA_SUFFIX) else found
    except (ValueError, LookupError, TypeError):  # damaged, or of something else
        config = None
    if not isinstance(config, dict) or "model_type" not in config:
        raise UsageError("no configuration of a student", where=where, remedy="name its shape with --student")
    return config


def _lines(prediction: MemoryPrediction, verdict: Verdict, card: Card) -> list[tuple[str, str]]:
    lines = [(f"peak, {stage}", format_bytes(size)) for stage, size in prediction.stages.items() if stage]
    lines.append(("at rest", format_bytes(prediction.rest_bytes)))
    lines.append(("largest", f"{format_bytes(prediction.peak_bytes)} of tensors: {prediction.peak_batch}"))
    lines += [(f"  {name}", format_bytes(size)) for name, size in prediction.consumers.items()]
    allowances = [f"{format_bytes(prediction.fragmentation_bytes)} for fragmentation"]
    if prediction.workspace_bytes:
        allowances.append(f"{format_bytes(prediction.workspace_bytes)} for libraries' workspaces")
    lines.append(("allowances", ", ".join(allowances)))
    lines.append(("available", f"{format_bytes(card.bytes)}, {card.origin}"))
    lines.append(("fits", verdict.words))
    return lines + [("  with", f"{one.change}: {format_bytes(one.needed_bytes)}") for one in verdict.options]
