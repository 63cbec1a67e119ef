"""Small jobs of every kind, through the real commands, and whether two runs of one have left the same, bit for bit.

What disturbs them (a bucket that fails, a disk that fills, kills) is up to the tests.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tests.support.annealing import anneal_words
from tests.support.tiny import QUICK, Tiny

from liquid_llm import storage
from liquid_llm.checkpoint.files import read_archive
from liquid_llm.cli.main import main
from liquid_llm.metrics import read_metrics, without_timings
from liquid_llm.signal_store.compare import compare
from liquid_llm.signal_store.store import open_store

STATE = ("student", "optimizer", "random", "accumulator")


@dataclass(frozen=True)
class Job:
    """One kind of job.

    Attributes:
        words: of ``liquid``, given where it writes to and, for an output behind a URL, the folder it works in.
        left: where what counts is left below that output.
        require_same: raises AssertionError where what is at a URI or path is not what is at the first one.
    """

    words: Callable[[str, Path], list[str]]
    left: str
    require_same: Callable[[str, str], None]


class Undisturbed(dict[str, "tuple[Job, str]"]):
    """Each job by its name, and where that lies what it leaves undisturbed; run when it is first asked for."""

    def __init__(self, scored: Tiny, folder: Path) -> None:
        super().__init__()
        self._jobs, self._folder = jobs(scored), folder

    def __missing__(self, name: str) -> tuple[Job, str]:
        job, folder = self._jobs[name], self._folder / name.replace(" ", "-")
        assert main(job.words(str(folder), folder)) == 0
        self[name] = job, str(folder / job.left)
        return self[name]


def jobs(scored: Tiny) -> dict[str, Job]:
    """Jobs by name over a world with stored signal: training of both faces, capture in both layouts, preparation."""
    catalog = scored.root / "datasets.json"
    (scored.root / "prompts.txt").write_text("Question:\n")
    spoken = {"sample_prompts": scored.root / "prompts.txt", "sample_tokens": 2}
    of_run = {**spoken, "max_steps": 6, "eval_every": 3, "eval_tokens": 64, "save_every": 2, "upload_interval": 0.05}
    of_annealing = {"train_steps": 6, "eval_every": 3, "eval_tokens": 64, "save_every": 2, "upload_interval": 0.05}

    def hybrid(output: str, work: Path) -> list[str]:
        read: dict[str, object] = {}
        if storage.is_remote(output):
            put_inputs(scored, output)
            read = {"dataset_manifest": f"{output}/in/manifest.jsonl", "data_cache": work.with_name("tokens")}
            read |= {f"{one}_logits_dir": f"{output}/in/signal/{one}" for one in ("math", "code")}
        return ["train", *scored.train_words(output, **of_run, **read, local_workdir=_work(output, work))]

    def anneal(output: str, work: Path) -> list[str]:
        given = {**of_annealing, "local_workdir": _work(output, work)}
        return ["anneal", *anneal_words(scored, output, **given)]

    def capture(layout: str) -> Callable[[str, Path], list[str]]:
        def words(output: str, work: Path) -> list[str]:
            folders = {"math_logits_dir": f"{output}/math", "code_logits_dir": f"{output}/code"}
            return ["capture", *scored.capture_words(**folders, logits_format=layout, batch_size=4, **QUICK)]

        return words

    def prepare(output: str, work: Path) -> list[str]:
        texts = {"in": str(scored.root / "lm.jsonl"), "out": f"{output}/out", "shard_bytes": 1000}
        plain = {"texts": {"type": "lm", **texts, "manifest": f"{output}/out/manifest.jsonl"}}
        catalog.write_text(json.dumps(plain))
        return ["prepare", f"--datasets_yaml={catalog}"]

    return {
        "hybrid": Job(hybrid, "run", require_same_run),
        "annealing": Job(anneal, "", require_same_run),
        "capture": Job(capture("shards"), "math", require_same_store),
        "capture of .pt files": Job(capture("pt"), "math", require_same_store),
        "preparation": Job(prepare, "out", require_same_files),
    }


def put_inputs(scored: Tiny, output: str) -> None:
    """Copies of what a hybrid run reads, behind a URL, where there are none yet."""
    if storage.exists(f"{output}/in/manifest.jsonl"):
        return
    for path in (*scored.root.glob("*.jsonl"), *scored.root.glob("signal/*/*")):
        if path.is_file():
            storage.upload(path, f"{output}/in/{path.relative_to(scored.root)}")


def _work(output: str, work: Path) -> Path | None:
    return work if storage.is_remote(output) else None


def require_same(found: Any, expected: Any, where: str = "") -> None:
    """Nested tensors and plain values, to the bit."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for name in expected:
            require_same(found[name], expected[name], f"{where}/{name}")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), where
        for number, (one, other) in enumerate(zip(found, expected, strict=True)):
            require_same(one, other, f"{where}/{number}")
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected), where
    else:
        assert found == expected, f"{where}: {found} instead of {expected}"


def require_same_run(expected: str, found: str) -> None:
    """Weights, moments, random states, rows and the exported student of two finished run directories."""
    first, second = Path(expected), Path(found)
    ended = [read_archive(one / "final.pt") for one in (second, first)]
    for part in STATE:
        require_same(ended[0][part], ended[1][part])
    rows = [[without_timings(row) for row in read_metrics(one)] for one in (second, first)]
    assert rows[0] == rows[1]
    weights = [(one / "student" / "model.safetensors").read_bytes() for one in (second, first)]
    assert weights[0] == weights[1]


def require_mirrored(run_dir: Path, uri: str) -> None:
    """Every file of a run directory is in its mirror, in its size."""
    there = {info.name: info.size for info in storage.list_files(uri)}
    for path in run_dir.rglob("*"):
        if path.is_file() and not path.name.startswith("."):
            assert there[path.relative_to(run_dir).as_posix()] == path.stat().st_size, path


def require_same_store(expected: str, found: str) -> None:
    """Every record of two stores."""
    first, second = open_store(expected), open_store(found)
    difference = compare(first, second, None)
    assert difference.same, difference
    assert not second.layout.problems()


def require_same_files(expected: str, found: str) -> None:
    """Every file below two folders, which may not say where they lie."""
    here, there = contents(expected), contents(found)
    markers = [name for name in here if "_prepared/" in name or name == "manifest.jsonl"]
    assert here.keys() == there.keys()
    assert {**here, **dict.fromkeys(markers)} == {**there, **dict.fromkeys(markers)}


def contents(uri: str) -> dict[str, bytes]:
    """Every file below a folder, strays of a kill apart."""
    found = storage.list_files(uri)
    return {info.name: storage.read_bytes(info.uri) for info in found if not info.name.endswith(".tmp")}
