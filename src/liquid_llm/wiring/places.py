"""Where a run lives: a local folder it writes, and the places that folder and parts of it are mirrored to.

A job on Vertex AI finds its places in the environment: AIP_CHECKPOINT_DIR, AIP_TENSORBOARD_LOG_DIR and AIP_MODEL_DIR
stand in for ``--output_gcs_uri``, ``--tensorboard_uri`` and ``--model_uri`` where those are not given, and
CLOUD_ML_JOB_ID for ``--run_id``.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from liquid_llm import storage
from liquid_llm.checkpoint.discovery import SIDECAR_SUFFIX
from liquid_llm.config import OutputConfig, RunConfig
from liquid_llm.config_names import earlier_run_names, run_name


@dataclass(frozen=True)
class Place:
    """A run directory.

    Attributes:
        remote: URL it is mirrored to while training, or None when the output is local.
        tensorboard: where its TensorBoard events go as well, path or URL, or None.
        model: where the finished student goes as well, path or URL, or None.
    """

    run_dir: Path
    remote: str | None
    tensorboard: str | None = None
    model: str | None = None

    @property
    def shown(self) -> str:
        return self.remote or str(self.run_dir)

    @property
    def parent_and_name(self) -> tuple[str, str]:
        """The output that the run is in, path or URL, and what it is called there."""
        parent, _, name = self.shown.rstrip("/").rpartition("/")
        return parent or ".", name


def try_places(place: Place) -> None:
    """Write to, and remove from, all the places that a run is mirrored to: not after hours is one found closed.

    Raises:
        StorageError: one of them cannot be written.
    """
    for uri in (place.remote, place.tensorboard, place.model):
        if uri is not None:
            storage.check_writable(uri)


def resolve_place(config: RunConfig) -> Place:
    """The run directory of a configuration.

    The annealing face writes to the output URI itself, the hybrid face to URI/run-id. A run whose output is a URL is
    kept in a folder of its own below ``--local_workdir`` (or the user's cache), so that two outputs never share one.
    """
    output = config.output
    named = output.run_id or os.environ.get("CLOUD_ML_JOB_ID")
    names = [named] if named else [run_name(config), *earlier_run_names(config)]
    folders = list(dict.fromkeys(_folders(output, name, config.below_output) for name in names))
    run_dir, remote = folders[0]
    if len(folders) > 1:  # this very command may have been begun under a name it had earlier
        run_dir, remote = next((one for one in folders if _is_begun(*one)), folders[0])
    return Place(
        run_dir,
        remote,
        tensorboard=output.tensorboard_uri or os.environ.get("AIP_TENSORBOARD_LOG_DIR") or None,
        model=output.model_uri or os.environ.get("AIP_MODEL_DIR") or None,
    )


def _folders(output: OutputConfig, name: str, below: bool) -> tuple[Path, str | None]:
    """The local folder of a run, and the URL of its mirror. ``below``: a folder ``name`` is made in the output."""
    output_uri = output.uri or os.environ.get("AIP_CHECKPOINT_DIR")
    if not output_uri:
        if output.workdir is not None:
            return Path(output.workdir) / name if below else Path(output.workdir), None
        return Path("runs") / name, None
    uri = storage.join(output_uri, name) if below else output_uri
    if not storage.is_remote(uri):
        return storage.local_path(uri), None
    base = Path(output.workdir) if output.workdir else cache_dir() / "runs"
    digest = hashlib.sha256(uri.encode()).hexdigest()[:8]
    return base / f"{uri.rstrip('/').rsplit('/', 1)[-1]}-{digest}", uri


def _is_begun(run_dir: Path, remote: str | None) -> bool:
    """Whether a run has left a checkpoint here."""
    there = [storage.list_files(str(run_dir))] if run_dir.is_dir() else []
    if remote is not None:
        there.append(storage.list_files(remote))
    return any(info.name.endswith(SIDECAR_SUFFIX) for files in there for info in files)


def cache_dir() -> Path:
    """The user's cache folder of this project (XDG base directory specification)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "liquid-llm"
