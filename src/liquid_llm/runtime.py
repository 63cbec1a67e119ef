"""What the machine offers and what the process is told: device, dtype, attention kernel, seeds, signals, memory (leaf).

choice        an automatic decision together with its reason; both are logged and kept in provenance
random state  everything the random generators of this process need to go on exactly where they are
stop signal   SIGTERM, SIGINT or SIGHUP turned into a flag that the training loop looks at between steps
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import math
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

import numpy as np
import torch

from liquid_llm.errors import UsageError

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
_KEPT_BYTES = 2**30
_OLD_LIMIT = 2**25  # the most that older glibc takes as _MMAP_THRESHOLD

DTYPES: dict[str, torch.dtype] = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}


@dataclass(frozen=True)
class Choice:
    """A decision and why it was taken, e.g. ``Choice("float32", "no AMX: ...")``."""

    value: str
    reason: str


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype called ``name``. Raises ``UsageError`` for an unknown one."""
    if name not in DTYPES:
        raise UsageError("unknown dtype", got=repr(name), expected=", ".join(DTYPES))
    return DTYPES[name]


def choose_device(requested: str = "auto") -> Choice:
    """The device to compute on.

    Args:
        requested: ``auto`` takes ``cuda`` where a GPU can be used, else ``cpu``; otherwise a device as torch names it,
            with or without an index: ``cuda``, ``cuda:1``, ``mps``, or that of a backend registered with torch.

    Of several processes on one machine (LOCAL_RANK, as torchrun sets it) each takes the GPU of its number, where none
    is named; torch's current device would not do, as it is one thread's.

    Raises:
        UsageError: this machine, or this build of torch, has no such device, or too few for its processes.
    """
    if requested not in ("auto", "cuda"):
        return _named_device(requested)
    if not torch.cuda.is_available():
        return Choice("cpu", "no usable CUDA device") if requested == "auto" else _named_device(requested)
    index = _own_gpu(torch.cuda.device_count())
    device = "cuda" if index is None else f"cuda:{index}"
    return Choice(device, f"found {torch.cuda.get_device_name(device)}" if requested == "auto" else "requested")


def _own_gpu(count: int) -> int | None:
    """The GPU of this process among ``count``; None where it is the only process of this machine.

    Raises:
        UsageError: there are fewer GPUs than processes.
    """
    rank, processes = os.environ.get("LOCAL_RANK", ""), os.environ.get("LOCAL_WORLD_SIZE", "")
    if not rank.isdigit() or os.environ.get("WORLD_SIZE", "1") == "1":
        return None
    if count == 1 and processes != "1" and os.environ.get("CUDA_VISIBLE_DEVICES", "").isdigit():
        return 0  # a launcher that shows each process a GPU of its own
    if int(rank) >= count:
        raise UsageError(
            "there is no GPU for this process",
            where=f"LOCAL_RANK={rank}",
            got=f"{count} GPU{'s' if count > 1 else ''} on this machine",
            remedy="start as many processes as there are GPUs (--nproc-per-node), or give --device=cpu",
        )
    return int(rank)


def _named_device(requested: str) -> Choice:
    try:
        device = torch.device(requested)
        module: Any = torch.get_device_module(device)
    except (RuntimeError, AttributeError) as error:  # no such type, or one that nothing can be computed on
        raise _no_device(requested, "torch cannot compute on a device of this name") from error
    count = int(module.device_count()) if module.is_available() else 0
    if count == 0:
        raise _no_device(requested, f"no {device.type} device can be used here")
    if (device.index or 0) >= count:
        raise _no_device(requested, f"this machine has {count} {device.type} device{'s' if count > 1 else ''}")
    return Choice("cpu" if device.type == "cpu" else str(device), "requested")


def _no_device(requested: str, problem: str) -> UsageError:
    there = [f"cuda:{index}" for index in range(torch.cuda.device_count())] + ["cpu"]
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is not None and accelerator.type != "cuda":
        there.insert(0, accelerator.type)
    return UsageError(problem, where="--device", got=repr(requested), expected=f"auto, {', '.join(there)}")


def has_amx() -> bool:
    """Whether products here go through bfloat16 tiles in hardware (x86 AMX), as far as this torch can tell.

    oneDNN works them out, and can be told to leave tiles alone: ``ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16``.
    """
    probe = getattr(torch.cpu, "_is_amx_tile_supported", None)  # private: absent in some torch versions
    if probe is None or not probe():
        return False
    newest = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or "DEFAULT"
    return newest.upper() in ("DEFAULT", "ALL") or "AMX" in newest.upper() or newest.upper().startswith("AVX10_2")


def choose_dtype(requested: str, device: str | torch.device) -> Choice:
    """The dtype to compute in on ``device``.

    Args:
        requested: ``auto`` or the name of a dtype, which is then taken as it is.

    Raises:
        UsageError: ``requested`` is no known dtype.
    """
    if requested != "auto":
        torch_dtype(requested)
        return Choice(requested, "requested")
    if torch.device(device).type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Choice("bfloat16", "this GPU computes in bfloat16")
        # float16 overflows without loss scaling, which this trainer does not do.
        return Choice("float32", "this GPU has no bfloat16 units")
    if torch.device(device).type != "cpu":
        supported = getattr(torch.get_device_module(device), "is_bf16_supported", None)
        if supported is not None and supported():
            return Choice("bfloat16", "this device computes in bfloat16")
        return Choice("float32", "this device does not say that it computes in bfloat16")
    if has_amx():
        return Choice("bfloat16", "AMX: bfloat16 products are faster than float32 on this CPU")
    return Choice("float32", "no AMX: bfloat16 products are slower than float32 on this CPU")


