"""Secrets in every place that a user may put one are in no file that is written, no output, no process's words."""

import base64
import glob
import io
import json
import os
import threading
import zlib
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import yaml
from tests.support.models import tiny_model
from tests.support.tiny import QUICK, VOCAB_SIZE, Tiny, build

from liquid_llm.cli.main import main

pytestmark = pytest.mark.slow

PASSWORD = "Pa55-of-the-url"
SIGNED = "5ignature0fTheQuery"
AMAZON = "4mz51gnature0815"
SECRETS = {
    "HF_TOKEN": "hf_AbCdEfGhIjKlMnOp",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "DB_PASSWORD": "c0rrect-horse-battery",
    "url": PASSWORD,
    "query": SIGNED,
    "amazon": AMAZON,
}
QUERY = f"sig={SIGNED}&X-Amz-Credential=AKIAABCDEFGHIJKLMNOP&X-Amz-Signature={AMAZON}"


class Guarded(SimpleHTTPRequestHandler):
    """Gives files to whoever has the password or the signature."""

    def do_GET(self) -> None:
        self._let(super().do_GET)

    def do_HEAD(self) -> None:
        self._let(super().do_HEAD)

    def _let(self, go_on) -> None:
        known = "Basic " + base64.b64encode(f"user:{PASSWORD}".encode()).decode()
        if self.headers.get("Authorization") != known and f"sig={SIGNED}" not in self.path:
            self.send_error(403)
        else:
            go_on()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Tiny:
    found = build(tmp_path_factory.mktemp("tiny"))
    torch.save(tiny_model("lfm2", VOCAB_SIZE, max_position_embeddings=256).state_dict(), found.root / "start.pt")
    (found.root / "texts.jsonl").write_text(found.manifest.read_text().partition("\n")[0])
    return found


@pytest.fixture
def served(tiny, monkeypatch) -> Iterator[str]:
    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY", "DB_PASSWORD"):
        monkeypatch.setenv(name, SECRETS[name])
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Guarded, directory=str(tiny.root))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def children() -> Iterator[set[str]]:
    """The command lines of this process's children and theirs, as anybody on the machine sees them."""
    seen: set[str] = set()
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.02):
            parents = {os.getpid()}
            for place in sorted(glob.glob("/proc/[0-9]*"), key=lambda one: int(one[6:])):
                try:
                    parent = int(Path(place, "stat").read_text().rpartition(")")[2].split()[1])
                    if parent in parents:
                        parents.add(int(place[6:]))
                        seen.add(Path(place, "cmdline").read_bytes().replace(b"\0", b" ").decode())
                except OSError:
                    pass

    thread = threading.Thread(target=watch)
    thread.start()
    yield seen
    ended.set()
    thread.join()


def leaks(folder: Path, *outputs: str) -> list[str]:
    """Where a secret is found: in a file below ``folder``, in its name, or in what was said."""
    found = []
    for path in folder.rglob("*"):
        texts = [path.name.encode()]
        if path.is_file():
            data = path.read_bytes()
            texts += [data, *unpacked(data)]
        found += [
            f"{path.relative_to(folder)}: {name}"
            for name, one in SECRETS.items()
            if any(one.encode() in text for text in texts)
        ]
    return found + [f"said: {name}" for name, one in SECRETS.items() for text in outputs if one in text]


def unpacked(data: bytes) -> Iterator[bytes]:
    """What lies packed in a file: the list of ids of a shard is one such piece."""
    at = data.find(b"x\xda")
    if at >= 0 and b"liquid_llm" in data[:4096]:
        yield zlib.decompressobj().decompress(data[at:])


def test_a_leak_is_found(tmp_path):
    assert leaks(tmp_path, "nothing") == []
    (tmp_path / "a").write_bytes(b"\0" + PASSWORD.encode())
    (tmp_path / f"b?sig={SIGNED}").touch()
    stream = io.BytesIO()
    torch.save({"metadata": {"run": SECRETS["HF_TOKEN"]}}, stream)
    (tmp_path / "c.pt").write_bytes(stream.getvalue())
    expected = {"a: url", f"b?sig={SIGNED}: query", "c.pt: HF_TOKEN", "said: amazon"}
    assert set(leaks(tmp_path, f"x{AMAZON}")) == expected


