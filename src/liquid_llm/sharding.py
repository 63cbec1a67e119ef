"""Models dealt out among the ranks of a run (FSDP2: ``torch.distributed.fsdp.fully_shard``).

    dealt out   each rank keeps some rows of every weight, with their gradients and moments, and no more
    block       what is gathered whole right before it is computed, and given up behind it; for backward again
    rest        what is in no block: embedding, last norm and output head

Gathering is an exchange: every rank computes a block as often as every other, and in the same order. What a rank
fails with in between ends the others as well (``Engine.watch``); none of them waits.

torch's part of it is imported where it is used: a run that deals nothing out does not wait for it to load.

Zhao et al. 2023 (arXiv 2304.11277); gradients are summed, not averaged, as the loss is a sum that was divided already.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def deal_out_trained(
    root: nn.Module, blocks: Sequence[nn.Module], device: torch.device, methods: Sequence[str] = ()
) -> None:
    """Deal out a module that is trained. The ranks must hold the same weights; they go to ``device``, block by block.

    The rest is gathered for ``root.forward`` and stays whole until its backward is done. Gradients are summed over the
    ranks in float32, or whatever dtype parameters have.

    Args:
        root: holds the blocks; its parameters are replaced, so an optimizer is built afterwards.
        methods: of ``root``, that compute with its weights outside ``forward``.
    """
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = _mesh(device)
    for module in (*blocks, root):
        sharded = fully_shard(module, mesh=mesh)
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)  # gloo has no sum that divides
    for name in methods:
        register_fsdp_forward_method(root, name)


def reshard(root: nn.Module) -> None:
    """Give up what ``root`` has gathered for passes without a backward, which would do that: its parameters are those
    that an optimizer holds again, and not whole ones in their places.
    """
    from torch.distributed.fsdp import FSDPModule

    assert isinstance(root, FSDPModule)
    root.reshard()


def deal_out_frozen(model: nn.Module, body: nn.Module, blocks: Sequence[nn.Module], device: torch.device) -> None:
    """Deal out the blocks of a model that is only asked; the rest of it is whole on every rank.

    Args:
        body: the module of ``model`` that is called, and calls the blocks.
    """
    from torch.distributed.fsdp import fully_shard

    mesh = _mesh(device)
    dealt = {id(parameter) for block in blocks for parameter in block.parameters()}
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(body, mesh=mesh, ignored_params={one for one in body.parameters() if id(one) not in dealt})
    model.to(device)


def _mesh(device: torch.device) -> DeviceMesh:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(device.type, (dist.get_world_size(),))


def make_whole(tensor: Tensor) -> Tensor:
    """A tensor that may be dealt out, whole on every rank; all of them call this."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather_whole(state: Any, *, keep: bool) -> Any:
    """Nested mappings and lists with every tensor whole and in the host's memory; all ranks call this.

    Args:
        keep: whether this rank wants them; else None stands in their place.
    """

    def gather(tensor: Tensor) -> Tensor | None:
        whole = make_whole(tensor.detach())
        return whole.cpu() if keep else None

    return _map_tensors(state, gather)


def own_parts(state: Any) -> Any:
    """The same with what this rank has of each tensor, without an exchange."""
    from torch.distributed.tensor import DTensor

    return _map_tensors(state, lambda tensor: tensor.to_local() if isinstance(tensor, DTensor) else tensor)


def outline(state: Any) -> Any:
    """The same with tensors of the whole sizes that hold nothing, without an exchange."""
    return _map_tensors(state, lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta"))


def _map_tensors(state: Any, change: Callable[[Tensor], Any]) -> Any:
    """``state`` with ``change`` of each tensor; what is one tensor under several names stays one."""
    changed: dict[int, Any] = {}

    def of(value: Any) -> Any:
        if isinstance(value, Tensor):
            if id(value) not in changed:
                changed[id(value)] = change(value)
            return changed[id(value)]
        if isinstance(value, Mapping):
            return {key: of(one) for key, one in value.items()}
        if type(value) in (list, tuple):
            return type(value)(map(of, value))
        return value

    return of(state)


def take_moments(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """What an optimizer has of each of its parameters, in order; it lets go of them, and is of no use any more."""
    parameters = [one for group in optimizer.param_groups for one in group["params"]]
    moments = [dict(optimizer.state.get(one, {})) for one in parameters]
    optimizer.state.clear()
    optimizer.param_groups.clear()
    return moments


def give_moments(optimizer: torch.optim.Optimizer, moments: Sequence[Mapping[str, Any]]) -> None:
    """Give an optimizer of dealt-out parameters this rank's part of the moments of whole ones (``take_moments``)."""
    from torch.distributed.tensor import distribute_tensor

    parameters = [one for group in optimizer.param_groups for one in group["params"]]
    for parameter, whole in zip(parameters, moments, strict=True):
        mesh, placements = parameter.device_mesh, parameter.placements
        own = {name: value.to(parameter.device) for name, value in whole.items()}
        for name, value in own.items():
            if value.dim():  # each rank has them all: nothing is sent
                own[name] = distribute_tensor(value, mesh, placements, src_data_rank=None)
        if own:
            optimizer.state[parameter] = own


_PIECE = "piece"  # the only key of a mapping that stands for a tensor


def split_tensors(state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Nested mappings without the tensors that are dealt out, and those by name; ``join_tensors`` undoes it."""
    from torch.distributed.tensor import DTensor

    names: dict[int, str] = {}
    tensors: dict[str, Tensor] = {}

    def of(value: Any, name: str) -> Any:
        if isinstance(value, DTensor):
            called = names.setdefault(id(value), name)
            tensors[called] = value.detach()
            return {_PIECE: called}
        if isinstance(value, Mapping):
            return {key: of(one, f"{name}/{key}" if name else str(key)) for key, one in value.items()}
        return value

    rest: dict[str, Any] = of(state, "")
    return rest, tensors


def join_tensors(state: Any, tensors: Mapping[str, Tensor]) -> Any:
    """``state`` with its tensors in their places."""
    if isinstance(state, Mapping):
        if state.keys() == {_PIECE}:
            return tensors[state[_PIECE]]
        return {key: join_tensors(one, tensors) for key, one in state.items()}
    return state


@dataclass(frozen=True)
class Part:
    """What this rank has of a tensor that is dealt out.

    Attributes:
        tensor: its rows, as many as there are.
        offsets: where in the whole they begin, along each dimension.
    """

    tensor: Tensor
    offsets: tuple[int, ...]


def find_parts(tensors: Mapping[str, Tensor]) -> dict[str, Part]:
    """What this rank has of each of these, without an exchange and without a copy."""
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

    planner = DefaultSavePlanner(flatten_state_dict=False)
    planner.set_up_planner(dict(tensors))
    parts = {}
    for item in planner.create_local_plan().items:
        assert item.tensor_data is not None
        found = planner.resolve_data(item)
        assert isinstance(found, Tensor)
        parts[item.index.fqn] = Part(found, tuple(item.tensor_data.chunk.offsets))
    return parts


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """What ranks have written of their parts (``checkpoint.pieces``), whole, on the host; by this process alone."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    reader = HuggingFaceStorageReader(str(folder))
    known = reader.read_metadata().state_dict_metadata.items()
    tensors = {
        name: torch.empty(one.size, dtype=one.properties.dtype)
        for name, one in known
        if isinstance(one, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # that is what is meant
        load(tensors, storage_reader=reader, no_dist=True)
    return tensors
