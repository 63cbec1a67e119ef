"""The one tokenizer of a run, and that all its models share it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from liquid_llm.config import RunConfig
from liquid_llm.errors import ModelError, UsageError
from liquid_llm.framing import Framings
from liquid_llm.models.loading import load_tokenizer
from liquid_llm.models.student import PRESETS
from liquid_llm.models.tokenizers import frame_tokenizer, highest_id, require_same_tokenizer, tokenizer_hash
from liquid_llm.wiring.framing import Speaker, choose_framings, recorded_framing
from liquid_llm.wiring.start import Start


@dataclass(frozen=True)
class TextTools:
    """The tokenizer and what belongs to it."""

    tokenizer: Any
    hash: str
    framings: Framings
    vocab_size: int

    @staticmethod
    def of(tokenizer: Any, framings: Framings) -> TextTools:
        """What a run needs of a tokenizer."""
        return TextTools(tokenizer, tokenizer_hash(tokenizer), framings, max(len(tokenizer), highest_id(tokenizer) + 1))

    def student_tokenizer(self) -> Any:
        """The tokenizer that the student is exported with: it names and puts what the student has seen."""
        return frame_tokenizer(self.tokenizer, self.framings.student)


def choose_tokenizer(config: RunConfig, start: Start, token: str | None) -> TextTools:
    """The one tokenizer of a run: the student's own if it came with one, else the online teacher's or the stored one's.

    Raises:
        ModelError: two of them differ (naming both), or none can be found.
    """
    sources: list[tuple[str, str]] = []
    if start.origin.tokenizer_folder is not None:
        sources.append((start.origin.description, start.origin.tokenizer_folder))
    named = [] if config.teacher.online_id is None else [config.teacher.online_id]
    sources += [(f"online teacher {model_id}", model_id) for model_id in dict.fromkeys([*named, *config.source.online])]
    if not sources and config.teacher.stored_id is not None:
        # Otherwise it is not needed here: the store itself says which tokenizer its signal is of.
        sources.append((f"stored teacher {config.teacher.stored_id}", config.teacher.stored_id))
    if not sources:
        if config.student.spec in PRESETS or config.student.spec.endswith(".json"):
            raise UsageError(
                "nothing says which tokenizer to use",
                where=f"--student={config.student.spec}",
                got="a shape without a tokenizer, and no teacher",
                remedy=f"give --{config.teacher_option}, or a Hugging Face model or folder as --student",
            )
        sources.append((f"--student={config.student.spec}", config.student.spec))
    speakers = {model_id: Speaker(name, load_tokenizer(model_id, token=token)) for name, model_id in sources}
    own, *others = speakers.values()
    for other in others:
        require_same_tokenizer(own.tokenizer, own.name, other.tokenizer, other.name)
    recorded = recorded_framing(start, config.source, own.tokenizer)
    text = TextTools.of(own.tokenizer, choose_framings(config.data.begin_token, config.source, speakers, own, recorded))
    known = start.origin.metadata.tokenizer_hash if start.origin.metadata is not None else None
    if known is not None and known != text.hash:
        raise ModelError(
            "the checkpoint was trained with another tokenizer",
            where=start.origin.description,
            got=known[:16],
            expected=f"{text.hash[:16]} of {own.name}",
            remedy="use a teacher with the student's tokenizer",
        )
    return text
