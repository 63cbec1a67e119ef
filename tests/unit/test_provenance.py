"""The six provenance files: complete, parseable, atomic, and without a secret wherever one is planted."""

from __future__ import annotations

import json
import os
import string
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import liquid_llm.provenance as provenance_module
from liquid_llm.errors import StorageError
from liquid_llm.parsing import ParseError
from liquid_llm.provenance import (
    describe_environment,
    git_state,
    hardware,
    package_versions,
    parse_kept_options,
    write_provenance,
)

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=timezone.utc)
FILES = {
    "options.yaml",
    "config.json",
    "manifest_snapshot.jsonl",
    "data_readiness.json",
    "datasets_snapshot.yaml",
    "environment.json",
}


def write(run_dir: Path, **changes: Any) -> Path:
    values: dict[str, Any] = {
        "config": {"student": {"spec": "liquid-16m", "rope_scale": None}, "betas": (0.9, 0.95)},
        "manifest": [
            {"path": "gs://b/*.jsonl", "type": "lm", "weight": 0.5},
            {"path": "/d", "type": "code", "weight": 1},
        ],
        "readiness": {"types": {"lm": {"train_samples": 3}}},
        "datasets": {"name": "wikitext", "config": "wikitext-103-raw-v1"},
        "choices": {"device": {"value": "cpu", "reason": "no GPU"}},
        "argv": ["liquid", "train", "--seed=1"],
        "environ": {"OMP_NUM_THREADS": "2", "HOME": "/root"},
        "now": NOW,
    }
    write_provenance(run_dir, **{**values, **changes})
    return run_dir / "provenance"


def everything(folder: Path) -> str:
    return "\n".join(path.read_text(encoding="utf-8") for path in sorted(folder.iterdir()))


def test_options_that_are_not_what_was_written_are_known(tmp_path: Path) -> None:
    """Half of them are options too, of another run."""
    text = (write(tmp_path, options={"lr": 1e-5, "val_fraction": 0.2, "note": "ä"}) / "options.yaml").read_bytes()
    assert parse_kept_options(text)["val_fraction"] == 0.2
    assert parse_kept_options(text.partition(b"\n")[2])["val_fraction"] == 0.2  # as an earlier release wrote it
    for damaged in (text[: text.index(b"val")], text.replace(b"0.2", b"0.3"), text + b"seed: 3\n", text[:-1]):
        with pytest.raises(ParseError, match="changed or damaged"):
            parse_kept_options(damaged)


def test_the_six_files_say_what_was_given(tmp_path: Path) -> None:
    options = {"lr": 1e-5, "betas": (0.9, 0.95), "hf_token_secret": "projects/p/secrets/s", "student": "null"}
    folder = write(tmp_path, extra={"parameters": 16_000_000}, options=options)
    assert {path.name for path in folder.iterdir()} == FILES
    assert yaml.safe_load((folder / "options.yaml").read_text()) == {**options, "betas": [0.9, 0.95]}
    config = json.loads((folder / "config.json").read_text())
    assert config == {"student": {"spec": "liquid-16m", "rope_scale": None}, "betas": [0.9, 0.95]}
    manifest = [json.loads(line) for line in (folder / "manifest_snapshot.jsonl").read_text().splitlines()]
    assert [line["type"] for line in manifest] == ["lm", "code"]
    assert yaml.safe_load((folder / "datasets_snapshot.yaml").read_text())["config"] == "wikitext-103-raw-v1"
    assert json.loads((folder / "data_readiness.json").read_text())["types"]["lm"]["train_samples"] == 3
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["started_at"] == "2026-01-02T03:04:05+00:00"
    assert environment["command"] == ["liquid", "train", "--seed=1"]
    assert environment["choices"]["device"] == {"value": "cpu", "reason": "no GPU"}
    assert environment["variables"] == {"OMP_NUM_THREADS": "2"}
    assert environment["parameters"] == 16_000_000
    assert environment["packages"]["torch"]
    assert environment["earlier_sessions"] == []


plain_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)
secrets = st.text(string.ascii_letters + string.digits + "+/=-_.:@'\" ", min_size=10, max_size=40).filter(
    lambda text: text.strip() == text and not text.startswith("-")
)


@pytest.fixture
def quick_machine() -> Any:
    """Git and hardware looked up once: they are the same for every example."""
    found_git, found_hardware = git_state(Path(__file__).parent), hardware()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(provenance_module, "git_state", lambda _: found_git)
        patch.setattr(provenance_module, "hardware", lambda: found_hardware)
        patch.setattr(provenance_module, "package_versions", dict)
        patch.setattr(provenance_module, "write_bytes", lambda path, data: _plain_write(Path(path), data))
        yield


