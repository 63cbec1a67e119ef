"""The recipes of docs/architecture.md as data, and a copy of the sources with all of them applied."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from tests.support.sources import REPOSITORY, SOURCE

PAGE = REPOSITORY / "docs" / "architecture.md"
EXAMPLES = REPOSITORY / "examples" / "extending"


@dataclass(frozen=True)
class Recipe:
    """One section of the page.

    Attributes:
        name, cost: its heading, ``A codec: 1 file and 1 line``.
        files: (example, where it goes), both relative to the repository.
        patches: (file, lines before, lines added, lines after) of each diff, in order.
        removed: lines that a diff takes away.
    """

    name: str
    cost: str
    files: tuple[tuple[str, str], ...]
    patches: tuple[tuple[str, tuple[str, ...], tuple[str, ...], tuple[str, ...]], ...]
    removed: tuple[str, ...]


def read_recipes(page: str) -> list[Recipe]:
    """The recipes under ``## Recipes``."""
    section = page.partition("\n## Recipes\n")[2].partition("\n## ")[0]
    return [_recipe(*part.split("\n", 1)) for part in section.split("\n### ")[1:]]


def _recipe(heading: str, text: str) -> Recipe:
    name, _, cost = heading.partition(": ")
    diffs = [diff.splitlines() for diff in re.findall(r"```diff\n(.*?)```", text, re.DOTALL)]
    files = re.findall(r"\[`(examples/extending/\S+)`\]\(\S+\) becomes\s+`(src/\S+)`", text)
    removed = [line for diff in diffs for line in diff if line.startswith("-") and not line.startswith("--- ")]
    return Recipe(name, cost, tuple(files), tuple(map(_patch, diffs)), tuple(removed))


def _patch(diff: list[str]) -> tuple[str, tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    path = diff[0].removeprefix("--- a/")
    assert diff[1] == f"+++ b/{path}"
    lines = diff[2:]
    added = [number for number, line in enumerate(lines) if line.startswith("+")]
    first, last = added[0], added[-1]
    assert added == list(range(first, last + 1)), "one place a diff"
    return (
        path,
        tuple(line[1:] for line in lines[:first]),
        tuple(line[1:] for line in lines[first : last + 1]),
        tuple(line[1:] for line in lines[last + 1 :]),
    )


def apply(recipes: list[Recipe], folder: Path) -> Path:
    """A copy of ``src`` in ``folder`` with the recipes' files and lines, and nothing else; returns it."""
    target = folder / "src"
    shutil.copytree(SOURCE, target, ignore=shutil.ignore_patterns("__pycache__"))
    for recipe in recipes:
        for example, goes_to in recipe.files:
            assert not (folder / goes_to).exists(), "a recipe replaces nothing"
            shutil.copyfile(REPOSITORY / example, folder / goes_to)
        for path, before, added, after in recipe.patches:
            text = (folder / path).read_text(encoding="utf-8")
            place = "\n".join([*before, *after])
            assert text.count(place) == 1, f"{recipe.name}: its diff does not fit {path}"
            (folder / path).write_text(text.replace(place, "\n".join([*before, *added, *after])), encoding="utf-8")
    return target
