"""What an OpenAI-compatible server is asked, and how its answers are read: names of vLLM 0.33.0, and nothing else's.

    GET /v1/models     the models served: name, where the weights came from, most tokens of a prompt and what follows
    GET /version       the engine's version
    POST /tokenize     the ids of a text
    POST /v1/completions   with ``prompt`` as ids and ``prompt_logprobs`` = K: of each token of the prompt but the
                           first the K likeliest ids there, and the token's own, each with its log-probability

Prompt log-probabilities are at T = 1 whatever the request says: no setting of sampling touches them. They are of the
model's whole vocabulary, in float32 of logits in the model's own precision.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

MOST_LOG_PROBS = 20
"""What a server gives at most where it was not started otherwise (``--max-logprobs``)."""

_ENTRY_BYTES = 512  # an entry is about 80 bytes; a token's text may be long, and each of its characters written as six
_FIXED_BYTES = 2**20
_ROUNDING = 1e-3  # by which probabilities may add up to more than 1


class BadAnswer(ValueError):
    """An answer that cannot be what a server of this kind says of these tokens."""


class OtherServer(Exception):
    """The answer is of another model, or of the same served in another way, than was asked in the beginning."""


@dataclass(frozen=True)
class Card:
    """A model as the server lists it.

    Attributes:
        name: what requests call it.
        root: where its weights came from: a hub id or a folder of the server's.
        engine: who serves it.
        max_tokens: of a prompt and what follows it; None where that is not told.
    """

    name: str
    root: str
    engine: str
    max_tokens: int | None


@dataclass(frozen=True, eq=False)
class Answer:
    """What is said of one text of n tokens.

    Attributes:
        ids: [n - 1, k] int64, likeliest first: row t is of the token after token t.
        log_probs: [n - 1, k] float64, theirs.
        own: [n - 1] float64, those of the text's own tokens.
        path: the file that the hidden states lie in on the server; None where none was asked for.
    """

    ids: NDArray[np.int64]
    log_probs: NDArray[np.float64]
    own: NDArray[np.float64]
    path: str | None


def read_cards(value: Any) -> list[Card]:
    """The models of ``/v1/models``. Raises BadAnswer."""
    try:
        found = []
        for one in value["data"]:
            name, most = one["id"], one.get("max_model_len")
            found.append(Card(str(name), str(one.get("root") or name), str(one.get("owned_by") or "unknown"), most))
            if not (most is None or (type(most) is int and most > 0)):
                raise BadAnswer(f"max_model_len is {most!r:.40}")
    except (KeyError, TypeError, AttributeError) as error:
        raise BadAnswer("no list of models") from error
    return found


def read_version(value: Any) -> str:
    """The version of ``/version``. Raises BadAnswer."""
    version = value.get("version") if isinstance(value, dict) else None
    if not isinstance(version, str) or not version:
        raise BadAnswer("no version")
    return version[:40]


def ask_tokens(name: str, text: str) -> dict[str, Any]:
    """What ``/tokenize`` is asked."""
    return {"model": name, "prompt": text, "add_special_tokens": False}


def read_tokens(value: Any) -> list[int]:
    """The ids of ``/tokenize``. Raises BadAnswer."""
    tokens = value.get("tokens") if isinstance(value, dict) else None
    if not isinstance(tokens, list) or not all(type(one) is int for one in tokens):
        raise BadAnswer("no list of ids")
    return tokens


def ask_log_probs(name: str, ids: list[int], k: int, *, states: bool = False) -> dict[str, Any]:
    """What ``/v1/completions`` is asked about one text.

    Args:
        k: ids of each position; 0 for the text's own tokens alone.
        states: whether the server's connector writes hidden states too.
    """
    asked: dict[str, Any] = {
        "model": name,
        "prompt": ids,
        "prompt_logprobs": k,
        "max_tokens": 1,  # the fewest there are
        "temperature": 0,
        "return_token_ids": True,
        "add_special_tokens": False,
    }
    return {**asked, "kv_transfer_params": {}} if states else asked


def most_bytes(num_tokens: int, k: int) -> int:
    """More than any answer about so many tokens has."""
    return _FIXED_BYTES + num_tokens * (k + 2) * _ENTRY_BYTES


def read_fingerprint(value: Any) -> str | None:
    """What the server calls its version and settings in one word; None where it does not."""
    told = value.get("system_fingerprint") if isinstance(value, dict) else None
    return told if isinstance(told, str) else None


def read_answer(
    value: Any, name: str, fingerprint: str | None, ids: list[int], k: int, vocab_size: int, num_rows: int = 0
) -> Answer:
    """What ``/v1/completions`` says of the text ``ids``.

    Args:
        name, fingerprint: of whom the answer must be.
        k: ids wanted of each position; as many or more were asked for.
        vocab_size: ids there are.
        num_rows: of the model's embedding where it has more: ids from ``vocab_size`` on are no tokens and are left out.

    Raises:
        BadAnswer: it is none, or is not of these tokens.
        OtherServer: it is of another model or of other settings.
    """
    if not isinstance(value, dict):
        raise BadAnswer("no JSON object")
    if value.get("model") != name:
        raise OtherServer(f"model {value.get('model')!r:.80}, not {name!r}")
    if read_fingerprint(value) != fingerprint:
        raise OtherServer(f"{read_fingerprint(value)!r:.80}, not {fingerprint!r}")
    choices = value.get("choices")
    choice = choices[0] if isinstance(choices, list) and len(choices) == 1 else None
    if not isinstance(choice, dict):
        raise BadAnswer("not one choice")
    if choice.get("prompt_token_ids", ids) != ids:
        raise BadAnswer("it is of other tokens than were sent")
    told = choice.get("prompt_logprobs")
    if not isinstance(told, list) or len(told) != len(ids):
        count = len(told) if isinstance(told, list) else "no"
        raise BadAnswer(f"{count} positions with log-probabilities for {len(ids)} tokens")
    found, values, own = _read_positions(told[1:], ids[1:], k, range(vocab_size, num_rows))
    if found.size and not 0 <= int(found.min()) <= int(found.max()) < vocab_size:
        raise BadAnswer(f"id {int(found.max())} in a vocabulary of {vocab_size}")
    transfer = value.get("kv_transfer_params")
    path = transfer.get("hidden_states_path") if isinstance(transfer, dict) else None
    return Answer(found, values, own, path if isinstance(path, str) else None)


def _read_positions(
    told: list[Any], tokens: list[int], k: int, padding: range
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    """The k likeliest ids of each position that are not ``padding``, likeliest first, their log-probabilities, and
    those of ``tokens``."""
    ids = np.zeros((len(told), k), np.int64)
    values = np.zeros((len(told), k))
    own = np.zeros(len(told))
    for place, (position, token) in enumerate(zip(told, tokens, strict=True)):
        try:
            own[place] = position[str(token)]["logprob"]
            named = list(map(int, position))
            numbers = np.array(named, np.int64)
            logs = np.fromiter((one["logprob"] for one in position.values()), np.float64, len(position))
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise BadAnswer(f"position {place} tells no ids with log-probabilities, its own among them") from error
        if len(set(named)) < len(named):  # "5" and "05"
            raise BadAnswer(f"position {place} tells of one id twice")
        if padding:
            tokens_alone = (numbers < padding.start) | (numbers >= padding.stop)
            numbers, logs = numbers[tokens_alone], logs[tokens_alone]
        if len(numbers) < k:
            raise BadAnswer(f"position {place} has {len(numbers)} ids, {k} were asked for")
        likeliest = np.lexsort((numbers, -logs))[:k]
        ids[place], values[place] = numbers[likeliest], logs[likeliest]
    if not (np.isfinite(values).all() and np.isfinite(own).all()):
        raise BadAnswer("a log-probability that is not finite")
    most = np.exp(np.minimum(values, 1.0)).sum(axis=1).max(initial=0.0)
    if max(most, float(np.exp(np.minimum(own, 1.0)).max(initial=0.0))) > 1.0 + _ROUNDING:
        raise BadAnswer(
            "probabilities that add up to more than 1, so that they are none (the server's --logprobs-mode must be "
            "raw_logprobs)"
        )
    return ids, np.minimum(values, 0.0), own
