"""How a record becomes tokens, and which of them are learnt.

    completion   of a prompt, or what the assistant says in a conversation: that alone is learnt, unless all is wanted.
                 Of a conversation whose first messages are the prompt, what the assistant says after them
    piece        a run of a record's text, learnt or not; the border of two pieces is always a border of two tokens

A prompt and its completion are cut where they meet, so that a student is trained on the very ids that it is asked with.
A conversation is written out by a chat template, which says itself what the assistant generates
(``{% generation %}``), or is asked what it writes before and after each of the assistant's turns.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

from liquid_llm.data.types import TextRecord
from liquid_llm.errors import UsageError, first_line

COMPLETION, ALL = "completion", "all"
ASSISTANT = "assistant"
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

FIXED_DATE = datetime(2024, 7, 26)
"""When templates are written out that print today's date, that is call ``strftime_now``."""
_DATED = "strftime_now"
_DIRECTIVES = [f"%{letter}" for letter in "aAbBcCdDeFgGhHIjmMprRSTuUVwWxXyY"] + ["%-d", "%-m", "%-H", "%-I"]
# transformers hands templates no functions, so a macro of its name puts the clock away. The line's end goes with the
# tag before it, and what follows begins a line, as in the template alone.
_WITHOUT_CLOCK = (
    "{% macro strftime_now(format) %}{{ format"
    + "".join(f" | replace('{one}', '{FIXED_DATE.strftime(one)}')" for one in _DIRECTIVES)
    + " }}{% endmacro %}\n"
)

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")

Piece = tuple[str, bool]
Message = Mapping[str, Any]


class LearningError(ValueError):
    """A record whose learnt tokens cannot be told; the message says why, ``remedy`` what helps."""

    def __init__(self, problem: str, remedy: str | None = None) -> None:
        super().__init__(problem)
        self.remedy = remedy


@dataclass(frozen=True)
class Learning:
    """What is learnt of a record that has a prompt or messages.

    Attributes:
        learn: ``completion`` or ``all``.
        chat_template: Jinja text that writes conversations out; None: there is none.
    """

    learn: str = COMPLETION
    chat_template: str | None = None

    @property
    def key(self) -> list[object]:
        """Plain values that change when the tokens of such records, or what is learnt of them, do."""
        template = self.chat_template
        if template is None:
            return [self.learn, None]
        date = [FIXED_DATE.date().isoformat()] if _DATED in template else []
        return [self.learn, hashlib.sha256(template.encode()).hexdigest(), *date]


USUAL = Learning()


class Encoded(NamedTuple):
    """A record's tokens, and which of them are learnt: None where all are."""

    input_ids: list[int]
    learnt: list[bool] | None


