"""How many bytes of a text each token stands for, in UTF-8: what bits a byte are counted by.

A special token (an end of text, the mark of a turn) stands for none: it is no text. A byte-level vocabulary writes each
byte as one character; one with ``▁`` for a blank may write single bytes as ``<0x0A>``; else the token is decoded.
"""

from __future__ import annotations

import json
import re
from typing import Any

import torch
from torch import Tensor

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_BLANK = "\N{LOWER ONE EIGHTH BLOCK}"


def token_bytes(tokenizer: Any, vocab_size: int) -> Tensor:
    """The bytes of each id: [vocab_size] int64, 0 for special tokens and ids that the tokenizer does not have."""
    sizes = torch.zeros(vocab_size, dtype=torch.int64)
    special = {one.content for one in tokenizer.added_tokens_decoder.values() if one.special}
    special |= set(tokenizer.all_special_tokens)
    added = {one.content for one in tokenizer.added_tokens_decoder.values()}
    kind = _kind(tokenizer)
    for token, number in tokenizer.get_vocab().items():
        if number >= vocab_size or token in special:
            continue
        if token in added:
            sizes[number] = len(token.encode())
        elif kind == "byte level":
            sizes[number] = len(token)
        elif kind == "blanks":
            sizes[number] = 1 if _BYTE.fullmatch(token) else len(token.replace(_BLANK, " ").encode())
        else:
            sizes[number] = len(tokenizer.decode([number], clean_up_tokenization_spaces=False).encode())
    return sizes


def _kind(tokenizer: Any) -> str:
    """How a vocabulary writes bytes, as its decoder tells."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return "other"
    decoder = json.dumps(json.loads(backend.to_str()).get("decoder"), ensure_ascii=False)
    if '"ByteLevel"' in decoder:
        return "byte level"
    return "blanks" if _BLANK in decoder else "other"
