"""``liquid export``: a Hugging Face folder of any checkpoint of a run."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

from liquid_llm import storage
from liquid_llm.errors import UsageError
from liquid_llm.models.export import find_foreign
from liquid_llm.runtime import torch_dtype
from liquid_llm.terminal import setup_logging
from liquid_llm.wiring.exports import save_with_card
from liquid_llm.wiring.opening import open_checkpoint

log = logging.getLogger(__name__)

_MODEL = "config.json"


def run_export(
    source: str, folder: str, *, which: str | None, dtype: str, tokenizer: str | None = None, force: bool = False
) -> int:
    """Write the student of a checkpoint; prints the folder and returns the exit code.

    Args:
        source: a run directory or a ``.pt`` file in one, local or a URL.
        folder: where to, local or a URL; not there yet or empty, or with ``force`` an earlier model.
        which: the checkpoint of a run directory; None takes the best, else the newest.
        dtype: of the weights.
        tokenizer: a model with the run's tokenizer, where the run itself does not have it.

    Raises:
        LiquidError: any problem a user can cause.
    """
    setup_logging("INFO")
    _require_room(folder, force)
    opened = open_checkpoint(source, which, tokenizer, "a run directory, or a .pt file in one")
    assert opened.text is not None  # it is of a run, and so has metadata
    assert opened.metadata is not None
    model = opened.model.to(torch_dtype(dtype))
    log.info("%s in %s", opened.description, dtype)
    if storage.is_remote(folder):
        with tempfile.TemporaryDirectory() as here:
            fresh = Path(here) / "student"
            save_with_card(model, opened.text.student_tokenizer(), opened.metadata, fresh, run=opened.run)
            _send(fresh, folder)
    else:
        save_with_card(
            model, opened.text.student_tokenizer(), opened.metadata, storage.local_path(folder), run=opened.run
        )
    print(folder)
    return 0


def _require_room(folder: str, force: bool) -> None:
    """Refuse a folder in which something is, and always one that holds anything but what an export writes."""
    found = storage.stat(folder)
    if found is not None and found.version:
        raise UsageError("a student is exported to a folder, and this is a file", where=folder)
    names = [one.name for one in storage.list_files(folder)]
    if not names:
        return
    if _MODEL not in names:
        raise UsageError(
            "this folder holds something that is no model, and is left alone",
            where=folder,
            got=", ".join(names[:4]),
            remedy="name a new or empty folder",
        )
    if not storage.is_remote(folder):  # a folder that is empty or a link has no files in the list
        names += [f"{path.name}/" for path in storage.local_path(folder).iterdir() if path.is_dir()]
    foreign = find_foreign(names)
    if foreign:
        raise UsageError(
            "this folder holds more than an exported model, and is left alone",
            where=folder,
            got=", ".join(foreign[:4]),
            expected="nothing that an export does not write",
            remedy="name a new or empty folder",
        )
    if not force:
        raise UsageError(
            "this folder holds a model already", where=folder, remedy="name another, or replace it with --force"
        )


def _send(fresh: Path, uri: str) -> None:
    """Bring a folder to a URL, its configuration last: what has one is a model; what an earlier one had more goes."""
    names = sorted((path.name for path in fresh.iterdir()), key=lambda name: (name == _MODEL, name))
    storage.remove(storage.join(uri, _MODEL))
    for one in storage.list_files(uri):
        if one.name not in names:
            storage.remove(one.uri)
    for name in names:
        storage.upload(fresh / name, storage.join(uri, name))
