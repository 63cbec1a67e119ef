import copy
import json

import pytest
from tests.support.tokenizers import tiny_tokenizer
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from liquid_llm.errors import ModelError
from liquid_llm.models.tokenizers import PROBE, encode, end_of_text_id, require_same_tokenizer, tokenizer_hash


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


def test_end_of_text_prefers_the_document_separator_to_a_turn_end():
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = "a"
    assert tokenizer.eos_token_id != 0
    assert end_of_text_id(tokenizer) == 0


def without_separator(**special):
    text = tiny_tokenizer().backend_tokenizer.to_str().replace("<|endoftext|>", "</doc>")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(text), **special)


def test_end_of_text_falls_back_to_eos_and_is_never_guessed():
    assert end_of_text_id(without_separator(eos_token="b")) == without_separator().convert_tokens_to_ids("b")
    with pytest.raises(ModelError, match=r"no end-of-text token.*eos_token"):
        end_of_text_id(without_separator())
