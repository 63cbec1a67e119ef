"""What the converter to GGUF is given, what is put right in what it writes, and what is said where it fails.

That llama.cpp finds the same student in the file is for ``integration/test_clients.py``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader, GGUFWriter
from tests.support.tokenizers import tiny_tokenizer

from liquid_llm.errors import ModelError, UsageError
from liquid_llm.framing import Framing
from liquid_llm.models.gguf_writing import find_converter, put_right, stage, write_gguf
from liquid_llm.models.tokenizers import frame_tokenizer

YARN = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4, "original_max_position_embeddings": 2048}
ROTARY = {"vocab_size": 512, "max_position_embeddings": 4096, "rope_parameters": {"rope_type": "default"}}


def folder_of(place: Path, config: dict[str, Any], begin_id: int | None) -> Path:
    """A student's folder without weights, whose tokenizer puts that token before a text."""
    place.mkdir()
    frame_tokenizer(tiny_tokenizer(512), Framing(begin_id, 0)).save_pretrained(place)
    (place / "config.json").write_text(json.dumps({**config, "bos_token_id": begin_id or 0, "eos_token_id": 0}))
    ids = {"bos_token_id": begin_id or 0, "eos_token_id": [0, 7], "pad_token_id": 0}
    (place / "generation_config.json").write_text(json.dumps(ids))
    (place / "model.safetensors").write_bytes(b"weights")
    return place


def read(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text())


@pytest.mark.parametrize(("begin_id", "puts"), [(0, True), (None, False)])
def test_what_would_be_guessed_is_said_and_the_folder_stays(begin_id: int | None, puts: bool, tmp_path: Path) -> None:
    folder, staging = folder_of(tmp_path / "student", ROTARY, begin_id), tmp_path / "staging"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    staging.mkdir()
    stage(folder, staging, 48, plain=False)
    assert read(staging, "tokenizer.json") == read(folder, "tokenizer.json")
    stage(folder, staging, 48, plain=True)
    assert read(staging, "tokenizer.json") == {**read(folder, "tokenizer.json"), "post_processor": None}
    assert read(staging, "config.json")["max_position_embeddings"] == 48
    assert read(staging, "tokenizer_config.json")["add_bos_token"] is puts
    assert (staging / "model.safetensors").samefile(folder / "model.safetensors")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("rope", [YARN, {"full_attention": {"rope_type": "default"}}])
def test_a_length_that_the_rotation_counts_with_stays(rope: dict[str, Any], tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "student", {**ROTARY, "rope_parameters": rope}, None)
    (tmp_path / "staging").mkdir()
    stage(folder, tmp_path / "staging", 48, plain=True)
    assert read(tmp_path / "staging", "config.json")["max_position_embeddings"] == 4096


def test_learned_positions_are_as_many_as_there_are_rows(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "student", {"vocab_size": 512, "n_positions": 64}, None)
    (tmp_path / "staging").mkdir()
    stage(folder, tmp_path / "staging", 48, plain=True)
    config = read(tmp_path / "staging", "config.json")
    assert (config["n_ctx"], config["n_positions"]) == (64, 64)


def written(file: Path, tokens: int = 512, **ids: int) -> Path:
    writer = GGUFWriter(file, "llama")
    writer.add_token_list([f"t{number}" for number in range(tokens)])
    writer.add_add_bos_token(False)
    for name, value in {"bos": 1, "eos": 2, "pad": 3, **ids}.items():
        getattr(writer, f"add_{name}_token_id")(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def test_special_tokens_are_put_right_in_the_file(tmp_path: Path) -> None:
    folder, file = folder_of(tmp_path / "student", ROTARY, 0), written(tmp_path / "a.gguf")
    put_right(file, folder)
    fields = GGUFReader(file).fields
    names = ("bos_token_id", "eos_token_id", "padding_token_id", "add_bos_token")
    assert [fields[f"tokenizer.ggml.{name}"].contents() for name in names] == [0, 0, 0, True]
    with pytest.raises(ModelError, match="lacks tokens"):
        put_right(written(tmp_path / "b.gguf", tokens=511), folder)


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("raise NotImplementedError('BPE pre-tokenizer was not recognized - update')", "does not know this tokenizer"),
        ("print('ERROR:Model MambaX is not supported'); raise SystemExit(1)", "Model MambaX is not supported"),
        ("import a_package_of_nobody", "lacks a package.*Install a_package_of_nobody"),
        ("import gguf; gguf.NO_SUCH_THING", "lacks a part of itself.*force-reinstall"),
    ],
)
def test_a_converter_that_fails_is_told_in_words(program: str, said: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "student", ROTARY, None)
    (tmp_path / "convert_hf_to_gguf.py").write_text(program)
    with pytest.raises(ModelError, match=said):
        write_gguf(folder, tmp_path / "a.gguf", "f16", "a", 48, find_converter(str(tmp_path)))
    with pytest.raises(UsageError, match=r"checkout of llama\.cpp"):
        find_converter(str(folder))
