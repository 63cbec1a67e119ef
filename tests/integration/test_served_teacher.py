"""Capture from a teacher behind a server: what is stored, what is refused, and what faults of the server do."""

import json
import os
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.support.teachers import IDENTITY, ListSource, make_samples
from tests.support.tiny import Tiny
from tests.support.vllm_server import Handler, VllmServer, serving, times
from transformers import AutoModelForCausalLM, AutoTokenizer

import liquid_llm
from liquid_llm import storage
from liquid_llm.capture.plan import Window
from liquid_llm.capture.scoring import Scratch
from liquid_llm.capture.served import ServedModel, ServedTeacher
from liquid_llm.cli.main import main
from liquid_llm.errors import SignalError, StorageError
from liquid_llm.losses.signals import LogitsSignal, SparseSignal
from liquid_llm.served.client import Server
from liquid_llm.signal_store.codecs.topk import TopKCodec
from liquid_llm.signal_store.records import token_hashes
from liquid_llm.signal_store.store import open_store

KEY = "a-secret-of-the-server"


@pytest.fixture(scope="module")
def few(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A handful of samples for the same teacher, of some of which a part alone is learnt."""
    made = Tiny(tmp_path_factory.mktemp("few"))
    made.teacher.symlink_to(tiny.teacher)
    made.student.symlink_to(tiny.student)
    rows = [json.loads(line) for line in (tiny.root / "math_tool.jsonl").read_text().splitlines()][:12]
    for row in rows[:3]:
        text = row.pop("text")
        row.update(prompt=text[:20], completion=text[20:])
    (made.root / "math.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made.draw_from({"path": "math.jsonl", "type": "math_tool", "weight": 1.0})
    return made


@pytest.fixture(scope="module")
def model(few: Tiny) -> tuple[object, object]:
    loaded = AutoModelForCausalLM.from_pretrained(few.teacher, dtype=torch.float32).eval()
    return loaded, AutoTokenizer.from_pretrained(few.teacher)


@pytest.fixture
def server(few: Tiny, model) -> Iterator[VllmServer]:
    with serving(VllmServer(*model, name="served", root=str(few.teacher))) as world:
        yield world


@pytest.fixture(autouse=True)
def in_a_hurry() -> Iterator[None]:
    before = storage.set_retry_policy(storage.RetryPolicy(attempts=3, first_seconds=0.01, max_seconds=0.02))
    yield
    storage.set_retry_policy(before)


def capture(few: Tiny, store: Path, **options: object) -> int:
    folders = {"math_logits_dir": store, "code_logits_dir": None}
    return main(["capture", *few.capture_words(**folders, **{"topk": 16, **options})])


def last_json(capsys) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def records(store: Path) -> dict[str, object]:
    return {record.header.sample_id: record for _, record in open_store(str(store)).layout.records()}


def test_log_probabilities_are_stored_as_the_same_teacher_here_would_have_them(
    few: Tiny, server: VllmServer, tmp_path: Path, capsys
) -> None:
    server.delay = 0.02
    assert capture(few, tmp_path / "served", teacher_url=f"{server.url}/v1/", served_as="float32") == 0
    assert last_json(capsys)["written"] == 12
    here = {"codec": "topk", "codec_options": "temperature=1", "teacher_precision": "float32", "held_out_tokens": 0}
    assert capture(few, tmp_path / "here", **here) == 0
    assert 2 < server.most_at_once <= 16

    served, own = records(tmp_path / "served"), records(tmp_path / "here")
    assert served.keys() == own.keys()
    assert any(record.header.runs for record in served.values()), "nothing is stored of a prompt"
    codec = open_store(str(tmp_path / "served")).codec
    for name, record in served.items():
        assert record.header.runs == own[name].header.runs
        assert record.header.token_hashes == own[name].header.token_hashes
        rows = record.header.num_rows
        one, other = (codec.decode(each.payload, 0, rows, 1.0, 512) for each in (record, own[name]))
        assert isinstance(one, SparseSignal)
        torch.testing.assert_close(one.weights, other.weights, rtol=2e-3, atol=1e-6)  # near-equal ids may swap
        torch.testing.assert_close(one.tail_mass, other.tail_mass, rtol=2e-3, atol=5e-6)

    identity = open_store(str(tmp_path / "served")).identity
    assert identity.codec_options == {"k": 16, "temperature": 1.0}
    assert (identity.teacher_id, identity.teacher_revision) == ("teacher", "served:vllm-0.33.0:float32")
    asked = len(server.seen)
    assert capture(few, tmp_path / "served", teacher_url=server.url, served_as="float32") == 0
    assert last_json(capsys)["skipped"] == 12
    assert len(server.seen) - asked == 4, "the server is looked at, and nothing is asked twice"
    assert capture(few, tmp_path / "served", teacher_url=server.url, served_as="awq") == 3, "another teacher's signal"


def test_such_a_store_is_trained_on_where_it_tells_enough_and_refused_elsewhere(
    few: Tiny, server: VllmServer, tmp_path: Path, capsys
) -> None:
    assert capture(few, tmp_path / "store", teacher_url=server.url) == 0
    options = {"math_logits_dir": tmp_path / "store", "mc_teacher_id": few.teacher, "max_steps": 2, "save_every": 2}
    train = {**options, "lm_teacher_id": None, "val_fraction": 0, "warmup_steps": 1}
    assert few.train_plainly(tmp_path / "a", **train, kd_temperature=2) == 3
    said = capsys.readouterr().err
    assert "got 2; expected 1. Give such a --kd_temperature, or --divergence=decoupled_topk:k=K" in said
    words = [f"--teacher={few.teacher}", f"--manifest={few.manifest}", "--seq_len=64"]
    assert main(["store", "verify", str(tmp_path / "store"), *words]) == 2
    assert "it ran behind a server" in capsys.readouterr().err
    assert few.train_plainly(tmp_path / "b", **train, divergence="reverse_kl") == 2
    assert few.train_plainly(tmp_path / "c", **train, kd_temperature=2, divergence="decoupled_topk:k=8") == 0
    rows = [json.loads(line) for line in (tmp_path / "c" / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["kd_coverage"] == 1.0


def test_hidden_states_give_what_the_teacher_here_gives(few: Tiny, server: VllmServer, tmp_path: Path, capsys) -> None:
    server.states_dir = tmp_path / "states"
    server.states_dir.mkdir()
    options = {"topk": None, "codec": "full", "teacher_precision": "float32"}
    served = {"teacher_url": server.url, "hidden_states_dir": server.states_dir}
    assert capture(few, tmp_path / "served", **options, **served) == 0
    assert last_json(capsys)["written"] == 12
    assert capture(few, tmp_path / "here", **options) == 0
    one, other = (records(tmp_path / name) for name in ("served", "here"))
    codec = open_store(str(tmp_path / "here")).codec
    for name, record in one.items():
        assert record.header.runs == other[name].header.runs
        rows = record.header.num_rows
        signals = [codec.decode(each.payload, 0, rows, 1.0, 512) for each in (record, other[name])]
        assert all(isinstance(signal, LogitsSignal) for signal in signals)
        torch.testing.assert_close(*(signal.rows.float() for signal in signals), rtol=2e-3, atol=2e-3)
    assert open_store(str(tmp_path / "served")).identity.teacher_revision.startswith("served:vllm-0.33.0:end-sha256-")
    assert not list(server.states_dir.iterdir()), "what was left for us is taken away"


def test_states_of_another_layer_are_found_out(few: Tiny, server: VllmServer, tmp_path: Path, capsys) -> None:
    server.states_dir = tmp_path / "states"
    server.states_dir.mkdir()
    whole = server.run

    def normed(ids: list[int]):
        logs, states = whole(ids)
        return logs, states / states.norm(dim=1, keepdim=True) + 0.5

    server.run = normed  # type: ignore[method-assign]
    assert capture(few, tmp_path / "store", topk=None, teacher_url=server.url, hidden_states_dir=server.states_dir) == 2
    assert "eagle_aux_hidden_state_layer_ids [2]" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "options", "code", "words"),
    [
        ({"max_logprobs": 8}, {}, 2, "--max-logprobs 16"),
        ({"max_logprobs": -1}, {"hidden_states_dir": "/tmp", "topk": None}, 2, "Use vLLM's own server"),
        (
            {"max_model_len": 64},
            {},
            2,
            "--seq_len: the teacher cannot see so long a context; got 64; expected at most 63",
        ),
        ({"root": "/other"}, {}, 2, "the server does not serve this model; got served (of /other)"),
        ({"key": KEY}, {}, 4, "LIQUID_TEACHER_API_KEY"),
        ({}, {"codec": "tail", "topk": None}, 2, "leave --codec out"),
        ({}, {"codec_options": "temperature=2"}, 2, "Leave the temperature out"),
        ({}, {"kd_positions": 0.5}, 2, "--kd_positions needs"),
        ({}, {"held_out_tokens": 100}, 2, "--held_out_tokens"),
        ({}, {"teacher_url": "http://me:word@127.0.0.1"}, 2, "has a name or password in it"),
        ({}, {"teacher_url": "127.0.0.1:8000"}, 2, "is no address of a server"),
        ({}, {"teacher_url": None, "served_as": "awq"}, 2, "--served_as goes with --teacher_url"),
        ({}, {"hidden_states_dir": "/nowhere", "topk": None}, 4, "there is no such folder"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_scored(
    few: Tiny, server: VllmServer, tmp_path: Path, capsys, settings, options, code, words
) -> None:
    for name, value in settings.items():
        setattr(server, name, value)
    assert capture(few, tmp_path / "store", **{"teacher_url": server.url, **options}) == code
    said = capsys.readouterr().err
    assert words in said
    assert "Traceback" not in said
    assert len(server.completions()) <= 1
    assert not list(tmp_path.glob("store/*.json"))


@pytest.mark.parametrize("option", ["dataset_manifest", "hidden_states_dir"])
def test_a_place_that_is_not_there_is_said_before_a_server_is_asked(
    few: Tiny, server: VllmServer, tmp_path: Path, capsys, option: str
) -> None:
    """A server that is down is waited for half a minute."""
    assert capture(few, tmp_path / "store", topk=None, teacher_url=server.url, **{option: tmp_path / "gone"}) == 4
    assert str(tmp_path / "gone") in capsys.readouterr().err
    assert server.seen == []


def test_another_tokenizer_is_refused(few: Tiny, server: VllmServer, tmp_path: Path, capsys) -> None:
    whole = server.tokenizer
    server.tokenizer = lambda text, **words: {"input_ids": whole(text.lower(), **words)["input_ids"]}
    assert capture(few, tmp_path / "store", teacher_url=server.url) == 2
    assert "the server's tokenizer is another one" in capsys.readouterr().err


def test_a_server_that_answers_under_another_name_is_refused(
    few: Tiny, server: VllmServer, tmp_path: Path, capsys
) -> None:
    rename = spoil(lambda told, _: told.update(model="an/alias"))
    server.faults.append(times(1, rename))
    assert capture(few, tmp_path / "store", teacher_url=server.url) == 2
    said = capsys.readouterr().err
    assert "answers as another model than it was asked for; got model 'an/alias', not 'served'" in said
    assert "Traceback" not in said


def test_the_key_is_sent_and_never_shown(few: Tiny, server: VllmServer, tmp_path: Path, capsys, monkeypatch) -> None:
    server.key = KEY
    monkeypatch.setenv("LIQUID_TEACHER_API_KEY", KEY)
    assert capture(few, tmp_path / "store", teacher_url=server.url) == 0
    assert set(server.keys) == {f"Bearer {KEY}"}
    said = capsys.readouterr()
    assert KEY not in said.out + said.err
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]


def spoil(change) -> object:
    """A fault of one sample: its answer is as the server's, changed."""

    def fault(handler: Handler) -> None:
        body = next(body for path, body in reversed(handler.world.seen) if path == "/v1/completions")
        told = handler.completion(body, *handler.world.run(body["prompt"]))
        change(told, told["choices"][0]["prompt_logprobs"])
        handler.send(200, told)

    return fault


def lose_a_position(told, positions) -> None:
    positions.pop()


def be_no_number(told, positions) -> None:
    next(iter(positions[1].values()))["logprob"] = float("nan")


def be_no_probability(told, positions) -> None:
    for one in positions[1].values():
        one["logprob"] += 3.0


def be_of_other_tokens(told, positions) -> None:
    told["choices"][0]["prompt_token_ids"] = [1]


def of_a_sample(server: VllmServer, fault) -> None:
    """From the first sample on, not at the trial text: that one prompt always strikes it."""
    struck: list[list[int]] = []

    def strike(handler: Handler, path: str, body: dict) -> bool:
        if path != "/v1/completions" or len(server.completions()) < 2:
            return False
        if not struck:
            struck.append(body["prompt"])
        if body["prompt"] != struck[0]:
            return False
        fault(handler)
        return True

    server.faults.append(strike)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (spoil(lose_a_position), "positions with log-probabilities for"),
        (spoil(be_no_number), "not finite"),
        (spoil(be_no_probability), "raw_logprobs"),
        (spoil(be_of_other_tokens), "of other tokens than were sent"),
        (lambda handler: handler.refuse(400, "BadRequestError", "out of vocabulary"), "the server refuses this sample"),
        (lambda handler: handler.refuse(500, "InternalServerError", "an assertion"), "fails on this sample each time"),
    ],
)
def test_a_sample_that_fails_fails_alone(few: Tiny, server: VllmServer, tmp_path: Path, capsys, fault, words) -> None:
    of_a_sample(server, fault)
    assert capture(few, tmp_path / "store", teacher_url=server.url, served_requests=1) == 3
    done = last_json(capsys)
    assert (done["written"], done["failed"]) == (11, 1)
    assert words in done["failures"][0]["reason"]
    server.faults.clear()
    assert capture(few, tmp_path / "store", teacher_url=server.url) == 0
    assert last_json(capsys)["written"] == 1


