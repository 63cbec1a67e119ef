"""A teacher behind a server: ``--signal TYPE=served:http://HOST:PORT``.

The server is asked as a vLLM server answers: ``/v1/models`` for its name, ``/tokenize`` for its tokens and
``/v1/completions`` with ``prompt_logprobs`` for the log-probabilities of its most probable tokens at each position of a
prompt. They hold at temperature 1 alone: the sum over all tokens, which another temperature would need, is not in the
answer. So a type with such a teacher takes ``temperature: 1`` in ``sources:``, or the run ``--kd_temperature=1``.

A batch is asked for ahead of need, in the threads that read data, and while it is computed nothing is waited for.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from liquid_llm.data.types import MicroBatch
from liquid_llm.errors import ModelError, SignalError
from liquid_llm.losses.signals import DRAWS, SparseSignal
from liquid_llm.teachers.teacher import Prepared, Teacher, TeacherSetup

NUM_IDS = 20  # a position; vLLM's own limit, unless it was started with --max-logprobs
_TIMEOUT_SECONDS = 300.0
_PROBE = "def f(x):\n    return 12.5 * x  # naïve, twice"


class ServedTeacher(Teacher):
    """The ``NUM_IDS`` most probable tokens of each position, exactly, and the mass of all others in one bucket.

    Args:
        url: of the server, without a path.
        model: the name under which it serves the model.
    """

    temperature_range = (1.0, 1.0)
    form = DRAWS
    most_ids = NUM_IDS + 1  # the token of the text itself comes along where it is not among them

    def __init__(self, url: str, model: str) -> None:
        self.url, self.name = url, model

    def prepare(self, batch: MicroBatch, temperature: float) -> Prepared | None:
        """Ask for all rows in one request."""
        prompts = [row[:length] for row, length in zip(batch.input_ids.tolist(), batch.lengths.tolist(), strict=True)]
        asked = {"model": self.name, "prompt": prompts, "max_tokens": 1, "temperature": 0, "prompt_logprobs": NUM_IDS}
        choices = sorted(ask(self.url, "/v1/completions", asked)["choices"], key=lambda one: int(one["index"]))
        said = [choice["prompt_logprobs"] for choice in choices]
        if [len(row) for row in said] != [len(prompt) for prompt in prompts]:
            raise SignalError("the server's answer is not one entry a token", where=self.url, got=list(map(len, said)))
        time = batch.input_ids.shape[1]
        # Entry t of a row is about token t, which position t - 1 predicts.
        places = [divmod(place, time) for place in batch.positions.tolist()]
        return Prepared(sparse([said[row][column + 1] for row, column in places])) if places else None

    def describe(self) -> dict[str, Any]:
        """Where it is served and under which name."""
        return {"url": self.url, "id": self.name}


def sparse(said: Sequence[Mapping[str, Mapping[str, float]]]) -> SparseSignal:
    """The signal of positions for which ``{id: {"logprob": ...}}`` was said."""
    slots = max(map(len, said))
    ids = torch.tensor([[*map(int, one), *[0] * (slots - len(one))] for one in said])
    unused = [{"logprob": -torch.inf}] * slots
    log_probs = torch.tensor([[float(v["logprob"]) for v in [*one.values(), *unused][:slots]] for one in said])
    weights = log_probs.exp()
    tail_mass = (1.0 - weights.sum(1)).clamp_min(0.0)
    mask = torch.ones(len(said), dtype=torch.bool)
    return SparseSignal(ids, weights, log_probs.where(weights > 0, 0.0), tail_mass, mask, temperature=1.0)


def open_served(url: str, setup: TeacherSetup) -> ServedTeacher:
    """The maker of ``served:URL``.

    Raises:
        SignalError: the server does not answer.
        ModelError: its tokenizer is not the student's.
    """
    url = url.rstrip("/")
    model = str(ask(url, "/v1/models")["data"][0]["id"])
    theirs = ask(url, "/tokenize", {"model": model, "prompt": _PROBE, "add_special_tokens": False})["tokens"]
    ours = setup.tokenizer.encode(_PROBE, add_special_tokens=False)
    if theirs != ours:
        raise ModelError(
            "the served teacher has another tokenizer than the student",
            where=f"{url}, model {model}",
            got=f"{theirs[:8]}... for {_PROBE[:12]!r}",
            expected=f"{ours[:8]}...",
            remedy="serve a teacher with the student's tokenizer",
        )
    return ServedTeacher(url, model)


def ask(url: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
    """The JSON that the server answers. Raises SignalError where it does not."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url + path, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS) as answer:
            return json.load(answer)
    except (urllib.error.URLError, OSError, ValueError) as error:
        raise SignalError(
            "the teacher's server does not answer", where=url + path, got=str(error), remedy="start it, then run again"
        ) from error
