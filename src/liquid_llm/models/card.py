"""The card of an exported student: ``README.md`` in the form the Hugging Face hub reads."""

from __future__ import annotations

import json
from collections.abc import Mapping

NAME = "README.md"

_CARD = """---
{base}library_name: transformers
pipeline_tag: text-generation
tags:
- distillation
- liquid-llm
---

# {title}

A small causal language model, distilled with liquid-llm.

| | |
|---|---|
{rows}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER")
model = AutoModelForCausalLM.from_pretrained("FOLDER")
```
"""


def write_card(title: str, facts: Mapping[str, object], base_model: str | None = None) -> str:
    """The text of a card.

    Args:
        title: what the student is called.
        facts: what is known of it, in words: name -> value; None is left out.
        base_model: the model of the Hugging Face hub whose weights it began with, where there was one.
    """
    rows = [f"| {_in_cell(name)} | {_in_cell(value)} |" for name, value in facts.items() if value is not None]
    base = "" if base_model is None else f"base_model: {json.dumps(base_model)}\n"
    return _CARD.format(base=base, title=_in_cell(title), rows="\n".join(rows))


def _in_cell(value: object) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")
