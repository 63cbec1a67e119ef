"""Command lines of every command: words are the lines of the input, the first byte says of which."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tests.fuzz.bytes_to_choices import Choices

from liquid_llm.cli.parse import parse
from liquid_llm.config import build_capture_config, build_prepare_config, build_run_config, build_schedules
from liquid_llm.options import ANNEAL, CAPTURE, PREPARE, TRAIN, options_of

FACES = (TRAIN, ANNEAL, CAPTURE, PREPARE)
_VALUES = (
    *("", "0", "1", "-1", "1e400", "nan", "9" * 5000, "auto", "none", "true", "x", "a=b", "code=online:m", "22GiB"),
    *("0:0.7,4:1", "0.1,0.2", "$(date +%Y)", "$(date +%\ud800)", "\ud800", "lm=0.5", "samples", "topk:k=8", "--", "="),
)


def seeds() -> Iterator[bytes]:
    yield b"\0--teacher_id=a\n--dataset_manifest=m\n--output_gcs_uri=/x\n--max-steps=4\n--kd_alpha_start=0.5"
    yield b"\1--train_steps=4\n--alpha_schedule=0:0.7,2:0.5\n--output_gcs_uri=/x\n--dataset_name=d"
    yield b"\2--mc_teacher_id=a\n--dataset_manifest=m\n--math_logits_dir=d"
    yield b"\3--datasets_yaml=a"


def mutate(data: bytes, number: int) -> bytes:
    """Another option with another value."""
    choices = Choices(number.to_bytes(8, "little") * 4)
    face = choices.below(len(FACES))
    option, value = choices.one(options_of(FACES[face])), choices.one(_VALUES)
    words = data[1:].split(b"\n") if choices.below(4) else []
    return data[:1] + b"\n".join([*words, f"--{option.name}={value}".encode("utf-8", "surrogatepass")])


def check(data: bytes, folder: Path) -> None:
    face = FACES[(data[0] if data else 0) % len(FACES)]
    words = [word.decode("utf-8", "surrogateescape") for word in data[1:].split(b"\n")]
    if any(word.partition("=")[0].replace("-", "_") in ("__config", "__help", "_h") for word in words):
        return  # another file is ``config``'s, and a page of help ends a process
    given = parse(options_of(face), words, "liquid", "about", face=face)
    if face == CAPTURE:
        build_capture_config(given)
    elif face == PREPARE:
        build_prepare_config(given)
    else:
        build_schedules(build_run_config(face, given)).at(3)
