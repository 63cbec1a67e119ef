"""Tests of what only a device shows. Without a GPU they run on the pretend accelerator, as far as it goes.

They need nothing of ``tests/conftest.py``, so that they run on a bare GPU machine:

    python -m pytest tests/gpu -p no:cacheprovider -o filterwarnings= --confcutdir=tests/gpu
"""

from __future__ import annotations

import os

import pytest
import torch

# Both are read when a GPU is first used. Products must be able to be deterministic, and a limit on this process's
# memory must hold to the megabyte.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:False")

from tests.support.devices import find_device
from tests.support.tiny import Tiny, build

# Before any backward pass: autograd has a queue only for devices that are there when it is first used.
DEVICE = find_device()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "soak: too long for `make test`; run by `make soak`")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without a GPU whole runs are for `make soak`: tests/integration/test_accelerator.py asks the same, more strictly.

    Some of them are walked by the rehearsal of `make gpu`, which takes no heed of the mark.
    """
    for item in items:
        whole = item.path.name == "test_commands.py" or item.name == "test_golden_losses"
        if DEVICE.type != "cuda" and item.path.parent.name == "gpu" and whole:
            item.add_marker(pytest.mark.soak)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU, or the pretend accelerator."""
    return DEVICE


@pytest.fixture
def card(device: torch.device) -> torch.device:
    """The GPU; without one the test is left for a machine that has one."""
    if device.type != "cuda":
        pytest.skip("no GPU")
    return device


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Texts and a small trained teacher."""
    return build(tmp_path_factory.mktemp("tiny"), teacher_steps=30)
