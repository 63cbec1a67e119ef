"""Writing a student as a Hugging Face folder, in one step or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from liquid_llm import storage
from liquid_llm.models import card as cards


def save_student(model: Any, tokenizer: Any, folder: str | Path, card: str | None = None) -> Path:
    """Save ``model`` and ``tokenizer`` so that ``AutoModelForCausalLM`` and ``AutoTokenizer`` open ``folder`` anywhere.

    The folder appears complete or stays as it was; an earlier one is replaced. Weights keep their dtype.

    Args:
        card: the text of its ``README.md``, or None for none.

    Raises:
        StorageError: the disk is full, or the place cannot be written.
    """

    with storage.publish_folder(Path(folder)) as fresh:
        model.save_pretrained(fresh)
        tokenizer.save_pretrained(fresh)
        if card is not None:
            (fresh / cards.NAME).write_text(card, encoding="utf-8")
    return Path(folder)
