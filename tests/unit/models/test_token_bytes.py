"""The bytes of tokens add up to the bytes of texts, whatever way a vocabulary writes them."""

import pytest
import torch
from tests.support.tokenizers import tiny_tokenizer, tokenizer_with

from liquid_llm.models.token_bytes import token_bytes
from liquid_llm.models.tokenizers import PROBE, encode

TEXTS = [text for text in PROBE if "<|" not in text]


def with_blanks():
    """A vocabulary as sentencepiece writes it: ▁ for a blank, single bytes where it has no character."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", "</s>", *(f"<0x{n:02X}>" for n in range(256)), *"▁abcdefghijklmnopqrstuvwxyzé界", "▁a", "▁th"]
    model = models.BPE(
        {piece: n for n, piece in enumerate(pieces)},
        [("▁", "a"), ("▁", "t")][:1],
        unk_token="<unk>",
        byte_fallback=True,
    )
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens([AddedToken("</s>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("make", [tiny_tokenizer, with_blanks])
def test_a_text_has_the_bytes_of_its_tokens(make):
    tokenizer = make()
    sizes = token_bytes(tokenizer, len(tokenizer) + 5)
    for text in TEXTS:
        assert int(sizes[encode(tokenizer, text)].sum()) == len(text.encode()), text


def test_special_tokens_and_padding_are_no_text():
    tokenizer = tokenizer_with(("<|endoftext|>", "<|im_end|>"), eos="<|im_end|>")
    sizes = token_bytes(tokenizer, 600)
    assert sizes[tokenizer.convert_tokens_to_ids("<|im_end|>")] == 0
    assert sizes[tokenizer.convert_tokens_to_ids("<|endoftext|>")] == 0
    assert sizes[len(tokenizer) :].sum() == 0
    assert sizes.dtype == torch.int64


def test_words_that_were_added_count_as_they_are_written():
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["né né"])
    number = tokenizer.convert_tokens_to_ids("né né")
    assert token_bytes(tokenizer, 600)[number] == len("né né".encode()) == 7
