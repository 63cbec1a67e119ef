"""The documentation as a tree of plain Markdown, with a configuration, for a site generator to build.

    python docs/tree.py FOLDER      writes FOLDER/docs/ and FOLDER/mkdocs.yml

Beyond what ``docs/`` holds:

- A page's ``<!-- generated: NAME -->`` is filled in by ``generate.py``.
- A link to a file outside ``docs/`` (an example, a test, SECURITY.md) leads to a page that shows the file, so that the
  site is whole without a network; one to a folder leads to the list of its files.
- A Mermaid diagram is replaced by the picture drawn from it beforehand: Mermaid itself is 3 MB of script, and the site
  would fetch it from a server.

Nothing here knows the site generator: another one reads the same tree.
"""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
import re
import shutil
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "src")]

from docs import generate  # noqa: E402

DOCS = REPOSITORY / "docs"
_LINK = re.compile(r"(?<=\]\()(?P<target>[^()\s]+)(?=\))")
_MERMAID = re.compile(r"^```mermaid\n(?P<source>.*?)^```$", re.M | re.S)
_FENCED = re.compile(r"(^```.*?^`{3,}$)", re.M | re.S)
_HIDDEN = ("__pycache__", ".egg-info")
_LANGUAGES = {".py": "python", ".yaml": "yaml", ".sbatch": "bash", ".sh": "bash", ".toml": "toml", ".ipynb": "json"}


def place_of(path: Path) -> str:
    """Where the site has a file or folder of the repository, relative to ``docs/``."""
    inside = path.relative_to(REPOSITORY).as_posix()
    if path.is_dir():
        return "decisions/index.md" if path == DOCS / "decisions" else f"repository/{inside}/index.md"
    if path.is_relative_to(DOCS):
        return path.relative_to(DOCS).as_posix()
    return f"repository/{inside}" if path.suffix == ".md" else f"repository/{inside}.md"


def linked_files(text: str, folder: Path) -> dict[str, Path]:
    """The links of a Markdown text that lies in ``folder`` -> the file or folder of this repository they lead to."""
    found = {}
    for match in _LINK.finditer(text):
        target = urlsplit(match["target"])
        if target.scheme or not target.path:
            continue
        path = Path(os.path.normpath(folder / target.path))
        if path.is_relative_to(REPOSITORY) and path.exists():
            found[match["target"]] = path
    return found


def with_links(text: str, folder: Path, place: str) -> str:
    """``text``, written in ``folder``, with links that are right where the site has it, at ``place``."""
    known = linked_files(text, folder)

    def relink(match: re.Match[str]) -> str:
        path = known.get(match["target"])
        if path is None:
            return match["target"]
        fragment = urlsplit(match["target"]).fragment
        link = posixpath.relpath(place_of(path), posixpath.dirname(place) or ".")
        return link + (f"#{fragment}" if fragment else "")

    return _LINK.sub(relink, text)


def with_pictures(text: str, place: str) -> str:
    """``text`` with the picture of each Mermaid diagram in the diagram's place.

    Raises:
        ValueError: a diagram has changed since its picture was drawn.
    """

    def draw(match: re.Match[str]) -> str:
        name = f"diagram-{hashlib.sha256(match['source'].encode()).hexdigest()[:12]}.svg"
        if not (DOCS / "images" / name).is_file():
            raise ValueError(
                f"{place}: this diagram has no picture docs/images/{name}; draw it with npx -p @mermaid-js/mermaid-cli "
                "mmdc -b white (htmlLabels: false), and remove the old one"
            )
        return f"![{_spoken(match['source'])}]({posixpath.relpath(f'images/{name}', posixpath.dirname(place) or '.')})"

    return _MERMAID.sub(draw, text)


def _spoken(source: str) -> str:
    """What a diagram shows, for who does not see it: its boxes in order."""
    boxes = re.findall(r'\["([^"]+)"\]', source)
    return "Diagram: " + "; ".join(re.sub(r"<br/>|[\[\]]", " ", box) for box in dict.fromkeys(boxes))


def page_of(path: Path) -> str:
    """The page that shows a file or folder of the repository."""
    inside = path.relative_to(REPOSITORY).as_posix()
    if path.is_dir():
        rows = [f"# {inside}/", ""]
        rows += [
            f"- [{p.name}]({posixpath.relpath(place_of(p), posixpath.dirname(place_of(path)))})" for p in _in(path)
        ]
        return "\n".join(rows)
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return with_links(text, path.parent, place_of(path))
    if path.suffix == ".ipynb":
        return with_links(_notebook(text), path.parent, place_of(path))
    return f"# {path.name}\n\n`{inside}`\n\n`````{_LANGUAGES.get(path.suffix, 'text')}\n{text}\n`````\n"


