"""What earlier releases left behind goes on: every folder of ``tests/fixtures``, through the real command.

A run keeps its name, its samples and its losses; stores are read, verified and trained from; a token cache is used and
a prepared dataset left as it is. What a newer release wrote is refused in words.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from tests.support.annealing import contents
from tests.support.releases import (
    RELEASES,
    Release,
    edit_checkpoints,
    lay_out,
    micro_batches,
    now_at,
    prepared,
    read_about,
)

from liquid_llm.cli.main import main
from liquid_llm.metrics import TIMING_KEYS, read_metrics
from liquid_llm.versions import changes_since, read_versions

pytestmark = pytest.mark.slow

# The processor that froze the numbers is not this one: kernels that add in another order differ in the last digits, and
# ten steps of AdamW spread that. On one machine, with one number of threads, they are equal to the last bit.
RELATIVE, ABSOLUTE = 1e-5, 1e-8
CHANGED = 3e-3  # where a later release computes in another way, and says so

NEWER = {"order": 1, "framing": 1, "numerics": 99}


def cases(part: str) -> list[tuple[str, str]]:
    """(fixture, name of a run or store) of every release."""
    return [(release, name) for release in RELEASES for name in read_about(release)[part]]


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def release(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Release:
    laid_out = lay_out(request.param, tmp_path / "release")
    monkeypatch.chdir(laid_out.folder)
    return laid_out


@contextmanager
def untouched(*folders: str, besides: str = "/no such folder/") -> Iterator[None]:
    """Nothing below the folders is made, changed or removed meanwhile, but in those of the name ``besides``."""

    def kept(folder: str) -> dict[str, tuple[bytes, int]]:
        return {name: found for name, found in visible(folder).items() if besides not in name}

    before = {folder: kept(folder) for folder in folders}
    yield
    assert {folder: kept(folder) for folder in folders} == before


def visible(folder: str) -> dict[str, tuple[bytes, int]]:
    """Content and time of change of each file but locks."""
    return {
        name: (data, (Path(folder) / name).stat().st_mtime_ns)
        for name, data in contents(Path(folder)).items()
        if not name.endswith(".lock")
    }


def of_training(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in TIMING_KEYS}


def assert_near(found: Any, frozen: Any, relative: float, absolute: float, where: str) -> None:
    """Every value of ``frozen`` is in ``found``: numbers with a fraction nearly, all else exactly."""
    if isinstance(frozen, dict):
        assert frozen.keys() <= found.keys(), where
        for key, value in frozen.items():
            assert_near(found[key], value, relative, absolute, f"{where}, {key}")
    elif isinstance(frozen, float):
        assert math.isclose(found, frozen, rel_tol=relative, abs_tol=absolute), f"{where}: {found} for {frozen}"
    else:
        assert found == frozen, where


# ----------------------------------------------------------------------------------------------------------------- runs


@pytest.mark.parametrize(("release", "name"), cases("runs"), indirect=["release"])
def test_a_stopped_run_goes_on_with_its_samples_and_losses(
    release: Release, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = release.about["runs"][name]
    metadata = json.loads(Path(run["folder"], "last.meta.json").read_text())
    changes = changes_since(read_versions(metadata.get("versions")), bfloat16=run["bfloat16"])
    seen = micro_batches(monkeypatch)
    with untouched("tokens", "stores"):
        assert main(run["words"]) == 0
    said = capsys.readouterr().err
    assert f"this run goes on from step {metadata['step']}: {run['folder']}/step-" in said
    for index in range(run["position"], len(run["micro_batches"])):
        assert seen[index] == run["micro_batches"][index], f"micro-batch {index}"
    rows = [of_training(row) for row in read_metrics(Path(run["folder"]))]
    assert [(row["kind"], row["step"]) for row in rows] == [(row["kind"], row["step"]) for row in run["rows"]]
    tolerance = (CHANGED, CHANGED) if changes else (RELATIVE, ABSOLUTE)
    for row, frozen in zip(rows, run["rows"], strict=True):
        assert_near(row, frozen, *tolerance, where=f"{frozen['kind']} row of step {frozen['step']}")
    lines = [line for line in said.splitlines() if "since this checkpoint" in line]
    assert len(lines) == len(changes)
    for line, change in zip(lines, changes, strict=True):
        assert f"{change.name} {change.version}" in line
        assert change.what in line
        assert change.before in line
    assert json.loads(Path(run["folder"], "final.meta.json").read_text())["step"] == run["steps"]


@pytest.mark.parametrize(("release", "name"), cases("runs"), indirect=["release"])
def test_a_run_of_a_newer_release_is_refused(release: Release, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The same run, as a release to come might have left it: nothing is trained, written or begun afresh."""
    run = release.about["runs"][name]
    folder = Path(run["folder"])
    edit_checkpoints(folder, versions=NEWER)
    with untouched(str(folder)):
        assert main(run["words"]) == 4
    said = capsys.readouterr().err
    assert "trained by a newer release" in said
    assert "got numerics 99 (known: at most" in said
    assert "Update liquid-llm" in said
    assert "Traceback" not in said


