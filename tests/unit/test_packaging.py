"""What is shipped beside the code: the image, its context, the citation, the package's description and its extras."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import pytest
import yaml
from tests.support.images import Follower, ignored, instructions, stages
from tests.support.readme import REPOSITORY

PYPROJECT = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
IGNORED = (REPOSITORY / ".dockerignore").read_text(encoding="utf-8")
DOCKERFILES = ("Dockerfile", "examples/vertex/Dockerfile")
REPOSITORY_URL = re.search(r'^Repository = "(.*)"$', PYPROJECT, re.M)[1]  # type: ignore[index]


@pytest.mark.parametrize("name", DOCKERFILES)
def test_an_image_is_built_from_what_is_there_and_gets_into_the_context(name: str) -> None:
    copied: list[str] = []
    for step, words in instructions((REPOSITORY / name).read_text()):
        if step == "COPY" and not words.startswith("--from="):
            copied += words.split()[:-1]
    assert {"pyproject.toml", "hatch_build.py", "README.md", "LICENSE", "src"} <= set(copied), "what a wheel is made of"
    assert not [one for one in copied if not (REPOSITORY / one).exists()]
    assert not [one for one in copied if ignored(one, IGNORED)]


def test_nothing_else_gets_into_the_context() -> None:
    out = [
        "runs/demo/a.pt",
        ".venv/bin/python",
        ".git/config",
        "key.json",
        "tests/conftest.py",
        "src/a/__pycache__/b.pyc",
    ]
    assert not [one for one in out if not ignored(one, IGNORED)]
    assert not ignored("src/liquid_llm/api.py", IGNORED)


def test_an_image_has_arguments_for_its_device_and_refuses_another(tmp_path: Path) -> None:
    text = (REPOSITORY / "Dockerfile").read_text()
    build, final = stages(text, {"PYTHON": "3.11", "DEVICE": "tpu"})
    assert (build.base, final.base) == ("python:3.11-slim", "python:3.11-slim")
    choice = next(words for step, words in final.steps if step == "RUN" and "DEVICE" in words)
    pip = tmp_path / "bin" / "pip"
    pip.parent.mkdir()
    pip.write_text('#!/bin/sh\necho "$@"\n')
    pip.chmod(0o755)
    follower = Follower(REPOSITORY, tmp_path, str(pip.parent))
    said = {}
    for device in ("cpu", "cuda", "tpu"):
        done = follower.run(choice, tmp_path, tmp_path, {**final.args, "DEVICE": device})
        said[device] = (done.returncode, done.stdout + done.stderr)
    assert said["cuda"] == (0, "")
    assert said["cpu"][1].split()[-1] == "torch"
    assert "--index-url=https://download.pytorch.org/whl/cpu" in said["cpu"][1]
    assert said["tpu"] == (1, "DEVICE is cuda or cpu, not 'tpu'\n")
    with pytest.raises(ValueError, match="CUDA"):
        stages(text, {"CUDA": "12"})


def test_the_citation_is_of_this_release() -> None:
    """``cff-version`` 1.2.0 asks for these; ``make test-wheel`` checks the whole against its schema."""
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert all(citation[name] for name in ("message", "title", "authors"))
    assert f'version = "{citation["version"]}"' in PYPROJECT
    assert f'license = "{citation["license"]}"' in PYPROJECT
    assert citation["repository-code"] == REPOSITORY_URL


def test_links_of_the_readme_lead_into_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    interface = types.ModuleType("hatchling.metadata.plugin.interface")
    interface.MetadataHookInterface = object  # type: ignore[attr-defined]  # hatchling is there while a wheel is built
    for name in ("hatchling", "hatchling.metadata", "hatchling.metadata.plugin"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, interface.__name__, interface)
    names: dict[str, object] = {"__name__": "hatch_build"}
    exec(compile((REPOSITORY / "hatch_build.py").read_text(), "hatch_build.py", "exec"), names)
    hook = names["ReadmeHook"]()  # type: ignore[operator]
    hook.root = str(REPOSITORY)
    metadata = {"urls": {"Repository": REPOSITORY_URL}}
    hook.update(metadata)
    text = metadata["readme"]["text"]  # type: ignore[index]
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    assert len(links) > 10
    for link in links:
        assert link.startswith(("https://", "#")), link
        if link.startswith(REPOSITORY_URL):
            kind, _, path = link.removeprefix(f"{REPOSITORY_URL}/").partition("/main/")
            there = REPOSITORY / path.partition("#")[0]
            assert there.is_dir() if kind == "tree" else there.is_file(), link
    plain = re.sub(r"\]\([^)\s]+\)", "]()", (REPOSITORY / "README.md").read_text())
    assert re.sub(r"\]\([^)\s]+\)", "]()", text) == plain, "nothing but the links differs"


def test_the_addresses_of_the_project_are_one_repositorys() -> None:
    block = re.search(r"^\[project.urls\]\n((?:\w+ = .*\n)+)", PYPROJECT, re.M)[1]  # type: ignore[index]
    urls = dict(re.findall(r'^(\w+) = "(.*)"$', block, re.M))
    assert {"Repository", "Documentation", "Changelog", "Issues"} <= urls.keys()
    assert not [url for url in urls.values() if not url.startswith(REPOSITORY_URL)]
    for name in ("Documentation", "Changelog"):
        assert (REPOSITORY / urls[name].partition("/main/")[2]).exists()


def test_no_name_of_an_extra_goes() -> None:
    """People have them in their requirements: names are added, never taken away."""
    block = PYPROJECT.partition("[project.optional-dependencies]\n")[2].partition("\n[")[0]
    assert set(re.findall(r"^([\w-]+) = \[", block, re.M)) >= {
        *("s3", "azure", "track", "eval", "lm-eval", "gguf", "lora", "torchao", "notebook", "docs", "fuzz", "dev"),
        "quantize",
    }
