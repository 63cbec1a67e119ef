"""How a model knows where a token stands, and how it is made to reach further.

    learned    a table with one row a position (GPT-2); made longer by linear interpolation between its rows
    rotary     angles that grow with the position (Llama, LFM2); stretched by a *RoPE scale* through the configuration
    sinusoidal, alibi, none   computed from the position, from distances, or not at all; nothing to be fitted

A RoPE scale of s divides positions by s, so that positions up to s times the trained length fall where training has
been (linear position interpolation, Chen et al. 2023, arXiv:2306.15595). It is kept in the model's configuration
(``rope_parameters``), so a saved student carries it.

A rotary model asked for more positions than its configuration names, without a scale, gets the higher number in its
configuration and keeps its angles: they exist for any position, the student is about to be trained there, and the
description returned says so. Nothing is ever made shorter: a longer table already covers a shorter block.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from liquid_llm.errors import ModelError, UsageError
from liquid_llm.models.heads import architecture

_TABLE_NAMES = ("wpe", "embed_positions", "position_embeddings", "positions_embed")
_LIMIT_NAMES = ("max_position_embeddings", "max_seq_len")
# Rotary kinds whose angles do not depend on max_position_embeddings, so that raising it changes nothing else.
_RAISABLE_ROPE = ("default", "linear", "llama3", "yarn", "proportional")


@dataclass(frozen=True)
class Stretch:
    """How the rows of a learned position table move when the context grows.

    Attributes:
        parameter: the table's name in the state dict.
        offset: rows before position 0, which stay.
        trained: rows that are interpolated.
        block_size: rows they become; what lies beyond in a longer table stays.
    """

    parameter: str
    offset: int
    trained: int
    block_size: int

    def __call__(self, table: Tensor) -> Tensor:
        """The stretched table, or whatever has one row a position, such as the optimizer's moments: [rows, dim]."""
        stretched = resize_learned_positions(table[self.offset : self.offset + self.trained], self.block_size)
        return torch.cat((table[: self.offset], stretched, table[self.offset + self.block_size :]))


def positional_embedding(model: Any) -> str:
    """``learned``, ``rotary``, ``sinusoidal``, ``alibi`` or ``none``."""
    if _learned_table(model) is not None:
        return "learned"
    config = _text_config(model)
    if config.model_type in ("bloom", "mpt") or getattr(config, "alibi", False):
        return "alibi"  # before rotary: Falcon builds a rotary module that alibi leaves unused
    if _rotary_modules(model) or getattr(config, "rotary_dim", None):
        return "rotary"
    if any("Sinusoidal" in type(module).__name__ for module in model.modules()):
        return "sinusoidal"
    return "none"


def max_positions(model: Any) -> int | None:
    """The longest sequence the model supports, in tokens; None where nothing limits it."""
    table = _learned_table(model)
    if table is not None:
        return int(table.weight.shape[0]) - _offset(table)
    return configured_positions(model.config)


def configured_positions(config: Any) -> int | None:
    """The same from a model's configuration alone, before there are weights."""
    limits = [getattr(config.get_text_config(decoder=True), name, None) for name in _LIMIT_NAMES]
    return next((int(limit) for limit in limits if limit and limit > 0), None)  # XLNet's -1 says that there is none


def require_positions(model: Any, num_positions: int, *, what: str) -> None:
    """Raise ``ModelError`` if ``model`` does not support ``num_positions`` tokens; ``what`` names who asks for them."""
    limit = max_positions(model)
    if limit is not None and num_positions > limit:
        raise ModelError(
            f"{what} is longer than the model supports",
            where=architecture(model),
            got=f"{num_positions} positions",
            expected=f"at most {limit}",
            remedy=f"use at most {limit}, or another model",
        )


