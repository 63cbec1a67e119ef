"""A small real tokenizer, trained on the spot on pages of Python's own documentation."""

from __future__ import annotations

from functools import cache
from pydoc_data.topics import topics
from typing import Any


@cache
def _serialized(vocab_size: int) -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([topics[name] for name in sorted(topics)[:24]], trainer)
    return str(tokenizer.to_str())


def tiny_tokenizer(vocab_size: int = 512) -> Any:
    """A byte-level BPE ``PreTrainedTokenizerFast`` of ``vocab_size`` tokens (257 or more); ``<|endoftext|>`` is id 0.

    Each call returns a new object, so that tests may change its settings.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_serialized(vocab_size)),
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        unk_token="<|endoftext|>",
    )


def tokenizer_with(
    specials: tuple[str, ...], *, eos: str | None, bos: str | None = None, adds_bos: bool = False
) -> Any:
    """The same tokenizer with these special tokens for ``<|endoftext|>`` (the first) and behind its vocabulary.

    Args:
        eos, bos: roles, each one of ``specials`` or None.
        adds_bos: it puts ``bos`` before a text, as Llama's and Gemma's do.
    """
    from tokenizers import AddedToken, Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer.from_str(_serialized(512).replace("<|endoftext|>", specials[0]))
    backend.add_special_tokens([AddedToken(token, special=True) for token in specials])
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    roles = {name: token for name, token in (("bos_token", bos), ("eos_token", eos)) if token is not None}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **roles)


def tokenizers_of_all_kinds() -> dict[str, Any]:
    """Tokenizers as the well-known families have them, small."""
    llama = ("<|end_of_text|>", "<|begin_of_text|>", "<|eot_id|>")
    return {
        "gpt2": tiny_tokenizer(),
        "smollm2-instruct": tokenizer_with(
            ("<|endoftext|>", "<|im_start|>", "<|im_end|>"), bos="<|im_start|>", eos="<|im_end|>"
        ),
        "llama3": tokenizer_with(llama, bos="<|begin_of_text|>", eos="<|end_of_text|>", adds_bos=True),
        "llama3-instruct": tokenizer_with(llama, bos="<|begin_of_text|>", eos="<|eot_id|>", adds_bos=True),
        "llama2": tokenizer_with(("</s>", "<s>"), bos="<s>", eos="</s>", adds_bos=True),
        "gemma-instruct": tokenizer_with(
            ("<eos>", "<bos>", "<end_of_turn>"), bos="<bos>", eos="<end_of_turn>", adds_bos=True
        ),
        "unknown": tokenizer_with(("<stop>",), eos="<stop>"),
    }


class CountingTokenizer:
    """The tiny tokenizer, which counts the texts that it is given."""

    texts = 0

    def __call__(self, text: list[str], **options: Any) -> Any:
        self.texts += len(text)
        return tiny_tokenizer()(text, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(tiny_tokenizer(), name)
