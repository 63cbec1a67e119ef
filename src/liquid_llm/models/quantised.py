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

import logging
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

        chosen = dict(linear_maps(model))
        quantize_(model, Int8WeightOnlyConfig(), filter_fn=lambda _, name: name in chosen)


def keep_plainly(model: Any) -> None:
    """Put an ``Int8Linear`` in the place of each linear map that torchao has quantised; the tensors are the same."""
    for name, module in list(model.named_modules()):
        weight: Any = getattr(module, "weight", None)
        if isinstance(module, nn.Linear) and hasattr(weight, "qdata"):
            replace_module(model, name, Int8Linear(weight.qdata, weight.scale.float().reshape(-1, 1), module.bias))
    if getattr(model.config, "quantization_config", None) is not None:
        del model.config.quantization_config  # it is a plain model of such modules now
    model.hf_quantizer = None


def keep_own_plainly(model: Any) -> None:
    """The same for a checkpoint that came quantised, as far as its maps are whole numbers of 8 bits with a scale a row.

    Of compressed-tensors the other maps are written out: it would do so in the first pass of the whole model, which is
    not what is asked here, and a map that is still packed has no weight. Activations that such a checkpoint would have
    rounded too (W8A8) are left as they are where its maps are kept. Those of bitsandbytes and others stay theirs.
    """
    method = own_quantisation(model.config)
    if method == "bitsandbytes":
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it says at each product which dtype it takes
    if method == "torchao":
        for name, module in list(model.named_modules()):
            weight: Any = getattr(module, "weight", None)
            if isinstance(module, nn.Linear) and type(weight).__name__ == "Int8Tensor" and _is_weight_only(weight):
                replace_module(model, name, Int8Linear(weight.qdata, weight.scale.float().reshape(-1, 1), module.bias))
    elif method == "compressed-tensors":
        for name, module in list(model.named_modules()):
            scheme = getattr(module, "quantization_scheme", None)
            if isinstance(module, nn.Linear) and scheme is not None and _is_row_wise(scheme.weights):
                replace_module(model, name, Int8Linear(_whole_numbers(module), _scale_of(module), module.bias))
        with torch.no_grad():
            model(input_ids=torch.zeros(1, 2, dtype=torch.int64, device=model.device), use_cache=False)


def _is_weight_only(weight: Any) -> bool:
    plain = weight.act_quant_kwargs is None and weight.act_quant_scale is None and weight.act_pre_scale is None
    centred = weight.zero_point is None or not bool(weight.zero_point.any())
    return plain and centred and weight.scale.numel() == weight.qdata.shape[0]


def _is_row_wise(weights: Any) -> bool:
    """Of a scheme of compressed-tensors: whole numbers of 8 bits around 0, a scale a row."""
    if weights is None:
        return False
    strategy = getattr(weights.strategy, "value", weights.strategy)
    kind = getattr(weights.type, "value", weights.type)
    return bool((weights.num_bits, kind, weights.symmetric, strategy) == (8, "int", True, "channel"))


def _whole_numbers(module: Any) -> Tensor:
    packed = getattr(module, "weight_packed", None)
    if packed is None:
        numbers: Tensor = module.weight.data
        return numbers
    # Four to a word of 32 bits, the first in the lowest bits, each 128 too large.
    shifts = torch.arange(0, 32, 8, dtype=torch.int32, device=packed.device)
    bytes_of = ((packed.data.unsqueeze(-1) >> shifts) & 0xFF).flatten(1)[:, : module.in_features]
    whole: Tensor = (bytes_of - 128).to(torch.int8)
    return whole


def _scale_of(module: Any) -> Tensor:
    scale: Tensor = module.weight_scale.data
    return scale.float().reshape(-1, 1)


def counted_as(config: Any) -> str | None:
    """As what a checkpoint's own quantisation is counted: ``int8``; or None, as if there were none, which is the most
    that it can take (a method of 4 bits takes less).
    """
    values = getattr(config, "quantization_config", None)
    if not values:
        return None
    values = values if isinstance(values, Mapping) else values.to_dict()
    method = own_quantisation(config)
    if method == "compressed-tensors":
        groups = [one.get("weights") or {} for one in (values.get("config_groups") or {}).values()]
        wanted = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
        return INT8 if groups and all(wanted.items() <= one.items() for one in groups) else None
    if method == "torchao":
        return INT8 if "Int8WeightOnlyConfig" in str(values.get("quant_type")) else None
    return INT8 if values.get("load_in_8bit") else None


def pretend_quantised(model: Any) -> None:
    """The same of a model on tensors without memory, and without torchao."""
    for name, module in list(linear_maps(model)):
        weight = torch.empty_like(module.weight, dtype=torch.int8)
        scale = torch.empty(weight.shape[0], 1, dtype=torch.float32)
        replace_module(model, name, Int8Linear(weight, scale, module.bias))


def linear_maps(model: Any) -> Iterator[tuple[str, nn.Linear]]:
    """The linear maps that are quantised, by name: those that transformers takes by itself."""
    from transformers.quantizers.base import get_keys_to_not_convert
    from transformers.quantizers.quantizers_utils import should_convert_module

    kept = [*get_keys_to_not_convert(model), *(getattr(model, "_keep_in_fp32_modules", None) or ())]
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and should_convert_module(f"{name}.weight", kept):
            yield name, module


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` where the module of that dotted name is."""
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
            remedy=f"install {package} with pip, or use the model that it was made from",
        )
    if method in _NEEDS_GPU and torch.device(device).type == "cpu":
        raise UsageError(
            f"the model is quantised ({method}), which needs a GPU",
            where=where,
            got=f"--device={torch.device(device).type}",
            remedy="use the model that it was made from, which --teacher_quantize=int8 makes small",
        )


def require_whole(config: Any, where: str) -> None:
    """Raise ModelError where what is to be a student, or to give it weights, comes quantised."""
    method = own_quantisation(config)
    if method is not None:
        raise ModelError(
            "a student is trained, and the weights of this model are quantised",
            where=where,
            got=f"{method}, as its config.json says",
            remedy="name the model that it was made from",
        )


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of a package around it
        return False
