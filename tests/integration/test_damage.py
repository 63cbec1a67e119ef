"""A run over damaged checkpoints goes on from what is whole, or ends and says so; nothing begins again in silence."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.tiny import Tiny, build

from liquid_llm import storage
from liquid_llm.cli.main import main
from liquid_llm.metrics import read_metrics, without_timings

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    made = build(tmp_path_factory.mktemp("tiny"))
    made.draw_from({"path": "lm.jsonl", "type": "lm"})
    return made


def train(tiny: Tiny, output: Path | str, **options: Any) -> int:
    return tiny.train_plainly(output, **{"save_every": 2, "max_steps": 6, "keep_last": 2, **options})


@pytest.fixture(scope="module")
def begun(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps, with snapshots of steps 4 and 6."""
    folder = tmp_path_factory.mktemp("begun")
    assert train(tiny, folder) == 0
    return folder


def damage(path: Path, data: bytes) -> None:
    path.unlink()  # names of one checkpoint are links to one file
    path.write_bytes(data)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("what", ["cut", "zeros", "data lost"])
def test_where_no_checkpoint_is_whole_a_start_ends_and_restart_keeps_all(
    tiny: Tiny, begun: Path, tmp_path: Path, what: str, capsys: Any
) -> None:
    run = shutil.copytree(begun, tmp_path / "out") / "run"
    for path in run.glob("*.pt"):
        data = path.read_bytes()
        if what == "data lost":
            path.unlink()
        else:
            damage(path, data[:-60] if what == "cut" else bytes(len(data)))
    before = contents(run)
    assert train(tiny, tmp_path / "out") == 4
    message = capsys.readouterr().err.rpartition("error: ")[2]
    for words in ("none of this run's checkpoints can be used", "step-00000006.pt", "--restart", str(run)):
        assert words in message
    assert contents(run) == before
    assert train(tiny, tmp_path / "out", restart="true") == 0
    (aside,) = run.glob("before-restart-*")
    kept = contents(aside)
    assert {name: data for name, data in before.items() if name.endswith((".pt", ".meta.json", ".jsonl"))} == kept
    assert [row["step"] for row in read_metrics(run) if row["kind"] == "train"] == list(range(1, 7))


def test_a_run_that_has_lost_its_sidecars_goes_on_from_its_data(
    tiny: Tiny, begun: Path, tmp_path: Path, capsys: Any
) -> None:
    run = shutil.copytree(begun, tmp_path / "out") / "run"
    whole = torch.load(run / "final.pt", weights_only=True)["student"]
    for path in run.glob("*.meta.json"):
        path.unlink()
    rows = [without_timings(row) for row in read_metrics(run)]
    shutil.rmtree(run / "student")
    assert train(tiny, tmp_path / "out") == 0
    said = capsys.readouterr().err
    assert "is made again: step-00000006.pt of step 6 is whole" in said
    assert "this run goes on from step 6" in said
    assert [without_timings(row) for row in read_metrics(run)] == rows
    again = torch.load(run / "final.pt", weights_only=True)["student"]
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_the_checkpoint_before_a_damaged_one_is_gone_on_from(
    tiny: Tiny, begun: Path, tmp_path: Path, capsys: Any
) -> None:
    run = shutil.copytree(begun, tmp_path / "out") / "run"
    for name in ("step-00000006", "last", "best", "final"):
        damage(run / f"{name}.pt", bytes(1000))
    shutil.rmtree(run / "student")
    assert train(tiny, tmp_path / "out") == 0
    said = capsys.readouterr().err
    assert "skipped a checkpoint" in said
    assert "this run goes on from step 4" in said
    assert main(["doctor", str(run)]) == 0


def test_a_mirror_is_looked_at_in_the_same_way(tiny: Tiny, tmp_path: Path, gcs: Any, capsys: Any) -> None:
    """Whole data without a sidecar is used; damaged data ends the start."""
    out, remote, workdir = f"{gcs.uri}/x", f"{gcs.uri}/x/run", tmp_path / "work"
    assert train(tiny, out, local_workdir=workdir) == 0
    shutil.rmtree(workdir)
    for info in storage.list_files(remote):
        if info.name.endswith(".meta.json"):
            storage.remove(info.uri)
    assert train(tiny, out, local_workdir=workdir, max_steps=7) == 0
    assert "is whole, and has no sidecar that can be read: it is used" in capsys.readouterr().err
    shutil.rmtree(workdir)
    for info in storage.list_files(remote):
        if info.name.endswith(".pt"):
            storage.write_bytes(info.uri, storage.read_bytes(info.uri)[:-60])
    assert train(tiny, out, local_workdir=workdir, max_steps=7) == 4
    assert "none of this run's checkpoints can be used" in capsys.readouterr().err