def resize_learned_positions(table: Tensor, new_len: int) -> Tensor:
    """A learned position table over the same span with another number of rows.

    Row i of the result is the linear interpolation of ``table`` at ``i * (old - 1) / (new_len - 1)``: the ends stay the
    ends, and a table that is linear in the position stays linear. Differentiable; the input is not changed.

    Args:
        table: [old, dim], old at least 1.
        new_len: rows wanted, at least 1.

    Returns:
        [new_len, dim] in the dtype of ``table``.
    """
    old_len = table.shape[0]
    if new_len < 1 or old_len < 1:
        raise UsageError("a position table needs at least one row", got=f"{old_len} rows to be made {new_len}")
    # Places in float64: float32 would misplace rows of long tables, and the last must be exactly old - 1.
    places = torch.linspace(0, old_len - 1, new_len, dtype=torch.float64, device=table.device)
    below = places.floor().long().clamp(max=old_len - 1)
    above = (below + 1).clamp(max=old_len - 1)
    work = table if table.dtype == torch.float64 else table.float()
    share = (places - below).to(work.dtype).unsqueeze(1)
    return torch.lerp(work[below], work[above], share).to(table.dtype)


def plan_stretch(model: Any, block_size: int, trained_positions: int | None = None) -> Stretch | None:
    """What ``fit_positions`` with the same arguments would do to a learned table; None where it is left alone."""
    table = _learned_table(model)
    if table is None:
        return None
    offset = _offset(table)
    rows = int(table.weight.shape[0]) - offset
    trained = rows if trained_positions is None else min(trained_positions, rows)
    if block_size <= trained:
        return None
    name = next(name for name, parameter in model.named_parameters() if parameter is table.weight)
    return Stretch(name, offset, trained, block_size)


def fit_positions(
    model: Any, block_size: int, rope_scale: float | None = None, *, trained_positions: int | None = None
) -> str:
    """Make ``model`` support sequences of ``block_size`` tokens, in place; build optimizers afterwards.

    Args:
        model: any transformers causal language model.
        block_size: tokens in the longest sequence to come.
        rope_scale: linear RoPE scale of a rotary model; 1 is unscaled, None leaves the scale it has.
        trained_positions: how many rows of a learned table have been trained, where that is known to be fewer than it
            has (the ``block_size`` of the checkpoint it comes from). Only those are stretched over ``block_size``.

    Returns:
        What was done, as one clause for the log.

    Raises:
        UsageError: a scale that is not positive.
        ModelError: a scale for a model that is not rotary or already scaled in another way, or positions that this
            architecture cannot be given.
    """
    kind = positional_embedding(model)
    if rope_scale is not None:
        if not rope_scale > 0:
            raise UsageError("rope_scale must be positive", got=rope_scale)
        if not _rotary_modules(model) or kind != "rotary":
            raise ModelError(
                "rope_scale only applies to models with configurable rotary positions",
                where=architecture(model),
                got=f"{kind} positions",
                remedy="leave rope_scale out",
            )
    if kind == "learned":
        return _fit_learned(model, block_size, trained_positions)
    if kind == "rotary":
        return _fit_rotary(model, block_size, rope_scale)
    require_positions(model, block_size, what="block_size")
    return f"{kind} positions: nothing to fit"


def match_table(model: Any, weights: Mapping[str, Tensor]) -> None:
    """Give a model about to take ``weights`` as many learned positions as they have; what its table held is lost."""
    table = _learned_table(model)
    if table is None:
        return
    name = next(name for name, parameter in model.named_parameters() if parameter is table.weight)
    rows = weights[name].shape[0] if name in weights and weights[name].dim() == 2 else table.weight.shape[0]
    if rows == table.weight.shape[0] or rows <= _offset(table):
        return
    table.weight = nn.Parameter(torch.zeros(rows, table.weight.shape[1], dtype=table.weight.dtype))
    table.num_embeddings = rows
    _text_config(model).max_position_embeddings = rows - _offset(table)
    _renew_derived(model)


def _fit_learned(model: Any, block_size: int, trained: int | None) -> str:
    table = _learned_table(model)
    rows = int(table.weight.shape[0]) - _offset(table)
    stretch = plan_stretch(model, block_size, trained)
    if stretch is None:
        return f"learned positions: {rows} rows cover block_size {block_size}"
    with torch.no_grad():
        new = stretch(table.weight)
    table.weight = nn.Parameter(new, requires_grad=table.weight.requires_grad)
    table.num_embeddings = new.shape[0]
    config = _text_config(model)
    config.max_position_embeddings = new.shape[0] - stretch.offset
    if rows < block_size:
        _renew_derived(model)
    return f"learned positions: {stretch.trained} trained rows interpolated to {block_size}"


