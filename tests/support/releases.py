"""What earlier releases wrote (``tests/fixtures``), copied to where a test may go on with it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import torch

from liquid_llm.data.loader import TrainingStream

FIXTURES = Path(__file__).parents[1] / "fixtures"
RELEASES = sorted(path.name for path in FIXTURES.glob("release-*"))


@dataclass(frozen=True)
class Release:
    """One release's files in a folder that is also the working folder.

    Attributes:
        folder: the copy.
        about: its ``release.json``.
    """

    folder: Path
    about: dict[str, Any]


def read_about(name: str) -> dict[str, Any]:
    """``release.json`` of one fixture."""
    about: dict[str, Any] = json.loads((FIXTURES / name / "release.json").read_text())
    return about


def lay_out(name: str, folder: Path) -> Release:
    """Copy a fixture to ``folder`` as the release had left it: times of change, and names that share a checkpoint."""
    shutil.copytree(FIXTURES / name, folder)
    about = read_about(name)
    _relink(folder)
    for path in folder.rglob("*"):
        os.utime(path, (about["changed"], about["changed"]))
    return Release(folder, about)


def _relink(folder: Path) -> None:
    """``last`` and ``best`` are links to the snapshot whose hash their sidecars name; one file of them is kept."""
    for run in {sidecar.parent for sidecar in folder.rglob("*.meta.json")}:
        snapshots = {hashlib.sha256(path.read_bytes()).hexdigest(): path for path in run.glob("*.pt")}
        for sidecar in run.glob("*.meta.json"):
            data = sidecar.with_name(sidecar.name.replace(".meta.json", ".pt"))
            if not data.exists():
                os.link(snapshots[json.loads(sidecar.read_text())["sha256"]], data)


@contextmanager
def prepared(release: Release) -> Iterator[dict[str, bytes]]:
    """The prepared dataset at the place it was made for, as (name -> bytes) of before."""
    files = fsspec.filesystem("memory")
    place = release.about["prepared"]["place"].removeprefix("memory:/")
    root = release.folder / "prepared"
    before = {f"{place}/{path.relative_to(root)}": path.read_bytes() for path in root.rglob("*") if path.is_file()}
    for name, data in before.items():
        files.pipe_file(name, data)
        files.store[name].created = datetime.fromisoformat(release.about["prepared"]["created"])
    try:
        yield before
    finally:
        files.rm(place, recursive=True)


def now_at(release: Release) -> dict[str, bytes]:
    """What lies at the place of the prepared dataset now."""
    files = fsspec.filesystem("memory")
    place = release.about["prepared"]["place"].removeprefix("memory:/")
    return {name: files.cat_file(name) for name in files.find(place)}


def edit_checkpoints(run_dir: Path, **changes: Any) -> None:
    """Change metadata in every checkpoint of a run as another release would have written it, hashes and all."""
    digests = {}
    for data in run_dir.glob("step-*.pt"):
        before = hashlib.sha256(data.read_bytes()).hexdigest()
        content = torch.load(data, weights_only=True)
        content["metadata"] |= changes
        data.unlink()
        torch.save(content, data)
        digests[before] = data
    for sidecar in run_dir.glob("*.meta.json"):
        values = json.loads(sidecar.read_text())
        data = digests[values["sha256"]]
        link = sidecar.with_name(sidecar.name.replace(".meta.json", ".pt"))
        if link != data:
            link.unlink()
            os.link(data, link)
        values |= {**changes, "sha256": hashlib.sha256(data.read_bytes()).hexdigest()}
        sidecar.write_text(json.dumps(values))


def micro_batches(monkeypatch: Any) -> dict[int, dict[str, Any]]:
    """From here on, what each training micro-batch holds, by its number, in the words of ``fixtures/make.py``."""
    seen: dict[int, dict[str, Any]] = {}
    original = TrainingStream.at

    def at(self: TrainingStream, index: int) -> Any:
        batch = original(self, index)
        ids = np.ascontiguousarray(batch.input_ids.numpy().astype("<i8"))
        seen[index] = {
            "type": batch.type,
            "samples": [sample.sample_id for sample in batch.samples],
            "shape": list(ids.shape),
            "input_ids": hashlib.sha256(ids.data).hexdigest()[:16],
        }
        return batch

    monkeypatch.setattr(TrainingStream, "at", at)
    return seen
