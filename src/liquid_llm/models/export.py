"""Writing a student as a Hugging Face folder, in one step or not at all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from torch import Tensor

from liquid_llm import storage
from liquid_llm.models import card as cards

_WRITTEN = (
    *(cards.NAME, "config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.*"),
    *("vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece*.model"),
)
"""The names, as patterns, of what a model, its tokenizer and its card are saved in: files, and no folder."""


def save_student(
    model: Any,
    tokenizer: Any,
    folder: str | Path,
    card: str | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> Path:
    """Save ``model`` and ``tokenizer`` so that ``AutoModelForCausalLM`` and ``AutoTokenizer`` open ``folder`` anywhere.

    The folder appears complete or stays as it was; an earlier one is replaced. Weights keep their dtype.

    Args:
        card: the text of its ``README.md``, or None for none.
        weights: its state dict; None takes the model's own.

    Raises:
        StorageError: the disk is full, or the place cannot be written.
    """

    with storage.publish_folder(Path(folder)) as fresh:
        model.save_pretrained(fresh, state_dict=None if weights is None else dict(weights))
        tokenizer.save_pretrained(fresh)
        if card is not None:
            (fresh / cards.NAME).write_text(card, encoding="utf-8")
    return Path(folder)


def find_foreign(names: Iterable[str]) -> list[str]:
    """Those of ``names`` that no export writes, in order; of what lies in a subfolder the subfolder, ``name/``."""
    tops = {head + slash for head, slash, _ in (name.partition("/") for name in names)}
    return sorted(top for top in tops if not any(fnmatchcase(top, pattern) for pattern in _WRITTEN))
