"""Dockerfiles, read and followed without Docker: what is copied, what is run, in folders that stand for the image."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Stage:
    """One FROM and what follows.

    Attributes:
        base: the image it begins with, arguments filled in.
        name: after AS, or "".
        steps: instructions and their words, in order; those of ARG left out.
        args: argument -> value.
    """

    base: str
    name: str
    args: dict[str, str]
    steps: list[tuple[str, str]] = field(default_factory=list)


def instructions(text: str) -> list[tuple[str, str]]:
    """Instructions and their words, comments left out and continued lines joined."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(line.partition(" ")[0], line.partition(" ")[2].strip()) for line in joined.splitlines() if line.strip()]


def stages(text: str, given: Mapping[str, str]) -> list[Stage]:
    """The stages of a Dockerfile with these build arguments.

    Raises:
        ValueError: an argument is given that it does not take.
    """
    found: list[Stage] = []
    before: dict[str, str] = {}
    taken: set[str] = set()
    for name, words in instructions(text):
        if name == "ARG":
            argument, _, usual = words.partition("=")
            taken.add(argument)
            (found[-1].args if found else before)[argument] = given.get(argument, usual)
        elif name == "FROM":
            base, _, alias = words.partition(" AS ")
            found.append(Stage(_fill(base, before), alias.strip(), {}))
        else:
            found[-1].steps.append((name, words))
    if not given.keys() <= taken:
        raise ValueError(f"arguments that it does not take: {sorted(given.keys() - taken)}")
    return found


def _fill(text: str, args: Mapping[str, str]) -> str:
    return re.sub(r"\$\{(\w+)\}", lambda name: args[name[1]], text)


def ignored(path: str, rules: str) -> bool:
    """Whether a ``.dockerignore`` of these lines keeps a path of the context from the image; the last match counts.

    Of the patterns only names, ``*`` alone and ``**/`` before a name are understood.
    """
    kept_out = False
    for line in rules.splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        pattern = line.removeprefix("!")
        where = pattern.removeprefix("**/").replace(".", r"\.").replace("*", "[^/]*")
        start = "(.*/)?" if pattern.startswith("**/") else ""
        if re.fullmatch(f"{start}{where}(/.*)?", path):
            kept_out = not line.startswith("!")
    return kept_out


@dataclass
class Follower:
    """Follows the steps of a stage in a folder that stands for the image's root.

    Args:
        context: what COPY copies from.
        root: a folder for each stage, by its number or name.
        path: of the programs that RUN finds first.
    """

    context: Path
    root: Path
    path: str

    def follow(self, stage: Stage, key: str) -> None:
        """Do what the stage says; raises AssertionError with what a RUN has said where it ends with an error."""
        image = self.root / key
        where, env = image, dict(stage.args)
        for name, words in stage.steps:
            if name == "WORKDIR":
                where = image / words.lstrip("/")
                where.mkdir(parents=True, exist_ok=True)
            elif name == "COPY":
                self._copy(words, image, where)
            elif name == "ENV":
                env[words.partition("=")[0]] = words.partition("=")[2]
            elif name == "RUN":
                done = self.run(words, image, where, env)
                assert done.returncode == 0, f"{words}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"

    def run(self, words: str, image: Path, where: Path, env: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
        """A RUN's command, absolute paths of the image made ones below its folder."""
        there = re.sub(r"(?<![\w.$:/])/(?=(wheels|home|liquid-llm|work)\b)", f"{image}/", words)
        environ = {**os.environ, **env, "HOME": os.environ["HOME"], "PATH": f"{self.path}:{os.environ['PATH']}"}
        return subprocess.run(["sh", "-ec", there], cwd=where, env=environ, capture_output=True, text=True)

    def _copy(self, words: str, image: Path, where: Path) -> None:
        source_of, *rest = words.split()
        own = not source_of.startswith("--from=")
        source = self.context if own else self.root / source_of.removeprefix("--from=")
        *names, target = [source_of, *rest] if own else rest
        folder = image / target.lstrip("/") if target.startswith("/") else where / target
        for name in names:
            path = source / name.lstrip("/")
            if path.is_dir():
                left_out = shutil.ignore_patterns("__pycache__", "*.egg-info")
                shutil.copytree(path, folder, dirs_exist_ok=True, ignore=left_out)
            else:
                folder.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, folder / path.name)
