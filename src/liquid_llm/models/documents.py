"""Several documents in one row, each as if it stood alone.

    place    a token's position in its document: 0 at each document's first token

Attention is kept within documents by transformers, from places that start again (``find_packed_sequence_indices``), and
positional embeddings follow them. What else mixes neighbours must be told: short convolutions (LFM2) are, here, and any
other architecture is found out by ``heads.check_documents``.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

_SHORT_CONVOLUTIONS = ("Lfm2ShortConv", "Lfm2MoeShortConv")
_PLACES = "document_places"  # of a forward pass: layers hand it down to their convolutions

_ROWS: ContextVar[str | None] = ContextVar("_ROWS", default=None)
_WHOLE, _JOINED = "whole", "joined"


@contextmanager
def tell_rows(*, joined: bool) -> Iterator[None]:
    """Whether rows of the passes inside join several documents.

    transformers looks at the positions of each pass to find out, and waits for the device to learn that they do not.
    """
    from transformers import masking_utils

    name = "find_packed_sequence_indices"
    original = getattr(masking_utils, name, None)
    # Put there once and asked each time, so that passes in several threads do not take each other's for the original.
    if original is not None and not hasattr(original, "asks_first"):

        def ask_first(position_ids: Any) -> Any:
            told = _ROWS.get()
            if told is None:
                return original(position_ids)
            return None if told == _WHOLE else number_documents(position_ids)

        ask_first.asks_first = True  # type: ignore[attr-defined]
        setattr(masking_utils, name, ask_first)
    token = _ROWS.set(_JOINED if joined else _WHOLE)
    try:
        yield
    finally:
        _ROWS.reset(token)


def number_documents(places: Tensor) -> Tensor:
    """Which document of its row each token is of, [batch, time] int64 from 0."""
    begins = torch.diff(places, prepend=places[:, :1] - 1, dim=-1) != 1
    return begins.cumsum(-1)


def extra_arguments(model: Any, places: Tensor) -> dict[str, Tensor]:
    """What the body of ``model`` takes beside ``position_ids`` so that its convolutions stay within documents."""
    found = [module for module in model.modules() if type(module).__name__ in _SHORT_CONVOLUTIONS]
    for module in found:
        if not isinstance(vars(module).get("forward"), types.MethodType):
            module.forward = types.MethodType(_convolve, module)  # bound to a copy of the module where it is copied
    return {_PLACES: places} if found else {}


def _convolve(
    module: Any,
    hidden_states: Tensor,
    past_key_values: object = None,
    attention_mask: Tensor | None = None,
    **arguments: Any,
) -> Tensor:
    """A gated short convolution (LFM2) whose taps do not reach past the beginning of a document.

    Args:
        hidden_states: [batch, time, hidden].
        arguments: with the tokens' places [batch, time] among them; without, the module's own forward pass is taken.
    """
    places = arguments.pop(_PLACES, None)
    if places is None:
        answer: Tensor = type(module).forward(module, hidden_states, past_key_values, attention_mask, **arguments)
        return answer
    before, after, values = module.in_proj(hidden_states).transpose(-1, -2).chunk(3, dim=-2)
    gated = before * values
    weight = module.conv.weight.squeeze(1).to(gated.dtype)  # [hidden, taps], the last of the present token
    mixed = gated * weight[:, -1:]
    for back in range(1, weight.shape[1]):
        reached = nn.functional.pad(gated, (back, 0))[..., :-back] * (places >= back).unsqueeze(1)
        mixed = mixed + reached * weight[:, -1 - back, None]
    if module.conv.bias is not None:
        mixed = mixed + module.conv.bias.to(mixed.dtype)[:, None]
    out: Tensor = module.out_proj((after * mixed).transpose(-1, -2).contiguous())
    return out
