"""The card of an exported student: ``README.md`` in the form the Hugging Face hub reads.

front matter   YAML between two lines of dashes, whose keys the hub knows: base_model, datasets, license, tags, ...
section        a heading with a table or sentences below it
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import yaml

NAME = "README.md"
TAGS = ("distillation", "knowledge-distillation", "liquid-llm")

_USE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER")
model = AutoModelForCausalLM.from_pretrained("FOLDER")
```"""


@dataclass(frozen=True)
class Section:
    """A part of a card.

    Attributes:
        title: its heading.
        rows: of its table, each as many values as ``heads``; None is shown as a dash.
        heads: of the table's columns.
        text: Markdown below it.
    """

    title: str
    rows: Sequence[Sequence[object]] = ()
    heads: Sequence[str] = ("", "")
    text: str = ""

    @staticmethod
    def of_facts(title: str, facts: Mapping[str, object], text: str = "") -> Section:
        """One of names and their values; what is None is left out."""
        return Section(title, [row for row in facts.items() if row[1] is not None], text=text)


@dataclass(frozen=True)
class Card:
    """What is said of a student.

    Attributes:
        title: what it is called.
        front: keys of the front matter beside those that every student has; None and empty values are left out.
        sections: in their order; one without rows and text is left out.
    """

    title: str
    front: Mapping[str, object] = field(default_factory=dict)
    sections: Sequence[Section] = ()

    def render(self) -> str:
        """The text of the card."""
        every = {**self.front, "library_name": "transformers", "pipeline_tag": "text-generation", "tags": list(TAGS)}
        kept = {name: value for name, value in every.items() if value not in (None, [], {})}
        front = yaml.safe_dump(kept, width=1_000)
        parts = [f"# {in_cell(self.title)}", "A small causal language model, distilled with liquid-llm."]
        for section in (*self.sections, Section("Use", text=_USE)):
            if section.rows or section.text:
                parts += [f"## {section.title}", *filter(None, (_table(section), section.text))]
        return f"---\n{front}---\n\n" + "\n\n".join(parts) + "\n"


def _table(section: Section) -> str:
    if not section.rows:
        return ""
    lines = [section.heads, ["---"] * len(section.heads), *section.rows]
    return "\n".join(f"| {' | '.join(in_cell(value) for value in line)} |" for line in lines)


def in_cell(value: object) -> str:
    """A value as one cell of a Markdown table, or as a heading."""
    return "-" if value is None else " ".join(str(value).split()).replace("|", "\\|")
