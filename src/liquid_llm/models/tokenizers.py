"""Which tokenizers count as the same, and which tokens they have for the beginning and the end of a text.

    tokenizer hash   names what a tokenizer does to text: its vocabulary and how it cuts fixed probe texts; its chat
                     template, padding and truncation settings and special-token roles are no part of it
    roles            which token begins a text, which ends it; two tokenizers of one hash (a base model and its Instruct
                     sibling) may name different ones, so what is made with them says which it was (``framing``)
    end of text      the token between documents; not always ``eos_token``, which in a chat model ends a turn

Texts are always encoded without special tokens; what stands around them is put there by ``framing``.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
from collections.abc import Mapping
from itertools import zip_longest
from typing import Any

from liquid_llm.errors import ModelError
from liquid_llm.framing import Framing

logger = logging.getLogger(__name__)

END_OF_TEXT = "<|endoftext|>"
# What else separates documents in pre-training, where a tokenizer has it as a special token.
_ENDS_OF_TEXT = ("<|end_of_text|>", "<eos>", "</s>")

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


def encode(tokenizer: Any, text: str, *, add_special_tokens: bool = False) -> list[int]:
    """Token ids of ``text`` without padding or truncation, whatever the tokenizer is set to."""
    ids = tokenizer(
        text,
        add_special_tokens=add_special_tokens,
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


def first_end_of_text_id(tokenizer: Any) -> int:
    """The end of text as release 0.1.0 chose it: ``<|endoftext|>`` where the vocabulary has it, else ``eos_token_id``.

    Raises:
        ModelError: the tokenizer has neither.
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


def end_of_text_id(tokenizer: Any) -> int:
    """Id of the token that separates documents in pre-training, see :func:`shared_end_of_text_id`."""
    return shared_end_of_text_id({"the tokenizer": tokenizer})


def shared_end_of_text_id(tokenizers: Mapping[str, Any]) -> int:
    """Id of the token that separates documents for all of these tokenizers, which have one vocabulary.

    A chat model's ``eos_token`` may end a turn (SmolLM2-Instruct: ``<|im_end|>``; Llama 3's: ``<|eot_id|>``) while its
    texts were joined by the one of its base model. So what the vocabulary calls the end of a text comes first, then
    the ``eos_token`` that all of them name.

    Args:
        tokenizers: name, for messages -> tokenizer.

    Raises:
        ModelError: none of it is there, or they name different ones.
    """
    every = list(tokenizers.values())
    vocabulary = every[0].get_vocab()
    special = {token for one in every for token in one.all_special_tokens} | {
        token.content for one in every for token in one.added_tokens_decoder.values() if token.special
    }
    for name in (END_OF_TEXT, *_ENDS_OF_TEXT):
        if name in vocabulary and (name == END_OF_TEXT or name in special):
            return int(vocabulary[name])
    ends = {name: first_end_of_text_id(one) for name, one in tokenizers.items() if one.eos_token_id is not None}
    if len(set(ends.values())) > 1:
        raise ModelError(
            "the tokenizers have one vocabulary and different ends of a text, and none is known to be of documents",
            got=", ".join(f"{every[0].convert_ids_to_tokens(end)!r} of {name}" for name, end in ends.items()),
            expected=f"one eos_token, or {', '.join((END_OF_TEXT, *_ENDS_OF_TEXT))} as a special token",
            remedy="set eos_token in their tokenizer_config.json to the token that ended documents in pre-training",
        )
    return next(iter(ends.values())) if ends else first_end_of_text_id(every[0])


def begin_token_id(tokenizer: Any) -> int | None:
    """The token that a tokenizer puts before a text, asked of the tokenizer itself; None where it puts nothing there.

    That ``bos_token`` is set says little: SmolLM2-Instruct's is ``<|im_start|>``, which begins a turn.

    Raises:
        ModelError: it puts several tokens there.
    """
    plain, whole = encode(tokenizer, "x"), encode(tokenizer, "x", add_special_tokens=True)
    places = [place for place in range(len(whole)) if whole[place : place + len(plain)] == plain]
    front = whole[: places[0]] if places else []
    if len(front) > 1:
        raise ModelError(
            "the tokenizer puts several tokens before a text",
            where=getattr(tokenizer, "name_or_path", None) or None,
            got=", ".join(map(repr, tokenizer.convert_ids_to_tokens(front))),
            expected="one at most",
            remedy="leave them out with --begin_token=never",
        )
    return front[0] if front else None


def highest_id(tokenizer: Any) -> int:
    """The largest id of the vocabulary; beyond its size where the ids have gaps."""
    return int(max(tokenizer.get_vocab().values()))


def _say_as_before(template: str, before: Any, after: Any) -> str:
    """A chat template that writes the tokens it wrote in training, whatever the tokenizer calls its own now."""
    changed = [
        f"{{%- set {name} = {json.dumps(getattr(before, name) or '')} -%}}"
        for name in ("bos_token", "eos_token", "pad_token")
        if name in template and getattr(before, name) != getattr(after, name)
    ]
    return "".join([*changed, template])


def frame_tokenizer(tokenizer: Any, framing: Framing) -> Any:
    """A copy of ``tokenizer`` that by itself puts before a text what training put there, and names the same tokens.

    ``tokenizer("text")`` gives the begin token where there is one, and the text's own ids; encoding without special
    tokens is as it was. The end of text stands for padding, as in the student's generation settings. One written in
    Python alone cannot be told what to put: it names the tokens, and a warning says what it does.
    """
    from tokenizers.processors import TemplateProcessing

    framed = copy.deepcopy(tokenizer)
    begin_id = framing.begin_id
    begin, end = framed.convert_ids_to_tokens([framing.bos_id, framing.end_id])
    framed.bos_token, framed.eos_token, framed.pad_token = begin, end, end
    if isinstance(framed.chat_template, str):
        framed.chat_template = _say_as_before(framed.chat_template, tokenizer, framed)
    plain = encode(framed, "x")
    if encode(framed, "x", add_special_tokens=True) != ([] if begin_id is None else [begin_id]) + plain:
        single, pair = (["$A"], ["$A", "$B"]) if begin_id is None else ([begin, "$A"], [begin, "$A", begin, "$B"])
        special_tokens = [] if begin_id is None else [(begin, begin_id)]
        if framed.is_fast:
            framed.backend_tokenizer.post_processor = TemplateProcessing(
                single=single, pair=pair, special_tokens=special_tokens
            )
        else:
            asked = "nothing" if begin_id is None else begin
            logger.warning("the student's tokenizer does not put %s before a text by itself, as training did", asked)
    return framed