@pytest.mark.parametrize("release", RELEASES, indirect=True)
def test_a_checkpoint_of_a_newer_format_is_refused_and_not_passed_over(
    release: Release, capsys: pytest.CaptureFixture[str]
) -> None:
    """An older snapshot is there, and could be gone on from: the newer steps would be lost."""
    run = release.about["runs"]["anneal"]
    folder = Path(run["folder"])
    newest = max(folder.glob("step-*.meta.json"))
    newest.write_text(json.dumps(json.loads(newest.read_text()) | {"format_version": 99}))
    with untouched(str(folder)):
        assert main(run["words"]) == 4
    said = capsys.readouterr().err
    assert f"{newest}: this checkpoint was written by a newer release; got format version 99; expected at most" in said


@pytest.mark.parametrize("release", RELEASES, indirect=True)
def test_a_mirror_that_only_holds_a_newer_format_is_refused(
    release: Release, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the local folder is lost, as on a machine just made: the mirror's run is not begun afresh over it."""
    run = release.about["runs"]["anneal"]
    files = fsspec.filesystem("memory")
    for name in ("last.pt", "last.meta.json"):
        files.pipe_file(f"/mirror/{name}", Path(run["folder"], name).read_bytes())
    files.pipe_file("/mirror/last.meta.json", files.cat_file("/mirror/last.meta.json").replace(b": 1\n}", b": 99\n}"))
    before = {name: files.cat_file(name) for name in files.find("/mirror")}
    words = [word for word in run["words"] if not word.startswith("--output_gcs_uri")]
    assert main([*words, "--output_gcs_uri=memory://mirror", "--local_workdir=work"]) == 4
    after = {name: files.cat_file(name) for name in files.find("/mirror")}
    lease = after.pop("/mirror/.lease/00000001.json")
    assert after == before
    assert json.loads(lease)["released"], "the next run need not wait for the one that was refused"
    files.rm("/mirror", recursive=True)
    assert "memory://mirror/last.meta.json: this checkpoint was written by a newer release" in capsys.readouterr().err


@pytest.mark.parametrize("release", RELEASES, indirect=True)
def test_only_weights_are_taken_from_a_newer_release(release: Release, capsys: pytest.CaptureFixture[str]) -> None:
    """Where step and optimizer go on, so would order and numerics: refused. Weights alone are weights."""
    run = release.about["runs"]["anneal"]
    edit_checkpoints(Path(run["folder"]), versions=NEWER)
    words = [word for word in run["words"] if not word.startswith(("--output_gcs_uri", "--student"))]
    words += [f"--resume_gcs_uri={run['folder']}/last.pt", "--output_gcs_uri=made", "--train_steps=6"]
    assert main(words) == 4
    assert "trained by a newer release" in capsys.readouterr().err
    assert main([*words, "--reset_optim"]) == 0
    assert "optimizer and step begin anew" in capsys.readouterr().err


@pytest.mark.parametrize("release", RELEASES, indirect=True)
def test_inspect_reads_runs_checkpoints_stores_and_manifest(
    release: Release, capsys: pytest.CaptureFixture[str]
) -> None:
    def inspected(place: str) -> dict[str, Any]:
        capsys.readouterr()
        assert main(["inspect", "--json", place]) == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    for run in release.about["runs"].values():
        found = inspected(run["folder"])
        step = found["checkpoints"]["last"]["step"]
        assert (found["kind"], 0 < step < run["steps"]) == ("run", True)
        assert inspected(f"{run['folder']}/last.pt")["step"] == step
    for name in release.about["stores"]:
        found = inspected(f"stores/{name}")
        assert (found["kind"], f"{found['codec']}-{found['layout']}", found["records"]) == ("store", name, 16)
    types = inspected("data/manifest.jsonl")["types"]
    assert {type: one["entries"] for type, one in types.items()} == {"lm": 1, "math_tool": 1, "code": 1}


# --------------------------------------------------------------------------------------------------------------- stores


@pytest.mark.parametrize(("release", "name"), cases("stores"), indirect=["release"])
def test_a_store_is_verified_trained_from_and_added_to(
    release: Release, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    store = f"stores/{name}"
    with untouched("stores", "tokens", besides="/held_out/"):  # which earlier releases did not have
        words = ["--teacher=teacher", "--manifest=data/manifest.jsonl", "--data-cache=tokens", "--json"]
        capsys.readouterr()
        assert main(["store", "verify", store, *words]) == 0
        verified = json.loads(capsys.readouterr().out)
        assert (verified["agrees"], verified["usable"], verified["differing"]) == (True, verified["looked_at"], 0)
        capture = release.about["stores"][name]
        assert main(capture) == 0
        captured = json.loads(capsys.readouterr().out)
        assert captured["written"] == 0
        assert main(trained_from(store)) == 0
    rows = [row for row in read_metrics(Path("made/run")) if row["kind"] == "train"]
    types = {kind: one["kd_coverage"] for row in rows for kind, one in row["by_type"].items()}
    assert types == {"math_tool": 1.0, "code": 1.0}
    signal = json.loads(Path("made/run/provenance/data_readiness.json").read_text())["signal"]
    for kind in ("math_tool", "code"):
        assert signal[kind]["usable"] == signal[kind]["checked"] == signal[kind]["samples"] > 0


def trained_from(store: str) -> list[str]:
    """Words of a short run on maths and code alone, whose signal is all in ``store``."""
    lines = [json.dumps({"path": f"{kind}.jsonl", "type": kind, "weight": 1}) for kind in ("math_tool", "code")]
    Path("data/stored.jsonl").write_text("\n".join(lines) + "\n")
    words = ["train", "--student=liquid-test", "--mc_teacher_id=teacher", f"--math_logits_dir={store}"]
    words += [f"--code_logits_dir={store}", "--dataset_manifest=data/stored.jsonl", "--data_cache=tokens"]
    words += ["--block_size=32", "--batch_size=2", "--grad_accum=2", "--max_steps=3", "--warmup_steps=1", "--seed=1"]
    words += ["--kd_temperature=1", "--metrics_interval=1", "--val_fraction=0"]  # 1 is what every codec answers
    return [*words, "--output_gcs_uri=made", "--run_id=run"]


@pytest.mark.parametrize("release", RELEASES, indirect=True)
def test_a_packed_store_keeps_the_versions_it_was_begun_with(
    release: Release, capsys: pytest.CaptureFixture[str]
) -> None:
    name = next(iter(release.about["stores"]))
    before = read_versions(json.loads(Path(f"stores/{name}/store.json").read_text()).get("versions"))
    assert main(["store", "pack", f"stores/{name}", "packed", "--json"]) == 0
    found = json.loads(Path("packed/store.json").read_text())
    assert found["versions"] == {kind: before[kind] for kind in ("framing", "numerics")}


@pytest.mark.parametrize("change", [{"versions": {"framing": 99}}, {"format_version": 99}])
@pytest.mark.parametrize("release", RELEASES, indirect=True)
def test_a_store_of_a_newer_release_is_refused(
    release: Release, change: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    name = "tail-shards"
    about = Path(f"stores/{name}/store.json")
    about.write_text(json.dumps(json.loads(about.read_text()) | change))
    with untouched("stores"):
        for words in (trained_from(f"stores/{name}"), release.about["stores"][name], ["inspect", f"stores/{name}"]):
            assert main(words) == 3
            said = capsys.readouterr().err
            assert "by a newer program" in said
            assert "99" in said
            assert "nstall a newer liquid-llm" in said


# ----------------------------------------------------------------------------------------------------------------- data


@pytest.mark.parametrize("release", RELEASES, indirect=True)
def test_a_token_cache_of_another_framing_is_made_again(release: Release) -> None:
    """The one thing that is never refused: what is cached can be had again."""
    folder = next(Path("tokens").glob("math_tool-*"))
    before = contents(folder)
    meta = folder / "meta.json"
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"framing": 99}))
    assert main(trained_from("stores/tail-pt")) == 0
    assert contents(folder) == before


