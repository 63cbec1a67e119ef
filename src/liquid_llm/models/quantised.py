"""Teachers whose weights are kept in 8 bits (``--teacher_quantize``), and those that come quantised.

    int8        weight-only: each row of a linear map is whole numbers of 8 bits and one scale, by torchao's arithmetic;
                products are as before, of weights that are written out right before each
    left whole  the output head, of which the loss forms logits itself, the embedding, and what is no linear map
    own         a checkpoint that brings its ``quantization_config``: a package that transformers knows opens it

torchao makes the numbers, weight by weight while the files are read, so that no device ever holds the whole model in 16
bits. What keeps them is a plain module: its tensors are counted, moved and dealt out as any others are, and its product
writes a row's scale into the weights, of which there are fewer values than of what comes out (torchao's own multiplies
the latter).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from liquid_llm.errors import ModelError, UsageError
from liquid_llm.optimizers import quiet_torchao
from liquid_llm.runtime import Choice

INT8 = "int8"

# method of a quantization_config -> what transformers opens it with: module, and what pip calls it
_PACKAGES = {
    "awq": ("gptqmodel", "gptqmodel"),
    "gptq": ("gptqmodel", "gptqmodel optimum"),
    "bitsandbytes": ("bitsandbytes", "bitsandbytes"),
    "bitsandbytes_8bit": ("bitsandbytes", "bitsandbytes"),
    "bitsandbytes_4bit": ("bitsandbytes", "bitsandbytes"),
    "compressed-tensors": ("compressed_tensors", "compressed-tensors"),
    "torchao": ("torchao", "torchao"),
    "quanto": ("optimum.quanto", "optimum-quanto"),
    "hqq": ("hqq", "hqq"),
}
_NEEDS_GPU = ("awq", "gptq", "eetq", "fbgemm_fp8", "higgs", "mxfp4", "spqr", "fp_quant")


class Int8Linear(nn.Module):
    """A linear map whose weight is in 8 bits, one scale a row: ``y = x (weight * scale)^T + bias``.

    Args:
        weight: [out, in] int8.
        scale: [out, 1] float32.
        bias: [out] in the model's dtype, or None.
    """

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out] in the dtype of ``x``."""
        return nn.functional.linear(x, self.weight * self.scale.to(x.dtype), self.bias)


def require_torchao(where: str) -> None:
    """Raise UsageError where the package is not installed."""
    if find_spec("torchao") is None:
        raise UsageError(
            "the package torchao is not installed", where=where, remedy="install it: pip install 'liquid-llm[quantize]'"
        )


def load_options(quantise: str | None) -> dict[str, Any]:
    """Keyword arguments by which ``from_pretrained`` quantises each weight as it is read; none for None."""
    if quantise is None:
        return {}
    with quiet_torchao():
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import TorchAoConfig  # which imports torchao, and would not do it quietly

        return {"quantization_config": TorchAoConfig(Int8WeightOnlyConfig())}


def quantise_plain(model: Any) -> None:
    """Quantise a model that is loaded already, linear map by linear map (a GGUF file's, which is written out first)."""
    with quiet_torchao():
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        chosen = dict(_quantisable(model))
        quantize_(model, Int8WeightOnlyConfig(), filter_fn=lambda _, name: name in chosen)


def keep_plainly(model: Any) -> None:
    """Put an ``Int8Linear`` in the place of each linear map that torchao has quantised; the tensors are the same."""
    for name, module in list(model.named_modules()):
        weight: Any = getattr(module, "weight", None)
        if isinstance(module, nn.Linear) and hasattr(weight, "qdata"):
            _replace(model, name, Int8Linear(weight.qdata, weight.scale.float().reshape(-1, 1), module.bias))
    if getattr(model.config, "quantization_config", None) is not None:
        del model.config.quantization_config  # it is a plain model of such modules now
    model.hf_quantizer = None


