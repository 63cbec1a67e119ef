"""A teacher behind a server, tried before anything else: that it is the one meant, and says what is needed."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from liquid_llm.capture.served import ServedModel, ServedTeacher
from liquid_llm.config import CaptureConfig
from liquid_llm.errors import ModelError, StorageError, UsageError
from liquid_llm.identity import ModelIdentity
from liquid_llm.models.final_part import FinalPart, open_final_part
from liquid_llm.models.loading import open_config
from liquid_llm.models.sources import resolve
from liquid_llm.runtime import Choice, choose_dtype, torch_dtype
from liquid_llm.served.client import Refused, Server
from liquid_llm.served.protocol import (
    MOST_LOG_PROBS,
    Answer,
    BadAnswer,
    Card,
    OtherServer,
    ask_tokens,
    read_cards,
    read_fingerprint,
    read_tokens,
    read_version,
)
from liquid_llm.served.states import read_states
from liquid_llm.signal_store.codecs import Codec
from liquid_llm.teachers.online import require_context
from liquid_llm.wiring.teachers import name_in_store
from liquid_llm.wiring.tokenizers import TextTools
from liquid_llm.wiring.tokens import read_server_key

log = logging.getLogger(__name__)

SERVED = "served"  # what the revision of such a teacher begins with
PROBE = (
    "Tom has 17 apples and gives 5 to Ana.\n\n\tdef f(x):\n        return {x**2: 'naïve'}  # 1,234.5 %\n"
    "Ein Läufer eilt über 42 km — 東京からパリへ; Привет, мир! <b>🙂</b>\n"
)
"""A text of many kinds of words, over which tokenizers part and a model's layers show."""

_MOST_DISTANCE = 0.1  # nats, of the probe's own tokens on the mean: what bfloat16 makes is a tenth of that
_OWN = "use vLLM's own server, started as docs/capture.md says"
_CANNOT = "this server cannot be asked for what a teacher says"


def find_served(config: CaptureConfig, text: TextTools, token: str | None) -> ServedModel | None:
    """The model of ``--teacher_url``, looked at without its signal; None where no server is named.

    Raises:
        StorageError: the server cannot be reached, or fails; there is no folder where its files are to be.
        ModelError: it does not serve that model, or with another tokenizer.
    """
    asked = config.served
    if asked.url is None:
        return None
    assert config.teacher.stored_id is not None
    if asked.states_dir is not None and not Path(asked.states_dir).is_dir():
        raise StorageError("there is no such folder", where=f"--hidden_states_dir={asked.states_dir}")
    server = Server(asked.url, read_server_key())
    try:
        card = _choose_card(read_cards(server.get("/v1/models")), config)
    except (Refused, BadAnswer) as error:
        raise UsageError(_CANNOT, where=f"{server.url}/v1/models", got=error) from error
    version = _version(server)
    _check_tokenizer(server, card.name, text)
    words = [f"{card.engine}-{version}", *(word.strip() for word in (asked.words or "").split(","))]
    if not _is_named(card, config):  # one tokenizer is of many models
        words.append(f"model-{card.name}")
    if asked.states_dir is not None:  # the end of the model is of files here
        words.append(f"end-{resolve(config.teacher.stored_id, token=token).revision[:19]}")
    revision = ":".join([SERVED, *filter(None, words)])
    name = name_in_store(config.teacher.stored_id)
    assert name is not None
    most = None if card.max_tokens is None else card.max_tokens - 1  # one token at least is written behind a text
    identity, num_rows = ModelIdentity(name, revision, text.hash), _num_rows(config, token)
    return ServedModel(server, card.name, identity, text.vocab_size, most, None, asked.requests, num_rows)


def try_served(
    config: CaptureConfig,
    model: ServedModel,
    text: TextTools,
    codecs: Sequence[Codec],
    device: torch.device,
    token: str | None,
) -> tuple[ServedTeacher, dict[str, Choice]]:
    """The teacher, once it has answered about a text as it will about all, and the choices made for it.

    Args:
        codecs: of the stores that its signal goes to.

    Raises:
        UsageError: the server does not give what is asked for, which says what to start it with, or is asked about
            longer texts than it takes.
        ModelError: its hidden states are not of the model whose end is here, or not of its last block.
        StorageError: it cannot be reached, or its files are not where they should be.
    """
    require_context(model.max_tokens, config.data.seq_len, model.identity.id, "--seq_len")
    ids = text.tokenizer(PROBE, add_special_tokens=False)["input_ids"][: model.max_tokens]
    folder, choices = config.served.states_dir, {}
    if folder is None:
        for codec in codecs:
            if codec.temperature_range != (1.0, 1.0):
                raise UsageError(
                    "a server's log-probabilities tell the rest's mass at T = 1 alone",
                    where="--codec_options",
                    got=dict(codec.options),
                    remedy="leave the temperature out of --codec_options",
                )
        k = min(max(codec.most_ids for codec in codecs), model.vocab_size)
        model = _try_log_probs(model, ids, k)[0]
        teacher = ServedTeacher(model, k)
        choices["codec"] = Choice("topk", "log-probabilities tell k ids and the rest's mass at T = 1, and nothing else")
    else:
        assert config.teacher.stored_id is not None
        dtype = choose_dtype(config.teacher.precision, device.type)
        end = open_final_part(config.teacher.stored_id, dtype=torch_dtype(dtype.value), device=device, token=token)
        vocab_size = min(model.vocab_size, end.head.vocab_size)
        model, answer = _try_log_probs(replace(model, vocab_size=vocab_size), ids, 0, states=True)
        _check_end(config, model, end, ids, answer)
        teacher = ServedTeacher(model, 0, (Path(folder), end))
        choices["teacher_dtype"] = dtype
    log.info(
        "teacher %s is asked at %s (%s, %s): %s, %d texts at a time",
        model.name,
        model.server.url,
        model.identity.revision,
        model.fingerprint or "no fingerprint",
        "log-probabilities for codec topk at T=1" if folder is None else f"hidden states by {folder}",
        model.requests,
    )
    return teacher, choices


