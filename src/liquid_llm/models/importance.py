"""What of a model matters on a text: its blocks, hidden channels, MLP neurons and attention heads.

    block      one layer of the stack; its importance is one minus the cosine between its input and its output (Men et
               al. 2024, ShortGPT, arXiv:2403.03853, equation 1): a block that changes nothing has 0
    channel    one of the hidden states' numbers: how large it is behind the norms
    neuron     one of an MLP's inner numbers: how large it is before the down projection
    head       a key-value head with its query heads: how long their outputs are

Sizes are root mean squares over the tokens of a short text, summed over norms where there are several (Muralidharan et
al. 2024, Minitron, arXiv:2407.14679, section 2.2, which takes means of absolute values).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from liquid_llm.models.heads import hidden_states, output_head

Text = tuple[Tensor, Tensor]
"""One sequence and what follows each of its tokens, -100 where that is not learnt: both [time] int64."""


@dataclass
class Importance:
    """Sums over the tokens of a calibration text.

    Attributes:
        blocks: [layers] one minus the cosine, a token's mean.
        inputs: module name -> [width] sum of squares of what goes into that linear map.
        norms: module name -> [width] sum of squares of what goes into that norm, each token divided by its mean square.
        num_tokens: how many there were.
        loss: the model's own mean cross-entropy on the text.
    """

    blocks: Tensor
    inputs: dict[str, Tensor] = field(default_factory=dict)
    norms: dict[str, Tensor] = field(default_factory=dict)
    num_tokens: int = 0
    loss: float = 0.0


@torch.no_grad()
def measure(
    model: Any,
    body: Any,
    layers: Sequence[nn.Module],
    linears: Sequence[str],
    norms: Sequence[str],
    text: Sequence[Text],
) -> Importance:
    """Pass ``text`` through ``model`` once and look at what goes into the modules of ``body`` that are named."""
    found = Importance(torch.zeros(len(layers), dtype=torch.float64))
    with _watch(body, layers, linears, norms, found):
        found.loss = mean_loss(model, text)
    found.num_tokens = sum(len(ids) for ids, _ in text)
    found.blocks /= found.num_tokens
    return found


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
def _watch(
    body: Any, layers: Sequence[nn.Module], linears: Sequence[str], norms: Sequence[str], found: Importance
) -> Iterator[None]:
    def block(number: int) -> Callable[..., None]:
        def look(_: nn.Module, given: tuple[Any, ...], options: dict[str, Any], output: Any) -> None:
            before = given[0] if given else options["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            cosine = nn.functional.cosine_similarity(before.float(), after.float(), dim=-1)
            found.blocks[number] += float((1 - cosine).double().sum())

        return look

    def squares(sums: dict[str, Tensor], name: str, *, normalise: bool) -> Callable[..., None]:
        def look(_: nn.Module, given: tuple[Any, ...]) -> None:
            size = given[0].float().flatten(0, -2).square()
            if normalise:
                size = size / size.mean(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
            total = size.double().sum(dim=0).cpu()
            sums[name] = sums[name] + total if name in sums else total

        return look

    handles = [layer.register_forward_hook(block(number), with_kwargs=True) for number, layer in enumerate(layers)]
    for names, sums, normalise in ((linears, found.inputs, False), (norms, found.norms, True)):
        for name in names:
            hook = squares(sums, name, normalise=normalise)
            handles.append(body.get_submodule(name).register_forward_pre_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
