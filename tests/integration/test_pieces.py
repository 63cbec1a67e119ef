"""A student too large for one checkpoint file is saved by each process for itself, and read as any other."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.support.annealing import anneal_words
from tests.support.gcs import Bucket
from tests.support.processes import launch, run, wait
from tests.support.tiny import Tiny

from liquid_llm import storage
from liquid_llm.checkpoint import pieces
from liquid_llm.checkpoint.discovery import latest_checkpoint, read_checkpoint
from liquid_llm.checkpoint.resume import read_student_weights
from liquid_llm.cli.main import main
from liquid_llm.errors import CheckpointError
from liquid_llm.metrics import read_metrics, without_timings

pytestmark = pytest.mark.slow
PIECES = "tests.support.in_pieces"


def words(tiny: Tiny, output: Path | str, **options: object) -> list[str]:
    given = {"train_steps": 6, "eval_every": 0, "save_every": 2, "grad_accum": 2, "batch_size": 2, "keep_last": 2}
    return anneal_words(tiny, output, **{"student": tiny.root / "gpt2.json", "shard": "full", **given, **options})


@pytest.fixture(scope="module")
def done(tiny, tmp_path_factory) -> Path:
    """Six steps on two processes, saved after every second."""
    output = tmp_path_factory.mktemp("done")
    run(PIECES, words(tiny, output), output / "said")
    return output


def folders(run_dir: Path) -> list[str]:
    return sorted(path.name[:15] for path in run_dir.glob("*pieces-*"))


def test_each_process_writes_its_own_and_what_is_forgotten_is_removed(done: Path) -> None:
    assert folders(done) == ["pieces-00000004", "pieces-00000006"], "of the two snapshots that are kept, and no other"
    for path in done.glob("pieces-*"):
        assert len(list(path.iterdir())) == 2
    assert json.loads((done / "last.meta.json").read_text())["format_version"] == 2
    assert max(path.stat().st_size for path in done.glob("*.pt")) < 100_000
    found = latest_checkpoint(done)
    assert found is not None
    state, _ = read_checkpoint(found.path)
    exported = load_file(done / "student" / "model.safetensors")
    for name, tensor in exported.items():
        assert torch.equal(state["student"][name], tensor), name
    assert state["student"]["lm_head.weight"] is state["student"]["transformer.wte.weight"], "tied, and written once"
    assert state["optimizer"]["state"][0]["exp_avg"].shape == state["student"]["transformer.wte.weight"].shape


def as_of(run_dir: Path, step: int, target: Path) -> Path:
    """A copy of a run as if it had been killed after the snapshot of ``step``."""
    target.mkdir()
    for path in (*run_dir.glob(f"step-{step:08d}*"), run_dir / "metrics.jsonl"):
        shutil.copy(path, target)
    (folder,) = run_dir.glob(f"pieces-{step:08d}*")
    shutil.copytree(folder, target / folder.name)
    return target


def rows(run_dir: Path) -> list[dict]:
    return [without_timings(row) for row in read_metrics(run_dir) if row["kind"] == "train"]


@pytest.mark.parametrize("size", [2, 1], ids=["in-pieces", "whole"])
def test_it_is_continued_in_pieces_to_the_bit_and_whole_to_rounding(tiny, done, tmp_path, size) -> None:
    again = as_of(done, 4, tmp_path / "again")
    given = words(tiny, again) if size == 2 else words(tiny, again, shard=None)
    run(PIECES, given, tmp_path / "said", size)
    states = [read_checkpoint(folder / "last.pt")[0] for folder in (again, done)]
    for name, tensor in states[1]["student"].items():
        torch.testing.assert_close(states[0]["student"][name], tensor, rtol=0, atol=0 if size == 2 else 1e-5)
    if size == 2:
        assert rows(again) == rows(done)
    else:
        assert rows(again)[-1]["loss"] == pytest.approx(rows(done)[-1]["loss"], rel=1e-6)
        assert "student/transformer.wte.weight" not in torch.load(again / "last.pt", weights_only=True)
        assert folders(again) == ["pieces-00000004"], "of the snapshot that is still kept"


def test_it_is_exported_and_inspected(done, tmp_path, capsys) -> None:
    assert main(["export", str(done), str(tmp_path / "student"), "--which=step-6"]) == 0
    expected = load_file(done / "student" / "model.safetensors")
    for name, tensor in load_file(tmp_path / "student" / "model.safetensors").items():
        assert torch.equal(tensor, expected[name]), name
    capsys.readouterr()
    assert main(["inspect", "--json", str(done / "last.pt")]) == 0
    found = json.loads(capsys.readouterr().out)["pieces"]
    assert (found["folder"][:15], found["files"]) == ("pieces-00000006", 2)
    assert found["bytes"] > 100_000
    assert main(["inspect", "--json", str(done)]) == 0
    checkpoints = json.loads(capsys.readouterr().out)["checkpoints"]
    assert {name: one["pieces"]["folder"][:15] for name, one in checkpoints.items()}["final"] == "pieces-00000006"


def test_a_piece_that_is_damaged_or_missing_is_found_and_the_one_before_used(done, tmp_path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(done, damaged)
    (folder,) = damaged.glob("pieces-00000006*")
    piece = sorted(folder.iterdir())[1]
    content = bytearray(piece.read_bytes())
    content[-1] ^= 1
    piece.write_bytes(content)
    said: list[str] = []
    found = latest_checkpoint(damaged, said.append)
    assert found is not None
    assert found.step == 4
    assert "sha256" in said[0]
    with pytest.raises(CheckpointError, match=r"a part of this checkpoint is not what was written.*sha256"):
        read_checkpoint(damaged / "last.pt")
    piece.unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        read_student_weights(str(damaged / "last.pt"), tmp_path / "work")


def be_killed_within_a_piece() -> None:
    """Within the second checkpoint's piece of this rank, while training goes on."""
    write, calls = pieces.write_piece, []

    def killed(path, tensors, offsets, given_up):
        calls.append(1)
        looks: list[int] = []

        def look() -> bool:
            looks.append(1)
            if len(calls) == 2 and len(looks) == 5:
                assert path.stat().st_size > 0
                os.kill(os.getpid(), signal.SIGKILL)
            return given_up()

        return write(path, tensors, offsets, look)

    pieces.write_piece = killed