def test_a_lost_server_keeps_what_is_written_and_the_same_command_goes_on(
    few: Tiny, server: VllmServer, tmp_path: Path, capsys
) -> None:
    def lost(handler: Handler, path: str, body: dict) -> bool:
        if len(server.completions()) < 7:
            return False
        handler.refuse(503, "ServiceUnavailableError", "going away")
        return True

    server.faults.append(lost)
    words = {"teacher_url": server.url, "served_requests": 2, "batch_size": 1}
    assert capture(few, tmp_path / "store", **words) == 4
    assert "the teacher's server failed (503)" in capsys.readouterr().err
    kept = len(records(tmp_path / "store"))
    assert 0 < kept < 12
    server.faults.clear()
    assert capture(few, tmp_path / "store", **words) == 0
    done = last_json(capsys)
    assert (done["skipped"], done["written"]) == (kept, 12 - kept)


@pytest.fixture
def files(few: Tiny) -> Iterator[Tiny]:
    """The samples in three files, each a unit."""
    rows = (few.root / "math.jsonl").read_text().splitlines(keepends=True)
    for number in range(3):
        (few.root / f"part-{number}.jsonl").write_text("".join(rows[4 * number : 4 * number + 4]))
    before = few.manifest.read_text()
    few.draw_from({"path": "part-*.jsonl", "type": "math_tool", "weight": 1.0})
    yield few
    few.manifest.write_text(before)


