"""Models without weights: the real classes, built from a configuration, on tensors that have shapes and no memory.

The tensors say that they are on the CPU whatever device is meant: torch builds for the CPU cannot run autograd on fake
CUDA tensors. What differs by device is told apart by the loss's plan.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from liquid_llm.errors import ModelError
from liquid_llm.memory.shapes import ModelShape
from liquid_llm.models.loading import as_model_error, quiet_transformers
from liquid_llm.runtime import torch_dtype


@contextmanager
def fake_tensors() -> Iterator[None]:
    """Tensors made inside have no memory; the random generators are as before afterwards."""
    with torch.random.fork_rng(devices=[]), FakeTensorMode(allow_non_fake_inputs=True), quiet_transformers():
        yield


def build(shape: ModelShape) -> Any:
    """The model of ``shape`` in evaluation mode; to be called inside :func:`fake_tensors`.

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
            config, attn_implementation="sdpa", dtype=torch_dtype(shape.dtype), trust_remote_code=False
        )
    return model.eval()