def places(tiny: Tiny, served: str, folder: Path) -> dict[str, str]:
    (folder / "token").write_text(SECRETS["HF_TOKEN"])
    return {
        "dataset_manifest": f"http://user:{PASSWORD}@{served}/manifest.jsonl",
        "data_cache": str(folder / "written" / "tokens"),
        "local_workdir": str(folder / "written" / "work"),
        "hf_token_file": str(folder / "token"),
    }


def test_of_capture_training_and_what_they_say(tiny, served, children, tmp_path, capfd):
    written = tmp_path / "written"
    stores = {f"{name}_logits_dir": written / "signal" / name for name in ("math", "code")}
    common = places(tiny, served, tmp_path)
    capture = {name: value for name, value in common.items() if name != "local_workdir"}
    assert main(["capture", *tiny.capture_words(**QUICK, **stores, **capture)]) == 0
    more = {"max_steps": 4, "eval_every": 2, "save_every": 2, "resume_gcs_uri": f"http://{served}/start.pt?{QUERY}"}
    training = tiny.train_words(written / "out", **stores, **common, **more, keep_old_logit_l2=0.01)
    assert main(["train", *training, "--dry_run"]) == 0
    assert main(["train", *training]) == 0
    run = written / "out" / "run"
    for again in (["inspect", str(run)], ["doctor", str(run)], ["report", str(run)]):
        assert main(again) == 0
    assert main(["export", str(run), str(written / "exported")]) == 0
    # what goes wrong is said without them, too
    for name, value in (
        ("resume_gcs_uri", f"http://{served}/none.pt?{QUERY}"),
        ("dataset_manifest", f"http://user:{PASSWORD}@{served}/none.jsonl"),
        ("hf_token", SECRETS["HF_TOKEN"]),
        ("max_steps", SECRETS["HF_TOKEN"]),
        ("fa_wheel_gcs", f"http://{served}/x.whl?{QUERY}"),
    ):
        assert main(["train", *training, f"--{name}={value}", f"--output_gcs_uri={written / 'refused'}"]) in (2, 3, 4)
    out, err = capfd.readouterr()
    assert leaks(written, out, err, *children) == []
    options = yaml.safe_load((run / "provenance" / "options.yaml").read_text())
    assert options["dataset_manifest"] == f"http://***@{served}/manifest.jsonl"
    assert options["resume_gcs_uri"].startswith(f"http://{served}/start.pt?")
    assert options["hf_token_file"] == str(tmp_path / "token")  # where one lies is none
    assert options["max_steps"] == 4
    config = json.loads((run / "student" / "config.json").read_text())
    assert config["eos_token_id"] == 0  # nor is a number by such a name


def test_of_a_study_and_the_processes_that_help_it(tiny, served, children, tmp_path, capfd):
    written = tmp_path / "written"
    values = {
        **places(tiny, served, tmp_path),
        "dataset_manifest": f"http://user:{PASSWORD}@{served}/texts.jsonl",
        "student": str(tiny.student),
        "lm_teacher_id": str(tiny.teacher),
        **dict.fromkeys(("max_steps", "eval_every", "batch_size"), 2),
        "block_size": 64,
        "eval_tokens": 256,
        "val_fraction": 0.2,
        "resume_gcs_uri": f"http://{served}/start.pt?{QUERY}",
        "arms": [{"name": "plain", "kd_alpha_start": 0, "kd_alpha_end": 0}, {"name": "more", "kd_alpha_start": 0.9}],
        "seeds": [0],
        # what a run keeps of its manifest's URL has no password: what to judge by is said
        "evaluation": {"records": f"http://user:{PASSWORD}@{served}/lm.jsonl"},
    }
    del values["local_workdir"]
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(values))
    words = ["study", f"--config={path}", f"--study_dir={written / 'study'}", "--processes=2"]
    assert main([*words, "--dry_run=true"]) == 0
    assert main(words) == 0
    out, err = capfd.readouterr()
    assert len(children) > 1
    assert leaks(written, out, err, *children) == []
