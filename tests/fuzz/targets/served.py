"""What a teacher's server answers, and the file that it leaves hidden states in: believed, or refused in words."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from tests.fuzz.bytes_to_choices import Choices, edit_bytes, edit_value

from liquid_llm.parsing import ParseError, parse_json
from liquid_llm.served import client
from liquid_llm.served.protocol import (
    BadAnswer,
    OtherServer,
    read_answer,
    read_cards,
    read_fingerprint,
    read_tokens,
    read_version,
)
from liquid_llm.served.states import read_states

IDS, K, VOCAB, HIDDEN = [5, 6, 7], 2, 20, 4
KINDS = ("answer", "padded", "cards", "version", "tokens", "refusal", "states", "header", "name")


def seeds() -> Iterator[bytes]:
    for kind in range(len(KINDS)):
        yield bytes([kind])
        yield bytes([kind, 1, 3, 9, 1, 5, 8])
        yield bytes([kind, 0, 1, 40, 2, 7, 7, 7])


def _position(*logs: float) -> dict[str, Any]:
    return {str(n + 5): {"logprob": value, "rank": n, "decoded_token": "a"} for n, value in enumerate(logs)}


@cache
def _answer() -> bytes:
    told = [None, _position(-1.5, -1.0, -3.0), _position(-2.0, -0.5, -9.0)]
    choice = {"index": 0, "text": "a", "prompt_token_ids": IDS, "prompt_logprobs": told}
    transfer = {"hidden_states_path": "/there/a.safetensors"}
    whole = {"model": "m", "system_fingerprint": "v", "choices": [choice], "kv_transfer_params": transfer}
    return json.dumps(whole).encode()


@cache
def _states() -> bytes:
    hidden = torch.arange(1, 25, dtype=torch.bfloat16).reshape(3, 2, HIDDEN)
    return save({"hidden_states": hidden, "token_ids": torch.tensor(IDS)})


PLAIN = {
    "cards": {"data": [{"id": "m", "root": "org/model", "owned_by": "vllm", "max_model_len": 64}]},
    "version": {"version": "0.33.0"},
    "tokens": {"tokens": [1, 2, 3]},
    "refusal": {"error": {"message": "too long", "param": "prompt", "code": 400}},
}


def check(data: bytes, folder: Path) -> None:
    choices = Choices(data)
    kind = choices.one(KINDS)
    try:
        if kind in ("states", "header", "name"):
            _look_at_states(kind, choices, folder)
        else:
            _look_at_answer(kind, choices)
    except (BadAnswer, OtherServer):
        pass


def _look_at_answer(kind: str, choices: Choices) -> None:
    content = _answer() if kind in ("answer", "padded") else json.dumps(PLAIN[kind]).encode()
    while choices:
        if choices.below(4):
            try:
                content = json.dumps(edit_value(json.loads(content), choices)).encode()
            except (ValueError, RecursionError):
                return
        else:
            content = edit_bytes(content, choices)
    if kind == "refusal":
        error = client._of_status(400, {"Retry-After": content.decode("latin-1")}, content, "http://here")
        assert str(error)
        assert client._wait_seconds({"Retry-After": content.decode("latin-1")}) >= 0
        return
    try:
        value = parse_json(content)
    except ParseError:
        return
    if kind == "cards":
        for card in read_cards(value):
            assert card.max_tokens is None or card.max_tokens >= 0
    elif kind == "version":
        assert read_version(value)
    elif kind == "tokens":
        assert all(isinstance(one, int) for one in read_tokens(value))
    else:
        read_fingerprint(value)
        _require_sound(read_answer(value, "m", "v", IDS, K, 6 if kind == "padded" else VOCAB, VOCAB))


def _require_sound(found: Any) -> None:
    """What is stored of an answer is a signal: ids that are there, each once, with what is left for all others."""
    assert found.ids.shape == found.log_probs.shape == (len(IDS) - 1, K)
    assert all(len(set(row)) == K for row in found.ids.tolist())
    assert ((found.ids >= 0) & (found.ids < VOCAB)).all()
    assert np.isfinite(found.log_probs).all()
    assert (found.log_probs <= 0).all()
    assert (np.diff(found.log_probs) <= 0).all()
    assert (found.own <= 0).all()


def _look_at_states(kind: str, choices: Choices, folder: Path) -> None:
    content, told = _states(), "/there/a.safetensors"
    if kind == "header":
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        while choices:
            header = edit_value(header, choices)
        plain = json.dumps(header).encode()
        content = len(plain).to_bytes(8, "little") + plain + content[8 + length :]
    elif kind == "name":
        told = choices.rest().decode("utf-8", "surrogateescape") + ".safetensors"
    while kind == "states" and choices:
        content = edit_bytes(content, choices)
    place = folder / "states"
    place.mkdir()
    (place / "a.safetensors").write_bytes(content)
    (folder / "b.safetensors").write_bytes(_states())  # beside the one folder that is looked into
    try:
        found = read_states(place, told, IDS, HIDDEN, seconds=0.0)
        assert found.shape == (len(IDS), HIDDEN)
        assert found.isfinite().all()
    finally:
        assert (folder / "b.safetensors").exists()
