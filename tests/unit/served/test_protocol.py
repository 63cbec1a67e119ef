"""Answers of a server: what is read of a good one, and that no bad one passes for good."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from liquid_llm.parsing import parse_json
from liquid_llm.served import protocol
from liquid_llm.served.protocol import BadAnswer, OtherServer

VOCAB = 40
IDS = [3, 1, 4, 1, 5]


def answer_about(ids: list[int], logs: np.ndarray, k: int, order: np.random.Generator | None = None) -> dict[str, Any]:
    """As a server writes it, of the log-probabilities [n - 1, vocab]; entries in any order where one is given."""
    told: list[dict[str, Any] | None] = [None]
    for row, token in zip(logs, ids[1:], strict=True):
        likeliest = np.argsort(-row, kind="stable")[:k].tolist()
        entries = [(str(one), {"logprob": float(row[one])}) for one in dict.fromkeys([token, *likeliest])]
        if order is not None:
            order.shuffle(entries)
        told.append(dict(entries))
    return {
        "model": "m",
        "system_fingerprint": "f",
        "choices": [{"index": 0, "prompt_logprobs": told, "prompt_token_ids": ids}],
    }


def distributions(rows: int, seed: int) -> np.ndarray:
    logits = np.random.default_rng(seed).normal(size=(rows, VOCAB)) * 3
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def read(value: Any, ids: list[int], k: int) -> protocol.Answer:
    return protocol.read_answer(value, "m", "f", ids, k, VOCAB)


@given(
    ids=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=12),
    k=st.integers(0, VOCAB),
    seed=st.integers(0, 2**31),
)
def test_the_likeliest_ids_and_the_texts_own_in_whatever_order_they_come(ids: list[int], k: int, seed: int) -> None:
    logs = distributions(len(ids) - 1, seed)
    value = json.loads(json.dumps(answer_about(ids, logs, k, np.random.default_rng(seed))))
    found = read(value, ids, k)
    assert found.ids.shape == found.log_probs.shape == (len(ids) - 1, k)
    np.testing.assert_array_equal(np.sort(-logs, axis=1)[:, :k], -found.log_probs)
    np.testing.assert_array_equal(np.take_along_axis(logs, found.ids, 1), found.log_probs)
    np.testing.assert_array_equal(logs[np.arange(len(logs)), np.array(ids[1:], dtype=int)], found.own)


@given(k=st.integers(1, VOCAB - 8), seed=st.integers(0, 2**31))
def test_rows_that_only_pad_the_embedding_are_part_of_the_rest(k: int, seed: int) -> None:
    logits = np.random.default_rng(seed).normal(size=(4, VOCAB)) * 3
    logs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    tokens = VOCAB - 8
    value = answer_about(IDS, logs, k + 8)
    found = protocol.read_answer(value, "m", "f", IDS, k, tokens, VOCAB)
    np.testing.assert_array_equal(np.sort(-logs[:, :tokens], axis=1)[:, :k], -found.log_probs)
    assert found.ids.max(initial=0) < tokens
    value["choices"][0]["prompt_logprobs"][2][str(VOCAB)] = {"logprob": 0.0}
    with pytest.raises(BadAnswer):  # no row has this id
        protocol.read_answer(value, "m", "f", IDS, k, tokens, VOCAB)


def _first(value: dict[str, Any]) -> dict[str, Any]:
    entries: dict[str, Any] = value["choices"][0]["prompt_logprobs"][1]
    return entries


def _set(value: dict[str, Any], number: object) -> None:
    next(iter(_first(value).values()))["logprob"] = number


BAD: dict[str, Callable[[dict[str, Any]], object]] = {
    "no choices": lambda value: value.pop("choices"),
    "two choices": lambda value: value["choices"].append(value["choices"][0]),
    "no positions": lambda value: value["choices"][0].pop("prompt_logprobs"),
    "one position fewer": lambda value: value["choices"][0]["prompt_logprobs"].pop(),
    "one position more": lambda value: value["choices"][0]["prompt_logprobs"].append({}),
    "a position of nothing": lambda value: value["choices"][0]["prompt_logprobs"].__setitem__(2, None),
    "a position that is a list": lambda value: value["choices"][0]["prompt_logprobs"].__setitem__(2, [1, 2]),
    "positions of another text": lambda value: value["choices"][0]["prompt_logprobs"].reverse(),
    "other tokens": lambda value: value["choices"][0].__setitem__("prompt_token_ids", [3, 1, 4, 1, 6]),
    "fewer ids": lambda value: [_first(value).popitem() for _ in range(2)],
    "a word for an id": lambda value: _first(value).__setitem__("the", {"logprob": -1.0}),
    "an id beyond the tokenizer": lambda value: _first(value).__setitem__(str(VOCAB), {"logprob": -0.1}),
    "an id twice": lambda value: _first(value).__setitem__("0" + next(iter(_first(value))), {"logprob": -9.0}),
    "an id below 0": lambda value: _first(value).__setitem__("-1", {"logprob": -0.1}),
    "an enormous id": lambda value: _first(value).__setitem__("9" * 30, {"logprob": -0.1}),
    "not a number": lambda value: _set(value, math.nan),
    "infinity": lambda value: _set(value, math.inf),
    "a word for a number": lambda value: _set(value, "much"),
    "nothing for a number": lambda value: _set(value, None),
    "logits": lambda value: [one.__setitem__("logprob", one["logprob"] + 4) for one in _first(value).values()],
    "more than certain": lambda value: _set(value, 0.5),
}


@pytest.mark.parametrize("what", BAD)
def test_no_answer_that_cannot_be_is_taken(what: str) -> None:
    good = answer_about(IDS, distributions(4, 1), 5)
    read(copy.deepcopy(good), IDS, 5)
    BAD[what](good)
    with pytest.raises(BadAnswer):
        read(good, IDS, 5)


@pytest.mark.parametrize(("field", "value"), [("model", "another"), ("system_fingerprint", "g"), ("model", None)])
def test_another_model_or_server_is_told_apart(field: str, value: object) -> None:
    answer = answer_about(IDS, distributions(4, 1), 5) | {field: value}
    with pytest.raises(OtherServer):
        read(answer, IDS, 5)


WORDS = st.sampled_from(["model", "choices", "data", "id", "tokens", "version", "prompt_logprobs"])
VALUES = st.recursive(
    st.none() | st.integers(), lambda of: st.lists(of) | st.dictionaries(WORDS, of, max_size=3), max_leaves=6
)


@settings(max_examples=50)
@given(VALUES)
def test_whatever_else_a_server_sends_is_refused(value: Any) -> None:
    for reader in (lambda: read(value, IDS, 5), lambda: protocol.read_version(value)):
        with pytest.raises((BadAnswer, OtherServer)):
            reader()
    for listed in (protocol.read_cards, protocol.read_tokens):
        with suppress(BadAnswer):
            assert isinstance(listed(value), list)


def test_an_answer_is_far_smaller_than_what_is_allowed_of_it() -> None:
    ids = list(range(30))
    text = json.dumps(answer_about(ids, distributions(29, 0), 20))
    assert len(text) < protocol.most_bytes(len(ids), 20) / 2
    assert 100 * len(text) < protocol.most_bytes(100 * len(ids), 20)
    assert parse_json(text)["model"] == "m"


@pytest.mark.parametrize("most", [-1, 0, True, 64.0, "64"])
def test_a_model_whose_texts_have_no_length_is_no_model(most: object) -> None:
    listed = {"data": [{"id": "m", "max_model_len": most}]}
    with pytest.raises(BadAnswer, match="max_model_len"):
        protocol.read_cards(listed)


def test_models_as_a_server_lists_them() -> None:
    listed = [{"id": "m", "root": "org/model", "owned_by": "vllm", "max_model_len": 64}, {"id": "n", "root": None}]
    whole, bare = protocol.read_cards({"data": listed})
    assert whole == protocol.Card("m", "org/model", "vllm", 64)
    assert bare == protocol.Card("n", "n", "unknown", None)


@pytest.mark.parametrize(("more", "is_taken"), [(0.0005, True), (0.01, False)])
def test_probabilities_add_up_to_one_and_a_rounding_error(more: float, is_taken: bool) -> None:
    value = answer_about(IDS, distributions(4, 1) + more, VOCAB)
    if is_taken:
        assert read(value, IDS, VOCAB).log_probs.shape == (4, VOCAB)
        return
    with pytest.raises(BadAnswer, match="add up to more than 1"):
        read(value, IDS, VOCAB)
