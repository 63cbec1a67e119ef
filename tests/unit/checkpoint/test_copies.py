"""Copies of a state: the bytes a direct write would have, taken at one moment, in memory that is used again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.accelerator import Accelerator
from tests.support.checkpoints import trained_model

from liquid_llm.checkpoint.copies import HostCopies, block_sizes
from liquid_llm.checkpoint.files import write_archive
from liquid_llm.runtime import random_state

CPU = torch.device("cpu")


def a_state() -> dict[str, Any]:
    """What a checkpoint holds, and what else tensors can be."""
    model, optimizer = trained_model()
    big = torch.arange(60.0).reshape(6, 10)
    return {
        "student": model.state_dict(),  # with tied weights
        "optimizer": optimizer.state_dict(),
        "random": random_state(),
        "row": big[2],
        "column": big[:, 3],
        "turned": big.clone().t(),
        "reshaped": [big, big.view(60), big.view(3, 20).t()],
        "half": torch.randn(7).bfloat16(),
        "one": torch.tensor(3.5),
        "none": torch.empty(0, 4),
        "plain": {"a": [1, (2.5, None)], 3: "x"},
    }


def tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [tensor for one in value for tensor in tensors(one)]
    return [value] if isinstance(value, torch.Tensor) else []


def places(value: Any) -> set[int]:
    return {tensor.data_ptr() for tensor in tensors(value) if tensor.numel()}


def archive(folder: Path, state: Mapping[str, Any]) -> bytes:
    path = folder / "state.pt"
    path.unlink(missing_ok=True)
    write_archive(path, state)
    return path.read_bytes()


def test_a_copy_is_written_as_the_state_itself_would_be_byte_for_byte(tmp_path: Path) -> None:
    state, copies = a_state(), HostCopies(CPU)
    expected = archive(tmp_path, state)
    assert archive(tmp_path, copies.copy(state)) == expected
    assert archive(tmp_path, copies.copy(state)) == expected  # and in memory that was used before


def test_what_happens_to_the_state_does_not_reach_its_copy(tmp_path: Path) -> None:
    state = a_state()
    expected = archive(tmp_path, state)
    copy = HostCopies(CPU).copy(state)
    for tensor in tensors(state):
        if tensor.is_leaf:
            tensor.data.zero_()
    state["plain"]["a"].append(4)
    state["optimizer"]["param_groups"][0]["lr"] = 9.0
    assert archive(tmp_path, copy) == expected
    assert not places(copy) & places(state)


def test_memory_is_taken_once_and_no_more_of_it_than_a_state_has() -> None:
    state, copies = a_state(), HostCopies(CPU)
    sizes = block_sizes(state)
    copies.prepare(sizes)
    prepared = {block.data_ptr() for blocks in copies._memory.values() for block in blocks if block.numel()}
    for _ in range(3):
        assert places(copies.copy(state)) == prepared
    assert sum(size * count for size, count in sizes.items()) < 20_000
    copies.copy({"w": torch.ones(3)})
    assert sum(block.numel() for blocks in copies._memory.values() for block in blocks) == 12


def test_the_size_of_a_copy_is_known_beforehand() -> None:
    tied = torch.ones(10, 10)
    assert block_sizes({"a": tied, "b": [tied.t(), tied[2]], "c": 1}) == {400: 1, 40: 1}
    model, optimizer = trained_model()
    sizes = block_sizes({"student": model.state_dict(), "optimizer": optimizer.state_dict()})
    assert sizes == {4 * 66: 3, 4: 1}  # the tied weight, its two moments, the step


def test_what_could_not_be_read_back_is_refused_at_once() -> None:
    with pytest.raises(TypeError, match=r"\['deep'\]\[0\]"):
        HostCopies(CPU).copy({"deep": [{1, 2}]})


def test_a_device_is_waited_for_once_however_many_tensors_there_are(accelerator: Accelerator, tmp_path: Path) -> None:
    there = {"student": {str(n): torch.full((5, n), float(n)).to(accelerator.device) for n in range(1, 9)}}
    copies = HostCopies(accelerator.device)
    copies.prepare(block_sizes(there))
    with accelerator.record() as log:
        copy = copies.copy(there)
    assert log.count("to_host") == 8
    assert log.sites("wait").total() == 1
    assert all(tensor.device.type == "cpu" and tensor.is_pinned() for tensor in tensors(copy))
    expected = {"student": {str(n): torch.full((5, n), float(n)) for n in range(1, 9)}}
    assert archive(tmp_path, copy) == archive(tmp_path, expected)
