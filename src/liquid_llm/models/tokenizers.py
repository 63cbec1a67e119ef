"""Which tokenizers count as the same, and which token stands between documents.

    tokenizer hash   names what a tokenizer does to text: its vocabulary and how it cuts fixed probe texts; its chat
                     template, padding and truncation settings and special-token roles are no part of it
    end of text      the token between documents; not always ``eos_token``, which in a chat model ends a turn

Texts are always encoded without special tokens: a document starts with its own first token.
"""

from __future__ import annotations

import hashlib
import json
from itertools import zip_longest
from typing import Any

from liquid_llm.errors import ModelError

END_OF_TEXT = "<|endoftext|>"

# Whitespace runs, digits, case, accents composed and decomposed, several scripts, emoji sequences, code, control
# characters and common special tokens: the places where tokenizers with equal vocabularies differ.
PROBE = (
    " Hello  world\n\n\tdef f(x):\n        return x**2 # 1234567890 3.14e-5\r\n",
    "It's we'll THEY'RE na\u00efve nai\u0308ve Straße \ufb01ne ½ ①  trailing   ",
    "Привет, мир! 你好，世界。こんにちは 안녕하세요 שלום مرحبا नमस्ते ไทย Ελληνικά",
    "\U0001f469\u200d\U0001f4bb\U0001f3fd\U0001f1ea\U0001f1fa \u200b\u200d\ufeff \u0000\u0007 ~~~~~~ ====== //////",
    "<|endoftext|><|im_start|>user<|im_end|></s><s>[INST]<pad><unk> <|endoftext|> x",
    '{"a": [1, 22, 333], "b": null} <<12*7=84>>84 https://example.org/?q=a%20b&c=d_e-f',
)


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of ``text`` without special tokens, padding or truncation, whatever the tokenizer is set to."""
    ids = tokenizer(
        text,
        add_special_tokens=False,
        padding=False,
        truncation=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )["input_ids"]
    return [int(token) for token in ids]


def tokenizer_hash(tokenizer: Any) -> str:
    """SHA-256 (hex) of the tokenizer's vocabulary and of its encodings of the probe texts.

    Stable over saving and loading, processes and machines, and independent of padding or truncation settings.
    """
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    content = [vocabulary, [encode(tokenizer, text) for text in PROBE]]
    return hashlib.sha256(json.dumps(content, ensure_ascii=True, separators=(",", ":")).encode()).hexdigest()


def require_same_tokenizer(a: Any, a_name: str, b: Any, b_name: str) -> None:
    """Raise ``ModelError`` naming both models and the first difference unless the two tokenizers are the same."""
    if tokenizer_hash(a) == tokenizer_hash(b):
        return
    raise ModelError(
        f"{a_name} and {b_name} have different tokenizers",
        got=_first_difference(a, a_name, b, b_name),
        remedy="use models that share a tokenizer: token probabilities can only be compared over one vocabulary",
    )


def _first_difference(a: Any, a_name: str, b: Any, b_name: str) -> str:
    a_vocabulary, b_vocabulary = a.get_vocab(), b.get_vocab()
    if len(a_vocabulary) != len(b_vocabulary):
        return f"{len(a_vocabulary)} tokens in {a_name}, {len(b_vocabulary)} in {b_name}"
    a_tokens = sorted(a_vocabulary.items(), key=lambda item: (item[1], item[0]))
    b_tokens = sorted(b_vocabulary.items(), key=lambda item: (item[1], item[0]))
    for (a_token, a_id), (b_token, b_id) in zip(a_tokens, b_tokens, strict=True):
        if (a_token, a_id) != (b_token, b_id):
            return f"token {a_id} is {a_token!r} in {a_name}, token {b_id} is {b_token!r} in {b_name}"
    for text in PROBE:
        for place, (a_id, b_id) in enumerate(zip_longest(encode(a, text), encode(b, text))):
            if a_id != b_id:
                return f"{text[:24]!r} becomes token {a_id} in {a_name} and {b_id} in {b_name} at place {place}"
    return "encodings that differ from one call to the next"


def end_of_text_id(tokenizer: Any) -> int:
    """Id of the token that separates documents: ``<|endoftext|>`` where the vocabulary has it, else ``eos_token_id``.

    A chat model's ``eos_token`` may end a turn (SmolLM2-Instruct: ``<|im_end|>``) while its texts were joined by
    ``<|endoftext|>``. Raises ``ModelError`` for a tokenizer with neither.
    """
    found = tokenizer.get_vocab().get(END_OF_TEXT, tokenizer.eos_token_id)
    if found is None:
        raise ModelError(
            "the tokenizer has no end-of-text token",
            where=getattr(tokenizer, "name_or_path", None) or None,
            expected=f"{END_OF_TEXT} in its vocabulary, or an eos_token",
            remedy="set eos_token in its tokenizer_config.json",
        )
    return int(found)
