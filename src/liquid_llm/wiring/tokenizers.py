"""The one tokenizer of a run, that all its models share it, and the chat template that goes with it."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any

from liquid_llm.config import DataConfig, RunConfig
from liquid_llm.data.learning import USUAL, Learning
from liquid_llm.errors import ModelError, UsageError
from liquid_llm.framing import Framings
from liquid_llm.models.loading import load_tokenizer
from liquid_llm.models.spec import parse_student
from liquid_llm.models.student import PRESETS
from liquid_llm.models.tokenizers import frame_tokenizer, highest_id, require_same_tokenizer, tokenizer_hash
from liquid_llm.wiring.framing import Speaker, choose_framings, recorded_framing
from liquid_llm.wiring.start import Start
from liquid_llm.wiring.templates import find_chat_template

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TextTools:
    """The tokenizer and what belongs to it.

    Attributes:
        learning: what is learnt of records with a prompt or messages, and how messages are written out.
    """

    tokenizer: Any
    hash: str
    framings: Framings
    vocab_size: int
    learning: Learning = USUAL

    @staticmethod
    def of(tokenizer: Any, framings: Framings) -> TextTools:
        """What a run needs of a tokenizer."""
        return TextTools(tokenizer, tokenizer_hash(tokenizer), framings, max(len(tokenizer), highest_id(tokenizer) + 1))

    def student_tokenizer(self) -> Any:
        """The tokenizer that the student is exported with: it names and puts what the student has seen."""
        return frame_tokenizer(self.tokenizer, self.framings.student)

    def learn(self, data: DataConfig, token: str | None) -> TextTools:
        """The same with the learning that ``data`` asks for; see ``find_chat_template`` for the errors."""
        template = find_chat_template(data.chat_template, self.tokenizer, token)
        return replace(self, learning=Learning(data.learn, template))

    def keep_chat_template(self, is_trained: bool) -> None:
        """Let the tokenizer, which the student is exported with, have a chat template only if one was trained with."""
        self.tokenizer.chat_template = self.learning.chat_template if is_trained else None


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
    student = parse_student(config.student.spec)
    needed = start.kind == "fresh" or not sources
    if student.teacher is not None and needed and all(model_id != student.teacher for _, model_id in sources):
        sources.append((f"--student={config.student.spec}", student.teacher))
    if not sources and config.teacher.stored_id is not None:
        # Otherwise it is not needed here: the store itself says which tokenizer its signal is of.
        sources.append((f"stored teacher {config.teacher.stored_id}", config.teacher.stored_id))
    if not sources:
        if student.base in PRESETS or student.base.endswith(".json"):
            raise UsageError(
                "nothing says which tokenizer to use",
                where=f"--student={config.student.spec}",
                got="a shape without a tokenizer, and no teacher",
                remedy=f"give --{config.teacher_option}, or a Hugging Face model or folder as --student",
            )
        sources.append((f"--student={config.student.spec}", student.base))
    speakers = {model_id: Speaker(name, load_tokenizer(model_id, token=token)) for name, model_id in sources}
    own, *others = speakers.values()
    for other in others:
        require_same_tokenizer(own.tokenizer, own.name, other.tokenizer, other.name)
    recorded = recorded_framing(start, config.source, own.tokenizer)
    framings = choose_framings(config.data.begin_token, config.source, speakers, own, recorded)
    text = TextTools.of(own.tokenizer, framings).learn(config.data, token)
    known = start.origin.metadata.tokenizer_hash if start.origin.metadata is not None else None
    if known is not None and known != text.hash:
        raise ModelError(
            "the checkpoint was trained with another tokenizer",
            where=start.origin.description,
            got=known[:16],
            expected=f"{text.hash[:16]} of {own.name}",
            remedy="use a teacher with the student's tokenizer",
        )
    if start.goes_on and start.origin.metadata is not None:
        known_learning = start.origin.metadata.run.get("learning")
        if known_learning not in (None, text.learning.key):
            log.warning("another --learn or chat template than the run had so far, whose prompts were learnt otherwise")
    return text