def _fit_rotary(model: Any, block_size: int, rope_scale: float | None) -> str:
    config = _text_config(model)
    done = []
    if rope_scale is not None:
        done.append(_scale_rope(model, config, rope_scale))
    limit = max_positions(model)
    if limit is not None and block_size > limit:
        kinds = {str(part.get("rope_type", "default")) for part in _rope_parts(config).values()}
        if not kinds <= set(_RAISABLE_ROPE):
            require_positions(model, block_size, what=f"block_size with {'/'.join(sorted(kinds))} rotary positions")
        config.max_position_embeddings = block_size
        note = "" if rope_scale is not None else " with unchanged angles (no rope_scale)"
        done.append(f"positions raised from {limit} to {block_size}{note}")
    if done:
        _renew_derived(model)
    return "rotary positions: " + ("; ".join(done) if done else f"{limit} cover block_size {block_size}")


def _scale_rope(model: Any, config: Any, rope_scale: float) -> str:
    """Set a linear scale on every part that attends over the whole context."""
    parts = _rope_parts(config)
    # A sliding window never spans more than its own length, so its angles need no stretching (Gemma 3 does the same).
    names = [name for name in parts if "sliding" not in name] or list(parts)
    for name in names:
        kind = parts[name].get("rope_type", "default")
        if kind not in ("default", "linear"):
            raise ModelError(
                "the model already scales its rotary positions in another way",
                where=architecture(model),
                got=f"rope_type {kind}",
                expected="default or linear",
                remedy="leave rope_scale out",
            )
    for name in names:
        if rope_scale == 1.0:
            parts[name]["rope_type"] = "default"
            parts[name].pop("factor", None)
        else:
            parts[name].update(rope_type="linear", factor=float(rope_scale))
    config.rope_parameters = parts.get("", parts)
    return f"linear RoPE scale {rope_scale:g}"


def _rope_parts(config: Any) -> dict[str, dict[str, Any]]:
    """Copies of the rotary parameters by attention type; under the name "" where all layers share them."""
    parameters = copy.deepcopy(dict(getattr(config, "rope_parameters", None) or {}))
    nested = bool(parameters) and all(isinstance(value, dict) for value in parameters.values())
    return parameters if nested else {"": parameters}


def _renew_derived(model: Any) -> None:
    """Give ``model`` the rotary modules and the buffers (causal masks, angle tables) its configuration now implies.

    They come from a second model built from the configuration with its parameters on the meta device, which costs
    neither time nor memory; so no architecture's own arithmetic is repeated here.
    """
    from accelerate import init_empty_weights

    with torch.random.fork_rng(devices=[]), init_empty_weights(include_buffers=False):
        donor = type(model)(copy.deepcopy(model.config))
    device = next(model.parameters()).device
    for name, module in _rotary_modules(donor).items():
        parent, _, attribute = name.rpartition(".")
        module.config = _text_config(model)
        setattr(model.get_submodule(parent), attribute, module.to(device).train(model.training))
    for name, buffer in donor.named_buffers():
        old = model.get_buffer(name)
        if old.shape != buffer.shape:
            parent, _, attribute = name.rpartition(".")
            owner = model.get_submodule(parent)
            persistent = attribute not in owner._non_persistent_buffers_set
            owner.register_buffer(attribute, buffer.to(device=old.device, dtype=old.dtype), persistent=persistent)


def _learned_table(model: Any) -> Any:
    """The module of the learned position table, or None."""
    for name, module in model.named_modules():
        is_table = isinstance(module, nn.Embedding) and "Sinusoidal" not in type(module).__name__
        if is_table and name.rpartition(".")[2] in _TABLE_NAMES:
            return module
    return None


def _offset(table: Any) -> int:
    """Rows before position 0 (OPT and BART keep two)."""
    return int(getattr(table, "offset", 0))


def _rotary_modules(model: Any) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if hasattr(module, "rope_type")}


def _text_config(model: Any) -> Any:
    return model.config.get_text_config(decoder=True)
