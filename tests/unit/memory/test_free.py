"""Free memory as Linux and its control groups tell of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from liquid_llm.memory.free import available_bytes, host_free_bytes, host_room_bytes
from liquid_llm.runtime import process_memory_bytes, process_peak_memory_bytes

GIB = 2**30


def write(root: Path, files: dict[str, object]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    return root


MEMINFO = {"proc/meminfo": f"MemTotal: {32 * 2**20} kB\nMemFree: 100 kB\nMemAvailable: {16 * 2**20} kB"}
V2 = "sys/fs/cgroup"
V1 = "sys/fs/cgroup/memory"


def group(folder: str, limit: object, usage: int, inactive: int = 0, version: int = 2) -> dict[str, object]:
    names = ("memory.max", "memory.current", "inactive_file")
    if version == 1:
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    stat = f"anon 5\n{names[2]} {inactive}"
    return {f"{folder}/{names[0]}": limit, f"{folder}/{names[1]}": usage, f"{folder}/memory.stat": stat}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 16 * GIB),
        ({"proc/self/cgroup": "0::/"}, 16 * GIB),
        ({"proc/self/cgroup": "0::/", **group(V2, 8 * GIB, 3 * GIB)}, 5 * GIB),
        ({"proc/self/cgroup": "0::/", **group(V2, 8 * GIB, 3 * GIB, GIB)}, 6 * GIB),
        ({"proc/self/cgroup": "0::/", **group(V2, "max", 3 * GIB)}, 16 * GIB),
        ({"proc/self/cgroup": "0::/", **group(V2, 64 * GIB, 3 * GIB)}, 16 * GIB),
        ({"proc/self/cgroup": "0::/", **group(V2, GIB, 2 * GIB)}, 0),
        # the tightest group above the process counts
        (
            {"proc/self/cgroup": "0::/a/b", **group(f"{V2}/a", 8 * GIB, GIB), **group(f"{V2}/a/b", 9 * GIB, GIB)},
            7 * GIB,
        ),
        # a container that sees the host's path and has its own group at the top
        ({"proc/self/cgroup": "0::/docker/1234", **group(V2, 4 * GIB, GIB)}, 3 * GIB),
        ({"proc/self/cgroup": "5:cpu:/x\n4:memory:/x", **group(f"{V1}/x", 4 * GIB, GIB, GIB, version=1)}, 4 * GIB),
        ({"proc/self/cgroup": "4:memory:/x", **group(f"{V1}/x", 2**63 - 4096, GIB, version=1)}, 16 * GIB),
    ],
)
def test_the_least_of_the_machine_and_its_groups(tmp_path: Path, files: dict[str, object], expected: int) -> None:
    assert host_free_bytes(write(tmp_path, {**MEMINFO, **files})) == expected


def test_a_system_that_does_not_tell(tmp_path: Path) -> None:
    assert host_free_bytes(tmp_path) is None
    assert host_free_bytes(write(tmp_path, {"proc/meminfo": "MemTotal: 12 kB"})) is None


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="only Linux tells in files")
def test_what_the_job_holds_already_is_its_own() -> None:
    free = available_bytes(torch.device("cpu"))
    held = available_bytes(torch.device("cpu"), held_bytes=1 << 50)
    assert free is not None
    assert held is not None
    assert 0 < free < 1 << 50 < held


def test_what_is_free_is_for_all_processes_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("liquid_llm.memory.free.host_free_bytes", lambda: 12 * GIB)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert available_bytes(torch.device("cpu"), held_bytes=GIB) == 4 * GIB
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert available_bytes(torch.device("cpu"), held_bytes=GIB) == 13 * GIB


def test_room_is_what_is_left_beside_the_most_that_was_held(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in (("host_free_bytes", 10), ("process_peak_memory_bytes", 6), ("process_memory_bytes", 4)):
        monkeypatch.setattr(f"liquid_llm.memory.free.{name}", lambda size=size: size * GIB)
    assert host_room_bytes() == 8 * GIB
    monkeypatch.setattr("liquid_llm.memory.free.process_memory_bytes", lambda: None)
    assert host_room_bytes() is None


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="only Linux tells in files")
def test_what_a_process_holds_is_not_more_than_it_ever_did() -> None:
    held, peak = process_memory_bytes(), process_peak_memory_bytes()
    assert held is not None
    assert peak is not None
    assert 10 * 2**20 < held <= peak + 2**20
