from __future__ import annotations

import io
import os
import pickle
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.support.checkpoints import trained_model

from liquid_llm import storage
from liquid_llm.checkpoint.files import HashingWriter, read_archive, write_archive
from liquid_llm.errors import CheckpointError, StorageError

DTYPES = [
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.complex64,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.uint16,
    torch.bool,
]


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    def raw(tensor: torch.Tensor) -> bytes:
        return bytes(tensor.contiguous().flatten().view(torch.uint8).numpy()) if tensor.numel() else b""

    return a.dtype == b.dtype and a.shape == b.shape and raw(a) == raw(b)


def test_every_bit_of_every_dtype_and_shape_comes_back(tmp_path: Path) -> None:
    tensors = {}
    for dtype in DTYPES:
        for shape in [(), (0,), (1,), (3, 5), (2, 0, 4)]:
            tensor = torch.zeros(shape, dtype=dtype)
            if tensor.numel():  # any pattern of bits: NaN payloads and denormals included
                most = 2 if dtype == torch.bool else 256
                raw = np.random.default_rng(0).integers(0, most, tensor.nbytes, dtype=np.uint8)
                tensor = torch.from_numpy(raw).view(dtype).reshape(shape)
            tensors[f"{dtype} {shape}"] = tensor
    write_archive(tmp_path / "a.pt", tensors)
    found = read_archive(tmp_path / "a.pt")
    assert not [name for name, tensor in tensors.items() if not same_bits(found[name], tensor)]


def test_plain_values_come_back_equal(tmp_path: Path) -> None:
    content = {
        "a": 1,
        "b": 2**70,
        "c": 0.1,
        "d": "ü",
        "e": None,
        "f": True,
        "g": [1, (2, "x")],
        "h": {0: {"y": []}},
        "i": 1e400,
    }
    write_archive(tmp_path / "a.pt", content)
    assert read_archive(tmp_path / "a.pt") == content


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_model_and_optimizer_continue_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    model, optimizer = trained_model(dtype)
    write_archive(tmp_path / "a.pt", {"student": model.state_dict(), "optimizer": optimizer.state_dict()})
    read = read_archive(tmp_path / "a.pt")
    assert read["student"]["embed.weight"].data_ptr() == read["student"]["head.weight"].data_ptr()  # still tied
    other, other_optimizer = trained_model(dtype)
    other.load_state_dict(read["student"])
    other_optimizer.load_state_dict(read["optimizer"])
    for one, opt in ((model, optimizer), (other, other_optimizer)):
        one["head"](one["embed"](torch.arange(11))).float().sum().backward()
        opt.step()
    assert same_bits(model["head"].weight.detach(), other["head"].weight.detach())


def test_hash_is_that_of_the_file(tmp_path: Path) -> None:
    digest = write_archive(tmp_path / "a.pt", {"t": torch.randn(700, 701)})
    assert digest == storage.sha256(tmp_path / "a.pt")


def test_the_disk_is_told_to_begin_while_a_large_file_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(
        "liquid_llm.checkpoint.files.start_writeback", lambda _, start, size: asked.append((start, size))
    )
    monkeypatch.setattr("liquid_llm.checkpoint.files._WRITEBACK_BYTES", 8 * 2**20)
    content = {"a": torch.ones(18 * 2**18), "b": torch.ones(3, 2**18), "c": torch.ones(5, 2**18)}
    digest = write_archive(tmp_path / "a.pt", content)
    assert digest == storage.sha256(tmp_path / "a.pt")
    assert [start for start, _ in asked] == [sum(size for _, size in asked[:n]) for n in range(len(asked))]
    assert len(asked) == 3  # of 26 MiB
    assert all(8 * 2**20 <= size < 13 * 2**20 for _, size in asked)


def test_hashing_writer_survives_short_writes() -> None:
    class Reluctant(io.RawIOBase):
        taken = b""

        def write(self, block: Any) -> int:
            self.taken += bytes(block[:3])
            return len(block[:3])

    stream = Reluctant()
    assert HashingWriter(stream).write(b"0123456789") == 10
    assert stream.taken == b"0123456789"


def test_a_view_does_not_drag_its_whole_storage_along(tmp_path: Path) -> None:
    big = torch.randn(1000, 1000)
    write_archive(tmp_path / "a.pt", {"row": big[3], "turned": big[:2].t()})
    assert (tmp_path / "a.pt").stat().st_size < 50_000
    assert torch.equal(read_archive(tmp_path / "a.pt")["row"], big[3])
    assert torch.equal(read_archive(tmp_path / "a.pt")["turned"], big[:2].t())


class Custom:
    pass


@pytest.mark.parametrize(
    "value", [Custom(), np.float64(1.0), {1, 2}, b"bytes", torch.float32, Path("x")], ids=lambda one: type(one).__name__
)
def test_what_could_not_be_read_back_is_not_written(tmp_path: Path, value: Any) -> None:
    with pytest.raises(TypeError, match=r"\['deep'\]\[0\]"):
        write_archive(tmp_path / "a.pt", {"deep": [value]})
    assert not (tmp_path / "a.pt").exists()


def test_ordered_dictionaries_of_modules_are_plain(tmp_path: Path) -> None:
    write_archive(tmp_path / "a.pt", {"d": OrderedDict(a=torch.ones(2))})
    assert type(read_archive(tmp_path / "a.pt")["d"]) is dict


class Bomb:
    """Creates a file when unpickled without care."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_a_file_that_would_run_code_is_refused_and_does_not(tmp_path: Path, form: str) -> None:
    path = tmp_path / "evil.pt"
    bomb = {"student": Bomb(tmp_path / "ran")}
    if form == "pickle":
        path.write_bytes(pickle.dumps(bomb))
    else:
        torch.save(bomb, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(CheckpointError, match="was not opened"):
        read_archive(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, -1])
def test_truncated_files_say_so(tmp_path: Path, keep: float) -> None:
    path = tmp_path / "a.pt"
    write_archive(path, {"t": torch.randn(50, 50)})
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(CheckpointError, match=r"a\.pt: .*(truncated|no torch file)"):
        read_archive(path)


@pytest.mark.parametrize(
    "content", [b"PK\x03\x04" + b"x" * 99, b"hello", b"\x80\x02.", bytes(range(256)) * 8], ids=range(4)
)
def test_foreign_files_say_so(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(CheckpointError):
        read_archive(tmp_path / "a.pt")


def test_a_missing_file_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="not found"):
        read_archive(tmp_path / "a.pt")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/dev/full is Linux")
def test_a_full_disk_comes_through_torch_as_the_error_it_is() -> None:
    with open("/dev/full", "wb", buffering=0) as full, pytest.raises(OSError, match="No space left"):
        torch.save({"t": torch.randn(100, 100)}, HashingWriter(full))  # type: ignore[arg-type]
