"""Weights & Biases, MLflow and Trackio themselves, offline: a run is interrupted, continued, and read back there."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.tiny import Tiny, build

from liquid_llm.cli.main import main
from liquid_llm.metrics import read_metrics
from liquid_llm.registry import TRACKERS_OF_EXTRA
from liquid_llm.trackers import RUNS_FILE

pytestmark = pytest.mark.slow
Curve = list[tuple[int, float]]
there = [name for name in TRACKERS_OF_EXTRA if find_spec(name) is not None]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    tiny = build(tmp_path_factory.mktemp("tiny"))
    (tiny.root / "prompts.txt").write_text("Ada has\nThe\n")
    return tiny


@pytest.fixture
def asked(tmp_path: Path) -> dict[str, str]:
    """The environment of someone who has no account anywhere and no network."""
    theirs = ("WANDB_", "MLFLOW_", "TRACKIO_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(theirs)}
    return {**kept, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", "TRACKIO_DIR": str(tmp_path / "trackio")}


def run(arguments: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "liquid_llm", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250)


def words(tiny: Tiny, output: Path, **options: Any) -> list[str]:
    told = {
        "math_logits_dir": None, "code_logits_dir": None, "hybrid": False, "lm_teacher_id": tiny.teacher,
        "eval_every": 2, "save_every": 2, "batch_size": 2, "sample_prompts": tiny.root / "prompts.txt",
        "sample_tokens": 4, "metrics_interval": 1, "max_steps": 6, **options,
    }  # fmt: skip
    return ["train", *tiny.train_words(output, **told)]


def read_mlflow(folder: Path, name: str) -> tuple[Curve, Any, set[str]]:
    from mlflow import MlflowClient

    client = MlflowClient((folder / "mlruns").absolute().as_uri())
    found = client.get_run(name)
    assert found.info.status == "FINISHED"
    curve = [(one.step, one.value) for one in client.get_metric_history(name, "train/loss")]
    there = {one.path for where in (None, "samples") for one in client.list_artifacts(name, where)}
    return curve, found.data.params, there


def records_of_wandb(data: bytes) -> Iterator[bytes]:
    """Its file is a LevelDB log behind seven bytes: blocks of 32 KiB, parts of (checksum, length, kind, bytes)."""
    at, whole = 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield whole
            whole = b""


def read_wandb(folder: Path, name: str) -> tuple[Curve, Any, set[str]]:
    from wandb.proto.wandb_internal_pb2 import Record

    curve: Curve = []
    config: dict[str, Any] = {}
    there: set[str] = set()
    for file in sorted(folder.glob(f"wandb/offline-run-*/run-{name}.wandb")):
        for data in records_of_wandb(file.read_bytes()):
            record = Record.FromString(data)
            row = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            curve += [(row["step"], row["train/loss"])] if "train/loss" in row else []
            there |= row.keys() & {"samples", "report"}
    return curve, config, there


def read_trackio(environment: dict[str, str], name: str) -> tuple[Curve, Any, set[str]]:
    """In a process of its own, as the package looks at the environment once."""
    script = """
import json, sys, trackio
from trackio.sqlite_storage import SQLiteStorage
[run] = [one for one in trackio.Api().runs("liquid-llm") if one.name == sys.argv[1]]
print(json.dumps([SQLiteStorage.get_logs("liquid-llm", run.name, run_id=run.id), run.config], default=str))
"""
    words = [sys.executable, "-c", script, name]
    rows, config = json.loads(subprocess.run(words, env=environment, capture_output=True, text=True, check=True).stdout)
    curve = [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row]
    return curve, config, {key for row in rows for key in row.keys() & {"samples", "report"}}


@pytest.mark.skipif(len(there) < len(TRACKERS_OF_EXTRA), reason="the extra track is not installed")
@pytest.mark.filterwarnings("default")
def test_a_run_is_one_run_to_each_however_often_it_is_continued(
    tiny: Tiny, tmp_path: Path, asked: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is the same to the last bit as one that is shown to nobody; ends after four steps, and goes on to six."""
    names = f"tensorboard,{','.join(TRACKERS_OF_EXTRA)}"
    folder = tmp_path / "out" / "r"
    alone = run(words(tiny, tmp_path / "alone", run_id="r", trackers="none", max_steps=4), asked)
    first = run(words(tiny, tmp_path / "out", run_id="r", trackers=names, max_steps=4), asked)
    assert (alone.returncode, first.returncode) == (0, 0), first.stderr
    assert first.stdout.startswith("held-out text"), "standard output is for results"
    assert "rackio" not in first.stdout
    ours, plain = (torch.load(tmp_path / one / "r" / "final.pt", weights_only=True) for one in ("out", "alone"))
    assert all(torch.equal(value, ours["student"][name]) for name, value in plain["student"].items())
    assert torch.equal(ours["random"]["python"]["words"], plain["random"]["python"]["words"])
    before = json.loads((folder / RUNS_FILE).read_text())
    assert set(before) == set(TRACKERS_OF_EXTRA)
    second = run(words(tiny, tmp_path / "out", run_id="r", report_to=names), asked)
    assert second.returncode == 0, second.stderr
    assert "failed" not in first.stderr + second.stderr
    assert json.loads((folder / RUNS_FILE).read_text()) == before

    expected = [(row["step"], row["loss"]) for row in read_metrics(folder) if row["kind"] == "train"]
    assert [step for step, _ in expected] == [1, 2, 3, 4, 5, 6]
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    curve, parameters, files = read_mlflow(folder, before["mlflow"])
    assert curve == expected
    assert parameters["data.batch_size"] == "2"
    assert files >= {"report.html", *(f"samples/step-{step:08d}-{n}.json" for step in (0, 2, 4, 6) for n in (0, 1))}
    curve, values, seen = read_wandb(folder, before["wandb"])
    assert curve == expected
    assert values["data"]["batch_size"] == 2
    assert seen == {"samples", "report"}
    curve, values, seen = read_trackio(asked, before["trackio"])
    assert sorted(curve) == expected
    assert values["data"]["batch_size"] == 2
    assert seen == {"samples", "report"}


@pytest.mark.skipif("mlflow" not in there, reason="MLflow is not installed")
def test_a_tracker_that_cannot_be_reached_stops_nothing(tiny: Tiny, tmp_path: Path, asked: dict[str, str]) -> None:
    closed = {"MLFLOW_TRACKING_URI": "http://me:s3cr3tPassw0rd@127.0.0.1:9", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    done = run(words(tiny, tmp_path, run_id="r", trackers="mlflow", max_steps=2), {**asked, **closed})
    assert done.returncode == 0
    assert done.stderr.count("the tracker mlflow failed and gets nothing more; the run goes on") == 1
    assert "s3cr3t" not in done.stderr
    assert (tmp_path / "r" / "report.html").is_file()


@pytest.mark.parametrize("name", TRACKERS_OF_EXTRA)
def test_a_package_that_is_not_there_is_named_before_anything_runs(
    name: str, tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda wanted: None)
    assert main(words(tiny, tmp_path / "out", trackers=name)) == 2
    assert f"the package {name} is not installed: pip install 'liquid-llm[track]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
