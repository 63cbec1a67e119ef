"""What of a model matters on a text: its blocks, hidden channels, MLP neurons and attention heads.

    block      one layer of the stack; its importance is how far what the output head sees turns when it is left out:
               the mean of one minus the cosine between the last hidden states with it and without
    channel    one of the hidden states' numbers: how large it is behind the norms
    neuron     one of an MLP's inner numbers: how large it is before the down projection
    head       a key-value head with its query heads: how long their outputs are

Sizes are root mean squares over the tokens of a short text, summed over norms where there are several (Muralidharan et
al. 2024, Minitron, arXiv:2407.14679, section 2.2, which takes means of absolute values). That paper and Men et al. 2024
(ShortGPT, arXiv:2403.03853) rank blocks by what leaving them out does to the loss, or by the cosine between input and
output of a block; docs/decisions/0016 has all three measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from liquid_llm.models.heads import hidden_states, output_head

_WEIGHED_TOKENS, _ROW_TOKENS = 512, 256

Text = tuple[Tensor, Tensor]
"""One sequence and what follows each of its tokens, -100 where that is not learnt: both [time] int64."""


@dataclass
class Importance:
    """Sums over the tokens of a calibration text.

    Attributes:
        inputs: module name -> [width] sum of squares of what goes into that linear map.
        norms: module name -> [width] sum of squares of what goes into that norm, each token divided by its mean square.
        num_tokens: how many there were.
        loss: the model's own mean cross-entropy on the text.
    """

    inputs: dict[str, Tensor] = field(default_factory=dict)
    norms: dict[str, Tensor] = field(default_factory=dict)
    num_tokens: int = 0
    loss: float = 0.0


@torch.no_grad()
def measure(model: Any, body: Any, linears: Sequence[str], norms: Sequence[str], text: Sequence[Text]) -> Importance:
    """Pass ``text`` through ``model`` once and look at what goes into the modules of ``body`` that are named."""
    found = Importance()
    with _watch(body, linears, norms, found):
        found.loss = mean_loss(model, text)
    found.num_tokens = sum(len(ids) for ids, _ in text)
    return found


@torch.no_grad()
def weigh_blocks(model: Any, body: Any, final_norm: nn.Module, text: Sequence[Text]) -> Tensor:
    """How much each block of ``body.layers`` matters: [layers] from 0, for one that does nothing, to 2.

    Of each sequence the first tokens are looked at, a few hundred in all: for every block the ones behind it are
    computed anew.
    """
    device, layers = output_head(model).weight.device, list(body.layers)
    moved, count = torch.zeros(len(layers), dtype=torch.float64), 0
    for ids, _ in text:
        if count >= _WEIGHED_TOKENS:
            break
        ids = ids[: min(_ROW_TOKENS, _WEIGHED_TOKENS - count)].to(device)
        with _record(layers) as calls:
            whole = hidden_states(model, ids[None])[0].float()
        for number, (first, *_) in enumerate(call[0] for call in calls):
            hidden = first
            for layer, (given, options) in list(zip(layers, calls, strict=True))[number + 1 :]:
                output = layer(hidden, *given[1:], **options)
                hidden = output[0] if isinstance(output, tuple) else output
            left = final_norm(hidden)[0].float()
            moved[number] += float((1 - nn.functional.cosine_similarity(left, whole, dim=-1)).double().sum())
        count += len(ids)
    return moved / max(count, 1)


@contextmanager
def _record(layers: Sequence[nn.Module]) -> Iterator[list[tuple[tuple[Any, ...], dict[str, Any]]]]:
    """Collect the arguments of every layer, in their order."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def note(_: nn.Module, given: tuple[Any, ...], options: dict[str, Any]) -> None:
        calls.append((given, options))

    handles = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def mean_loss(model: Any, text: Sequence[Text]) -> float:
    """Mean cross-entropy over the learnt tokens of ``text``, in nats; 0 where none is."""
    head, total, count = output_head(model), 0.0, 0
    device = head.weight.device
    for ids, labels in text:
        hidden = hidden_states(model, ids.to(device)[None])[0]
        learnt = labels != -100
        logits = head.logits(hidden[learnt.to(device)]).float()
        total += float(nn.functional.cross_entropy(logits, labels[learnt].to(device), reduction="sum"))
        count += int(learnt.sum())
    return total / max(count, 1)


@contextmanager
def _watch(body: Any, linears: Sequence[str], norms: Sequence[str], found: Importance) -> Iterator[None]:
    def squares(sums: dict[str, Tensor], name: str, *, normalise: bool) -> Callable[..., None]:
        def look(_: nn.Module, given: tuple[Any, ...]) -> None:
            size = given[0].float().flatten(0, -2).square()
            if normalise:
                size = size / size.mean(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
            total = size.double().sum(dim=0).cpu()
            sums[name] = sums[name] + total if name in sums else total

        return look

    handles = []
    for names, sums, normalise in ((linears, found.inputs, False), (norms, found.norms, True)):
        for name in names:
            hook = squares(sums, name, normalise=normalise)
            handles.append(body.get_submodule(name).register_forward_pre_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
