"""Configuration files: of training, and of a study."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tests.fuzz.bytes_to_choices import mutate_bytes as mutate
from tests.fuzz.driver import attempt

from liquid_llm.cli.parse import read_config_file
from liquid_llm.cli.study import read_study
from liquid_llm.config import build_run_config
from liquid_llm.options import TRAIN, options_of

__all__ = ["check", "mutate", "seeds"]

_RUN = """\
teacher_id: a
dataset_manifest: m.jsonl
output_gcs_uri: /x
eval_ctx_lens: [64, 128]
kd_alpha_start: 0.5
train-steps: null
sources:
  code: {teacher: "online:b", alpha: 0.3}
  lm: {layout: samples}
"""
_STUDY = """\
study_dir: /x
student: llama-test
arms:
  - plain: {kd_alpha_start: 0}
  - {name: b, options: {kd_alpha_start: 0.5}}
vary: {lr: [1e-3, 2e-3]}
captures: [{mc_teacher_id: a}]
evaluation: {students: a}
"""


def seeds() -> Iterator[bytes]:
    yield _RUN.encode()
    yield _STUDY.encode()
    yield b"a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n"
    yield b"<<: {a: 1}\nlr: 0:30\n!!python/object:os.system x: 1\n"


def check(data: bytes, folder: Path) -> None:
    path = folder / "config.yaml"
    path.write_bytes(data)
    attempt(lambda: build_run_config(TRAIN, read_config_file(path, options_of(TRAIN))))
    read_study(TRAIN, [f"--config={path}"])
