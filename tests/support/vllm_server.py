"""An HTTP server with a real small model behind it, which answers as vLLM 0.33.0's OpenAI-compatible server does.

Written from that release's code: request fields and their checks, the form of answers and of errors, which status says
what, the limits of a prompt's length and of ``prompt_logprobs``, and the files of its connector for hidden states
(residual stream after the last block, in the model's dtype; a lock on ``PATH.lock`` until the file is whole).

``faults`` are what goes wrong: functions that see a request's path and body and may answer in the server's place, each
called until it returns False for good (``once``) or always.
"""

from __future__ import annotations

import fcntl
import json
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from liquid_llm.models.heads import blocks_of

VERSION = "0.33.0"
Fault = Callable[["Handler", str, dict[str, Any]], bool]


@dataclass
class VllmServer:
    """The server and what it has seen.

    Attributes:
        max_logprobs, max_model_len: as its options have them.
        name, root: of the model, as it lists it.
        states_dir: where the connector writes hidden states; None for a server without one.
        delay: seconds that every completion takes at least.
        seen: (path, body) of every request; ``keys``: the Authorization headers.
        most_at_once: requests that were being answered at the same time.
    """

    model: Any
    tokenizer: Any
    name: str
    root: str
    max_model_len: int = 256
    max_logprobs: int = 20
    states_dir: Path | None = None
    key: str | None = None
    fingerprint: str | None = f"vllm-{VERSION}-0123abcd"
    delay: float = 0.0
    faults: list[Fault] = field(default_factory=list)
    seen: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    most_at_once: int = 0
    url: str = ""

    def __post_init__(self) -> None:
        self.lock = threading.Lock()
        self.at_once = 0
        self._last: torch.Tensor | None = None
        blocks_of(self.model)[-1].register_forward_hook(self._keep)

    def _keep(self, _module: Any, _given: Any, made: Any) -> None:
        self._last = made[0] if isinstance(made, tuple) else made

    def run(self, ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities [n, vocab] float32 and the last block's states [n, hidden]."""
        with self.lock, torch.no_grad():
            logits = self.model(input_ids=torch.tensor([ids])).logits[0].float()
            assert self._last is not None
            return torch.log_softmax(logits, dim=1), self._last[0].clone()

    def completions(self) -> list[list[int]]:
        """The prompts that were asked about."""
        return [body["prompt"] for path, body in self.seen if path == "/v1/completions"]


class Handler(BaseHTTPRequestHandler):
    """Answers one connection."""

    protocol_version = "HTTP/1.1"
    server: Any

    @property
    def world(self) -> VllmServer:
        return self.server.world  # type: ignore[no-any-return]

    def log_message(self, *_: Any) -> None:
        """Nothing: what tests want to know is kept."""

    def do_GET(self) -> None:
        self.answer({})

    def do_POST(self) -> None:
        self.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def answer(self, body: dict[str, Any]) -> None:
        world = self.world
        with world.lock:
            world.seen.append((self.path, body))
            world.keys.append(self.headers.get("Authorization"))
            world.at_once += 1
            world.most_at_once = max(world.most_at_once, world.at_once)
        try:
            for fault in list(world.faults):
                if fault(self, self.path, body):
                    return
            self._answer_well(body)
        finally:
            with world.lock:
                world.at_once -= 1

    def _answer_well(self, body: dict[str, Any]) -> None:
        world = self.world
        signed = self.headers.get("Authorization") == f"Bearer {world.key}"
        if world.key is not None and self.path.startswith("/v1") and not signed:
            self.send(401, {"error": "Unauthorized"})
        elif self.path == "/health":
            self.send_bytes(200, b"")
        elif self.path == "/version":
            self.send(200, {"version": VERSION})
        elif self.path == "/v1/models":
            card = {"id": world.name, "object": "model", "created": 0, "owned_by": "vllm", "root": world.root}
            self.send(200, {"object": "list", "data": [{**card, "max_model_len": world.max_model_len}]})
        elif self.path == "/tokenize":
            ids = world.tokenizer(body["prompt"], add_special_tokens=body["add_special_tokens"])["input_ids"]
            self.send(200, {"count": len(ids), "max_model_len": world.max_model_len, "tokens": ids, "token_strs": None})
        elif self.path == "/v1/completions":
            self._complete(body)
        else:
            self.send(404, {"detail": "Not Found"})

    def _complete(self, body: dict[str, Any]) -> None:
        world, ids, k = self.world, body["prompt"], body["prompt_logprobs"]
        vocab_size = world.model.config.vocab_size
        time.sleep(world.delay)
        if body["model"] != world.name:
            self.refuse(404, "NotFoundError", f"The model `{body['model']}` does not exist.")
        elif len(ids) + body["max_tokens"] > world.max_model_len:
            self.refuse(
                400, "BadRequestError", f"at most {world.max_model_len} tokens, {len(ids)} were sent", "input_tokens"
            )
        elif k > world.max_logprobs:
            self.refuse(400, "BadRequestError", f"{k} logprobs, at most {world.max_logprobs}", "prompt_logprobs")
        elif max(ids) >= vocab_size:
            self.refuse(400, "BadRequestError", f"Token id {max(ids)} is out of vocabulary")
        else:
            self.send(200, self.completion(body, *world.run(ids)))

    def completion(self, body: dict[str, Any], logs: torch.Tensor, states: torch.Tensor) -> dict[str, Any]:
        """The answer about a prompt."""
        world, ids, k = self.world, body["prompt"], body["prompt_logprobs"]
        told: list[dict[str, Any] | None] = [None]
        for row, token in zip(logs[:-1], ids[1:], strict=True):
            values, top = row.topk(k)
            rank = int((row >= row[token]).sum())
            entry = {token: {"logprob": float(row[token]), "rank": rank, "decoded_token": "x"}}
            for place, (value, one) in enumerate(zip(values.tolist(), top.tolist(), strict=True), 1):
                entry.setdefault(one, {"logprob": value, "rank": place, "decoded_token": "x"})
            told.append({str(one): each for one, each in entry.items()})
        choice = {
            "index": 0,
            "text": "x",
            "logprobs": None,
            "finish_reason": "length",
            "stop_reason": None,
            "prompt_logprobs": told,
            "prompt_token_ids": ids if body.get("return_token_ids") else None,
            "token_ids": [0] if body.get("return_token_ids") else None,
        }
        usage = {"prompt_tokens": len(ids), "completion_tokens": 1, "total_tokens": len(ids) + 1}
        transfer = None
        if world.states_dir is not None:
            transfer = {"hidden_states_path": self._write_states(ids, states)}
        return {
            "id": "cmpl-1",
            "object": "text_completion",
            "created": 0,
            "model": world.name,
            "choices": [choice],
            "system_fingerprint": world.fingerprint,
            "usage": usage,
            "kv_transfer_params": transfer,
        }

    def _write_states(self, ids: list[int], states: torch.Tensor) -> str:
        """As the connector: the lock is there before the answer, the file a moment after it."""
        assert self.world.states_dir is not None
        name = f"cmpl-{uuid.uuid4().hex}-0.safetensors"
        path = self.world.states_dir / name
        lock = os.open(f"{path}.lock", os.O_CREAT | os.O_WRONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)

        def write() -> None:
            save_file({"hidden_states": states.unsqueeze(1).contiguous(), "token_ids": torch.tensor(ids)}, path)
            os.close(lock)

        threading.Thread(target=write, daemon=True).start()
        return f"/of/the/server/{name}"

    def refuse(self, status: int, type: str, message: str, param: str | None = None) -> None:
        """An error as the server writes it."""
        self.send(status, {"error": {"message": message, "type": type, "param": param, "code": status}})

    def send(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        """A JSON answer."""
        self.send_bytes(status, json.dumps(value).encode(), headers)

    def send_bytes(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        """Any answer."""
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


class Quiet(ThreadingHTTPServer):
    """Says nothing of clients that have gone."""

    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        """Nothing."""


@contextmanager
def serving(world: VllmServer) -> Iterator[VllmServer]:
    """The server on a free port of this machine, until the end of the block."""
    server = Quiet(("127.0.0.1", 0), Handler)
    server.world = world  # type: ignore[attr-defined]
    world.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield world
    finally:
        server.shutdown()
        server.server_close()


def times(count: int, fault: Callable[[Handler], None], path: str = "/v1/completions") -> Fault:
    """A fault that strikes the first ``count`` requests of ``path``."""
    left, lock = [count], threading.Lock()

    def strike(handler: Handler, asked: str, _: dict[str, Any]) -> bool:
        with lock:
            if asked != path or left[0] <= 0:
                return False
            left[0] -= 1
        fault(handler)
        return True

    return strike
