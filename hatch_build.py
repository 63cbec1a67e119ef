"""Makes the package's description of README.md: its links lead somewhere on PyPI too, where there is no repository."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

_LINK = re.compile(r"(?<=\]\()(?!https?://|mailto:|#)(?P<target>[^)\s#]+)(?P<place>#[^)\s]*)?(?=\))")


def with_absolute_links(text: str, repository: str) -> str:
    """``text`` with each link to a file or folder of the repository leading there.

    Whether they are there is for a test to say: an image is built from a part of the repository.
    """

    def absolute(link: re.Match[str]) -> str:
        name = link["target"].rstrip("/").rpartition("/")[2]
        kind = "blob" if "." in name or name.isupper() else "tree"  # README.md, LICENSE; docs/decisions
        return f"{repository}/{kind}/main/{link['target']}{link['place'] or ''}"

    return _LINK.sub(absolute, text)


class ReadmeHook(MetadataHookInterface):
    """Gives ``readme``, which pyproject.toml says is dynamic."""

    def update(self, metadata: dict[str, Any]) -> None:
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        text = with_absolute_links(text, metadata["urls"]["Repository"])
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
