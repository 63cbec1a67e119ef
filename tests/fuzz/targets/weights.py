"""Folders, zips and safetensors files of models: the first byte says which file, the rest is it or what changes it."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import save
from tests.fuzz.bytes_to_choices import Choices, edit_bytes, edit_value
from tests.fuzz.driver import attempt

from liquid_llm.checkpoint.resume import read_student_weights
from liquid_llm.models.sources import read_origin, resolve
from liquid_llm.models.student import parse_student

KINDS = ("config", "index", "header", "safetensors", "zip", "origin", "raw")


def seeds() -> Iterator[bytes]:
    for kind in range(len(KINDS)):
        yield bytes([kind])
        yield bytes([kind, 3, 9, 1, 5, 8])


@cache
def _weights() -> bytes:
    return save({"a.weight": torch.zeros(2, 3), "b.bias": torch.ones(4)})


def _zipped(files: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(f"model/{name}", content)
    return stream.getvalue()


def _edited(value: object, choices: Choices) -> bytes:
    while choices:
        value = edit_value(value, choices)
    return json.dumps(value).encode()


def check(data: bytes, folder: Path) -> None:
    choices = Choices(data)
    kind = choices.one(KINDS)
    files = {"config.json": b'{"model_type": "llama", "hidden_size": 8}', "model.safetensors": _weights()}
    if kind == "config":
        files["config.json"] = _edited(json.loads(files["config.json"]), choices)
    elif kind == "index":
        named = {"metadata": {"total_size": 40}, "weight_map": {"a.weight": "one.safetensors", "b.bias": "config.json"}}
        files["one.safetensors"] = files.pop("model.safetensors")
        files["model.safetensors.index.json"] = _edited(named, choices)
    elif kind == "header":
        length = int.from_bytes(_weights()[:8], "little")
        header = _edited(json.loads(_weights()[8 : 8 + length]), choices)
        files["model.safetensors"] = len(header).to_bytes(8, "little") + header + _weights()[8 + length :]
    elif kind == "origin":
        files["liquid_origin.json"] = _edited({"id": "a", "revision": "b", "dtype": "float32"}, choices)
    elif kind == "raw":
        files["model.safetensors"] = choices.rest()
    while kind == "safetensors" and choices:
        files["model.safetensors"] = edit_bytes(files["model.safetensors"], choices)
    place = folder / "model"
    if kind == "zip":
        archive = _zipped(files)
        while choices:
            archive = edit_bytes(archive, choices)
        place = folder / "model.zip"
        place.write_bytes(archive)
    else:
        place.mkdir()
        for name, content in files.items():
            (place / name).write_bytes(content)
    for look in (
        lambda: read_student_weights(str(place), folder / "work"),
        lambda: read_origin(place) if place.is_dir() else None,
        lambda: resolve(str(place)),
        lambda: parse_student(str(place)),
    ):
        attempt(look)
    assert {path.name for path in folder.iterdir()} <= {place.name, "work"}  # no member beside its folder
