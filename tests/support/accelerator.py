"""A pretend accelerator, so that every command walks the road of a GPU on a machine that has none.

Its tensors are plain ``torch.Tensor`` on device ``pretend:0``. Their bytes lie in the machine's memory and are computed
by the CPU's kernels, so numbers equal the CPU's; everything else is as on CUDA:

- a tensor of the CPU with dimensions is refused beside one of the device; ``.numpy()`` is refused
- each kernel launch, each copy between host and device and each time the host must wait for the device is counted, with
  the file and line of the code that caused it (:meth:`Accelerator.record`)
- memory is counted by storages that are alive, to the byte; above a limit ``torch.OutOfMemoryError`` is raised
  (:meth:`Accelerator.memory_limit`)
- the device can be lost at a given launch; from then on everything on it fails (:meth:`Accelerator.lost_after`)
- autocast has CUDA's lists of operations, ``torch.mm`` has ``out_dtype``, ``torch.pretend`` has what ``torch.cuda`` has
- pinned memory, and copies from and to it that the host does not wait for
- streams: everything is done in order, at once, but what one stream has written another may use only behind a wait

How: torch keeps a dispatch key for backends outside of it (PrivateUse1). A tensor is carried over by DLPack, whose
capsule says "CPU" or "extension device" in one field; an operation without a kernel of its own comes to one fallback,
which carries its arguments over, runs it and carries the result back. Operations that torch composes of others are
composed here too.

Not pretended: that streams run beside each other, kernels' own numerics and times, the allocator's rounding
and fragmentation, autocast's cache of cast weights, fused attention with a mask (it is composed of products),
``torch.Generator`` of the device (its random numbers are the CPU's), ``torch.empty(..., pin_memory=True)``, more than
one device. A 0-dimensional CPU tensor is taken everywhere, where CUDA takes it in elementwise operations only.

Installing it cannot be undone in a process; what is on the CPU goes on as before, but that ``pin_memory()``, which
fails in a torch without accelerators, works.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from tests.support import accelerator_rules as rules
from tests.support.accelerator_log import Event, Log, site
from tests.support.accelerator_memory import Memory
from tests.support.accelerator_streams import Streams, torch_names
from torch import Tensor
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "pretend"

_DLPACK_CPU, _DLPACK_EXTENSION = 1, 12  # device types of DLPack

_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.restype = ctypes.c_void_p
_capsule_pointer.argtypes = [ctypes.py_object, ctypes.c_char_p]


class Accelerator:
    """The pretend device of this process; see :func:`install`."""

    def __init__(self) -> None:
        self.device = torch.device(NAME, 0)
        self.memory = Memory()
        self.streams = Streams(lambda: self.note("wait", "an event"))
        self._logs: list[Log] = []
        self._launches_left: int | None = None

    @contextlib.contextmanager
    def record(self) -> Iterator[Log]:
        """Everything that happens meanwhile."""
        log = Log()
        self._logs.append(log)
        try:
            yield log
        finally:
            self._logs = [one for one in self._logs if one is not log]

    @contextlib.contextmanager
    def memory_limit(self, nbytes: int) -> Iterator[Memory]:
        """A device with ``nbytes`` of memory in all, counted from what is alive now."""
        before, self.memory.total = self.memory.total, nbytes
        try:
            yield self.memory
        finally:
            self.memory.total = before

    @contextlib.contextmanager
    def lost_after(self, launches: int) -> Iterator[None]:
        """A device that is lost after so many more launches: all that is asked of it fails until the end."""
        self._launches_left = launches
        try:
            yield
        finally:
            self._launches_left = None

    def note(self, kind: str, operation: str, nbytes: int = 0) -> None:
        """Count an event, and fail if the device is lost."""
        if self._launches_left is not None:
            if self._launches_left <= 0:
                # The words are CUDA's, as a program that looks for a lost device knows them.
                raise getattr(torch, "AcceleratorError", RuntimeError)("CUDA error: unspecified launch failure")
            self._launches_left -= kind == "launch"
        if self._logs:
            event = Event(kind, operation, site(), nbytes, threading.current_thread().name)
            for log in self._logs:
                log.append(event)

    def adopt(self, tensor: Tensor) -> Tensor:
        """A freshly made CPU tensor as one of the device, its memory counted from now until it is freed."""
        self.memory.take(tensor.untyped_storage())
        self.streams.make(tensor.untyped_storage())
        return _carry(tensor, _DLPACK_EXTENSION)

    def holds(self, value: object) -> bool:
        """Whether ``value`` is a tensor of this device."""
        return isinstance(value, Tensor) and value.device.type == NAME


def on_host(value: Any) -> Any:
    """The same bytes as a CPU tensor; whatever is not a tensor of the device stays as it is."""
    return _carry(value, _DLPACK_CPU) if isinstance(value, Tensor) and value.device.type == NAME else value


def _carry(tensor: Tensor, device_type: int) -> Tensor:
    capsule = torch._C._to_dlpack(tensor)
    address = _capsule_pointer(capsule, b"dltensor")
    # A DLTensor begins with a pointer, the device's type and its index.
    place = (ctypes.c_int32 * 2).from_address(address + ctypes.sizeof(ctypes.c_void_p))
    place[:] = [device_type, 0]
    return torch._C._from_dlpack(capsule)


def _all_on_host(args: Iterable[Any], kwargs: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    return [rules.each(on_host, one) for one in args], {name: rules.each(on_host, one) for name, one in kwargs.items()}


class _Schema(NamedTuple):
    """For each value that an operation returns the argument that it is (by position or name); None for a new one."""

    returns: tuple[int | str | None, ...]
    views: bool


@functools.cache
def _schema(operation: Any) -> _Schema:
    written: dict[frozenset[str], int | str] = {}
    for place, argument in enumerate(operation._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            written[frozenset(argument.alias_info.before_set)] = argument.name if argument.kwarg_only else place
    returns, views = [], False
    for value in operation._schema.returns:
        source = None if value.alias_info is None else written.get(frozenset(value.alias_info.before_set))
        views |= value.alias_info is not None and source is None
        returns.append(source)
    return _Schema(tuple(returns), views)


def _require_same_device(operation: Any, tensors: list[Tensor]) -> None:
    """Refuse what CUDA refuses: tensors of the CPU beside the device's own."""
    if operation._schema.name in rules.HOST_INDICES:
        tensors = tensors[:1]
    for tensor in tensors:
        if tensor.device.type != NAME and tensor.dim() > 0:
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, "
                f"{NAME}:0 and {tensor.device}! (when calling {operation})"
            )