def test_rows_that_only_pad_the_embedding_are_part_of_the_rest(few: Tiny, model, tmp_path: Path, capsys) -> None:
    """Many a model's embedding has more rows than its tokenizer has ids, and servers tell of all of them."""
    padded = AutoModelForCausalLM.from_pretrained(few.teacher, dtype=torch.float32).eval()
    padded.resize_token_embeddings(512 + 4)
    (tmp_path / "padded").mkdir()
    padded.save_pretrained(tmp_path / "padded")
    model[1].save_pretrained(tmp_path / "padded")
    with serving(VllmServer(padded, model[1], name="padded", root=str(tmp_path / "padded"), max_logprobs=19)) as server:
        words = {"teacher_url": server.url, "mc_teacher_id": tmp_path / "padded", "served_requests": 2}
        assert capture(few, tmp_path / "store", **words) == 2
        assert "--max-logprobs 20, or give --topk=16" in capsys.readouterr().err
        assert capture(few, tmp_path / "store", **words, topk=15) == 0
        store = open_store(str(tmp_path / "store"))
        for body in server.completions()[2:4]:
            logs, _ = server.run(body)
            (record,) = [
                one for _, one in store.layout.records() if one.header.token_hashes == token_hashes(np.array(body))
            ]
            stored = store.codec.decode(record.payload, 0, record.header.num_rows, 1.0, 512)
            best = logs[:-1][torch.from_numpy(record.header.positions())][:, :512].topk(15).values.exp()
            torch.testing.assert_close(stored.weights, best, rtol=2e-3, atol=1e-6)
            torch.testing.assert_close(stored.tail_mass, 1 - best.sum(dim=1), rtol=2e-3, atol=5e-6)


