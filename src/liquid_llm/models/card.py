"""The card of an exported student: ``README.md`` in the form the Hugging Face hub reads."""

from __future__ import annotations

from collections.abc import Mapping

NAME = "README.md"

_CARD = """---
library_name: transformers
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


def write_card(title: str, facts: Mapping[str, object]) -> str:
    """The text of a card.

    Args:
        title: what the student is called.
        facts: what is known of it, in words: name -> value; None is left out.
    """
    rows = [f"| {_in_cell(name)} | {_in_cell(value)} |" for name, value in facts.items() if value is not None]
    return _CARD.format(title=_in_cell(title), rows="\n".join(rows))


def _in_cell(value: object) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")
