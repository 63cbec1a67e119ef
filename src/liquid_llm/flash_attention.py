"""FlashAttention from a wheel a user keeps in a bucket: fetched and installed only where it can work.

A wheel's name says what it was built for: Python, platform and, in its local version, CUDA, torch and C++ ABI
(``flash_attn-2.8.3+cu12torch2.4cxx11abiTRUE-cp310-cp310-linux_x86_64.whl``). Where any of them is not this machine's, a
run goes on with PyTorch's own attention and says why. The choice and its reason are kept in provenance.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from packaging.tags import Tag, sys_tags
from packaging.utils import InvalidWheelFilename, parse_wheel_filename
from packaging.version import Version

from liquid_llm import storage
from liquid_llm.errors import StorageError, UsageError

log = logging.getLogger(__name__)

_LOCAL = re.compile(r"^cu(?P<cuda>\d+)torch(?P<torch>\d+\.\d+)cxx11abi(?P<abi>true|false)$")
_INSTALL_SECONDS = 600


@dataclass(frozen=True)
class Machine:
    """What a wheel must fit.

    Attributes:
        tags: wheel tags this Python takes.
        torch: version of torch, such as ``2.4.1``.
        cuda: major version of the CUDA torch was built with, or None without CUDA.
        cxx11_abi: which C++ ABI torch was built with.
    """

    tags: frozenset[Tag]
    torch: str
    cuda: str | None
    cxx11_abi: bool


def this_machine() -> Machine:
    """The machine of this process."""
    import torch

    built = torch.version.cuda
    cuda = built.partition(".")[0] if built is not None and torch.cuda.is_available() else None
    return Machine(frozenset(sys_tags()), torch.__version__, cuda, bool(torch.compiled_with_cxx11_abi()))


def obstacle(wheel: str, machine: Machine) -> str | None:
    """Why the wheel of that file name cannot work on ``machine``, or None if it can.

    Raises:
        UsageError: it is not a wheel of ``flash_attn``.
    """
    try:
        name, version, _, tags = parse_wheel_filename(wheel)
    except InvalidWheelFilename:
        raise UsageError("not the name of a wheel", where="--fa_wheel_gcs", got=wheel) from None
    if name != "flash-attn":
        raise UsageError("not a FlashAttention wheel", where="--fa_wheel_gcs", got=name, expected="flash_attn")
    if machine.cuda is None:
        return "no CUDA device: FlashAttention needs one"
    if not tags & machine.tags:
        best = sorted(map(str, tags))[0]
        return f"the wheel is for {best}, this is Python {sys.version_info[0]}.{sys.version_info[1]} on {sys.platform}"
    local = _LOCAL.match((version.local or "").lower())
    if local is None:
        return None  # built for any torch, as far as its name says
    release = Version(machine.torch).release
    mine = f"{release[0]}.{release[1]}"
    if local["torch"] != mine:
        return f"the wheel is for torch {local['torch']}, this is {mine}"
    if not machine.cuda.startswith(local["cuda"][:2]):
        return f"the wheel is for CUDA {local['cuda']}, torch was built with {machine.cuda}"
    if (local["abi"] == "true") != machine.cxx11_abi:
        return f"the wheel has C++11 ABI {local['abi']}, torch has {str(machine.cxx11_abi).lower()}"
    return None


def provide(
    uri: str,
    sha256: str | None,
    work_dir: Path,
    *,
    machine: Machine | None = None,
    installed: Callable[[], bool] = lambda: importlib.util.find_spec("flash_attn") is not None,
    install: Callable[[Path], None] | None = None,
) -> str | None:
    """Make FlashAttention importable from the wheel at ``uri``; returns why it is not used, or None when it can be.

    Raises:
        UsageError: ``uri`` names no FlashAttention wheel, or the file's hash is not the expected one.
        StorageError: it fits and cannot be read, or cannot be installed.
    """
    wheel = uri.rstrip("/").rsplit("/", 1)[-1]
    reason = obstacle(wheel, machine or this_machine())
    if reason is not None or installed():
        return reason
    with storage.scratch("wheel") as folder:
        local = folder / wheel  # nobody else can write there: what is installed is what was checked
        with storage.translate_errors(uri):
            shutil.copyfile(storage.fetch_once(uri, work_dir), local)
        got = storage.sha256(local)
        if sha256 is not None and got != sha256.lower():
            raise UsageError("the wheel's hash is not the expected one", where=uri, got=got, expected=sha256)
        if sha256 is None:
            log.warning("%s is installed unchecked: give --fa_wheel_sha256=%s to have it checked", uri, got)
        (install or _pip_install)(local)
    importlib.invalidate_caches()
    log.info("installed %s", wheel)
    return None


def _pip_install(wheel: Path) -> None:
    words: Iterable[str] = ("-m", "pip", "install", "--no-deps", "--no-index", str(wheel))
    done = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, timeout=_INSTALL_SECONDS, check=False
    )
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise StorageError("the wheel could not be installed", where=wheel, got=last[0])
