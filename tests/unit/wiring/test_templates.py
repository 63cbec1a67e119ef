"""Where a chat template comes from."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from tests.support.gcs import Bucket
from tests.support.models import tiny_config, tiny_model
from tests.support.tokenizers import tiny_tokenizer

from liquid_llm import storage
from liquid_llm.data.learning import CHATML, Encoder, Learning
from liquid_llm.data.types import TextRecord
from liquid_llm.errors import StorageError, UsageError
from liquid_llm.wiring.templates import find_chat_template, stop_at_turns


def save(tokenizer: Any, folder: Path) -> None:
    """A model's folder as far as a tokenizer needs it."""
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(tiny_config("llama", 512).to_json_string())


def test_a_template_is_a_name_a_file_or_a_tokenizers_own(tmp_path: Path, gcs: Bucket) -> None:
    tokenizer = tiny_tokenizer()
    assert find_chat_template(None, tokenizer) is None
    assert find_chat_template("chatml", tokenizer) == CHATML
    tokenizer.chat_template = "own"
    save(tokenizer, tmp_path / "model")
    assert find_chat_template(None, tokenizer) == "own"
    assert find_chat_template(str(tmp_path / "model"), tiny_tokenizer()) == "own"
    (tmp_path / "mine.jinja").write_text("from a file: ü")
    (tmp_path / "marked.jinja").write_text(
        "{% generation %}{% endgeneration %}{% for m in messages %}{% break %}{% endfor %}"
    )
    assert find_chat_template(str(tmp_path / "marked.jinja"), tokenizer) == (tmp_path / "marked.jinja").read_text()
    assert find_chat_template(str(tmp_path / "mine.jinja"), tokenizer) == "from a file: ü"
    storage.write_bytes(f"{gcs.uri}/mine", b"from a bucket")
    assert find_chat_template(f"{gcs.uri}/mine", tokenizer) == "from a bucket"
    tokenizer.chat_template = {"tool_use": "other", "default": "the one"}
    assert find_chat_template(None, tokenizer) == "the one"


def test_what_is_no_template_is_refused(tmp_path: Path) -> None:
    save(tiny_tokenizer(), tmp_path / "model")
    with pytest.raises(UsageError, match="the tokenizer has no chat template"):
        find_chat_template(str(tmp_path / "model"), tiny_tokenizer())
    (tmp_path / "bytes.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="the chat template is not text"):
        find_chat_template(str(tmp_path / "bytes.jinja"), tiny_tokenizer())
    missing = tmp_path / "not-there.jinja"
    for name, kind, parts in (
        (str(missing), UsageError, f"no such file; got {missing}; expected chatml, a"),
        ("memory://none/a.jinja", StorageError, "the chat template cannot be read: "),
        ("chatmll", UsageError, "no such chat template; got "),
        ("no such/model at all", UsageError, "no such chat template; got no such model; expected chatml, a Jinja file"),
    ):
        with pytest.raises(kind, match=re.escape(f"--chat_template={name}: {parts}")):
            find_chat_template(name, tiny_tokenizer())


@pytest.mark.parametrize(
    ("template", "line", "got"),
    [
        ("{% for m in messages %}\n{{ m['content'] }}\n{% endfo %}\n", 3, "{% endfo %}"),
        ("{% if %}", 1, "{% if %}"),
        ("{{ strftime_now('%Y') }}\n{{ messages[ }}", 2, "{{ messages[ }}"),
        ("{% for m in messages %}", 1, "{% for m in messages %}"),
    ],
)
def test_a_template_with_a_slip_of_the_pen_is_named_with_its_line(
    tmp_path: Path, template: str, line: int, got: str
) -> None:
    """Before any record is read where an option names it; where a tokenizer has it, once it is used."""
    file = tmp_path / "mine.jinja"
    file.write_text(template)
    with pytest.raises(UsageError, match="the chat template is no Jinja text") as refused:
        find_chat_template(str(file), tiny_tokenizer())
    assert (refused.value.where, refused.value.got) == (f"--chat_template={file}, line {line}", got)
    encoder = Encoder(tiny_tokenizer(), Learning(chat_template=template))
    with pytest.raises(UsageError) as refused:
        encoder.pieces(TextRecord("", "chat", "1", None, ({"role": "user", "content": "hi"},)))
    assert (refused.value.where, refused.value.got) == (f"the tokenizer's chat template, line {line}", got)
    assert encoder.end_of_turn() is None


def test_a_student_of_conversations_stops_at_the_end_of_a_turn() -> None:
    tokenizer, model = tiny_tokenizer(), tiny_model("llama", vocab_size=520)
    model.generation_config.eos_token_id = 0
    tokenizer.chat_template = CHATML
    stop_at_turns(model, tokenizer)
    assert model.generation_config.eos_token_id == 0, "this vocabulary has no token that ends a turn"
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    tokenizer.chat_template = None
    stop_at_turns(model, tokenizer)
    assert model.generation_config.eos_token_id == 0, "no conversation was trained on"
    tokenizer.chat_template = CHATML
    stop_at_turns(model, tokenizer)
    assert model.generation_config.eos_token_id == [0, tokenizer.convert_tokens_to_ids("<|im_end|>")]
