"""Where a run lives: its output, its name in it, and a run that was begun under the name of an earlier release."""

from pathlib import Path

import fsspec
import pytest

from liquid_llm.config import build_run_config
from liquid_llm.config_names import old_run_name, run_name
from liquid_llm.options import ANNEAL, TRAIN
from liquid_llm.wiring.places import resolve_place


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("AIP_CHECKPOINT_DIR", "AIP_TENSORBOARD_LOG_DIR", "AIP_MODEL_DIR", "CLOUD_ML_JOB_ID"):
        monkeypatch.delenv(name, raising=False)


def hybrid(**given):
    return build_run_config(TRAIN, {"dataset_manifest": "m.jsonl", **given})


def anneal(**given):
    return build_run_config(ANNEAL, {"dataset_name": "d", **given})


@pytest.mark.parametrize(
    ("config", "run_dir"),
    [
        (hybrid(output_gcs_uri="out", run_id="mine"), "out/mine"),
        (hybrid(local_workdir="work", run_id="mine"), "work/mine"),
        (hybrid(run_id="mine"), "runs/mine"),
        (hybrid(output_gcs_uri="out"), f"out/{run_name(hybrid())}"),
        (anneal(output_gcs_uri="out"), "out"),
        (anneal(local_workdir="work"), "work"),
        (anneal(), f"runs/{run_name(anneal())}"),
    ],
)
def test_a_local_run_lies_in_its_output(config, run_dir):
    place = resolve_place(config)
    assert (place.run_dir, place.remote) == (Path(run_dir), None)


def test_a_remote_run_is_kept_in_a_folder_of_its_own(tmp_path):
    one = resolve_place(hybrid(output_gcs_uri="memory://a/out", run_id="mine"))
    other = resolve_place(hybrid(output_gcs_uri="memory://b/out", run_id="mine"))
    assert (one.remote, other.remote) == ("memory://a/out/mine", "memory://b/out/mine")
    assert one.run_dir != other.run_dir
    assert {one.run_dir.parent, other.run_dir.parent} == {tmp_path / "cache" / "liquid-llm" / "runs"}


@pytest.mark.parametrize("output", ["out", "memory://places-old/out"])
def test_a_run_begun_under_its_old_name_is_gone_on_with(output):
    config = hybrid(output_gcs_uri=output)
    new, old = (f"{output}/{name}" for name in (run_name(config), old_run_name(config)))

    def begin(folder: str) -> None:
        with fsspec.open(f"{folder}/last.meta.json", "w", auto_mkdir=True) as file:
            file.write("{}")

    def found() -> str:
        return resolve_place(config).shown

    assert found() == new
    begin(old)
    assert found() == old
    begin(new)
    assert found() == new
    assert resolve_place(hybrid(output_gcs_uri=output, run_id="mine")).shown == f"{output}/mine"
