"""What CUDA does with single operations, as data: which wait, which keep views, what autocast casts them to."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from tests.support.products import MIXED, mixed_product
from torch import Tensor

# Operations whose indices may lie on the CPU.
HOST_INDICES = ("aten::index", "aten::_index_put_impl_")

# Results that share the argument's storage. torch composes all other views of these.
VIEWS = (
    "view",
    "view.dtype",
    "as_strided",
    "_reshape_alias",
    "unfold",
    "set_.source_Tensor",
    "set_.source_Storage",
    "set_.source_Storage_storage_offset",
)

# The size of the result depends on values, so the host must read how many there are; or the result is the host's.
_WAITING = (
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "_unique",
    "bincount",
    "repeat_interleave",
    "equal",
)


def wait_of(name: str, args: tuple[Any, ...]) -> str | None:
    """What the host waits for in operation ``name``, or None."""
    if name in _WAITING:
        return name
    if name == "_index_put_impl_":
        indices, values = args[1], args[2]
        masks = [one for one in indices if one is not None and one.dtype in (torch.bool, torch.uint8)]
        if masks and values.numel() != 1:  # a single value fills where the mask is true, without counting
            return "assignment by a mask"
    return None


def _convolution_backward(
    grad: Tensor, source: Tensor, weight: Tensor, *shape: Any, output_mask: Any = None
) -> tuple[Tensor | None, ...]:
    *shape, mask = shape if output_mask is None else (*shape, output_mask)
    sizes = [grad.shape[1]] if mask[2] else None
    return torch.ops.aten.convolution_backward(grad, source, weight, sizes, *shape, mask)


# What torch does to many tensors at once. CUDA has a kernel for a list of them, where other devices go through it.
_FOREACH = (
    *("norm.Scalar", "mul_.Tensor", "mul_.Scalar", "mul.Tensor", "add_.Scalar", "add_.List", "sub_.List", "copy_"),
    *("zero_", "lerp_.Scalar", "addcmul_.Scalar", "sqrt", "div_.ScalarList", "div_.List", "addcdiv_.ScalarList"),
)

# Operations that the device has as CUDA has them, and what computes them on the CPU; None: the CPU's operation of the
# same name, which torch would otherwise compose of smaller ones.
SUBSTITUTES: dict[str, Callable[..., Any] | None] = {
    **{name: functools.partial(mixed_product, multiply) for name, multiply in MIXED.items()},
    **{f"_foreach_{name}": None for name in _FOREACH},
    "native_layer_norm": None,
    "native_layer_norm_backward": None,
    "convolution_overrideable": torch.ops.aten.convolution.default,
    "convolution_backward_overrideable": _convolution_backward,
}

# Autocast: operations that run in the lower precision, in float32, and in the widest precision of their arguments.
_LOWER = (
    *("mm", "bmm", "mv", "addmm", "addmv", "addr", "baddbmm", "addbmm", "matmul", "linear", "chain_matmul"),
    *("linalg_multi_dot", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "prelu", "scaled_dot_product_attention"),
)
_FLOAT32 = (
    *("acos", "asin", "cosh", "sinh", "tan", "erfinv", "exp", "expm1", "log", "log10", "log2", "log1p", "reciprocal"),
    *("rsqrt", "pow", "softplus", "layer_norm", "native_layer_norm", "group_norm", "norm", "dist", "cdist", "renorm"),
    *("nll_loss", "cross_entropy_loss", "mse_loss", "l1_loss", "smooth_l1_loss", "kl_div", "cosine_similarity"),
    *("softmax", "log_softmax", "cumsum", "cumprod", "prod", "sum", "logsumexp"),
)
_WIDEST = ("addcdiv", "addcmul", "atan2", "cross", "dot", "index_put", "scatter_add", "tensordot", "cat", "stack")


def autocast_kernels(device_type: str) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Name and kernel of each operation that autocast changes on the device."""
    for names, choose in ((_LOWER, _lower), (_FLOAT32, _float32), (_WIDEST, _widest)):
        for name in names:
            packet = getattr(torch.ops.aten, name)
            for overload in packet.overloads():
                operation = getattr(packet, overload)
                arguments = operation._schema.arguments
                written = any(one.alias_info is not None and one.alias_info.is_write for one in arguments)
                if not written and "Dimname" not in str(operation._schema) and overload != "dtype":
                    full = name if overload == "default" else f"{name}.{overload}"
                    yield full, functools.partial(_autocast, operation, choose, device_type)


# An operation's values are tensors, lists of them, or neither; torch's walks through any tree take as long as all else.


def tensors(args: Iterable[Any], named: Mapping[str, Any] | None = None) -> list[Tensor]:
    """All of them."""
    found = []
    for value in (*args, *(named or {}).values()):
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += [one for one in value if isinstance(one, Tensor)]
    return found


def each(change: Callable[[Tensor], Any], value: Any) -> Any:
    """The value with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, list | tuple):
        return type(value)([each(change, one) for one in value])
    return value


def _autocast(operation: Any, choose: Callable[..., torch.dtype], device_type: str, *args: Any, **kwargs: Any) -> Any:
    def eligible(value: object) -> bool:
        floating = isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64
        return floating and value.device.type == device_type

    def cast(value: Tensor) -> Tensor:
        return value.to(dtype) if eligible(value) else value

    found = [value for value in tensors(args, kwargs) if eligible(value)]
    with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)):
        if found:
            dtype = choose(found, device_type)
            args = tuple(each(cast, value) for value in args)
            kwargs = {name: each(cast, value) for name, value in kwargs.items()}
        return operation(*args, **kwargs)


def _lower(found: list[Tensor], device_type: str) -> torch.dtype:
    return torch.get_autocast_dtype(device_type)


def _float32(found: list[Tensor], device_type: str) -> torch.dtype:
    return torch.float32


def _widest(found: list[Tensor], device_type: str) -> torch.dtype:
    dtypes = {value.dtype for value in found}
    return next(iter(dtypes)) if len(dtypes) == 1 else torch.float32
