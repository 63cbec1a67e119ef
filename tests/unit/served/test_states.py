"""Files with hidden states: read when they are whole, believed when they are of the text, and taken away."""

from __future__ import annotations

import fcntl
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save, save_file

from liquid_llm.errors import StorageError
from liquid_llm.served.client import Abandoned
from liquid_llm.served.protocol import BadAnswer
from liquid_llm.served.states import read_states

IDS = [5, 6, 7]
STATES = torch.arange(1, 25, dtype=torch.bfloat16).reshape(3, 2, 4)


def tensors(**changes: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"hidden_states": STATES, "token_ids": torch.tensor(IDS), **changes}


def test_the_last_layer_of_a_file_that_is_named_by_another_machine(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "a.safetensors")
    (tmp_path / "a.safetensors.lock").touch()
    found = read_states(tmp_path, "/on/the/server/a.safetensors", IDS, 4)
    assert torch.equal(found, STATES[:, 1])
    assert not list(tmp_path.iterdir())


def test_a_file_is_waited_for_until_it_is_unlocked(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with open(tmp_path / "a.safetensors.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        save_file(tensors(hidden_states=STATES * 0), path)  # of its size already, and not written yet
        found: list[torch.Tensor] = []
        thread = threading.Thread(target=lambda: found.append(read_states(tmp_path, path.name, IDS, 4)))
        thread.start()
        thread.join(0.1)
        assert not found
        path.write_bytes(save(tensors()))
    thread.join(30)
    assert torch.equal(found[0], STATES[:, 1])


@pytest.mark.parametrize("length", [0, 5, 60, -1])
def test_a_part_of_a_file_is_no_file(tmp_path: Path, length: int) -> None:
    (tmp_path / "a.safetensors").write_bytes(save(tensors())[:length])
    with pytest.raises(StorageError, match="shared_storage_path"):
        read_states(tmp_path, "a.safetensors", IDS, 4, seconds=0.0)
    with pytest.raises(Abandoned):
        read_states(tmp_path, "a.safetensors", IDS, 4, stopping=lambda: True)


@pytest.mark.parametrize("told", [None, "", "/tmp/a.txt", "..", "a\0.safetensors", "\ud800.safetensors"])
def test_no_path_or_one_of_something_else(tmp_path: Path, told: str | None) -> None:
    with pytest.raises(StorageError, match="says of no file"):
        read_states(tmp_path, told, IDS, 4)


def test_a_link_leads_nowhere(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    save_file(tensors(), tmp_path / "a.safetensors")
    (folder / "a.safetensors").symlink_to(tmp_path / "a.safetensors")
    with pytest.raises(StorageError):
        read_states(folder, "../a.safetensors", IDS, 4, seconds=0.0)
    assert (tmp_path / "a.safetensors").exists()


@pytest.mark.parametrize(
    "wrong",
    [
        {"token_ids": torch.tensor([5, 6, 8])},
        {"token_ids": torch.tensor([5, 6])},
        {"hidden_states": STATES[:2]},
        {"hidden_states": STATES[:, :, :3].contiguous()},
        {"hidden_states": STATES[:, 0].contiguous()},
        {"hidden_states": torch.ones(3, 2, 4, dtype=torch.int64)},
        {"hidden_states": STATES * float("nan")},
        {"hidden_states": torch.cat([STATES[:2], torch.zeros(1, 2, 4, dtype=torch.bfloat16)])},
        {"hidden_states": torch.ones(3, 90_000, 4)},
    ],
)
def test_states_of_something_else_are_not_taken(tmp_path: Path, wrong: dict[str, torch.Tensor]) -> None:
    save_file(tensors(**wrong), tmp_path / "a.safetensors")
    with pytest.raises(BadAnswer):
        read_states(tmp_path, "a.safetensors", IDS, 4)