def choose_attention(device: str | torch.device, dtype: str | None = None) -> Choice:
    """The attention implementation to ask transformers for.

    Args:
        dtype: the dtype the model computes in, where known: FlashAttention has no float32 kernels.
    """
    obstacle = _flash_attention_obstacle(torch.device(device), dtype)
    if obstacle is None:
        return Choice("flash_attention_2", "CUDA device with flash_attn installed")
    return Choice("sdpa", obstacle)


def _flash_attention_obstacle(device: torch.device, dtype: str | None) -> str | None:
    """Why FlashAttention cannot be used, or None if it can. The package is looked for but not imported."""
    if device.type != "cuda":
        return "no CUDA device: FlashAttention needs one"
    if importlib.util.find_spec("flash_attn") is None:
        return "flash_attn is not installed"
    if dtype == "float32":
        return "FlashAttention has no float32 kernels"
    return None


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's global generators (all devices). ``seed`` is any non-negative integer."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # NumPy's global generator takes 32 bits
    torch.manual_seed(seed)


def random_state(*, gpus: bool = True) -> dict[str, Any]:
    """The state of every global generator as tensors and plain values, loadable with ``weights_only=True``.

    Args:
        gpus: with those of all GPUs; asking one of them takes memory of it, which may be another process's.
    """
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": {"version": version, "words": torch.tensor(words, dtype=torch.int64), "gauss": gauss},
        "numpy": {
            "name": str(name),
            "keys": torch.from_numpy(np.asarray(keys).astype(np.int64)),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "gauss": float(cached),
        },
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if gpus and torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Continue from what ``random_state`` returned.

    GPU generators are restored only where the number of devices is the same; otherwise they keep their own state.
    """
    python, numpy = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
    keys = numpy["keys"].numpy().astype(np.uint32)
    np.random.set_state((numpy["name"], keys, numpy["position"], numpy["has_gauss"], numpy["gauss"]))
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([one.cpu() for one in state["cuda"]])


class StopSignal:
    """While entered, SIGTERM, SIGINT and SIGHUP set a flag instead of ending the process; a second SIGINT interrupts.

    Handlers can only be set from the main thread; elsewhere entering changes nothing and the flag stays down unless
    ``request`` is called. Earlier handlers return on exit; another ``StopSignal`` that had set them (a study's
    around a run's) is told of what came meanwhile, and tells what came before. A process that was told to outlive its
    terminal (``nohup``) does not hear SIGHUP.

    A process that was forked meanwhile, as a loader's worker, is its owner's to end: what a terminal sends to all
    (SIGINT, SIGHUP) it leaves to it, and SIGTERM ends it as if there were no handler.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.requested = False
        self._clock = clock
        self._since = math.inf
        self._interrupts = 0
        self._owner = os.getpid()
        self._raise: Callable[[], BaseException] | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def request(self) -> None:
        """Ask for a stop from within the process."""
        if not self.requested:
            self._since = self._clock()
        self.requested = True

    def deadline(self, seconds: float) -> float:
        """When that many seconds have passed since a stop was asked for, on the clock; infinite before it is."""
        return self._since + seconds

    @contextlib.contextmanager
    def raising(self, make: Callable[[], BaseException]) -> Iterator[None]:
        """For work that has nothing to save: while entered, a signal raises what ``make`` gives, wherever it comes.

        One that came before raises on entering.
        """
        if self.requested:
            raise make()
        self._raise = make
        try:
            yield
        finally:
            self._raise = None

    def __enter__(self) -> StopSignal:
        self.requested, self._since, self._interrupts, self._owner = False, math.inf, 0, os.getpid()
        if threading.current_thread() is threading.main_thread():
            heard = [one for one in self.SIGNALS if not _is_to_be_outlived(one)]
            self._previous = {number: signal.signal(number, self._handle) for number in heard}
            # One that came while the outer's job was getting ready asks this one's too.
            for outer in [getattr(handler, "__self__", None) for handler in self._previous.values()]:
                if isinstance(outer, StopSignal) and outer.requested:
                    self.requested, self._since = True, outer._since
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            # None: a handler that was not set from Python and so cannot be given back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
            outer = getattr(handler, "__self__", None)
            if self.requested and isinstance(outer, StopSignal):
                outer.request()
        self._previous = {}

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:
            if signum == signal.SIGTERM:
                signal.signal(signum, signal.SIG_DFL)
                os.kill(os.getpid(), signum)
            return
        self.request()
        if signum == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts > 1:
                raise KeyboardInterrupt
        if self._raise is not None:
            make, self._raise = self._raise, None
            raise make()


def _is_to_be_outlived(number: signal.Signals) -> bool:
    """Whether the process was started to live on when its terminal is closed."""
    return number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN


def keep_freed_memory() -> bool:
    """Let the C library keep what a step on the CPU frees for the next step; whether it agreed.

    glibc gives large tensors back to the system as soon as they are freed, and the system zeroes their pages again one
    by one: a tenth of a training step's time. Up to 1 GiB is kept. What the user's environment says of this wins, and
    other C libraries are left alone.
    """
    told = ("GLIBC_TUNABLES", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")
    if any(name in os.environ for name in told):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # no glibc
        return False
    # Either call alone would make things worse: the first ends glibc's own adjusting of both.
    return any(mallopt(_MMAP_THRESHOLD, size) for size in (_KEPT_BYTES, _OLD_LIMIT)) and bool(
        mallopt(_TRIM_THRESHOLD, _KEPT_BYTES)
    )


def process_peak_memory_bytes() -> int | None:
    """The largest resident size this process has had, in bytes; None where the system does not tell (Windows)."""
    if os.name != "posix":
        return None
    import resource  # only there on POSIX

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB


def process_memory_bytes() -> int | None:
    """The resident size of this process now, in bytes; None where the system does not tell (other than Linux)."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return None