class Encoder:
    """Turns records into tokens.

    Args:
        tokenizer: of transformers.
        learning: what is learnt.
    """

    def __init__(self, tokenizer: Any, learning: Learning) -> None:
        self._tokenizer = tokenizer
        self._learning = learning

    def pieces(self, record: TextRecord) -> list[Piece]:
        """The text of a record in pieces, none of them empty.

        Raises:
            LearningError: there is no chat template, it refuses the conversation, or it does not tell what the
                assistant says.
            UsageError: it is no Jinja text.
        """
        found: list[Piece] = [(record.text, True)]
        if record.messages is not None:
            found = self._conversation(record.messages, record.prompt_messages)
        elif record.prompt is not None:
            found = [(record.prompt, False), (record.text, True)]
        if self._learning.learn == ALL:
            found = [("".join(text for text, _ in found), True)]
        return [piece for piece in found if piece[0]]

    def ask(self, messages: Sequence[Message]) -> str:
        """A conversation written out up to where the assistant is to speak.

        Raises:
            LearningError: there is no chat template, or it refuses the conversation.
        """
        if self._learning.chat_template is None:
            raise LearningError("there is no chat template to write messages out with", "name one: --chat_template")
        return self._render(messages, opened=True)[0]

    def encode(self, records: Sequence[Sequence[Piece]]) -> list[Encoded | LearningError]:
        """The tokens of each record, given its pieces: of the whole text, cut where pieces meet.

        Where a tokenizer would join the end of one piece and the beginning of the next in one token, the pieces are
        tokenised one by one, which the tokens decoded must bear out.
        """
        texts = ["".join(text for text, _ in pieces) for pieces in records]
        apart = [text for pieces in records if len(pieces) > 1 for text, _ in pieces]
        ids = iter(self._ids([*texts, *apart]))
        wholes = [next(ids) for _ in texts]
        found: list[Encoded | LearningError] = []
        for pieces, whole in zip(records, wholes, strict=True):
            if len(pieces) == 1:
                found.append(Encoded(whole, None if pieces[0][1] else [False] * len(whole)))
            else:
                found.append(self._join(pieces, whole, [next(ids) for _ in pieces]))
        return found

    def end_of_turn(self) -> int | None:
        """The token of its own that ends the assistant's turns; None where there is no such one."""
        said = ({"role": "user", "content": "x"}, {"role": ASSISTANT, "content": "x"})
        try:
            (turn,) = (text for text, is_learnt in self._conversation(said) if is_learnt)
        except (LearningError, UsageError, ValueError):  # no template, or one that will not say
            return None
        last = self._ids([_without_gap(turn, "x")])[0][-1]  # marks may take in the blanks behind the end
        return last if last in self._tokenizer.added_tokens_decoder else None

    def _ids(self, texts: list[str]) -> list[list[int]]:
        # verbose=False: a text longer than the model is no mistake here, windows are cut later
        options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
        ids: list[list[int]] = self._tokenizer(texts, **options)["input_ids"] if texts else []
        return ids

    def _join(self, pieces: Sequence[Piece], whole: list[int], apart: list[list[int]]) -> Encoded | LearningError:
        joined = [token for ids in apart for token in ids]
        ends = list(accumulate(map(len, apart)))
        if joined != whole:
            # A tokenizer that puts a blank before each text does not do so inside one: there the beginnings tell.
            texts = list(accumulate(text for text, _ in pieces))
            beginnings = self._ids(texts[:-1])
            if all(whole[: len(one)] == one for one in beginnings):
                joined, ends = whole, [*map(len, beginnings), len(whole)]
            elif self._decode(joined) != self._decode(whole):
                return LearningError(
                    "the tokenizer does not cut this text where what is learnt begins or ends",
                    "give --learn=all, or a model with another tokenizer",
                )
        learnt = [flag for (_, flag), count in zip(pieces, _differences(ends), strict=True) for _ in range(count)]
        return Encoded(joined, learnt)

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    # ------------------------------------------------------------------------------------------------- conversations

    def _conversation(self, messages: Sequence[Message], prompt_messages: int = 0) -> list[Piece]:
        template = self._learning.chat_template
        if template is None:
            raise LearningError("there is no chat template to write messages out with", "name one: --chat_template")
        if self._learning.learn == ALL:
            return [(self._render(messages)[0], True)]
        marked = _GENERATION.search(template) is not None
        if marked:
            whole, spans = self._render(messages, marks=True)
            spans = _after_prompt(spans, messages, prompt_messages)
        else:
            whole, spans = self._turns(messages, prompt_messages)
        borders = [0, *(border for span in spans for border in span), len(whole)]
        return [(whole[a:b], n % 2 == 1) for n, (a, b) in enumerate(pairwise(borders))]

    def _turns(self, messages: Sequence[Message], prompt_messages: int) -> tuple[str, list[tuple[int, int]]]:
        """A conversation written out, and where the assistant's turns lie in it, their ends of turn included; those of
        the prompt are left out.

        A turn is what the template adds to all before it and the words that open a turn. It must add the same, and to
        the same, whatever follows.
        """
        whole, _ = self._render(messages)
        spans = []
        for number, message in enumerate(messages):
            if message["role"] != ASSISTANT or number < prompt_messages:
                continue
            if number == 0:
                raise LearningError("the assistant speaks first: nothing says where its turn begins", _MARKS)
            before, _ = self._render(messages[:number], opened=True)
            so_far, _ = self._render(messages[: number + 1])
            if not (whole.startswith(so_far) and so_far.startswith(before)):
                raise LearningError(
                    f"the chat template writes turn {number + 1} in another way once more follows", _MARKS
                )
            spans.append((len(before), len(before) + len(_without_gap(so_far[len(before) :], message["content"]))))
        return whole, spans

    def _render(
        self, messages: Sequence[Message], *, opened: bool = False, marks: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        """A conversation written out, and with ``marks`` where the template says the assistant generates.

        ``apply_chat_template`` gives masks of tokens for that, which reach to the end of the text where a token's
        offsets leave out a blank: here tokens are made from the places in the text.
        """
        from jinja2 import TemplateError, TemplateSyntaxError
        from transformers.utils.chat_template_utils import render_jinja_template

        template = self._learning.chat_template or ""
        plain = [{name: value for name, value in one.items() if value is not None} for one in messages]
        try:
            (text,), spans = render_jinja_template(
                conversations=[plain],
                chat_template=_WITHOUT_CLOCK + template if _DATED in template else template,
                add_generation_prompt=opened,
                return_assistant_tokens_mask=marks,
                **self._tokenizer.special_tokens_map,
            )
        except TemplateSyntaxError:
            require_template(template, "the tokenizer's chat template")
            raise
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            raise LearningError(f"the chat template refuses the conversation ({error})") from error
        return text, [(start, end) for start, end in spans[0]] if marks else []


def require_template(template: str, where: str) -> None:
    """Refuse a chat template that is no Jinja text; what it makes of a conversation is seen when it writes one.

    Raises:
        UsageError: with the line.
    """
    from jinja2 import TemplateSyntaxError
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        render_jinja_template(conversations=[], chat_template=template)  # it knows the tags that transformers adds
    except TemplateSyntaxError as error:
        raise UsageError(
            f"the chat template is no Jinja text ({first_line(error)})",
            where=f"{where}, line {error.lineno}",
            got=first_line(template.splitlines()[error.lineno - 1].strip()) if template else None,
            remedy="correct it, or name another: --chat_template",
        ) from error


_MARKS = "name a template with {% generation %} marks: --chat_template, or give --learn=all"


def _after_prompt(
    spans: list[tuple[int, int]], messages: Sequence[Message], prompt_messages: int
) -> list[tuple[int, int]]:
    """The marks of the assistant's turns without those in the prompt, which come first.

    Raises:
        LearningError: there are such, and the template does not mark each turn once.
    """
    turns = [number for number, message in enumerate(messages) if message["role"] == ASSISTANT]
    in_prompt = sum(number < prompt_messages for number in turns)
    if in_prompt and len(spans) != len(turns):
        raise LearningError(
            f"the chat template marks {len(spans)} runs of text and the assistant speaks {len(turns)} times, "
            f"{in_prompt} of them in the prompt",
            "name a template that marks each turn once: --chat_template, or give --learn=all",
        )
    return spans[in_prompt:]


def _without_gap(turn: str, content: str) -> str:
    """A turn without the blanks behind its end-of-turn words; what has none keeps its blanks, which then end it."""
    content = content.strip()
    behind = turn[turn.find(content) + len(content) :] if content in turn else turn
    return turn.rstrip() if behind.strip() else turn


def _differences(ends: Sequence[int]) -> list[int]:
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]
