"""A folder whose weights are a ``pytorch_model.bin``: tensors are read, anything more is refused and never run."""

from __future__ import annotations

import io
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.models import tiny_model
from tests.support.tokenizers import tiny_tokenizer

from liquid_llm.checkpoint.resume import read_student_weights
from liquid_llm.errors import CheckpointError, ModelError
from liquid_llm.models.loading import load_teacher
from liquid_llm.models.student import file_config


class Runs:
    """What a pickle does when it is opened by whoever trusts it."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.place),)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model, folder = tiny_model("llama", 512), tmp_path / "model"
    model.save_pretrained(folder)
    tiny_tokenizer(512).save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return folder


def opened(folder: Path) -> Any:
    return load_teacher(str(folder), dtype=torch.float32, device="cpu").model


def test_tensors_alone_are_read(folder: Path) -> None:
    weights = torch.load(folder / "pytorch_model.bin", weights_only=True)
    found = opened(folder).state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in found.items())
    read = read_student_weights(str(folder), folder / "work").state_dict
    assert all(torch.equal(value, weights[name]) for name, value in read.items())


def spoil(folder: Path, how: str) -> None:
    path = folder / "pytorch_model.bin"
    data = path.read_bytes()
    if how == "runs":
        torch.save({**torch.load(path, weights_only=True), "extra": Runs(folder / "was-run")}, path)
    elif how == "runs, an old format":
        torch.save({"extra": Runs(folder / "was-run")}, path, _use_new_zipfile_serialization=False)
    elif how == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif how == "nothing":
        path.write_bytes(b"")
    else:
        stream = io.BytesIO()
        torch.save({"w": torch.zeros(2**22)}, stream)
        with zipfile.ZipFile(stream) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
            for member in source.infolist():
                target.writestr(member.filename, source.read(member))


SAID = {
    "runs": "the weights hold more than tensors, or are damaged; they were not opened",
    "runs, an old format": "the weights hold more than tensors, or are damaged; they were not opened",
    "cut": "the model cannot be opened",
    "nothing": "the model cannot be opened",
    "a bomb": "unpacks to far more than it should; it was not opened",
}


@pytest.mark.parametrize("how", SAID)
def test_anything_else_is_refused_in_words(folder: Path, how: str) -> None:
    spoil(folder, how)
    with pytest.raises(ModelError, match=SAID[how]) as error:
        opened(folder)
    assert "weights_only" not in str(error.value)  # torch's own advice is to run what is in it
    with pytest.raises(CheckpointError, match=r"not opened|truncated, damaged or no torch file"):
        read_student_weights(str(folder), folder / "work")
    assert not (folder / "was-run").exists()


def test_a_pickle_that_runs_would_have_been_noticed(tmp_path: Path) -> None:
    torch.save(Runs(tmp_path / "was-run"), tmp_path / "a.pt")
    torch.load(tmp_path / "a.pt", weights_only=False)
    assert (tmp_path / "was-run").is_dir()


@pytest.mark.parametrize("nested", [False, True])
def test_code_that_a_configuration_names_is_refused(folder: Path, nested: bool) -> None:
    """With the package ``kernels``, transformers runs what lies in such a repository."""
    values = json.loads((folder / "config.json").read_text())
    named: Any = {"": "evil/attention"} if nested else "evil/attention"
    (folder / "config.json").write_text(json.dumps({**values, "_attn_implementation": named}))
    for read in (
        lambda: opened(folder),
        lambda: file_config(str(folder / "config.json")),
        lambda: file_config(str(folder)),
    ):
        with pytest.raises(ModelError, match="names code of a hub for its attention"):
            read()


def test_a_length_that_is_no_number_is_no_usable_tokenizer(folder: Path) -> None:
    values = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**values, "model_max_length": "x"}))
    with pytest.raises(ModelError, match="no usable tokenizer; got ValueError: model_max_length is 'x'"):
        opened(folder)