def test_another_model_with_the_same_tokenizer_is_another_teacher(
    few: Tiny, server: VllmServer, tmp_path: Path, capsys
) -> None:
    server.root = "/a/model/that/was/tuned"
    assert capture(few, tmp_path / "store", teacher_url=server.url, served_model="served") == 0
    assert open_store(str(tmp_path / "store")).identity.teacher_revision == "served:vllm-0.33.0:model-served"
    server.name = "tuned"
    assert capture(few, tmp_path / "store", teacher_url=server.url, served_model="tuned") == 3
    assert "the teacher revision differs" in capsys.readouterr().err


def test_units_of_a_served_teacher(files: Tiny, server: VllmServer, tmp_path: Path, capsys) -> None:
    words = {"teacher_url": server.url, "served_requests": 2}
    assert capture(files, tmp_path / "store", **words, unit="0/2") == 0
    done = last_json(capsys)
    assert (done["units"], done["units_complete"], done["written"]) == (2, 2, 8)
    assert len(server.completions()) == 1 + 8, "the probe, and each sample once"
    assert capture(files, tmp_path / "store", **words, unit="0/2") == 0
    assert last_json(capsys)["units_skipped"] == 2
    assert len(server.completions()) == 2 + 8
    assert capture(files, tmp_path / "store", **words, unit="1/2", served_as="awq") == 3, "another teacher's signal"
    assert "the teacher revision differs" in capsys.readouterr().err
    assert len(records(tmp_path / "store")) == 8


