"""Killed at any moment and started again, a run ends with the losses and weights of one that was never killed."""

import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from tests.support.forked import Forked
from tests.support.tiny import QUICK, Tiny, build, run, start

from liquid_llm.checkpoint.discovery import latest_checkpoint, read_sidecar
from liquid_llm.cli.main import main
from liquid_llm.metrics import read_metrics, without_timings

pytestmark = pytest.mark.slow
FACE = "stage1_hybrid.cli"
STEPS = 20


@pytest.fixture(scope="module")
def captured(tmp_path_factory) -> Tiny:
    tiny = build(tmp_path_factory.mktemp("tiny"))
    done = run("stage1_hybrid.precompute_hybrid_logits", tiny.capture_words(**QUICK))
    assert done.returncode == 0, done.stderr
    return tiny


@pytest.fixture(scope="module")
def undisturbed(captured, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("undisturbed")
    done = run(FACE, words(captured, output))
    assert done.returncode == 0, done.stderr
    return output / "run"


def words(tiny: Tiny, output: Path) -> list[str]:
    # Rows cover three steps and snapshots come every four, so that a row is cut by a checkpoint.
    told = {"save_every": 4, "metrics_interval": 3, "eval_every": 10, "kd_temperature": 2}  # the face's own default
    return tiny.train_words(output, max_steps=STEPS, **told)


def wait_for(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return
        assert process.poll() is None, "it ended before the moment to kill it: " + (process.stderr.read() or "")
        time.sleep(0.0005)  # a checkpoint of so small a model is written in milliseconds
    raise AssertionError("the moment to kill never came")


def between_checkpoints(run_dir: Path) -> bool:
    rows = (
        (run_dir / "metrics.jsonl").read_text().count('"kind":"train"') if (run_dir / "metrics.jsonl").exists() else 0
    )
    return rows >= 2


def right_after_one(run_dir: Path) -> bool:
    return (run_dir / "step-00000004.meta.json").exists()


def during_one(run_dir: Path) -> bool:
    return any(run_dir.glob(".step-00000008*tmp")) if run_dir.exists() else False


@pytest.mark.parametrize("moment", [between_checkpoints, right_after_one, during_one])
def test_sigkill_and_the_same_command_again_give_the_same_bits(captured, undisturbed, tmp_path, moment):
    run_dir = tmp_path / "run"
    process = start(FACE, words(captured, tmp_path))
    wait_for(lambda: moment(run_dir), process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (run_dir / "final.pt").exists()
    done = run(FACE, words(captured, tmp_path))
    assert done.returncode == 0, done.stderr
    assert_same_run(run_dir, undisturbed)


# A disk on which each part of a file takes its time.
SLOW_DISK = """
import sys, time
from liquid_llm.checkpoint.files import HashingWriter
write = HashingWriter.write
HashingWriter.write = lambda writer, block: (time.sleep(0.01), write(writer, block))[1]
from liquid_llm.cli.main import main
sys.exit(main(["train", *sys.argv[1:]]))
"""


def start_on_a_slow_disk(words: list[str]) -> Forked:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return Forked(["-c", SLOW_DISK, *words], env=environment, stdout=False)


def steps_taken_while_it_is_written(run_dir: Path, step: int) -> bool:
    """Whether the checkpoint of ``step`` is being written and a row of a later step is there."""
    if not list(run_dir.glob(f".step-{step:08d}*tmp")):
        return False
    return any(row["kind"] == "train" and row["step"] > step for row in read_metrics(run_dir))


def test_killed_while_steps_go_on_behind_a_write_the_checkpoint_before_is_whole(captured, undisturbed, tmp_path):
    run_dir = tmp_path / "run"
    process = start_on_a_slow_disk(words(captured, tmp_path))
    wait_for(lambda: steps_taken_while_it_is_written(run_dir, 8), process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert latest_checkpoint(run_dir).name == "step-00000004"
    assert read_sidecar(run_dir, "last").step == 4
    done = run(FACE, words(captured, tmp_path))
    assert done.returncode == 0, done.stderr
    assert_same_run(run_dir, undisturbed)


def test_sigterm_while_a_checkpoint_is_written_exits_when_both_are_whole(captured, undisturbed, tmp_path):
    run_dir = tmp_path / "run"
    process = start_on_a_slow_disk(words(captured, tmp_path))
    wait_for(lambda: steps_taken_while_it_is_written(run_dir, 4), process)
    process.terminate()
    _, err = process.communicate(timeout=120)
    assert process.returncode == 75, err
    assert (run_dir / "step-00000004.meta.json").exists()
    stopped = latest_checkpoint(run_dir).step
    assert stopped > 4
    assert read_sidecar(run_dir, "last").step == stopped
    assert not list(run_dir.glob(".*tmp"))
    done = run(FACE, words(captured, tmp_path))
    assert done.returncode == 0, done.stderr
    assert_same_run(run_dir, undisturbed)


def test_sigterm_saves_exits_75_and_goes_on(captured, undisturbed, tmp_path):
    run_dir = tmp_path / "run"
    process = start(FACE, words(captured, tmp_path))
    wait_for(lambda: between_checkpoints(run_dir), process)
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert "run the same command again" in err.lower()
    assert (run_dir / "last.pt").exists()
    done = run(FACE, words(captured, tmp_path))
    assert done.returncode == 0, done.stderr
    assert_same_run(run_dir, undisturbed)


def assert_same_run(run_dir: Path, other: Path) -> None:
    mine, theirs = ([without_timings(row) for row in read_metrics(place)] for place in (run_dir, other))
    assert mine == theirs
    a, b = (torch.load(place / "final.pt", weights_only=True) for place in (run_dir, other))
    assert a["student"].keys() == b["student"].keys()
    for name, value in a["student"].items():
        assert torch.equal(value, b["student"][name]), name
    for key, moments in a["optimizer"]["state"].items():
        for name, value in moments.items():
            assert torch.equal(value, b["optimizer"]["state"][key][name]), (key, name)


def test_the_options_a_run_keeps_run_it_again(captured, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sources = "sources: {math_tool: {teacher: none}, code: {alpha: 0.25}}"
    Path("more.yaml").write_text(sources)
    given = ["--config=more.yaml", "--no-restart", "--eval-ctx-lens=32,64", "--trackers=none"]
    words = captured.train_words("out", max_steps=3, math_logits_dir=None)
    assert main(["train", *words, *given]) == 0
    first, kept = read_metrics(Path("out/run")), Path("out/run/provenance/options.yaml").read_bytes()
    assert not Path("out/run/tb").exists()
    shutil.move("out", "before")
    Path("again.yaml").write_bytes(kept)
    assert main(["train", "--config=again.yaml"]) == 0
    again = read_metrics(Path("out/run"))
    assert [without_timings(row) for row in again] == [without_timings(row) for row in first]
    assert Path("out/run/provenance/options.yaml").read_bytes() == kept