@pytest.mark.parametrize("release", RELEASES, indirect=True)
def test_a_prepared_dataset_is_left_as_it_is_and_trained_on(
    release: Release, capsys: pytest.CaptureFixture[str]
) -> None:
    about = release.about["prepared"]
    words = ["train", "--student=liquid-test", "--hybrid=false", f"--dataset_manifest={about['place']}/manifest.jsonl"]
    words += ["--lm_teacher_id=teacher", "--block_size=32", "--batch_size=2", "--max_steps=1", "--val_fraction=0"]
    words += ["--data_cache=made/tokens", "--output_gcs_uri=made", "--run_id=run", "--seed=1"]
    with prepared(release) as before:
        assert main(about["words"]) == 0
        done = json.loads(capsys.readouterr().out)
        assert {one["status"] for one in done.values()} == {"complete"}
        assert main(words) == 0
        assert now_at(release) == before
    readiness = json.loads(Path("made/run/provenance/data_readiness.json").read_text())
    assert {one["status"] for one in readiness["preparation"].values()} == {"complete"}


@pytest.mark.parametrize("release", RELEASES, indirect=True)
def test_a_dataset_prepared_by_a_newer_release_is_refused(release: Release, capsys: pytest.CaptureFixture[str]) -> None:
    (marker,) = Path("prepared").rglob("complete.json")
    marker.write_text(json.dumps(json.loads(marker.read_text()) | {"format_version": 99}))
    with prepared(release) as before:
        assert main(release.about["prepared"]["words"]) == 3
        assert now_at(release) == before
    said = capsys.readouterr().err
    assert "prepared by a newer release; got format version 99" in said
    assert "Update liquid-llm, or remove memory://" in said


# ------------------------------------------------------------------------------------------------------------- fixtures


def test_there_is_a_fixture_of_the_first_release() -> None:
    assert "release-0.1.0" in RELEASES


@pytest.mark.parametrize("name", RELEASES)
def test_a_fixture_has_each_face_codec_and_layout(name: str) -> None:
    about = read_about(name)
    assert {run["words"][0] for run in about["runs"].values()} == {"anneal", "train"}
    wanted = {f"{codec}-{layout}" for codec in ("full", "topk", "sampled", "tail") for layout in ("pt", "shards")}
    assert wanted <= about["stores"].keys()
    assert all(0 < run["position"] < len(run["micro_batches"]) for run in about["runs"].values())
