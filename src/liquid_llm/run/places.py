"""Where a run lives: a local folder it writes, and the place that folder is mirrored to."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from liquid_llm import storage
from liquid_llm.config import RunConfig, run_name
from liquid_llm.options import TRAIN


@dataclass(frozen=True)
class Place:
    """A run directory.

    Attributes:
        run_dir: local folder.
        remote: URL it is mirrored to while training, or None when the output is local.
    """

    run_dir: Path
    remote: str | None

    @property
    def shown(self) -> str:
        return self.remote or str(self.run_dir)


def resolve_place(config: RunConfig) -> Place:
    """The run directory of a configuration.

    The annealing face writes to the output URI itself, the hybrid face to URI/run-id. A run whose output is a URL is
    kept in a folder of its own below ``--local_workdir`` (or the user's cache), so that two outputs never share one.
    """
    output = config.output
    name = output.run_id or os.environ.get("CLOUD_ML_JOB_ID") or run_name(config)
    below = config.face == TRAIN
    if output.uri is None:
        if output.workdir is not None:
            return Place(Path(output.workdir) / name if below else Path(output.workdir), None)
        return Place(Path("runs") / name, None)
    uri = storage.join(output.uri, name) if below else output.uri
    if not storage.is_remote(uri):
        return Place(storage.local_path(uri), None)
    base = Path(output.workdir) if output.workdir else cache_dir() / "runs"
    digest = hashlib.sha256(uri.encode()).hexdigest()[:8]
    return Place(base / f"{uri.rstrip('/').rsplit('/', 1)[-1]}-{digest}", uri)


def cache_dir() -> Path:
    """The user's cache folder of this project (XDG base directory specification)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "liquid-llm"
