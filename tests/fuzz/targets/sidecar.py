"""Sidecars of checkpoints, ``last.meta.json``, as a continued run, ``inspect`` and ``doctor`` read them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path

import torch
from tests.fuzz.bytes_to_choices import mutate_json as mutate
from tests.fuzz.driver import attempt
from tests.support.checkpoints import metadata_of, state_of

from liquid_llm.checkpoint.discovery import latest_checkpoint, parse_sidecar, sidecar_text
from liquid_llm.checkpoint.mending import lacks_sidecar
from liquid_llm.checkpoint.pieces import folder_name
from liquid_llm.jobs.doctor import examine
from liquid_llm.jobs.inspect import describe

__all__ = ["check", "mutate", "seeds"]


def seeds() -> Iterator[bytes]:
    for changes in ({}, {"format_version": 2}, {"run": {"options": {"lr": 1.0}, "data": [1, None]}}):
        yield sidecar_text(metadata_of(7, sha256="ab" * 32, **changes)).replace(b"\n", b"")


@cache
def _data() -> bytes:
    import io

    stream = io.BytesIO()
    torch.save({**state_of(7, 4), "metadata": metadata_of(7).to_dict()}, stream)
    return stream.getvalue()


def check(data: bytes, folder: Path) -> None:
    (folder / "last.meta.json").write_bytes(data)
    (folder / "last.pt").write_bytes(_data())
    metadata = attempt(lambda: parse_sidecar(data, "last.meta.json"))
    if metadata is not None:
        assert parse_sidecar(sidecar_text(metadata), "again") == metadata
        assert "/" not in folder_name(metadata)
    lacks_sidecar(folder, "last")
    latest_checkpoint(folder, lambda text: None)
    for look in (examine, describe):
        for where in (str(folder), str(folder / "last.pt")):
            attempt(partial(look, where))
