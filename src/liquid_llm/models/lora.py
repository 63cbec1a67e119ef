"""Students of which an adapter is trained and nothing else (LoRA: Hu et al. 2021, arXiv 2106.09685), through peft.

    base      the model that the adapter is put into; its weights stay as they are
    adapter   for each chosen linear map two small matrices, A [rank, in] and B [out, rank]; the map's output gains
              ``alpha / rank * B A x``. B begins at zero, so that a new adapter changes nothing
    merged    the same model without an adapter: what it adds is added to the weights

The adapter has no dropout, as a run must be repeatable. peft is an extra, imported where it is used.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from liquid_llm import storage
from liquid_llm.errors import CheckpointError, ModelError
from liquid_llm.options import ALL_LINEAR

ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json")  # what has the second is whole
_NAME = "default"  # peft's, of the one adapter there is
_MARK = ".lora_"
_BASE = ".base_layer."
_PREFIX = "base_model.model."  # that peft puts before the names of an adapter it has saved


@dataclass(frozen=True)
class LoraSpec:
    """An adapter as it is asked for.

    Attributes:
        rank: of its two matrices.
        alpha: what their product is multiplied by, ``rank`` times.
        target_modules: names of the maps that get one, comma-separated, as peft takes them (``q_proj``); or
            ``all-linear``: every linear map but the output head.
    """

    rank: int
    alpha: float
    target_modules: str = ALL_LINEAR

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> LoraSpec:
        """That of a checkpoint's description."""
        return cls(int(values["rank"]), float(values["alpha"]), str(values["target_modules"]))

    def plain(self) -> dict[str, Any]:
        return asdict(self)


def add_adapter(model: Any, spec: LoraSpec, seed: int) -> None:
    """Put a new adapter into ``model``, whose own weights are not trained from here on.

    The global generators are neither read nor moved.

    Raises:
        ModelError: the model has no such maps, or its embedding or output head is among them: the loss takes its head
            as a matrix, beside which an adapter would not be seen.
    """
    from peft import inject_adapter_in_model
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    config = _config(spec, transposed=has_transposed(model))
    # Its matrices have no memory at first: peft moves those that have, and what is pretended (``memory``) stays put.
    with warnings.catch_warnings(), unset_fake_temporarily():
        warnings.simplefilter("ignore", UserWarning)  # of maps that lie transposed, which it finds out by itself
        try:
            inject_adapter_in_model(config, model, _NAME, low_cpu_mem_usage=True)
        except ValueError as error:
            raise ModelError(
                "this adapter cannot be put into the student",
                where=f"--lora_target_modules={spec.target_modules}",
                got=str(error).splitlines()[0][:200],
                expected=f"{ALL_LINEAR}, or some of {', '.join(_linear_names(model))}",
            ) from error
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    if any(module in ends for module in _adapted(model)):
        raise ModelError(
            "an adapter of the embedding or the output head cannot be trained",
            where=f"--lora_target_modules={spec.target_modules}",
            expected=f"{ALL_LINEAR}, which leaves them out, or some of {', '.join(_linear_names(model))}",
        )
    _begin(model, torch.Generator().manual_seed(seed))


def _begin(model: nn.Module, generator: torch.Generator) -> None:
    """Give a new adapter its first weights: A as torch begins a linear map (as peft does), B at zero."""
    for name, module in model.named_modules():
        if _MARK in f".{name}" and isinstance(module, nn.Linear):
            weight = torch.zeros(module.weight.shape)
            if ".lora_A." in name:
                nn.init.kaiming_uniform_(weight, a=math.sqrt(5), generator=generator)
            module.weight = nn.Parameter(weight)


def _config(spec: LoraSpec, **more: Any) -> Any:
    from peft import LoraConfig

    transposed = more.pop("transposed")
    names = [one.strip() for one in spec.target_modules.split(",") if one.strip()]
    return LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,
        lora_dropout=0.0,
        target_modules=ALL_LINEAR if names == [ALL_LINEAR] else names,
        fan_in_fan_out=transposed,
        task_type="CAUSAL_LM",
        **more,
    )


