"""Writing a finished model as a Hugging Face folder, in one step or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from liquid_llm import storage


def save_student(model: Any, tokenizer: Any, folder: str | Path) -> Path:
    """Save ``model`` and ``tokenizer`` so that ``AutoModelForCausalLM`` and ``AutoTokenizer`` open ``folder`` anywhere.

    The folder appears complete or stays as it was; an earlier one is replaced. Weights keep their dtype.

    Raises:
        StorageError: the disk is full, or the place cannot be written.
    """

    with storage.publish_folder(Path(folder)) as fresh:
        model.save_pretrained(fresh)
        tokenizer.save_pretrained(fresh)
    return Path(folder)
