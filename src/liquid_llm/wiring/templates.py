"""The chat template by which a run writes conversations out, and the token by which it ends turns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from liquid_llm import storage
from liquid_llm.data.learning import CHATML, Encoder, Learning, require_template
from liquid_llm.errors import ModelError, StorageError, UsageError
from liquid_llm.models.loading import load_tokenizer

_FILES = (".jinja", ".jinja2", ".j2", ".txt")
_EXPECTED = "chatml, a Jinja file, or a Hugging Face id or folder whose tokenizer has a template"


def find_chat_template(name: str | None, tokenizer: Any, token: str | None = None) -> str | None:
    """The chat template that ``--chat_template`` names: Jinja text, or None where nothing is named or there.

    Raises:
        UsageError: the name is of no template, or its template is no Jinja text.
        StorageError: a URL cannot be read.
    """
    if name is None:
        return _template_of(tokenizer)
    where = f"--chat_template={name}"
    if name == "chatml":
        return CHATML
    if name.endswith(_FILES) or storage.is_remote(name) or Path(name).is_file():
        template = _read(name, where)
    else:
        try:
            found = _template_of(load_tokenizer(name, token=token))
        except ModelError as error:
            raise UsageError("no such chat template", where=where, got=error.problem, expected=_EXPECTED) from error
        if found is None:
            raise UsageError("the tokenizer has no chat template", where=where, expected=_EXPECTED)
        template = found
    require_template(template, where)
    return template


def _read(name: str, where: str) -> str:
    """The text of a template's file."""
    if not storage.is_remote(name) and not Path(name).is_file():
        raise UsageError("no such file", where=where, got=Path(name).absolute(), expected=_EXPECTED)
    try:
        return bytes(storage.read_small(name)).decode()
    except UnicodeDecodeError as error:
        raise UsageError("the chat template is not text", where=where) from error
    except StorageError as error:
        problem, got = f"the chat template cannot be read: {error.problem}", error.got
        raise StorageError(problem, where=where, got=got, expected=error.expected, remedy=error.remedy) from error


def stop_at_turns(model: Any, tokenizer: Any) -> None:
    """Let a student whose tokenizer has a chat template stop at the end of a turn, as at the end of a text."""
    turn_id = Encoder(tokenizer, Learning(chat_template=_template_of(tokenizer))).end_of_turn()
    if turn_id not in (None, tokenizer.eos_token_id) and model.generation_config is not None:
        model.generation_config.eos_token_id = [tokenizer.eos_token_id, turn_id]


def _template_of(tokenizer: Any) -> str | None:
    """A tokenizer's chat template; of several that have names, the one named default."""
    template = getattr(tokenizer, "chat_template", None)
    found = template.get("default") if isinstance(template, dict) else template
    return None if found is None else str(found)