def has_transposed(model: nn.Module) -> bool:
    """Whether its linear maps are GPT-2's, whose weights lie the other way round."""
    from transformers.pytorch_utils import Conv1D

    return any(isinstance(module, Conv1D) for module in model.modules())


def _linear_names(model: Any) -> list[str]:
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    found = [name for name, one in model.named_modules() if isinstance(one, nn.Linear | Conv1D) and one is not head]
    return sorted({name.rpartition(".")[2] for name in found if _MARK not in f".{name}" and "base_layer" not in name})


def _adapted(model: nn.Module) -> list[Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def is_of_adapter(name: str) -> bool:
    """Whether this is the name of a weight of an adapter."""
    return _MARK in name


def has_adapter(model: nn.Module) -> bool:
    """Whether an adapter is all that is trained of a student."""
    return any(is_of_adapter(name) for name, _ in model.named_parameters())


def trained_weights(model: nn.Module, *, keep_vars: bool = False) -> dict[str, Tensor]:
    """What a checkpoint keeps of a student: its state dict; of one with an adapter the adapter's alone."""
    weights = model.state_dict(keep_vars=keep_vars)
    adapter = {name: value for name, value in weights.items() if is_of_adapter(name)}
    return adapter or weights


def load_adapter(model: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Fill the adapter of ``model``.

    Raises:
        CheckpointError: names or shapes are not those of its adapter.
    """
    expected = {name: value for name, value in model.state_dict().items() if is_of_adapter(name)}
    wrong = [
        name
        for name in dict.fromkeys((*expected, *weights))
        if name not in expected or name not in weights or expected[name].shape != weights[name].shape
    ]
    if wrong:
        raise CheckpointError(
            "the adapter is of another rank, or of other modules",
            where=source,
            got=f"{len(wrong)} weights that do not fit, {wrong[0]} among them",
            remedy="give the --student, --lora_r and the further options of LoRA that it was trained with",
        )
    model.load_state_dict(dict(weights), strict=False)


@contextmanager
def without_adapter(model: nn.Module) -> Iterator[None]:
    """While entered, ``model`` is its base: what the keep-old-logits term stays near, without a second copy."""
    layers = _adapted(model)
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def merge_adapter(model: Any) -> None:
    """Add to the weights of ``model`` what its adapter adds, and take that out; nothing is done to one without."""
    if not has_adapter(model):
        return
    names = {id(module): name for name, module in model.named_modules()}
    for layer in _adapted(model):
        layer.merge()
        parent, _, last = names[id(layer)].rpartition(".")
        setattr(model.get_submodule(parent), last, layer.get_base_layer())
    del model.peft_config
    model.requires_grad_(True)


def save_adapter(
    spec: LoraSpec, weights: Mapping[str, Tensor], folder: Path, *, base: str, dtype: torch.dtype, transposed: bool
) -> None:
    """Write an adapter as peft opens it: ``adapter_config.json`` and ``adapter_model.safetensors``.

    Args:
        weights: those of a checkpoint.
        base: id or path of the model that it goes with.
        transposed: whether that model's linear maps lie the other way round.

    Raises:
        StorageError: the disk is full, or the place cannot be written.
    """
    from safetensors.torch import save_file

    modules = sorted({name.partition(_MARK)[0] for name in weights})
    named = LoraSpec(spec.rank, spec.alpha, ",".join(modules))
    config = _config(named, transposed=transposed, inference_mode=True, base_model_name_or_path=base)
    plain = {
        _PREFIX + name.replace(f".{_NAME}.", "."): value.detach().cpu().to(dtype).contiguous()
        for name, value in weights.items()
    }
    with storage.publish_folder(folder) as fresh:
        config.save_pretrained(str(fresh))
        save_file(plain, fresh / "adapter_model.safetensors", metadata={"format": "pt"})