def test_units_go_on_once_a_lost_server_is_back(files: Tiny, server: VllmServer, tmp_path: Path) -> None:
    given = {"mc_teacher_id": files.teacher, "dataset_manifest": files.manifest, "seq_len": 64, "topk": 16}
    served = {"teacher_url": server.url, "data_cache": tmp_path / "tokens", "math_logits_dir": tmp_path / "store"}
    opened = liquid_llm.open_capture({**given, **served})
    first, *others = opened.units()
    server.faults.append(lambda handler, *_: handler.refuse(503, "ServiceUnavailableError", "going away") or True)
    with pytest.raises(StorageError, match="the teacher's server failed"):
        opened.run(first)
    server.faults.clear()
    assert [opened.run(unit)["complete"] for unit in (first, *others)] == [True] * 3
    assert len(records(tmp_path / "store")) == 12


def test_work_that_was_given_up_is_not_asked_about_by_what_comes_next(server: VllmServer) -> None:
    at, free = threading.Event(), threading.Event()
    server.faults.append(lambda *_: bool(at.set()) or not free.wait(60))
    samples = make_samples(3, low=6, high=6)
    windows = [Window(ListSource(samples), n, one.sample_id, one.type, 6) for n, one in enumerate(samples)]
    served = ServedModel(Server(server.url), "served", IDENTITY, 512, 255, server.fingerprint, requests=1)
    teacher = ServedTeacher(served, 4)
    next(teacher.ahead([[one] for one in windows[:2]]))
    at.wait(60)
    teacher.end(abandon=True)
    free.set()
    next(teacher.ahead([[windows[2]]]))
    codecs = {"math_tool": TopKCodec(4, temperature=1.0)}
    ((_, rows, _),) = teacher.score([windows[2]], codecs, Scratch(), lambda _, count: count)
    assert not isinstance(rows, SignalError)
    teacher.end(abandon=False)
    assert server.completions() == [samples[n].input_ids.tolist() for n in (0, 2)]


def test_a_server_that_becomes_another_is_noticed(few: Tiny, server: VllmServer, tmp_path: Path, capsys) -> None:
    server.faults.append(lambda *_: setattr(server, "fingerprint", f"other-{len(server.completions()) > 3}") or False)
    assert capture(few, tmp_path / "store", teacher_url=server.url, served_requests=1) == 4
    assert "no longer the one that was asked in the beginning" in capsys.readouterr().err


def test_a_stop_does_not_wait_for_a_server_that_says_nothing(
    few: Tiny, server: VllmServer, tmp_path: Path, capsys
) -> None:
    free = threading.Event()

    def hang(handler: Handler, path: str, body: dict) -> bool:
        if len(server.completions()) < 4:
            return False
        os.kill(os.getpid(), signal.SIGTERM)
        return not free.wait(60)

    server.faults.append(hang)
    try:
        assert capture(few, tmp_path / "store", teacher_url=server.url, served_requests=1, batch_size=1) == 75
        assert not free.is_set()
    finally:
        free.set()
    done = last_json(capsys)
    assert done["interrupted"]
    assert len(records(tmp_path / "store")) == done["written"] > 0


def test_passing_trouble_passes(few: Tiny, server: VllmServer, tmp_path: Path, capsys) -> None:
    def cut(handler: Handler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "100000")
        handler.end_headers()
        handler.wfile.write(b'{"id": "cmpl')
        handler.close_connection = True

    server.faults += [
        times(2, lambda handler: handler.refuse(500, "InternalServerError", "once")),
        times(1, lambda handler: handler.send_bytes(200, b"<html>one moment</html>")),
        times(1, cut),
        times(1, lambda handler: handler.send(429, {"error": "slow down"}, {"Retry-After": "0"})),
        times(1, lambda handler: handler.connection.shutdown(socket.SHUT_RDWR)),
    ]
    storage.set_retry_policy(storage.RetryPolicy(attempts=9, first_seconds=0.01, max_seconds=0.02))
    assert capture(few, tmp_path / "store", teacher_url=server.url) == 0
    assert last_json(capsys)["written"] == 12