def pretend_quantised(model: Any) -> None:
    """The same of a model on tensors without memory, and without torchao."""
    for name, module in list(_quantisable(model)):
        weight = torch.empty_like(module.weight, dtype=torch.int8)
        scale = torch.empty(weight.shape[0], 1, dtype=torch.float32)
        _replace(model, name, Int8Linear(weight, scale, module.bias))


def _quantisable(model: Any) -> Iterator[tuple[str, nn.Linear]]:
    """The linear maps that are quantised, by name: those that transformers takes by itself."""
    from transformers.quantizers.base import get_keys_to_not_convert
    from transformers.quantizers.quantizers_utils import should_convert_module

    kept = [*get_keys_to_not_convert(model), *(getattr(model, "_keep_in_fp32_modules", None) or ())]
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and should_convert_module(f"{name}.weight", kept):
            yield name, module


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def explain(model: Any, quantise: str | None, dtype: str) -> Choice | None:
    """What of a teacher is quantised, for the log and provenance; None where nothing is.

    Raises:
        ModelError: nothing of the model is a linear map that could be.
    """
    if quantise is None:
        own = own_quantisation(model.config)
        return None if own is None else Choice(own, "as its own config.json says")
    narrow = sum(one.weight.numel() for one in model.modules() if isinstance(one, Int8Linear))
    total = narrow + sum(
        one.numel() for name, one in model.named_parameters() if one.dtype != torch.int8 and not name.endswith(".scale")
    )
    if not narrow:
        raise ModelError(
            "nothing of this model can be kept in 8 bits",
            where=f"--teacher_quantize={quantise}",
            got=f"{type(model).__name__}, which has no linear maps of torch's kind beside its output head",
            remedy="leave it out, or use another model",
        )
    return Choice(quantise, f"asked for: {narrow / total:.0%} of {total:,} weights, the others {dtype}")


def own_quantisation(config: Mapping[str, Any] | Any) -> str | None:
    """The method by which a checkpoint says that it is quantised (``compressed-tensors``, ``awq``, ...), or None."""
    found = config.get("quantization_config") if isinstance(config, Mapping) else None
    if found is None:
        found = getattr(config, "quantization_config", None)
    if not found:
        return None
    values = found if isinstance(found, Mapping) else found.to_dict()
    method = values.get("quant_method")
    if method is None and (values.get("load_in_8bit") or values.get("load_in_4bit")):
        method = "bitsandbytes"  # which said no name at first
    return str(getattr(method, "value", method or "unnamed"))


def check_own(config: Any, where: str, device: str | torch.device, quantise: str | None = None) -> None:
    """Refuse, before its weights are read, a quantised checkpoint that cannot be opened here.

    Args:
        config: a transformers configuration, or that of ``config.json`` as plain values.
        device: where it is going to be.
        quantise: ``--teacher_quantize``.

    Raises:
        UsageError: its package is not installed, it needs a GPU, or it is to be quantised once more.
    """
    method = own_quantisation(config)
    if method is None:
        return
    if quantise is not None:
        raise UsageError(
            "this model is quantised already",
            where=f"--teacher_quantize={quantise}",
            got=f"{where}, whose config.json says {method}",
            remedy="leave --teacher_quantize out, or name the model that it was made from",
        )
    module, package = _PACKAGES.get(method, (None, None))
    if module is not None and not _is_there(module):
        raise UsageError(
            f"the model is quantised ({method}), and the package that opens it is not installed",
            where=where,
            got=f"no {module}",
            remedy=f"install it (pip install {package}), or use the model that it was made from",
        )
    if method in _NEEDS_GPU and torch.device(device).type == "cpu":
        raise UsageError(
            f"the model is quantised ({method}), which needs a GPU",
            where=where,
            got=f"--device={torch.device(device).type}",
            remedy="use the model that it was made from, which --teacher_quantize=int8 makes small",
        )


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of a package around it
        return False
