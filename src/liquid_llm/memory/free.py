"""How much memory a job can have: what its device has free, and what the job itself holds of it already."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from liquid_llm.device import free_memory
from liquid_llm.distributed import Ranks
from liquid_llm.runtime import process_memory_bytes, process_peak_memory_bytes

# Files of a control group: its limit, its use, and the line of memory.stat with what can be dropped.
_VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_VERSION_2 = ("memory.max", "memory.current", "inactive_file")
_UNLIMITED = 1 << 60  # what cgroup version 1 writes where there is no limit is near 2 ** 63


def available_bytes(device: torch.device, held_bytes: int = 0) -> int | None:
    """Bytes that tensors of this process can take on ``device`` in all.

    Args:
        held_bytes: of them, what this job's models take already: they are in the prediction too. Where the device's
            allocator says what it took from the device, that counts instead: it is used again.

    Returns:
        None where the system does not tell.
    """
    if device.type == "cpu":
        free = host_free_bytes()
        # Of several processes on this machine each is to have as much of what is free.
        return None if free is None else free // Ranks.read().local_world_size + held_bytes
    found = free_memory(device)
    if found is None:
        return None
    module: Any = torch.get_device_module(device)
    reserved = int(module.memory_reserved(device)) if hasattr(module, "memory_reserved") else 0
    return found[0] + max(reserved, held_bytes)


def host_free_bytes(root: Path = Path("/")) -> int | None:
    """Main memory that can be had without swapping, within the limits of the container; None where that is not told.

    Args:
        root: of the file system, where Linux tells of memory and of control groups (both versions).
    """
    available = _meminfo(root / "proc/meminfo")
    if available is None:
        return None
    return max(0, min([available, *_group_limits(root)]))


def host_room_bytes(processes: int = 1) -> int | None:
    """Main memory left beside the most that this process has held so far; None where that is not told.

    Args:
        processes: of this host that are all to have as much of what is free.
    """
    free, peak, held = host_free_bytes(), process_peak_memory_bytes(), process_memory_bytes()
    return None if free is None or peak is None or held is None else free // processes - max(0, peak - held)


def _meminfo(path: Path) -> int | None:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    words = fields.get("MemAvailable", "").split()
    return int(words[0]) * 1024 if words and words[0].isdigit() else None


def _group_limits(root: Path) -> list[int]:
    """What each control group above this process leaves it."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    left = []
    for line in lines:
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers == "":
            base, names = root / "sys/fs/cgroup", _VERSION_2
        elif "memory" in controllers.split(","):
            base, names = root / "sys/fs/cgroup/memory", _VERSION_1
        else:
            continue
        folder = base / path.lstrip("/")
        # Inside a container the path may be that of the host; its own group is then at the top.
        for place in [folder, *folder.parents]:
            if not place.is_relative_to(base):
                break
            limit = _group_left(place, *names)
            if limit is not None:
                left.append(limit)
    return left


def _group_left(folder: Path, limit_name: str, usage_name: str, reclaimable: str) -> int | None:
    """Limit minus use of one group, files that can be dropped from memory not counted as use; None without a limit."""
    try:
        limit, usage = (int((folder / name).read_text()) for name in (limit_name, usage_name))
        rows = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines() if line.count(" ") == 1)
    except (OSError, ValueError):  # no such group, or the word "max"
        return None
    return limit - usage + int(rows.get(reclaimable, 0)) if limit < _UNLIMITED else None