def _choose_card(cards: list[Card], config: CaptureConfig) -> Card:
    """The model that is meant. Raises ModelError where it is not served."""
    named, teacher = config.served.model, config.teacher.stored_id or ""
    for card in cards:
        if card.name == named if named else _is_named(card, config):
            return card
    served = ", ".join(card.name if card.name == card.root else f"{card.name} (of {card.root})" for card in cards)
    raise ModelError(
        "the server does not serve this model",
        where=f"--teacher_url={config.served.url}",
        got=served or "no models",
        expected=named or teacher,
        remedy="name the model as the server does with --served_model, if it is the one meant",
    )


def _is_named(card: Card, config: CaptureConfig) -> bool:
    """Whether ``--mc_teacher_id`` names this model itself, and not its tokenizer alone."""
    teacher = config.teacher.stored_id or ""
    return not {card.name, card.root}.isdisjoint({teacher, teacher.partition("@")[0]})


def _num_rows(config: CaptureConfig, token: str | None) -> int:
    """Rows of the teacher's embedding, as its configuration here says; 0 where there is none beside the tokenizer."""
    teacher_id = config.teacher.stored_id
    assert teacher_id is not None
    try:
        found = open_config(resolve(teacher_id, token=token), teacher_id, token)
    except ModelError:
        return 0
    return int(getattr(found.get_text_config(), "vocab_size", None) or 0)


def _version(server: Server) -> str:
    try:
        return read_version(server.get("/version"))
    except (Refused, BadAnswer):
        return "unknown"


def _check_tokenizer(server: Server, name: str, text: TextTools) -> None:
    """Raise ModelError unless the server's tokenizer and the one here make the same ids of a text."""
    where = f"{server.url}/tokenize"
    try:
        theirs = read_tokens(server.post("/tokenize", ask_tokens(name, PROBE)))
    except (Refused, BadAnswer) as error:
        problem = "the server does not say how it divides a text, so that its tokens cannot be compared"
        raise ModelError(problem, where=where, got=error, remedy=_OWN) from error
    ours = text.tokenizer(PROBE, add_special_tokens=False)["input_ids"]
    if theirs != ours:
        place = next((n for n, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), None)
        place = min(len(ours), len(theirs)) if place is None else place
        raise ModelError(
            "the server's tokenizer is another one",
            where=where,
            got=f"{theirs[place : place + 4]} at token {place} of a probe",
            expected=f"{ours[place : place + 4]}, as --mc_teacher_id has it",
            remedy="name the tokenizer of the model that is served",
        )


def _try_log_probs(model: ServedModel, ids: list[int], k: int, *, states: bool = False) -> tuple[ServedModel, Answer]:
    """The model with the fingerprint that its answers have, and the first of them."""
    where = f"{model.server.url}/v1/completions"
    try:
        told = model.post(ids, k, states=states)
        model = replace(model, fingerprint=read_fingerprint(told))
        answer = model.read(told, ids, k)
    except Refused as error:
        few = k > 0 and (error.parameter == "prompt_logprobs" or "logprobs" in error.message)
        raise UsageError(
            "the server refuses a question about log-probabilities",
            where=where,
            got=error,
            remedy=f"start the server with --max-logprobs {model.num_asked(k)}, or give "
            f"--topk={MOST_LOG_PROBS - model.num_asked(k) + k}, which servers allow by default"
            if few
            else _OWN,
        ) from error
    except BadAnswer as error:
        raise UsageError(_CANNOT, where=where, got=error, remedy=_OWN) from error
    except OtherServer as error:
        raise ModelError(
            "the server answers as another model than it was asked for",
            where=where,
            got=error,
            remedy="name the server itself, and nothing before it that calls its models otherwise",
        ) from error
    return model, answer


def _check_end(config: CaptureConfig, model: ServedModel, end: FinalPart, ids: list[int], answer: Answer) -> None:
    """Compare what the model's end makes of the server's states with what the server says of the same text.

    Raises:
        ModelError: they differ.
        StorageError: there are no states in the folder.
    """
    assert config.served.states_dir is not None
    folder = Path(config.served.states_dir)
    where = f"--hidden_states_dir={folder}"
    try:
        states = read_states(folder, answer.path, ids, end.hidden_size, seconds=10.0)
    except BadAnswer as error:
        raise ModelError("the server's hidden states are not this model's", where=where, got=error) from error
    hidden = end.head_input(states.to(end.head.weight.device))
    logs = torch.log_softmax(end.head.logits(hidden[:-1]).float(), dim=1).cpu()
    ours = logs.gather(1, torch.tensor(ids[1:]).unsqueeze(1)).squeeze(1).double()
    distance = float((ours - torch.from_numpy(answer.own)).abs().mean())
    if not distance <= _MOST_DISTANCE:
        raise ModelError(
            "what the server's hidden states give is not what the server says",
            where=where,
            got=f"{distance:.3g} nats apart on the mean of a probe's tokens",
            expected=f"at most {_MOST_DISTANCE}",
            remedy=f"start the server with eagle_aux_hidden_state_layer_ids [{end.num_layers}], the state after the "
            "last block before the final norm, and name the same model's files with --mc_teacher_id",
        )
    log.info("the server's hidden states give its own log-probabilities within %.2g nats", distance)
