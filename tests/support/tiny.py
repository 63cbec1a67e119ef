"""A hybrid run small enough for seconds: two-layer teacher and student, generated texts, a captured store.

Everything goes through the real command lines; only the sizes are small.
"""

from __future__ import annotations

import glob
import json
import os
import random
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tests.support import shared, texts
from tests.support.forked import Forked
from tests.support.models import tiny_config, tiny_model
from tests.support.processes import launch, wait
from tests.support.tokenizers import tiny_tokenizer

from liquid_llm.cli.main import main

VOCAB_SIZE = 512
# Of a store whose content a test does not look at: a third of what the usual codec takes to be made, less to be read.
QUICK: dict[str, object] = {"codec": "topk", "topk": 16}


@dataclass(frozen=True)
class Tiny:
    """Where the pieces of a small hybrid run lie."""

    root: Path

    @property
    def teacher(self) -> Path:
        return self.root / "teacher"

    @property
    def manifest(self) -> Path:
        return self.root / "manifest.jsonl"

    @property
    def student(self) -> Path:
        return self.root / "student.json"

    def capture_words(self, **options: object) -> list[str]:
        """Words of a ``liquid capture`` over this data."""
        defaults = {
            "mc_teacher_id": self.teacher,
            "dataset_manifest": self.manifest,
            "math_logits_dir": self.root / "signal" / "math",
            "code_logits_dir": self.root / "signal" / "code",
            "seq_len": 64,
            "data_cache": self.root / "tokens",
        }
        return words({**defaults, **options})

    def train_words(self, output: Path | str, **options: object) -> list[str]:
        """Words of a ``liquid train`` over this data."""
        defaults = {
            "student": self.student,
            "lm_teacher_id": self.teacher,
            "mc_teacher_id": self.teacher,
            "math_logits_dir": self.root / "signal" / "math",
            "code_logits_dir": self.root / "signal" / "code",
            "dataset_manifest": self.manifest,
            "output_gcs_uri": output,
            "run_id": "run",
            "data_cache": self.root / "tokens",
            "block_size": 64,
            "batch_size": 2,
            "max_steps": 20,
            "warmup_steps": 4,
            "lr": 1e-2,
            "eval_every": 10,
            "eval_tokens": 1024,
            "save_every": 5,
            "metrics_interval": 1,
            "val_fraction": 0.2,
        }
        return words({**defaults, **options})

    def train_plainly(self, output: Path | str, **options: object) -> int:
        """``liquid train`` without a stored signal or an evaluation unless asked for; returns the exit code."""
        unused = dict.fromkeys(("mc_teacher_id", "math_logits_dir", "code_logits_dir"))
        return main(["train", *self.train_words(output, **{**unused, "eval_every": 0, **options})])

    def draw_from(self, *entries: dict[str, Any]) -> None:
        """Make these the lines of the manifest."""
        self.manifest.write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def words(options: dict[str, Any]) -> list[str]:
    """Options as command-line words; None leaves one out."""
    return [f"--{name}={value}" for name, value in options.items() if value is not None]


def build(root: Path, teacher_steps: int = 10) -> Tiny:
    """Write teacher, student configuration and data below ``root``; nothing is captured yet.

    A teacher of 150 steps has something to teach that shows in figures; one of few is made in a blink. In a session
    of tests each is made once, and copied.
    """
    if shared.FOLDER not in os.environ:
        return _build(root, teacher_steps)
    made = shared.once(f"tiny-{teacher_steps}", lambda place: _build(place, teacher_steps))
    shutil.copytree(made, root, dirs_exist_ok=True)
    return Tiny(root)


def _build(root: Path, teacher_steps: int) -> Tiny:
    tiny = Tiny(root)
    root.mkdir(parents=True, exist_ok=True)
    tokenizer = tiny_tokenizer(VOCAB_SIZE)
    tiny.student.write_text(tiny_config("lfm2", VOCAB_SIZE, max_position_embeddings=256).to_json_string())
    rng = random.Random(7)
    makers: dict[str, tuple[Callable[[], str], int, float]] = {
        "lm": (lambda: texts.paragraph(rng), 60, 2.0),
        "math_tool": (lambda: texts.word_problem(rng), 40, 1.0),
        "code": (lambda: texts.function(rng), 40, 1.0),
    }
    lines = []
    for kind, (make, count, weight) in makers.items():
        rows = [{"text": make(), "type": kind, "sample_id": f"{kind}-{number}"} for number in range(count)]
        (root / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        lines.append({"path": f"{kind}.jsonl", "type": kind, "weight": weight})
    tiny.draw_from(*lines)
    texts_of_all = [
        json.loads(row)["text"] for kind in makers for row in (root / f"{kind}.jsonl").read_text().splitlines()
    ]
    _trained_teacher(tokenizer, texts_of_all, teacher_steps).save_pretrained(tiny.teacher)
    tokenizer.save_pretrained(tiny.teacher)
    return tiny


def _trained_teacher(tokenizer: Any, lines: list[str], steps: int) -> Any:
    """A teacher that knows something no text says: what it predicts follows from the next token by a fixed rule.

    Cross-entropy on the text therefore leads away from it: only its signal can bring a student near.
    """
    model = tiny_model("llama", VOCAB_SIZE, seed=1, max_position_embeddings=256).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    rng = random.Random(3)
    encoded = [torch.tensor(tokenizer(line, add_special_tokens=False)["input_ids"][:64]) for line in lines]
    for _ in range(steps):
        rows = rng.sample(encoded, 8)
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        contrary = [(row * 7 + 3) % VOCAB_SIZE for row in rows]
        labels = torch.nn.utils.rnn.pad_sequence(contrary, batch_first=True, padding_value=-100)
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def start(module: str, argv: list[str], **env: str) -> Forked:
    """A face as a process of its own, one thread, so that results do not depend on how busy the machine is."""
    process = Forked(["-m", module, *argv], env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **env})
    _STARTED.append(process)
    return process


_STARTED: list[Forked] = []


def end_started() -> None:
    """End what a failed test left running, so that the next test does not fail for it as well."""
    while _STARTED:
        process = _STARTED.pop()
        process.kill()
        process.communicate()  # its pipes too


def files(folder: Path, pattern: str) -> list[str]:
    """What matches now, in a folder that another process makes or removes meanwhile (where ``Path.glob`` raises)."""
    return glob.glob(pattern, root_dir=folder)


def run(module: str, argv: list[str], **env: str) -> subprocess.CompletedProcess[str]:
    """The same to its end, forked from a process that has the libraries loaded: seconds less."""
    with tempfile.TemporaryDirectory() as folder:
        ranks = launch(module, argv, Path(folder), 1, env=env, two_streams=True)
        (code,) = wait(ranks)
        assert code is not None, ranks[0].said + ranks[0].said_wrong
        return subprocess.CompletedProcess(argv, code, ranks[0].said, ranks[0].said_wrong)