def test_a_rank_that_is_killed_within_its_piece_leaves_the_checkpoint_before_it_whole(tiny, done, tmp_path) -> None:
    ranks = launch(PIECES, words(tiny, tmp_path), tmp_path / "said", fault=(1, be_killed_within_a_piece))
    assert wait(ranks) == [6, -signal.SIGKILL], "\n".join(rank.said for rank in ranks)
    assert "another process of this run has ended" in ranks[0].said
    assert "Traceback" not in ranks[0].said
    found = latest_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 2
    assert folders(tmp_path) == ["pieces-00000002"]
    assert read_checkpoint(tmp_path / "last.pt")[1].step == 2
    run(PIECES, words(tiny, tmp_path), tmp_path / "said")
    states = [read_checkpoint(folder / "last.pt")[0] for folder in (tmp_path, done)]
    for name, tensor in states[1]["student"].items():
        assert torch.equal(states[0]["student"][name], tensor), name


def test_it_is_mirrored_and_comes_back_on_another_machine(tiny, tmp_path, gcs: Bucket) -> None:
    output, env = f"{gcs.uri}/run", {"STORAGE_EMULATOR_HOST": gcs.base, "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}
    for machine, steps in (("one", 6), ("another", 8)):
        given = words(tiny, output, train_steps=steps, local_workdir=tmp_path / machine)
        ranks = launch(PIECES, given, tmp_path / f"said-{machine}", env=env)
        assert wait(ranks) == [0, 0], "\n".join(rank.said for rank in ranks)
    assert "at step 6" in ranks[0].said
    there = {one.name.partition("/")[0][:15] for one in storage.list_files(output) if one.name.startswith("pieces-")}
    assert there == {"pieces-00000006", "pieces-00000008"}
    assert read_student_weights(f"{output}/last.pt", tmp_path / "work").state is not None
