"""Models without weights: the real classes, built from a configuration, on tensors that have shapes and no memory.

The tensors say that they are on the CPU whatever device is meant: torch builds for the CPU cannot run autograd on fake
CUDA tensors. What differs by device is put right here (autocast) or told apart by the loss's plan.
"""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from liquid_llm.errors import ModelError
from liquid_llm.memory.shapes import ModelShape
from liquid_llm.models.loading import as_model_error, quiet_transformers
from liquid_llm.models.quantised import pretend_quantised
from liquid_llm.runtime import torch_dtype

# What torch documents to run in float32 under autocast on CUDA, as far as language models use it.
_FLOAT32 = frozenset(
    (
        *("exp", "expm1", "log", "log1p", "pow", "reciprocal", "rsqrt", "softplus", "layer_norm", "group_norm", "norm"),
        *("softmax", "log_softmax", "cumsum", "cumprod", "prod", "sum", "logsumexp", "__pow__", "__rpow__"),
    )
)


@contextmanager
def fake_tensors() -> Iterator[None]:
    """Tensors made inside have no memory; the random generators are as before afterwards.

    Raises:
        ModelError: an operation of the model that cannot be carried out on such tensors.
    """
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # it would log the traceback of what is told in words here
    try:
        with (
            as_model_error("memory", "this model's memory cannot be worked out without its weights"),
            torch.random.fork_rng(devices=[]),
            FakeTensorMode(allow_non_fake_inputs=True),
            quiet_transformers(),
        ):
            yield
    finally:
        logger.setLevel(level)


def autocast_as_on_accelerators(model: nn.Module) -> None:
    """Let autocast on the CPU widen in ``model`` what it widens on a GPU: norms and powers are float32 and stay so.

    A LayerNorm keeps twice the bytes for the backward pass that way. It is done where a module has no parts of its own,
    so that it holds for what is recomputed too.
    """
    for module in model.modules():
        if next(module.children(), None) is None:
            entered: list[_Wide] = []
            module.register_forward_pre_hook(functools.partial(_enter, entered))
            module.register_forward_hook(functools.partial(_leave, entered), always_call=True)


def _enter(entered: list[_Wide], *_: object) -> None:
    entered.append(_Wide())
    entered[-1].__enter__()  # type: ignore[no-untyped-call]


def _leave(entered: list[_Wide], *_: object) -> None:
    entered.pop().__exit__(None, None, None)  # type: ignore[no-untyped-call]


class _Wide(TorchFunctionMode):
    """While entered, functions that autocast widens on a GPU get float32."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        values = dict(kwargs or {})
        if getattr(func, "__name__", "") in _FLOAT32 and torch.is_autocast_enabled("cpu"):
            args = tuple(map(_widen, args))
            values = {name: _widen(value) for name, value in values.items()}
        return func(*args, **values)


def _widen(value: Any) -> Any:
    narrow = isinstance(value, torch.Tensor) and value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if narrow else value


def build(shape: ModelShape) -> Any:
    """The model of ``shape`` in evaluation mode; to be called inside ``fake_tensors``.

    Raises:
        ModelError: transformers has no causal language model for this configuration.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    values = copy.deepcopy(dict(shape.config))
    kind = values.pop("model_type", None)
    if kind is None:
        raise ModelError("not a transformers configuration", got="no model_type")
    with as_model_error(str(kind), "no causal language model can be built from this configuration"):
        config = AutoConfig.for_model(kind, **values)
        model = AutoModelForCausalLM.from_config(
            config, attn_implementation=None, dtype=torch_dtype(shape.dtype), trust_remote_code=False
        )
        if shape.quantisation is not None:
            pretend_quantised(model)
    return model.eval()


def weight_bytes(shape: ModelShape) -> int:
    """Bytes of a model's weights; raises as ``build``."""
    with fake_tensors():
        return sum(one.numel() * one.element_size() for one in build(shape).parameters())