def _plain_write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)  # without fsync: hundreds of examples
    path.write_bytes(data)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    secret=secrets,
    around=plain_values,
    place=st.sampled_from(
        ["config", "manifest", "readiness", "datasets", "argv", "environ", "choices", "extra", "key", "options"]
    ),
    variable=st.sampled_from(["HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY", "AIP_PASSWORD", "HF_TOKEN_2"]),
    inside=st.booleans(),
)
@pytest.mark.usefixtures("quick_machine")
def test_a_planted_token_reaches_no_file(
    tmp_path: Path, secret: str, around: object, place: str, variable: str, inside: bool
) -> None:
    text = f"gs://bucket/{secret}/x" if inside else secret
    nested = {"a": around, "b": [{"c": text}, around]}
    changes: dict[str, Any] = {
        "config": {"config": nested},
        "manifest": {"manifest": [nested]},
        "readiness": {"readiness": nested},
        "datasets": {"datasets": nested},
        "argv": {"argv": ["liquid", "--note", text, f"--x={text}"]},
        "environ": {},
        "choices": {"choices": {"device": {"value": "cpu", "reason": text}}},
        "extra": {"extra": nested},
        "key": {"config": {text: 1}},
        "options": {"options": {"data_cache": text, "sources": {"lm": {"teacher": text}}}},
    }[place]
    folder = write(tmp_path, environ={variable: secret, "HF_HOME": f"/x/{secret}/y", "OMP_X": text}, **changes)
    written = everything(folder)
    parsed = [json.loads((folder / name).read_text()) for name in FILES if name.endswith(".json")]
    parsed += [yaml.safe_load((folder / name).read_text()) for name in FILES if name.endswith(".yaml")]
    for spelling in (secret, json.dumps(secret)[1:-1]):
        assert spelling not in written
    assert not any(secret in found for value in parsed for found in strings(value))


def strings(value: object) -> list[str]:
    if isinstance(value, dict):
        return [found for pair in value.items() for one in pair for found in strings(one)]
    if isinstance(value, list):
        return [found for one in value for found in strings(one)]
    return [value] if isinstance(value, str) else []


def test_a_continued_run_keeps_its_earlier_sessions(tmp_path: Path) -> None:
    for session in range(25):
        folder = write(tmp_path, argv=["liquid", f"--session={session}"])
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["command"][1] == "--session=24"
    earlier = [one["command"][1] for one in environment["earlier_sessions"]]
    assert earlier == [f"--session={n}" for n in range(4, 24)]
    assert all("earlier_sessions" not in one for one in environment["earlier_sessions"])


@pytest.mark.parametrize("content", [b"", b'{"started_at": ', b"\xff", b"[1]"])
def test_an_unreadable_earlier_environment_does_not_stop_a_run(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "provenance").mkdir()
    (tmp_path / "provenance" / "environment.json").write_bytes(content)
    folder = write(tmp_path)
    assert json.loads((folder / "environment.json").read_text())["earlier_sessions"] == []


def test_writing_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path)
    before = everything(folder)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(StorageError, match="space"):
        write(tmp_path, config={"other": 1})
    assert everything(folder) == before
    assert {path.name for path in folder.iterdir()} == FILES


def test_objects_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="model"):
        write(tmp_path, config={"model": object()})


def test_undecodable_file_names_can_be_written(tmp_path: Path) -> None:
    folder = write(
        tmp_path, argv=["liquid", os.fsdecode(b"/data/\xff.jsonl")], config={"p": "\udcff"}, datasets={"p": "é"}
    )
    assert json.loads((folder / "environment.json").read_text())["command"][1] == "/data/\udcff.jsonl"


# ----------------------------------------------------------------------------------------------------------------- git


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "repo"
    (folder / "package").mkdir(parents=True)
    (folder / "package" / "module.py").write_text("x = 1\n")
    git = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "package"], check=True)
    subprocess.run([*git, "commit", "-qm", "first"], check=True)
    return folder


def test_the_commit_of_a_checkout(repository: Path) -> None:
    head = subprocess.run(
        ["git", "-C", str(repository), "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    )
    state = git_state(repository / "package")
    assert state == {"commit": head.stdout.strip(), "modified": False, "reason": "clean checkout"}
    (repository / "package" / "module.py").write_text("x = 2\n")
    (repository / "untracked.txt").write_text("")
    assert git_state(repository / "package")["modified"] is True
    assert "1 tracked" in git_state(repository / "package")["reason"]


def test_an_installed_package_inside_somebodys_repository_has_no_commit(repository: Path) -> None:
    installed = repository / ".venv" / "site-packages" / "liquid_llm"
    installed.mkdir(parents=True)
    (installed / "x.py").write_text("")
    state = git_state(installed)
    assert state["commit"] is None
    assert "not tracked" in state["reason"]


def test_no_repository_and_no_git_say_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    outside = git_state(tmp_path)
    assert outside["commit"] is None
    assert "repository" in outside["reason"]
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_state(tmp_path) == {"commit": None, "modified": None, "reason": "git is not installed"}


def test_another_repository_named_by_a_git_hook_is_not_taken(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head = git_state(repository / "package")["commit"]
    monkeypatch.setenv("GIT_DIR", "/nowhere")
    assert git_state(repository / "package")["commit"] == head


# ------------------------------------------------------------------------------------------------------------- machine


def test_hardware_and_packages_are_those_of_this_machine() -> None:
    found = hardware()
    assert found["num_cores"] == os.cpu_count()
    assert found["num_usable_cores"] <= found["num_cores"]
    assert found["memory_bytes"] > 2**28
    assert found["gpus"] or found["gpus_reason"]
    versions = package_versions(("torch", "no-such-package-here"))
    assert versions["torch"][0].isdigit()
    assert versions["no-such-package-here"] is None


def test_the_description_is_plain_json() -> None:
    described = describe_environment(argv=["x"], environ={"HF_HOME": "/h", "SECRET_STUFF": "s"}, now=NOW)
    assert json.loads(json.dumps(described)) == described
    assert described["variables"] == {"HF_HOME": "/h"}