@functools.cache
def _tensor_places(operation: Any) -> tuple[int, ...]:
    """Where ``operation`` takes a tensor and no number in its place."""
    if torch._C._should_allow_numbers_as_tensors(operation._schema.name.removeprefix("aten::")):
        return ()
    return tuple(place for place, one in enumerate(operation._schema.arguments) if str(one.type) == "Tensor")


def _with_tensors(operation: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Numbers where ``operation`` takes tensors: torch hands them over bare, and takes few of them back."""
    given = list(args)
    for place in _tensor_places(operation):
        if place < len(args) and isinstance(args[place], (bool, int, float)):
            beside = next((one for one in args if isinstance(one, Tensor)), None)
            dtype = None if beside is None else torch.result_type(beside, args[place])
            given[place] = torch.scalar_tensor(args[place], dtype=dtype)
    return tuple(given)


def _run(accelerator: Accelerator, compute: Callable[..., Any], operation: Any, args: Any, kwargs: Any) -> Any:
    """Run ``operation`` on the device's tensors by ``compute`` on the same bytes as CPU tensors."""
    schema = _schema(operation)
    if schema.views:
        raise NotImplementedError(f"the pretend accelerator has no kernel for the view {operation}")
    if kwargs.get("generator") is not None:
        raise RuntimeError(f"Expected a '{NAME}' device type for generator but found 'cpu'")
    given = rules.tensors(args, kwargs)
    _require_same_device(operation, given)
    name, args = operation._schema.name.removeprefix("aten::"), _with_tensors(operation, args)
    accelerator.note("launch", name)
    outs = [kwargs.get(key) if isinstance(key, str) else args[key] for key in schema.returns if key is not None]
    if not schema.returns and name.endswith("_"):
        outs.append(args[0])  # a list, written in place
    used, written = ([one for one in them if one.device.type == NAME] for them in (given, rules.tensors(outs)))
    accelerator.streams.launch(used, written)
    if (why := rules.wait_of(name, args)) is not None:
        accelerator.note("wait", why)
    if isinstance(kwargs.get("out"), Tensor) and kwargs["out"].numel() == 0:
        result = torch.empty(0, dtype=kwargs["out"].dtype)  # to be resized, which the device's own memory cannot be
        hosted, named = _all_on_host(args, kwargs)
        compute(*hosted, **{**named, "out": result})
        kwargs["out"].set_(accelerator.adopt(result))
        return kwargs["out"]
    if kwargs.get("device") is not None:
        kwargs = {**kwargs, "device": "cpu"}
    hosted, named = _all_on_host(args, kwargs)
    results = compute(*hosted, **named)
    values = (results,) if len(schema.returns) == 1 else results or ()
    out = []
    for source, value in zip(schema.returns, values, strict=True):
        if source is not None:
            out.append(kwargs[source] if isinstance(source, str) else args[source])
        else:
            out.append(rules.each(accelerator.adopt, value))
    return (out[0] if len(schema.returns) == 1 else tuple(out)) if out else None


def _copy(accelerator: Accelerator, source: Tensor, target: Tensor, non_blocking: bool) -> Tensor:
    """Copies go by pinned memory or not, and the host waits for them or not, as CUDA has it."""
    nbytes = source.numel() * source.element_size()
    if not accelerator.holds(source):
        accelerator.note("to_device", "copy_", nbytes)
        if not non_blocking:
            accelerator.note("wait", "copy to the device")
    elif not accelerator.holds(target):
        accelerator.note("to_host", "copy_", nbytes)
        if not (non_blocking and target.is_pinned()):
            accelerator.note("wait", "copy to the host")
    else:
        accelerator.note("launch", "copy_")
    there = [one for one in (source, target) if accelerator.holds(one)]
    accelerator.streams.launch(there, there[-1:] if accelerator.holds(target) else [])
    on_host(target).copy_(on_host(source))
    return target


def _to_copy(
    accelerator: Accelerator,
    self: Tensor,
    *,
    dtype: torch.dtype | None = None,
    layout: Any = None,
    device: torch.device | None = None,
    pin_memory: bool | None = None,
    non_blocking: bool = False,
    memory_format: torch.memory_format | None = None,
) -> Tensor:
    """``Tensor.to`` of a tensor of the device. A copy to the host that it need not wait for lands in pinned memory."""
    device = self.device if device is None else device
    form = torch.preserve_format if memory_format is None else memory_format
    target = torch.empty_like(self, dtype=dtype, device=device, memory_format=form)
    if non_blocking and device.type == "cpu":
        target = target.pin_memory()
    return target.copy_(self, non_blocking)


def _read(accelerator: Accelerator, self: Tensor) -> Any:
    """``Tensor.item``."""
    accelerator.note("to_host", "item", self.element_size())
    accelerator.note("wait", "item")
    accelerator.streams.launch([self], [])
    return torch.ops.aten._local_scalar_dense(on_host(self))


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """One fused kernel where the CPU has one, as CUDA has: no matrix of all pairs, and the CPU's numbers."""
    given, grouped = (query, key, value), {"scale": scale, "enable_gqa": enable_gqa}
    chosen = torch.ops.aten._fused_sdp_choice(*map(on_host, given), on_host(attn_mask), dropout_p, is_causal, **grouped)
    if chosen != torch.nn.attention.SDPBackend.FLASH_ATTENTION.value or attn_mask is not None:
        composed = torch.ops.aten._scaled_dot_product_attention_math
        return composed(*given, attn_mask, dropout_p, is_causal, **grouped)[0]
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*given, dropout_p, is_causal, scale=scale)[0]


