"""The commands of README.md and of the pages that go on from it, as a reader would copy them."""

from __future__ import annotations

import re
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
# Every command in the ``sh`` blocks of these is run by a test; those of the other pages are parsed.
PAGES = (
    "README.md",
    *(f"docs/{name}.md" for name in ("first-run", "own-data", "longer", "hybrid", "annealing", "capture")),
)
_FENCE = re.compile(r"^```(?P<language>[^\n]*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)


def commands(text: str | None = None) -> list[str]:
    """Every command of the ``sh`` blocks, continued lines joined and spaces made single; comments are left out.

    Args:
        text: a page; None: all of ``PAGES``, a command that several have once.

    Raises:
        ValueError: a fenced block says no language, so nobody can tell whether its lines are commands.
    """
    if text is None:
        pages = [(REPOSITORY / page).read_text(encoding="utf-8") for page in PAGES]
        return list(dict.fromkeys(command for page in pages for command in commands(page)))
    found = []
    for block in _FENCE.finditer(text):
        language = block["language"].strip()
        if not language:
            raise ValueError(f"a fenced block without a language: {block['body'][:60]!r}")
        if language in ("sh", "bash", "shell", "console"):
            lines = block["body"].replace("\\\n", " ").splitlines()
            found += [" ".join(line.split()) for line in lines if line.strip() and not line.lstrip().startswith("#")]
    return found


def command(*words: str, **options: object) -> str:
    """The only command of ``PAGES`` that contains all ``words``, with option values replaced or added.

    ``command("stage1_hybrid.cli", max_steps=3)`` is the page's text but for the number of steps.
    """
    matching = [text for text in commands() if all(word in text for word in words)]
    if len(matching) != 1:
        raise ValueError(f"{len(matching)} commands of the pages contain {words}: {matching}")
    text = matching[0]
    for name, value in options.items():
        pattern = re.compile(rf"(?<=\s)--{name.replace('_', '[-_]')}(=\S*( \+\S*\))?)?(?=\s|$)")
        text, count = pattern.subn(lambda _, name=name, value=value: f"--{name}={value}", text)
        if not count:
            text += f" --{name}={value}"
    return text
