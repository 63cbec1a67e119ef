"""What a model goes on with: greedy continuations of prompts in batches, with the cache, by transformers' ``generate``.

    prompt      token ids, what its framing puts before a text included (``Framing.open``)
    allowance   tokens that may follow a prompt: as many as are asked for, or as the model has positions left

A continuation is what the model would say to the prompt alone, computed anew for each token: batches, padding and
caches change nothing but rounding. Prompts of different lengths are padded on the left where ``can_pad_left`` has seen
that the model takes it, else those of one length go together. Nothing is drawn, so random states stay as they are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from liquid_llm.device import is_out_of_memory, release_memory
from liquid_llm.models.heads import evaluating
from liquid_llm.models.loading import quiet_transformers
from liquid_llm.models.positions import max_positions

_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}  # of the largest logit; 16-bit numbers are coarser
_COARSE = 4e-2


def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    end_ids: Sequence[int],
    max_new_tokens: int,
    batch_size: int = 16,
    dtype: torch.dtype | None = None,
    alike: bool = False,
) -> list[list[int]]:
    """The likeliest token, again and again, after each prompt.

    The model's own generation settings (penalties, sampling) are put aside, its training mode is restored, dropout is
    off. A batch that does not fit into the device's memory is halved.

    Args:
        model: any causal language model of transformers, on any device.
        prompts: token ids; none is empty.
        end_ids: tokens that end a continuation.
        max_new_tokens: most tokens of one; fewer where the model's positions end before (none after a prompt that
            fills them).
        batch_size: most prompts computed together.
        dtype: of the products, by autocast; None: the model's own.
        alike: the model is dealt out among ranks, all of which ask it this: each computes as many passes as every
            other, the one that would end first too, and nothing is halved.

    Returns:
        The new tokens of each prompt, in the order of ``prompts``, the end token left out.

    Raises:
        ValueError: a prompt is empty, or nothing ends a continuation.
        RuntimeError: not even one prompt fits into the device's memory.
    """
    if not end_ids or not all(len(one) for one in prompts):
        raise ValueError("a prompt and the tokens that end a text need at least one token each")
    limit = max_positions(model)
    allowances = [max_new_tokens if limit is None else min(max_new_tokens, limit - len(one)) for one in prompts]
    found: list[list[int]] = [[] for _ in prompts]
    with evaluating(model), quiet_transformers(), _plain_settings(model), _products(model, dtype):
        for rows in _batches([len(one) for one in prompts], allowances, batch_size, model):
            new = _continue_rows(model, [prompts[row] for row in rows], end_ids, allowances[rows[0]], alike)
            for row, ids in zip(rows, new, strict=True):
                found[row] = ids
    return found


def repeated_share(ids: Sequence[int], n: int = 4) -> float:
    """Share of a text's ``n``-grams of tokens that stood in it before: 1 - distinct / all, 0 to below 1.

    Welleck et al. 2020 (arXiv 1908.04319), seq-rep-n; 4 is their n. A text of fewer than ``n`` tokens has 0.
    """
    grams = [tuple(ids[start : start + n]) for start in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def can_pad_left(model: Any) -> bool:
    """Whether tokens on the left that the attention mask leaves out change nothing of what the model goes on with.

    Asked of the model as it stands, with random ids: attention leaves padding out, but a convolution or a recurrent
    state that does not know of the mask, or positions that are counted from the padding, would show in the logits.
    """
    vocab_size = model.get_output_embeddings().weight.shape[0]
    ids = torch.randint(vocab_size, (2, 9), generator=torch.Generator().manual_seed(0)).to(_device(model))
    short, new_tokens = 4, 3
    mask = torch.ones_like(ids)
    mask[0, :-short] = 0
    with evaluating(model), quiet_transformers(), _plain_settings(model):
        told = {"output_logits": True, "return_dict_in_generate": True, "eos_token_id": None, "pad_token_id": 0}
        output = _call(model, ids, mask, new_tokens, **told)
        padded = torch.stack(output.logits, 1)[0]
        alone = output.sequences[:1, -short - new_tokens : -1]
        expected = model(input_ids=alone, use_cache=False).logits[0, short - 1 :]
    distance = (padded.float() - expected.float()).abs().max() / expected.float().abs().max().clamp_min(1e-30)
    return bool(distance <= _TOLERANCE.get(expected.dtype, _COARSE))  # False for what is not finite


def _batches(lengths: Sequence[int], allowances: Sequence[int], size: int, model: Any) -> Iterator[list[int]]:
    """Rows that are computed together, the longest first: what does not fit is found out at once.

    Rows with other allowances are apart, so that the padding of one does not take the positions of another.
    """
    rows = [row for row, allowance in enumerate(allowances) if allowance > 0]
    pads = len({lengths[row] for row in rows}) > 1 and can_pad_left(model)
    groups: dict[tuple[int, int], list[int]] = {}
    for row in sorted(rows, key=lambda row: -lengths[row]):
        groups.setdefault((allowances[row], 0 if pads else lengths[row]), []).append(row)
    for group in groups.values():
        for start in range(0, len(group), size):
            yield group[start : start + size]


def _continue_rows(
    model: Any, prompts: Sequence[Sequence[int]], end_ids: Sequence[int], max_new_tokens: int, alike: bool
) -> list[list[int]]:
    """New tokens of prompts in one batch, or in halves of it where the whole does not fit."""
    try:
        return _continue_batch(model, prompts, end_ids, max_new_tokens, alike)
    except RuntimeError as error:
        if alike or len(prompts) == 1 or not is_out_of_memory(error):
            raise
    release_memory(_device(model))
    half = len(prompts) // 2
    parts = (prompts[:half], prompts[half:])
    return [ids for part in parts for ids in _continue_rows(model, part, end_ids, max_new_tokens, alike)]


def _continue_batch(
    model: Any, prompts: Sequence[Sequence[int]], end_ids: Sequence[int], max_new_tokens: int, alike: bool
) -> list[list[int]]:
    width = max(map(len, prompts))
    ids = torch.tensor([[end_ids[0]] * (width - len(one)) + list(one) for one in prompts])
    mask = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in prompts])
    device = _device(model)
    told = {"eos_token_id": list(end_ids), "pad_token_id": end_ids[0], "synced_gpus": alike}
    new = _call(model, ids.to(device), mask.to(device), max_new_tokens, **told)[:, width:].tolist()
    ends = set(end_ids)
    return [row[: next((place for place, one in enumerate(row) if one in ends), len(row))] for row in new]


def _call(model: Any, ids: Tensor, mask: Tensor, max_new_tokens: int, **told: Any) -> Any:
    options = {"do_sample": False, "num_beams": 1, "use_cache": True, "max_new_tokens": max_new_tokens}
    return model.generate(input_ids=ids, attention_mask=mask, **options, **told)


@contextlib.contextmanager
def _plain_settings(model: Any) -> Iterator[None]:
    """The model without generation settings of its own, which would come in behind what a call gives."""
    from transformers import GenerationConfig

    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def _products(model: Any, dtype: torch.dtype | None) -> contextlib.AbstractContextManager[Any]:
    """Autocast to ``dtype`` where the model's numbers are wider; each weight is turned into it once, not each time."""
    if dtype in (None, torch.float32) or dtype == next(model.parameters()).dtype:
        return contextlib.nullcontext()
    return torch.autocast(_device(model).type, dtype=dtype)


def _device(model: Any) -> torch.device:
    return torch.device(next(model.parameters()).device)
