"""Asking one server: what is repeated, what is not, and the bounds on what is read."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
from tests.support.vllm_server import Handler, VllmServer, serving

from liquid_llm import storage
from liquid_llm.errors import StorageError
from liquid_llm.served import client
from liquid_llm.served.client import Abandoned, Refused, Server, ServerFailed


class Scripted(VllmServer):
    """A server without a model, whose answers are all faults."""

    def __post_init__(self) -> None:
        self.lock, self.at_once = threading.Lock(), 0


@pytest.fixture
def world() -> Iterator[VllmServer]:
    before = storage.set_retry_policy(storage.RetryPolicy(attempts=3, first_seconds=0.001, max_seconds=0.002))
    with serving(Scripted(None, None, "m", "m")) as running:
        yield running
    storage.set_retry_policy(before)


def answer(world: VllmServer, act: Callable[[Handler], Any]) -> None:
    """Let the server answer everything so."""
    world.faults = [lambda handler, _path, _body: act(handler) or True]


def send(status: int, content: bytes = b"{}", **headers: str) -> Callable[[Handler], None]:
    return lambda handler: handler.send_bytes(status, content, headers)


def drop(handler: Handler) -> None:
    handler.connection.shutdown(socket.SHUT_RDWR)


def cut(handler: Handler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "9000")
    handler.end_headers()
    handler.wfile.write(b"[1, 2")
    handler.close_connection = True


def drip(handler: Handler) -> None:
    """A byte now and then, never silent for long, and no end."""
    handler.send_response(200)
    handler.send_header("Content-Length", "90000")
    handler.end_headers()
    with suppress(OSError):
        for _ in range(1000):
            handler.wfile.write(b" ")
            handler.wfile.flush()
            time.sleep(0.01)
    handler.close_connection = True


@pytest.mark.parametrize("trouble", [drop, cut, *map(send, (408, 429, 500, 502, 503, 504)), send(200, b"<html>")])
def test_what_may_pass_is_tried_as_often_as_the_policy_says(
    world: VllmServer, trouble: Callable[[Handler], None]
) -> None:
    answer(world, trouble)
    with pytest.raises(ServerFailed, match="run the same command again") as failed:
        Server(world.url).post("/v1/completions", {})
    assert len(world.seen) == 3
    assert failed.value.exit_code == 4


def test_an_answer_that_drips_has_an_end(world: VllmServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_ANSWER_SECONDS", 0.05)
    answer(world, drip)
    with pytest.raises(ServerFailed, match="did not answer in time; got an answer unfinished"):
        Server(world.url).get("/v1/models")
    assert len(world.seen) == 3


@pytest.mark.parametrize("trouble", [drop, cut, send(503), send(429), send(200, b"<html>")])
def test_what_has_passed_is_forgotten(world: VllmServer, trouble: Callable[[Handler], None]) -> None:
    left = [trouble, trouble]
    answer(world, lambda handler: left.pop()(handler) if left else send(200, b'{"a": 1}')(handler))
    assert Server(world.url).get("/v1/models") == {"a": 1}


def test_a_server_that_is_not_there() -> None:
    before = storage.set_retry_policy(storage.RetryPolicy(attempts=2, first_seconds=0.001, max_seconds=0.002))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        with pytest.raises(ServerFailed, match="could not connect to the teacher's server"):
            Server(f"http://127.0.0.1:{free.getsockname()[1]}").get("/v1/models")
    storage.set_retry_policy(before)


@pytest.mark.parametrize(
    ("status", "content", "told"),
    [
        (400, b'{"error": {"message": "too long", "param": "prompt", "code": 400}}', ("too long", "prompt")),
        (404, b'{"detail": "Not Found"}', ("{'detail': 'Not Found'}", None)),
        (422, b"no JSON at all", ("no JSON at all", None)),
        (418, b"", ("nothing more", None)),
    ],
)
def test_what_is_refused_is_not_asked_twice(
    world: VllmServer, status: int, content: bytes, told: tuple[str, Any]
) -> None:
    answer(world, send(status, content))
    with pytest.raises(Refused) as refused:
        Server(world.url).post("/v1/completions", {})
    assert (refused.value.status, refused.value.message, refused.value.parameter) == (status, *told)
    assert len(world.seen) == 1


@pytest.mark.parametrize(
    ("trouble", "words"),
    [
        (send(401), "refuses this key"),
        (send(403), "refuses this key"),
        (send(302, Location="http://elsewhere/v1"), "leads to another one; got 302 to elsewhere"),
        (send(200, b" " * 2000), "more than 1,000 bytes"),
    ],
)
def test_what_no_question_would_change_ends_at_once(
    world: VllmServer, trouble: Callable[[Handler], None], words: str
) -> None:
    answer(world, trouble)
    with pytest.raises(StorageError, match=words):
        Server(world.url, "key").post("/v1/completions", {}, 1000)
    assert len(world.seen) == 1


def test_the_pause_that_is_asked_for_is_said_and_kept_and_can_be_given_up(
    world: VllmServer, caplog: pytest.LogCaptureFixture
) -> None:
    answer(world, send(429, **{"Retry-After": "600"}))
    server, raised = Server(world.url), []

    def ask() -> None:
        try:
            server.get("/v1/models")
        except Abandoned as error:
            raised.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    while not world.seen:
        time.sleep(0.001)
    thread.join(0.2)
    assert thread.is_alive(), "it waits for as long as it was told to"
    assert "trying again in 120.0 s" in caplog.text, "and says how long, which has a bound"
    server.give_up()
    thread.join(30)
    assert raised
    assert len(world.seen) == 1
    with pytest.raises(Abandoned):
        server.get("/v1/models")
    server.resume()
    answer(world, send(200, b"[]"))
    assert server.get("/v1/models") == []


def asking(server: Server, path: str, outcomes: list[Any]) -> threading.Thread:
    """A thread that asks once; its answer, or what it ends with, comes into ``outcomes``."""

    def ask() -> None:
        try:
            outcomes.append(server.get(path))
        except (Abandoned, ServerFailed) as error:
            outcomes.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    return thread


def test_a_pause_is_one_for_all_threads(world: VllmServer, caplog: pytest.LogCaptureFixture) -> None:
    """Sixteen that are refused together wait once, and who comes meanwhile waits with them instead of asking."""
    together = threading.Barrier(16)

    def refuse(handler: Handler) -> None:
        together.wait(60)
        send(429, **{"Retry-After": "600"})(handler)

    answer(world, refuse)
    server, outcomes = Server(world.url), []
    threads = [asking(server, "/v1/models", outcomes) for _ in range(16)]
    while len(world.seen) < 16 or world.at_once or "trying again" not in caplog.text:
        time.sleep(0.001)
    answer(world, send(200, b"[]"))
    threads += [asking(server, "/v1/models", outcomes) for _ in range(4)]
    threads[-1].join(0.2)
    assert len(world.seen) == 16, "nobody asks while the server wants to be left alone"
    assert caplog.text.count("trying again") == 1
    server.give_up()
    for thread in threads:
        thread.join(30)
    assert [type(one) for one in outcomes] == [Abandoned] * 20


def test_a_server_that_answers_others_is_not_given_up_for_one_question(world: VllmServer) -> None:
    """One that is busy refuses whoever comes at the wrong moment, the same question more often than the policy says."""
    answered, left = threading.Semaphore(0), [7]

    def busy(handler: Handler, path: str, _body: Any) -> bool:
        if path == "/often" or not left[0]:
            answered.release()
            send(200, b"[]")(handler)
            return True
        left[0] -= 1
        while answered.acquire(blocking=False):
            pass
        for _ in range(2):  # the first of them has been read when the second is asked
            answered.acquire(timeout=60)
        send(429)(handler)
        return True

    world.faults = [busy]
    server, outcomes = Server(world.url), []
    thread = asking(server, "/seldom", outcomes)
    while not outcomes:
        server.get("/often")
    thread.join(30)
    assert outcomes == [[]]
    assert left == [0]


def test_a_netrc_does_not_sign_in_the_keys_place(
    world: VllmServer, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login someone password else\n")
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    answer(world, send(200))
    Server(world.url, "key").get("/v1/models")
    Server(world.url).get("/v1/models")
    assert world.keys == ["Bearer key", None]


@pytest.mark.parametrize("url", ["/", "/v1", "/v1/"])
def test_an_address_with_or_without_its_version(world: VllmServer, url: str) -> None:
    answer(world, send(200))
    Server(world.url + url).get("/v1/models")
    assert world.seen[0][0] == "/v1/models"


@pytest.mark.parametrize(("trouble", "healthy"), [(send(200, b""), True), (send(503), False), (drop, False)])
def test_health(world: VllmServer, trouble: Callable[[Handler], None], healthy: bool) -> None:
    answer(world, trouble)
    assert Server(world.url).is_healthy() is healthy
    assert len(world.seen) == 1