def _notebook(text: str) -> str:
    """The cells of a notebook: its words, its code, and what the code printed."""
    parts = []
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"`````python\n{source}\n`````")
        said = ["".join(one.get("text", ())) for one in cell.get("outputs", ())]
        parts += [f"`````text\n{one}\n`````" for one in said if one.strip()]
    return "\n\n".join(parts) + "\n"


def _in(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if not p.name.startswith(".") and not p.name.endswith(_HIDDEN))


def shown_files() -> list[Path]:
    """All files and folders outside ``docs/`` that a page leads to, directly or by one that it leads to."""
    todo = [path for page in DOCS.rglob("*.md") for path in linked_files(page.read_text(), page.parent).values()]
    todo += [REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "examples")]
    seen: dict[Path, None] = {}
    while todo:
        path = todo.pop()
        if path in seen or path.is_relative_to(DOCS) or path == REPOSITORY:
            continue
        seen[path] = None
        if path.is_dir():
            todo += _in(path)
        elif path.suffix in (".md", ".ipynb"):
            todo += linked_files(path.read_text(encoding="utf-8"), path.parent).values()
    return sorted(seen)


def _title(path: Path) -> str:
    return path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")


def configuration() -> dict[str, Any]:
    """``docs/mkdocs.yml`` for ``FOLDER``: its folders filled in, pages that it does not name among the guides."""
    config: dict[str, Any] = yaml.safe_load((DOCS / "mkdocs.yml").read_text(encoding="utf-8"))
    decisions = [f"decisions/{path.name}" for path in sorted((DOCS / "decisions").glob("0*.md"))]
    shown = [path for path in shown_files() if path.parent == REPOSITORY]
    folders: dict[str, list[Any]] = {
        "decisions/": ["decisions/index.md", *decisions],
        "repository/": [{path.name: place_of(path)} for path in shown],
    }
    config["site_dir"] = "../site"
    listed = str(config["nav"])
    unlisted = [path.name for path in sorted(DOCS.glob("*.md")) if f"{path.name}'" not in listed]
    guides = next(section["Guides"] for section in config["nav"] if "Guides" in section)
    guides += [{_title(DOCS / name): name} for name in unlisted]
    for section in config["nav"]:
        for children in section.values():
            for entry in children if isinstance(children, list) else []:
                entry.update({title: folders.get(target, target) for title, target in entry.items()})
    config["not_in_nav"] = "\n".join(f"/{place_of(path)}" for path in shown_files() if path.parent != REPOSITORY)
    config["plugins"][-1]["mkdocstrings"]["handlers"]["python"]["paths"] = [str(REPOSITORY / "src")]
    return config


def pages() -> dict[str, str]:
    """Every page of the site: place -> Markdown."""
    found = {"decisions/index.md": generate.decisions_page()}
    found |= {place_of(path): page_of(path) for path in shown_files()}
    for path in DOCS.rglob("*.md"):
        place = path.relative_to(DOCS).as_posix()
        text = with_pictures(generate.fill_in(path.read_text(encoding="utf-8")), place)
        found[place] = with_links(text, path.parent, place)
    return {place: with_lists(text) for place, text in found.items()}


def with_lists(text: str) -> str:
    """``text`` with a blank line before each list: code hosts need none, Markdown's first reader does."""
    parts = _FENCED.split(text)
    parts[::2] = [re.sub(r"^(?![-|#>\s])(.+)\n(?=- )", r"\1\n\n", part, flags=re.M) for part in parts[::2]]
    return "".join(parts)


def write_tree(folder: Path) -> None:
    """Write the tree and the configuration into ``folder``; what an earlier call left there goes."""
    shutil.rmtree(folder / "docs", ignore_errors=True)
    for place, text in pages().items():
        path = folder / "docs" / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    for name in ("assets", "images"):
        shutil.copytree(DOCS / name, folder / "docs" / name)
    (folder / "mkdocs.yml").write_text(yaml.safe_dump(configuration(), sort_keys=False), encoding="utf-8")


if __name__ == "__main__":
    write_tree(Path(sys.argv[1]))
