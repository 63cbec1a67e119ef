from __future__ import annotations

import functools
import http.server
import json
import os
import stat
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tests.support.checkpoints import metadata_of
from tests.support.gcs import Bucket
from transformers import LlamaConfig, LlamaForCausalLM

from liquid_llm import storage
from liquid_llm.checkpoint.resume import ResumeSource, read_student_weights
from liquid_llm.checkpoint.store import CheckpointStore
from liquid_llm.errors import CheckpointError, StorageError

WEIGHTS = {"a.weight": torch.arange(6.0).reshape(2, 3), "b.bias": torch.tensor([1.5, -2.0])}


def same_weights(source: ResumeSource, expected: dict[str, torch.Tensor]) -> bool:
    return source.state_dict.keys() == expected.keys() and all(
        torch.equal(source.state_dict[name], value) for name, value in expected.items()
    )


@pytest.fixture
def work(tmp_path: Path) -> Path:
    return tmp_path / "work"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A run's checkpoint with its sidecar."""
    metadata = metadata_of(40, student={"spec": "tiny", "config": {"model_type": "llama"}})
    with CheckpointStore(tmp_path / "run", 3) as store:
        info = store.save({"student": WEIGHTS, "optimizer": {"state": {}}}, metadata, also_as=("best",))
    return info.path.with_name("best.pt")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder as transformers writes it, with tied weights."""
    folder = tmp_path_factory.mktemp("hf") / "model"
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "training_args.bin").write_bytes(b"never read")
    return folder


def zipped(folder: Path, archive: Path, below: str = "") -> Path:
    with zipfile.ZipFile(archive, "w") as opened:
        for path in sorted(folder.iterdir()):
            opened.write(path, f"{below}{path.name}")
    return archive


# ------------------------------------------------------------------------------------------------------ our checkpoints


def test_a_run_checkpoint_gives_everything(checkpoint: Path, work: Path) -> None:
    source = read_student_weights(str(checkpoint), work)
    assert same_weights(source, WEIGHTS)
    assert source.metadata is not None
    assert source.metadata.step == 40
    assert source.config == {"model_type": "llama"}
    assert source.state is not None
    assert "optimizer" in source.state
    assert "40" in source.description
    assert str(checkpoint) in source.description


def test_a_run_checkpoint_without_its_sidecar_is_taken_as_it_is(checkpoint: Path, work: Path) -> None:
    checkpoint.with_name("best.meta.json").unlink()
    assert read_student_weights(str(checkpoint), work).state


def test_a_sidecar_that_disagrees_is_refused(checkpoint: Path, work: Path) -> None:
    sidecar = checkpoint.with_name("best.meta.json")
    sidecar.write_text(sidecar.read_text().replace('"sha256": "', '"sha256": "0'))
    with pytest.raises(CheckpointError, match=r"best\.pt: the sidecar does not belong.*Copy both again"):
        read_student_weights(str(checkpoint), work)


def test_another_format_version_is_refused(tmp_path: Path, work: Path) -> None:
    values = metadata_of(1).to_dict() | {"format_version": 99}
    torch.save({"model_state": WEIGHTS, "metadata": values}, tmp_path / "new.pt")
    with pytest.raises(CheckpointError, match=r"new\.pt.*got 99; expected 1 or 2\. Use the release"):
        read_student_weights(str(tmp_path / "new.pt"), work)


# -------------------------------------------------------------------------------------------------- foreign state dicts


def test_bare_state_dicts_in_their_usual_wrappings(tmp_path: Path, work: Path) -> None:
    for wrapper in ("", "model", "state_dict", "student", "model_state_dict"):
        for prefix in ("", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."):
            weights = {prefix + name: value for name, value in WEIGHTS.items()}
            torch.save({wrapper: weights, "epoch": 3} if wrapper else weights, tmp_path / "w.pt")
            source = read_student_weights(str(tmp_path / "w.pt"), work)
            assert same_weights(source, WEIGHTS), (wrapper, prefix)
            assert (source.metadata, source.state) == (None, None)


def test_wrappers_may_be_nested(tmp_path: Path, work: Path) -> None:
    torch.save({"student": {"state_dict": WEIGHTS}}, tmp_path / "w.pt")
    assert same_weights(read_student_weights(str(tmp_path / "w.pt"), work), WEIGHTS)


def test_a_prefix_of_only_some_names_is_part_of_them(tmp_path: Path, work: Path) -> None:
    weights = {"module.x": torch.ones(1), "head": torch.ones(1)}
    torch.save(weights, tmp_path / "w.pt")
    assert same_weights(read_student_weights(str(tmp_path / "w.pt"), work), weights)


@pytest.mark.parametrize("content", [{}, [1, 2], {"model": {}}, {"a": torch.ones(1), "b": "text"}, 3.0, torch.ones(2)])
def test_files_without_a_state_dict_say_so(tmp_path: Path, work: Path, content: Any) -> None:
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=r"w\.pt: .*no state dict; got .*; expected names and tensors"):
        read_student_weights(str(tmp_path / "w.pt"), work)


def test_legacy_torch_files_are_read(tmp_path: Path, work: Path) -> None:
    torch.save(WEIGHTS, tmp_path / "w.bin", _use_new_zipfile_serialization=False)
    assert same_weights(read_student_weights(str(tmp_path / "w.bin"), work), WEIGHTS)


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_truncated_files_name_the_uri_and_the_remedy(tmp_path: Path, work: Path, name: str) -> None:
    path = tmp_path / name
    save_file(WEIGHTS, path) if name.endswith("tensors") else torch.save(WEIGHTS, path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(CheckpointError, match=rf"{name}: .*truncated.*[Cc]opy it again"):
        read_student_weights(str(path), work)


def test_a_missing_file_says_what_would_do(tmp_path: Path, work: Path) -> None:
    with pytest.raises(CheckpointError, match=r"there is no checkpoint here; expected .*Hugging Face"):
        read_student_weights(str(tmp_path / "none.pt"), work)


# --------------------------------------------------------------------------------------------------------- Hugging Face


def as_safetensors(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def test_a_hugging_face_folder(model_folder: Path, work: Path) -> None:
    source = read_student_weights(str(model_folder), work)
    assert same_weights(source, as_safetensors(model_folder))
    assert source.config is not None
    assert source.config["hidden_size"] == 8
    assert source.tokenizer_folder == str(model_folder)
    LlamaForCausalLM(LlamaConfig(**source.config)).load_state_dict(dict(source.state_dict), strict=False)


def test_a_single_safetensors_file(model_folder: Path, work: Path) -> None:
    source = read_student_weights(str(model_folder / "model.safetensors"), work)
    assert same_weights(source, as_safetensors(model_folder))


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_shards(model_folder: Path, tmp_path: Path, work: Path, kind: str) -> None:
    weights = as_safetensors(model_folder)
    names = sorted(weights)
    parts = [dict.fromkeys(names[:2]), dict.fromkeys(names[2:])]
    whole = {"safetensors": "model.safetensors", "bin": "pytorch_model.bin"}[kind]
    weight_map = {}
    for number, part in enumerate(parts):
        shard = whole.replace(".", f"-0000{number}-of-00002.", 1)
        content = {name: weights[name].clone() for name in part}
        save_file(content, tmp_path / shard) if kind == "safetensors" else torch.save(content, tmp_path / shard)
        weight_map |= dict.fromkeys(part, shard)
    (tmp_path / "config.json").write_text((model_folder / "config.json").read_text())
    (tmp_path / f"{whole}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert same_weights(read_student_weights(str(tmp_path), work), weights)
    (tmp_path / shard).unlink()
    with pytest.raises(CheckpointError, match=rf"missing; got {shard}"):
        read_student_weights(str(tmp_path), work)


def test_an_index_cannot_name_a_file_elsewhere(model_folder: Path, tmp_path: Path, work: Path) -> None:
    torch.save(WEIGHTS, tmp_path / "outside.bin")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": "../outside.bin"}}))
    with pytest.raises(CheckpointError, match=r"missing; got \.\./outside\.bin"):
        read_student_weights(str(folder), work)


def test_a_folder_of_a_run_names_its_checkpoints(checkpoint: Path, work: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"no Hugging Face model.*Name one of the checkpoints in it: best\.pt, step-"
    ):
        read_student_weights(str(checkpoint.parent), work)


def test_a_broken_configuration_says_so(tmp_path: Path, work: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json holds no JSON object"):
        read_student_weights(str(tmp_path), work)


# ---------------------------------------------------------------------------------------------------------------- zips


@pytest.mark.parametrize("below", ["", "student/", "a/b/"])
def test_a_zip_of_a_folder(model_folder: Path, tmp_path: Path, work: Path, below: str) -> None:
    archive = zipped(model_folder, tmp_path / "m.zip", below)
    source = read_student_weights(str(archive), work)
    assert same_weights(source, as_safetensors(model_folder))
    assert source.tokenizer_folder is not None
    assert Path(source.tokenizer_folder).is_relative_to(work)
    assert same_weights(read_student_weights(str(archive), work), as_safetensors(model_folder))  # a second time


def member(name: str, mode: int = stat.S_IFREG | 0o644) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo("placeholder")
    info.filename = info.orig_filename = name
    info.external_attr = mode << 16
    return info


@pytest.mark.parametrize(
    "bad",
    [
        member("../escaped.txt"),
        member("a/../../escaped.txt"),
        member("/escaped.txt"),
        member("..\\escaped.txt"),
        member("C:escaped.txt"),
        member("escaped.txt", stat.S_IFLNK | 0o777),
        member("escaped.txt", stat.S_IFIFO | 0o644),
        member("CONFIG.json"),
    ],
    ids=lambda one: one.filename + oct(one.external_attr >> 16),
)
def test_zips_that_reach_outside_are_refused_whole(tmp_path: Path, work: Path, bad: zipfile.ZipInfo) -> None:
    with zipfile.ZipFile(tmp_path / "m.zip", "w") as opened:
        opened.writestr("config.json", "{}")
        opened.writestr(bad, "/etc/passwd")
    with pytest.raises(StorageError, match=r"m\.zip: .*got .*Make the archive again"):
        read_student_weights(str(tmp_path / "m.zip"), work)
    assert not list(tmp_path.rglob("escaped*"))
    assert not [path for path in work.rglob("*") if path.is_file()]


def test_a_damaged_zip_says_so_and_leaves_nothing(model_folder: Path, tmp_path: Path, work: Path) -> None:
    archive = zipped(model_folder, tmp_path / "m.zip")
    data = bytearray(archive.read_bytes())
    data[300] ^= 0xFF
    archive.write_bytes(data)
    with pytest.raises(StorageError, match=r"m\.zip: "):
        read_student_weights(str(archive), work)
    assert not [path for path in work.rglob("*") if path.is_file()]


# ------------------------------------------------------------------------------------------------------------- anywhere


class _Requests(http.server.SimpleHTTPRequestHandler):
    seen: list[tuple[str, str]]

    def do_GET(self) -> None:
        self.seen.append(("GET", self.path))
        super().do_GET()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def web(tmp_path: Path) -> Iterator[tuple[str, Path, list[tuple[str, str]]]]:
    """A plain web server (no ranges, no etags): its URL, its folder and the GETs it answered."""
    folder = tmp_path / "web"
    folder.mkdir()
    handler = type("Handler", (_Requests,), {"seen": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", folder, handler.seen
    server.shutdown()
    thread.join()
    server.server_close()


def upload_folder(folder: Path, uri: str) -> None:
    for path in folder.iterdir():
        storage.upload(path, storage.join(uri, path.name))


def test_from_a_bucket(gcs: Bucket, checkpoint: Path, model_folder: Path, work: Path, tmp_path: Path) -> None:
    upload_folder(model_folder, f"{gcs.uri}/model")
    storage.upload(zipped(model_folder, tmp_path / "m.zip"), f"{gcs.uri}/m.zip")
    for suffix in (".pt", ".meta.json"):
        storage.upload(checkpoint.with_name(f"best{suffix}"), f"{gcs.uri}/run/best{suffix}")
    assert same_weights(read_student_weights(f"{gcs.uri}/model", work), as_safetensors(model_folder))
    assert same_weights(read_student_weights(f"{gcs.uri}/model/", work), as_safetensors(model_folder))
    assert not list(work.rglob("training_args.bin"))  # what is not needed is not downloaded
    assert same_weights(read_student_weights(f"{gcs.uri}/m.zip", work), as_safetensors(model_folder))
    source = read_student_weights(f"{gcs.uri}/run/best.pt", work)
    assert source.metadata is not None
    assert source.description.startswith("checkpoint gs://")
    for missing in (f"{gcs.uri}/run/nothing.pt", "gs://no-such-bucket-here/x.pt"):
        with pytest.raises(CheckpointError, match=rf"{missing}: there is no checkpoint here"):
            read_student_weights(missing, work)


def test_a_remote_sidecar_that_disagrees_is_refused(gcs: Bucket, checkpoint: Path, work: Path) -> None:
    storage.upload(checkpoint, f"{gcs.uri}/best.pt")
    text = checkpoint.with_name("best.meta.json").read_bytes()
    storage.write_bytes(f"{gcs.uri}/best.meta.json", text.replace(b'"sha256": "', b'"sha256": "0'))
    with pytest.raises(CheckpointError, match=r"gs://.*best\.pt: the sidecar does not belong"):
        read_student_weights(f"{gcs.uri}/best.pt", work)
    storage.write_bytes(f"{gcs.uri}/best.meta.json", text)
    assert read_student_weights(f"{gcs.uri}/best.pt", work).state
    storage.remove(f"{gcs.uri}/best.meta.json")
    torch.save(torch.load(checkpoint, weights_only=True) | {"more": 1}, checkpoint)
    storage.upload(checkpoint, f"{gcs.uri}/best.pt")
    assert read_student_weights(f"{gcs.uri}/best.pt", work).state  # the old sidecar's copy is gone too


def test_from_the_web_downloaded_once_until_it_changes(
    web: tuple[str, Path, list[tuple[str, str]]], work: Path
) -> None:
    url, folder, seen = web
    torch.save(WEIGHTS, folder / "w.pt")

    def gets() -> int:
        seen.clear()
        assert same_weights(read_student_weights(f"{url}/w.pt", work), expected)
        return len([path for kind, path in seen if kind == "GET" and path == "/w.pt"])

    expected = dict(WEIGHTS)
    assert gets() > 0
    assert gets() == 0
    expected = {name: value + 1 for name, value in WEIGHTS.items()}
    torch.save(expected, folder / "w.pt")  # the same size: only its time tells
    os.utime(folder / "w.pt", (2e9, 2e9))
    assert gets() > 0


def test_a_damaged_local_copy_is_fetched_again(gcs: Bucket, tmp_path: Path, work: Path) -> None:
    torch.save(WEIGHTS, tmp_path / "w.pt")
    storage.upload(tmp_path / "w.pt", f"{gcs.uri}/w.pt")
    read_student_weights(f"{gcs.uri}/w.pt", work)
    (copy,) = work.rglob("w.pt")
    copy.write_bytes(copy.read_bytes()[:50])
    assert same_weights(read_student_weights(f"{gcs.uri}/w.pt", work), WEIGHTS)
