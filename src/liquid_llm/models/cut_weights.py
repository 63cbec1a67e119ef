"""The weights of a student that is cut out of a teacher; ``cut`` has the words and its shape.

Which blocks and channels stay is decided by what goes through the teacher on a short text (``importance``). Embedding
and head are cut with the rest, to the channels that stay and to the tokenizer's vocabulary.

A norm divides by the size of all its channels. Of those that stay the size is another one, so each norm's weight is
multiplied by the ratio of the two, as it is on the text: where the channels that go are zero, nothing changes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from liquid_llm.errors import ModelError
from liquid_llm.models.cut import (
    CONV,
    CONV3,
    FINAL_NORMS,
    GEMMA,
    HIDDEN,
    KV,
    LINEAR,
    MLP,
    QUERY,
    VOCAB,
    axes_of,
    cut_config,
    name_layers,
    read_sizes,
    without_weights,
)
from liquid_llm.models.importance import Importance, Text, measure, weigh_blocks
from liquid_llm.models.spec import EVENLY, Cut

# The linear maps back to the hidden channels: what goes into them tells how much each neuron or head has to say.
_OUTPUTS = tuple(f".{name}" for name, axes in LINEAR.items() if axes[0] == HIDDEN)


def cut_weights(
    teacher: Any, cut: Cut, vocab_size: int, where: str, text: Sequence[Text], config: Any = None
) -> tuple[Any, tuple[int, ...], Importance]:
    """A student cut out of ``teacher``: float32, on the CPU, in evaluation mode.

    Args:
        teacher: any model of ``cut.TYPES``; it is not changed.
        vocab_size, where: as for ``cut_config``.
        text: what its importance is measured on.
        config: its configuration as the student is to have it, where that is not its own.

    Returns:
        The student, the teacher's blocks that it is made of, and what was measured.

    Raises:
        ModelError: as for ``cut_config``; or a smaller vocabulary than is asked for.
    """
    config = teacher.config if config is None else config
    body, num_ids = teacher.get_decoder(), teacher.get_output_embeddings().weight.shape[0]
    if num_ids < vocab_size:
        raise ModelError(
            "the model's vocabulary is smaller than the tokenizer's",
            where=where,
            got=num_ids,
            expected=f"at least {vocab_size}",
        )
    sizes = read_sizes(config, where)
    named = name_layers(cut, sizes, where)
    parts = [name.removesuffix(".weight") for name, _ in body.named_parameters() if name.endswith(".weight")]
    outputs = [name for name in parts if name.endswith(_OUTPUTS)]
    norms = [name for name in parts if axes_of(f"{name}.weight") == (HIDDEN,)]
    found = measure(teacher, body, outputs, norms, text)
    if isinstance(cut.layers, int) and cut.layers < sizes.layers and cut.choose != EVENLY:
        final = next(getattr(body, name) for name in FINAL_NORMS if hasattr(body, name))
        named = largest(weigh_blocks(teacher, body, final, text), cut.layers)
    student = without_weights(cut_config(config, cut, vocab_size, where, named), where)
    _fill(student, teacher, named, found)
    student.config.architectures = [type(student).__name__]
    return student.eval(), named, found


def largest(values: Tensor, count: int) -> tuple[int, ...]:
    """The places of the ``count`` largest of [n] values, in rising order; of equal ones the first."""
    order = torch.sort(values, descending=True, stable=True).indices[:count]
    return tuple(sorted(order.tolist()))


def _fill(student: Any, teacher: Any, layers: Sequence[int], found: Importance) -> None:
    """Give ``student`` the weights that stay, in place."""
    kept = _Kept(student, teacher, layers, found)
    theirs, places = dict(teacher.get_decoder().named_parameters()), {id(m): n for n, m in student.named_modules()}
    weights = {}
    for name, wanted in student.get_decoder().named_parameters():
        head, number, rest = name.split(".", 2) if name.startswith("layers.") else ("", "0", name)
        layer = layers[int(number)]
        source = f"{head}.{layer}.{rest}" if head else name
        weights[f"{places[id(student.get_decoder())]}.{name}"] = kept.take(theirs[source], source, layer, wanted.shape)
    if not student.config.tie_word_embeddings:
        ours, weight = student.get_output_embeddings(), teacher.get_output_embeddings().weight
        weights[f"{places[id(ours)]}.weight"] = kept.along(weight, (VOCAB, HIDDEN), 0, ours.weight.shape)
    missing, unexpected = student.load_state_dict(weights, strict=False, assign=True)
    student.tie_weights()
    assert not unexpected
    assert not any(parameter.is_meta for parameter in student.parameters()), missing


class _Kept:
    """Which indices of every axis stay. Where all do, a weight is the teacher's, number by number."""

    def __init__(self, student: Any, teacher: Any, layers: Sequence[int], found: Importance) -> None:
        old, new = (model.config.get_text_config(decoder=True) for model in (teacher, student))
        self._found, self._body = found, teacher.get_decoder()
        self._old_width, self._width = old.hidden_size, new.hidden_size
        self._old_kv_heads, self._kv_heads = old.num_key_value_heads, new.num_key_value_heads
        self._offset = 1.0 if old.model_type in GEMMA else 0.0
        self._tied = student.config.tie_word_embeddings
        self._channels = self._choose_channels(layers) if self._width < self._old_width else None

    def _choose_channels(self, layers: Sequence[int]) -> Tensor:
        """The hidden channels that are largest behind the norms of the blocks that stay."""
        total = torch.zeros(self._old_width, dtype=torch.float64)
        for name, squares in self._found.norms.items():
            if not name.startswith("layers.") or int(name.split(".")[1]) in layers:
                weight = self._body.get_parameter(f"{name}.weight").detach().cpu().double() + self._offset
                total += (squares / self._found.num_tokens).sqrt() * weight.abs()
        return torch.tensor(largest(total, self._width))

    def take(self, weight: Tensor, name: str, layer: int, shape: Sequence[int]) -> Tensor:
        """What of the teacher's weight of this name stays: ``shape``, float32."""
        axes, part = axes_of(name), name.rpartition(".")[0]
        assert axes is not None
        kept = self.along(weight, axes, layer, shape)
        if self._channels is None:
            return kept
        # Gemma's embedding is multiplied by the root of the width, which is less now.
        enlarged = math.sqrt(self._old_width / self._width) if self._offset else 1.0
        if axes == (VOCAB, HIDDEN):
            return kept * enlarged
        if part not in self._found.norms:
            return kept
        squares = self._found.norms[part]
        ratio = math.sqrt(float(squares[self._channels].mean() / squares.mean()))
        if self._tied and not part.startswith("layers."):
            ratio /= enlarged  # what comes before the head, which is that embedding
        return (kept + self._offset) * ratio - self._offset

    def along(self, weight: Tensor, axes: Sequence[str], layer: int, shape: Sequence[int]) -> Tensor:
        """What stays of each dimension: ``shape``, float32 and a copy."""
        kept = weight.detach()
        for dimension, (axis, wanted) in enumerate(zip(axes, shape, strict=False)):
            if kept.shape[dimension] != wanted:
                index = self._index(axis, layer, kept.shape[dimension], wanted)
                kept = kept.index_select(dimension, index.to(kept.device))
        return kept.to("cpu", torch.float32, copy=True).contiguous()

    def _index(self, axis: str, layer: int, size: int, wanted: int) -> Tensor:
        if axis == VOCAB:
            return torch.arange(wanted)
        if axis == HIDDEN:
            assert self._channels is not None
            return self._channels
        if axis in (CONV, CONV3):
            chosen = torch.tensor(largest(self._squares(layer, "conv.out_proj"), self._width))
            return chosen if axis == CONV else torch.cat([chosen + part * self._old_width for part in range(3)])
        if axis == MLP:
            return torch.tensor(largest(self._squares(layer, "mlp.down_proj", "feed_forward.w2"), wanted))
        assert axis in (QUERY, KV)
        outputs = self._squares(layer, "self_attn.o_proj", "self_attn.out_proj")
        heads = torch.tensor(largest(outputs.view(self._old_kv_heads, -1).sum(dim=1), self._kv_heads))
        each = size // self._old_kv_heads
        rows: Tensor = heads[:, None] * each + torch.arange(each)
        return rows.flatten()

    def _squares(self, layer: int, *names: str) -> Tensor:
        """Of what goes into the linear map of the block that has one of these names."""
        places = (f"layers.{layer}.{name}" for name in names)
        return next(self._found.inputs[place] for place in places if place in self._found.inputs)
