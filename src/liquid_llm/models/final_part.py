"""What of a causal language model comes after its last block, without the rest: the final norm and the output head.

A server that runs the blocks gives what they end with; these few tensors make logits of it. They are read by name from
the files of the checkpoint, so that a model of any size is opened with the memory of its head.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from liquid_llm.errors import ModelError
from liquid_llm.losses.signals import OutputHead
from liquid_llm.models.folder import WRAPPERS
from liquid_llm.models.heads import architecture, blocks_of, body_of, is_body_and_head, output_head
from liquid_llm.models.loading import as_model_error, open_config, quiet_transformers
from liquid_llm.models.sources import Source, fetch, resolve
from liquid_llm.parsing import parse_json

_INDEX, _WHOLE = "model.safetensors.index.json", "model.safetensors"


@dataclass(frozen=True)
class FinalPart:
    """The end of a model.

    Attributes:
        norm: from the blocks' last states to the head's input.
        head: over all entries that the model has.
        revision: of the files that both are from.
        num_layers: blocks that the model has.
    """

    norm: nn.Module
    head: OutputHead
    revision: str
    num_layers: int

    @property
    def hidden_size(self) -> int:
        return self.head.weight.shape[1]

    def head_input(self, states: Tensor) -> Tensor:
        """What the head takes, of states [..., hidden] after the last block, in any floating dtype."""
        with torch.no_grad():
            normed: Tensor = self.norm(states.to(self.head.weight))
            return normed.to(self.head.weight.dtype)


def open_final_part(
    model_id: str, *, dtype: torch.dtype, device: str | torch.device, token: str | None = None
) -> FinalPart:
    """The end of ``model_id``.

    Raises:
        ModelError: it is not found, its files are no safetensors, or its architecture is not known to end that way.
    """
    from transformers import AutoModelForCausalLM

    source = resolve(model_id, token=token)
    if source.gguf_file is not None:
        raise ModelError(
            "the end of a model is read from safetensors files",
            where=model_id,
            got=source.gguf_file,
            remedy="name the folder or Hugging Face id that the server has the model from",
        )
    config = open_config(source, model_id, token)
    with as_model_error(model_id, "the model cannot be built"), quiet_transformers(), torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    norm = _norm_of(model)
    head = output_head(model)
    wanted = {"head.weight": head.weight, **({} if head.bias is None else {"head.bias": head.bias})}
    wanted |= {f"norm.{name}": one for name, one in norm.named_parameters()}
    names = _names_of(model, wanted)
    tensors = {
        name: tensor.to(device=device, dtype=dtype) for name, tensor in _read(source, model_id, names, token).items()
    }
    for name, tensor in tensors.items():
        if tensor.shape != wanted[name].shape:
            got, expected = list(tensor.shape), list(wanted[name].shape)
            problem = "a weight has another shape than config.json says"
            raise ModelError(problem, where=model_id, got=got, expected=expected)
    own = copy.deepcopy(norm).to_empty(device=device).to(dtype)  # a GPU normalises in one dtype, its weights' too
    own.load_state_dict({name.removeprefix("norm."): one for name, one in tensors.items() if name.startswith("norm.")})
    made = replace(head, weight=tensors["head.weight"], bias=tensors.get("head.bias"))
    return FinalPart(own.eval().requires_grad_(False), made, source.revision, len(blocks_of(model)))


def _norm_of(model: Any) -> nn.Module:
    """The norm between the last block and the head: the one module with weights that comes after the list of blocks.

    Raises:
        ModelError: there is none, or something else as well.
    """
    blocks = blocks_of(model)
    found: list[nn.Module] = []
    for parent in body_of(model).modules():
        children = list(parent.children())
        places = [n for n, one in enumerate(children) if isinstance(one, nn.ModuleList) and list(one) == blocks]
        if places:
            found = [one for one in children[places[0] + 1 :] if any(True for _ in one.parameters())]
    hidden = output_head(model).weight.shape[1]
    if (
        len(found) != 1
        or any(one.shape != (hidden,) for one in found[0].parameters())
        or any(True for _ in found[0].buffers())
        or not is_body_and_head(model)
    ):
        raise ModelError(
            "this architecture does not end with blocks, one norm and a head",
            where=architecture(model),
            remedy="leave --hidden_states_dir out: the server's log-probabilities need nothing of the model here",
        )
    return found[0]


def _names_of(model: Any, wanted: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """What each tensor may be called in the files: a tied one has two names, and one of them is written."""
    names: dict[str, list[str]] = {name: [] for name in wanted}
    for full, parameter in model.named_parameters(remove_duplicate=False):
        for name, one in wanted.items():
            if one is parameter:
                names[name].append(full)
    return names


def _read(source: Source, model_id: str, names: Mapping[str, list[str]], token: str | None) -> dict[str, Tensor]:
    """The tensors, of the files that hold them alone.

    Raises:
        ModelError: the files are no safetensors, a tensor is not in them, or is not of floating numbers.
    """
    from safetensors import safe_open

    files = _files_by_tensor(source, model_id, token)
    found = {}
    for name, spelled in names.items():
        one = next((one for one in spelled if one in files), None)
        if one is None:
            raise ModelError("a weight is missing", where=model_id, got=f"no {' or '.join(spelled)}")
        file, stored = files[one]
        path = fetch(source, file, token)
        if path is None:
            raise ModelError("a file with weights is missing", where=model_id, got=f"no {file}")
        with as_model_error(model_id, "the weights cannot be read"), safe_open(path, framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(stored)
        if not tensor.is_floating_point() or tensor.element_size() < 2:
            raise ModelError(
                "the end of this model is quantised",
                where=f"{model_id}, {stored}",
                got=str(tensor.dtype),
                remedy="leave --hidden_states_dir out: the server's log-probabilities need nothing of the model here",
            )
        found[name] = tensor
    return found


def _files_by_tensor(source: Source, model_id: str, token: str | None) -> dict[str, tuple[str, str]]:
    """Name of a tensor, without what wrappers put before it -> the file that holds it, and its name there."""
    from safetensors import safe_open

    index = fetch(source, _INDEX, token)
    if index is not None:
        try:
            listed = parse_json(index.read_bytes())["weight_map"].items()
            files = {name: Path(file).name for name, file in listed}  # a name never leads out of the folder
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError("the index of the weights is damaged", where=f"{model_id}, {_INDEX}") from error
    else:
        whole = fetch(source, _WHOLE, token)
        if whole is None:
            raise ModelError("the model has no safetensors files", where=model_id, expected=f"{_WHOLE} or {_INDEX}")
        with as_model_error(model_id, "the weights cannot be read"), safe_open(whole, framework="pt") as opened:
            files = dict.fromkeys(opened.keys(), _WHOLE)
    return {re.sub(WRAPPERS, "", name): (file, name) for name, file in files.items()}
