"""``liquid export``: a Hugging Face folder of any checkpoint of a run, a GGUF file of it, and both on the hub."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from liquid_llm import storage
from liquid_llm.errors import LiquidError, UsageError
from liquid_llm.models.export import find_foreign
from liquid_llm.models.gguf_writing import find_converter, write_gguf
from liquid_llm.models.publishing import Hub
from liquid_llm.runtime import torch_dtype
from liquid_llm.terminal import setup_logging
from liquid_llm.wiring.cards import declared_context, name_student
from liquid_llm.wiring.exports import save_with_card
from liquid_llm.wiring.judging import plain_config
from liquid_llm.wiring.opening import open_checkpoint
from liquid_llm.wiring.tokens import read_token

log = logging.getLogger(__name__)

_MODEL = "config.json"
_USUAL_KIND = "f16"


@dataclass(frozen=True)
class Asked:
    """What a person wants.

    Attributes:
        source: a run directory or a ``.pt`` file in one, local or a URL.
        folder: where to, local or a URL; not there yet or empty, or with ``force`` an earlier model.
        which: the checkpoint of a run directory; None takes the best, else the newest.
        dtype: of the weights in the folder.
        tokenizer: a model with the run's tokenizer, where the run itself does not have it.
        license: the student's, as the hub names it.
        gguf: a GGUF file to write too, local or a URL.
        quantize: of its weights.
        converter: a folder with llama.cpp's converter.
        push_to_hub: a repository of the hub to bring all of it to.
        private: whether it is private, where it is made.
    """

    source: str
    folder: str
    which: str | None = None
    dtype: str = "float32"
    tokenizer: str | None = None
    force: bool = False
    license: str | None = None
    gguf: str | None = None
    quantize: str | None = None
    converter: str | None = None
    push_to_hub: str | None = None
    private: bool = False


def run_export(given: Mapping[str, object]) -> int:
    """Write the student of a checkpoint; prints where it is and returns the exit code.

    Args:
        given: the fields of ``Asked``, and where a Hugging Face token is, by the names of the options.

    Raises:
        LiquidError: any problem a user can cause.
    """
    setup_logging("INFO")
    asked = Asked(**{name: value for name, value in given.items() if name in Asked.__dataclass_fields__})  # type: ignore[arg-type]
    _require_sense(asked)
    converter = None if asked.gguf is None else find_converter(asked.converter)
    _require_room(asked.folder, asked.force, asked.gguf)
    hub = None if asked.push_to_hub is None else Hub(asked.push_to_hub, _token(given))
    if hub is not None:
        hub.look()
    opened = open_checkpoint(asked.source, asked.which, asked.tokenizer, "a run directory, or a .pt file in one")
    assert opened.text is not None  # it is of a run, and so has metadata
    assert opened.metadata is not None
    model = opened.model.to(torch_dtype(asked.dtype))
    log.info("%s in %s", opened.description, asked.dtype)
    with ExitStack() as stack:
        here = stack.enter_context(storage.scratch("export"))
        remote = storage.is_remote(asked.folder)
        folder = here / "student" if remote else storage.local_path(asked.folder)
        tokenizer = opened.text.student_tokenizer()
        save_with_card(model, tokenizer, opened.metadata, folder, run=opened.run, license=asked.license)
        if remote:
            _send(folder, asked.folder)
        print(asked.folder, flush=True)
        files = []
        if asked.gguf is not None and converter is not None:
            name, context = name_student(opened.metadata.student), declared_context(model, opened.metadata)
            file = here / asked.gguf.rpartition("/")[2]
            write_gguf(folder, file, asked.quantize or _USUAL_KIND, name, context, converter)
            storage.upload(file, asked.gguf)
            print(asked.gguf, flush=True)
            files.append(file)
        if hub is not None:
            print(_push(hub, folder, asked, opened.metadata.step, files))
    return 0


def _token(given: Mapping[str, object]) -> str | None:
    return read_token(plain_config({name: one for name, one in given.items() if name.startswith("hf_token")}).teacher)


def _require_sense(asked: Asked) -> None:
    """Refuse words that would do nothing, and a file that is there already."""
    for name, needs in {"quantize": "gguf", "converter": "gguf", "private": "push_to_hub"}.items():
        if getattr(asked, name) and getattr(asked, needs) is None:
            raise UsageError(f"this says nothing without --{needs}", where=f"--{name}", remedy=f"give --{needs} too")
    if asked.gguf is None:
        return
    where = f"--gguf={asked.gguf}"
    if not asked.gguf.endswith(".gguf"):
        raise UsageError("this is no name of a GGUF file", where=where, expected="one that ends in .gguf")
    if storage.exists(asked.gguf) and not asked.force:
        raise UsageError("this file is there already", where=where, remedy="name another, or replace it with --force")


def _push(hub: Hub, folder: Path, asked: Asked, step: int, files: list[Path]) -> str:
    """Bring the folder to the hub; returns its address there."""
    try:
        return hub.push(folder, f"liquid export, step {step}", True if asked.private else None, files)
    except LiquidError:
        log.error(
            "the student is in %s and not on the hub: once the hub takes it, hf upload brings it there", asked.folder
        )
        raise


def _require_room(folder: str, force: bool, gguf: str | None) -> None:
    """Refuse a folder in which something is, and always one that holds anything but what this export writes."""
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
    foreign = find_foreign(name for name in names if storage.join(folder, name) != gguf)
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