def _register(accelerator: Accelerator) -> Iterator[torch.library.Library]:
    """Give torch the device's kernels; they are there as long as the libraries are."""
    everything, aten = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    everything.fallback(lambda operation, *args, **kw: _run(accelerator, operation, operation, args, kw), "PrivateUse1")
    kernels: dict[str, Callable[..., Any]] = {
        "empty.memory_format": lambda size, **kw: accelerator.adopt(torch.empty(size, **{**kw, "device": "cpu"})),
        "empty_strided": lambda size, stride, **kw: accelerator.adopt(
            torch.empty_strided(size, stride, **{**kw, "device": "cpu"})
        ),
        "_copy_from": lambda source, target, non_blocking=False: _copy(accelerator, source, target, non_blocking),
        "_to_copy": functools.partial(_to_copy, accelerator),
        "_local_scalar_dense": functools.partial(_read, accelerator),
        # CPU and device tensors may replace each other in a parameter, as CPU and CUDA may: ties outlive Module.to.
        "_has_compatible_shallow_copy_type": lambda self, other: True,
    }
    # Views share the storage; torch's own code for the CPU looks at sizes and strides alone.
    on_cpu_key = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    for name in rules.VIEWS:
        kernels[name] = functools.partial(_operation(name).redispatch, on_cpu_key)
    for name, compute in rules.SUBSTITUTES.items():
        kernels[name] = functools.partial(_given, accelerator, compute or _operation(name), _operation(name))
    for name, kernel in kernels.items():
        aten.impl(name, kernel, "PrivateUse1")
    for key in ("AutogradPrivateUse1", "PrivateUse1"):
        aten.impl("scaled_dot_product_attention", _attention, key)
    everything.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    for name, kernel in rules.autocast_kernels(NAME):
        aten.impl(name, kernel, "AutocastPrivateUse1")
    aten.impl("_pin_memory", lambda self, device=None: accelerator.memory.pin(self.clone()), "CPU")
    aten.impl("is_pinned", lambda self, device=None: accelerator.memory.is_pinned(self), "CPU")
    yield from (everything, aten)


