"""What counts as a lack of memory, what as a lost device, and what a user is told."""

from __future__ import annotations

import os

import pytest
import torch
from tests.support import forked

from liquid_llm.cli.main import guard
from liquid_llm.device import (
    deterministic_algorithms,
    device_error,
    device_memory,
    find_not_finite,
    free_memory,
    is_lost,
    is_out_of_memory,
)

NO_ROOM = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to ..."),
    RuntimeError("CUDA error: out of memory"),
    MemoryError(),
]
LOST = [
    torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("CUDA error: unspecified launch failure\nCUDA kernel errors might be asynchronously reported"),
    RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
]
OTHER = [
    torch.AcceleratorError("CUDA error: no kernel image is available for execution on the device"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling `cublasGemmEx`"),
    RuntimeError("The size of tensor a (3) must match"),
    ValueError("CUDA error"),
    KeyError("x"),
]


@pytest.mark.parametrize("error", NO_ROOM, ids=repr)
def test_no_room(error: BaseException, capsys: pytest.CaptureFixture[str]) -> None:
    assert is_out_of_memory(error)
    assert guard(lambda: _raise(error)) == 6
    assert "memory does not suffice" in (message := capsys.readouterr().err)
    assert "--batch_size" in message
    assert "Traceback" not in message


@pytest.mark.parametrize("error", LOST, ids=repr)
def test_lost(error: BaseException, capsys: pytest.CaptureFixture[str]) -> None:
    assert is_lost(error)
    assert not is_out_of_memory(error)
    assert guard(lambda: _raise(error)) == 6
    message = capsys.readouterr().err
    assert "the device failed" in message
    assert "run the same command again" in message.lower()


@pytest.mark.parametrize("error", OTHER, ids=repr)
def test_faults_of_the_program_stay_what_they_are(error: BaseException) -> None:
    assert not is_out_of_memory(error)
    assert not is_lost(error)
    assert device_error(error) is None
    with pytest.raises(type(error)):
        guard(lambda: _raise(error))


def _raise(error: BaseException) -> int:
    raise error


def test_what_a_real_allocator_says_is_a_lack_of_memory() -> None:
    with pytest.raises(RuntimeError) as failure:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(failure.value)


def test_the_cpu_has_no_memory_of_its_own() -> None:
    assert device_memory(torch.device("cpu")) is None
    assert free_memory(torch.device("cpu")) is None


def test_deterministic_algorithms_are_on_while_wanted_and_refuse_what_has_none() -> None:
    with deterministic_algorithms(False):
        assert not torch.are_deterministic_algorithms_enabled()
    with deterministic_algorithms(True):
        assert torch.are_deterministic_algorithms_enabled()
    assert not torch.are_deterministic_algorithms_enabled()
    with pytest.raises(KeyError), deterministic_algorithms(True):
        raise KeyError
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "expandable_segments:True"),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, "max_split_size_mb:64"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, "None"),
    ],
)
def test_the_users_own_allocator_settings_win(given: dict[str, str], expected: str) -> None:
    code = (
        "import os; from liquid_llm.device import prepare_allocator; prepare_allocator(); "
        "print(os.environ.get('PYTORCH_ALLOC_CONF'))"
    )
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    env = {name: value for name, value in os.environ.items() if name not in names}
    done = forked.run(["-c", code], env={**env, **given}, check=True)
    assert done.stdout.strip() == expected


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_tensor_that_is_not_finite_is_named_wherever_it_lies(value, dtype):
    state = {
        "student": {"a": torch.ones(3, 2), "empty": torch.ones(0)},
        "optimizer": {
            "state": {0: {"step": torch.tensor(3.0), "m": torch.ones(5, dtype=dtype)}},
            "groups": [{"lr": 1}],
        },
        "number": torch.tensor([2**62]),
    }
    assert find_not_finite(state) is None
    state["optimizer"]["state"][0]["m"][4] = value
    assert find_not_finite(state) == "optimizer.state.0.m"