def _given(accelerator: Accelerator, compute: Callable[..., Any], operation: Any, *args: Any, **kwargs: Any) -> Any:
    return _run(accelerator, compute, operation, args, kwargs)


def _operation(name: str) -> Any:
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet), overload or "default")


class _Module:
    """``torch.pretend``: what programs ask ``torch.cuda``."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        memory = accelerator.memory
        self.memory_allocated = lambda device=None: memory.allocated
        self.max_memory_allocated = lambda device=None: memory.peak
        self.memory_reserved = lambda device=None: memory.reserved
        self.max_memory_reserved = lambda device=None: memory.peak_reserved
        self.mem_get_info = lambda device=None: (memory.total - memory.reserved, memory.total)
        self.reset_peak_memory_stats = lambda device=None: memory.reset_peak()
        self.empty_cache = memory.empty_cache
        self.is_available = self.is_initialized = self.is_bf16_supported = lambda: True
        self._is_in_bad_fork = lambda: False
        self.device_count = lambda: 1
        self.current_device = lambda: 0
        self.set_device = self.manual_seed = self.manual_seed_all = lambda value: None
        self.get_device_name = lambda device=None: "pretend accelerator"
        self.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
        self.get_rng_state = lambda device=None: torch.get_rng_state()
        self.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
        self.device = lambda device=None: contextlib.nullcontext()
        vars(self).update(torch_names(accelerator.streams))

    def synchronize(self, device: Any = None) -> None:
        self._accelerator.note("wait", "synchronize")


def _allocate_storage(accelerator: Accelerator, allocate: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.UntypedStorage(n, device=...)`` asks for an allocator in C++, which this backend has not."""

    def new(cls: type, *args: Any, **kwargs: Any) -> Any:
        device = kwargs.get("device")
        if device is None or torch.device(device).type != NAME:
            return allocate(cls, *args, **kwargs)
        return torch.empty(*args, dtype=torch.uint8, device=accelerator.device).untyped_storage()

    return new


@functools.cache
def install() -> Accelerator:
    """Register the device with torch, once a process, and return it."""
    torch.utils.rename_privateuse1_backend(NAME)
    accelerator = Accelerator()
    _setup_privateuseone_for_python_backend(backend_module=_Module(accelerator), rename=NAME)
    accelerator.libraries = tuple(_register(accelerator))
    torch.UntypedStorage.__new__ = _allocate_storage(accelerator, torch.UntypedStorage.__new__)
    return accelerator
