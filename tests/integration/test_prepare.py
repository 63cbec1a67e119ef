"""Data preparation through the real commands: liquid prepare, and --prepare_data of training and capture."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
import signal
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.support import readme, texts
from tests.support.forked import Forked
from tests.support.gcs import Bucket
from tests.support.raw_inputs import RAW, jsonl, zipped
from tests.support.tiny import Tiny, build, files

from liquid_llm import storage
from liquid_llm.cli.main import main
from liquid_llm.data.manifest import entry_files, read_manifest
from liquid_llm.data.records import read_records
from liquid_llm.options import PREPARE, options_of
from liquid_llm.preparation.toolkit import clean_environment

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def put(root: Path, plain: dict[str, Any], **raw: bytes) -> str:
    """A catalog at ``root`` and files beside it; gives the catalog's path."""
    root.mkdir(parents=True, exist_ok=True)
    for name, data in raw.items():
        (root / name.replace("_", ".")).write_bytes(data)
    (root / "datasets.yaml").write_text(yaml.safe_dump(plain, sort_keys=False))
    return str(root / "datasets.yaml")


def prepare(capsys: pytest.CaptureFixture[str], catalog: str, *words: str, code: int = 0) -> Any:
    """What ``liquid prepare`` prints: its JSON line, or the error with an exit code other than 0."""
    assert main(["prepare", f"--datasets_yaml={catalog}", *words]) == code
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return json.loads(captured.out) if code == 0 else captured.err[captured.err.rindex("error: ") :]


def all_texts(manifest: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for entry in read_manifest(manifest):
        for uri in entry_files(entry):
            found.setdefault(entry.type, []).extend(record.whole for record in read_records(uri, entry.type))
    return found


def test_every_dataset_of_a_catalog_goes_into_its_manifest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = {
        name: {"type": raw.type, "in": f"raw/{name}/*", "out": f"out/{name}", "manifest": "manifest.jsonl"}
        for name, raw in RAW.items()
        if name not in ("dolma", "fineweb-edu", "jsonl")  # the same words as c4
    }
    for name, raw in RAW.items():
        storage.write_bytes(f"{tmp_path}/raw/{name}/{raw.name}", raw.data)
    catalog = put(tmp_path, plain)
    done = prepare(capsys, catalog)
    assert {one["status"] for one in done.values()} == {"prepared"}
    expected: dict[str, list[str]] = {}
    for name in plain:
        expected.setdefault(RAW[name].type, []).extend(RAW[name].texts)
    assert all_texts(str(tmp_path / "manifest.jsonl")) == expected
    before = (tmp_path / "manifest.jsonl").read_bytes()
    assert {one["status"] for one in prepare(capsys, catalog).values()} == {"complete"}
    assert set(prepare(capsys, catalog, "--only=gsm8k,c4", "--prepare-data=force")) == {"gsm8k", "c4"}
    assert (tmp_path / "manifest.jsonl").read_bytes() == before


def test_inputs_and_shards_in_a_bucket(gcs: Bucket, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = f"{gcs.uri}/datasets"
    for name in ("wikitext", "fineweb-edu", "gsm8k", "codesearchnet"):
        storage.write_bytes(f"{base}/raw/{name}/{RAW[name].name}", RAW[name].data)
    plain = {
        "wt": {
            "type": "lm",
            "in": f"{base}/raw/wikitext/*.zip",
            "out": f"{base}/shards/wt",
            "manifest": f"{base}/m.jsonl",
        },
        "fw": {"type": "lm", "in": "raw/fineweb-edu/*", "out": "shards/fw-*.jsonl.gz", "manifest": "m.jsonl"},
        "gs": {"type": "math_tool", "in": "raw/gsm8k/*", "out": "shards/gs", "manifest": "m.jsonl"},
        "cs": {"type": "code", "in": "raw/codesearchnet/*", "out": "shards/cs", "manifest": "m.jsonl"},
    }
    storage.write_bytes(f"{base}/datasets.yaml", yaml.safe_dump(plain, sort_keys=False).encode())
    prepare(capsys, f"{base}/datasets.yaml")
    found = all_texts(f"{base}/m.jsonl")
    assert found["lm"] == [*RAW["wikitext"].texts, *RAW["fineweb-edu"].texts]
    assert found["math_tool"] == RAW["gsm8k"].texts
    assert found["code"] == RAW["codesearchnet"].texts
    assert {one["status"] for one in prepare(capsys, f"{base}/datasets.yaml").values()} == {"complete"}
    names = {info.name for info in storage.list_files(f"{base}/shards")}
    assert "wt/_prepared/wt/complete.json" in names
    storage.remove(f"{base}/shards/wt/wt-00000-00000.jsonl")
    assert prepare(capsys, f"{base}/datasets.yaml", "--only=wt")["wt"]["status"] == "prepared"
    assert all_texts(f"{base}/m.jsonl") == found


def test_a_killed_command_is_run_again_and_ends_with_the_same_shards(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = random.Random(2)
    rows = [{"text": f"{n} {texts.paragraph(rng, 30)}"} for n in range(6000)]
    raw = {f"r{n}_json": jsonl(rows[n * 2000 : n * 2000 + 2000]) for n in range(3)}
    one = {"type": "lm", "in": "r*.json", "shard_bytes": 400_000}
    clean = put(tmp_path, {"a": {**one, "out": "clean"}}, **raw)
    prepare(capsys, clean)
    catalog = str(tmp_path / "killed.yaml")
    Path(catalog).write_text(yaml.safe_dump({"a": {**one, "out": "killed"}}))
    words = ["-m", "liquid_llm.cli.main", "prepare", f"--datasets_yaml={catalog}"]
    kills = 0
    for shards_at_least in (1, 4, 9):
        process = Forked(words, stdout=False, stderr=False)
        while process.poll() is None and len(files(tmp_path / "killed", "a-*")) < shards_at_least:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
    assert kills >= 2
    prepare(capsys, catalog)
    same = {path.name: path.read_bytes() for path in (tmp_path / "clean").glob("a-*")}
    assert same == {path.name: path.read_bytes() for path in (tmp_path / "killed").glob("a-*")}


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        ({"a_bin": b"\x00\x01\x02\x03" * 9}, "fits no known format"),
        ({"a_jsonl": b"{broken\n" * 9}, "nothing in this input is usable"),
        ({"a_json.gz": gzip.compress(jsonl([{"text": "x" * 99}] * 99))[:-9]}, "cannot be read to its end"),
        ({}, "no file matches"),
    ],
)
def test_an_input_that_cannot_be_used_exits_3_and_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], raw: dict[str, bytes], says: str
) -> None:
    catalog = put(tmp_path, {"a": {"type": "lm", "in": "a.*", "out": "out", "manifest": "m.jsonl"}}, **raw)
    message = prepare(capsys, catalog, code=3)
    assert says in message
    assert f"{tmp_path}/a." in message
    assert not (tmp_path / "m.jsonl").exists()
    assert not list((tmp_path / "out").glob("a-*"))


def test_a_dataset_that_cannot_be_prepared_keeps_no_other_from_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = {name: {"type": "lm", "in": f"{name}.jsonl", "out": f"out-{name}", "manifest": "m.jsonl"} for name in "abc"}
    texts = {f"{name}_jsonl": jsonl([{"text": f"the text of {name} and its words"}] * 3) for name in "ac"}
    catalog = put(tmp_path, plain, **texts, b_jsonl=b"{broken\n" * 9)
    assert f"{tmp_path}/b.jsonl" in prepare(capsys, catalog, code=3)
    assert set(all_texts(str(tmp_path / "m.jsonl"))["lm"]) == {f"the text of {name} and its words" for name in "ac"}
    (tmp_path / "b.jsonl").write_bytes(jsonl([{"text": "the text of b and its words"}] * 3))
    done = prepare(capsys, catalog)
    assert {name: one["status"] for name, one in done.items()} == {"a": "complete", "b": "prepared", "c": "complete"}


def test_skip_says_what_lacks_and_prepares_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    catalog = put(tmp_path, {"a": {"type": "lm", "in": "a.txt", "out": "out"}}, a_txt=b"words\n")
    assert "a is incomplete" in prepare(capsys, catalog, "--prepare_data=skip", code=3)
    assert not (tmp_path / "out").exists()
    prepare(capsys, catalog)
    assert prepare(capsys, catalog, "--prepare_data=skip")["a"]["status"] == "complete"
    (tmp_path / "a.txt").write_bytes(b"other words\n")
    assert "a is changed" in prepare(capsys, catalog, "--prepare_data=skip", code=3)
    (tmp_path / "a.txt").unlink()
    assert prepare(capsys, catalog)["a"]["status"] == "complete"  # the inputs are gone, the shards are not
    assert "nothing to prepare from" in prepare(capsys, catalog, "--prepare_data=force", code=3)


def test_the_options_of_prepare_are_frozen() -> None:
    frozen = (Path(__file__).parents[1] / "faces" / "frozen_options.txt").read_text().splitlines()
    names = [line.partition(" ")[2] for line in frozen if line.startswith(f"{PREPARE} ")]
    assert sorted(option.name for option in options_of(PREPARE)) == sorted(names)


def test_the_example_of_the_page_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document = (readme.REPOSITORY / "docs" / "own-data.md").read_text(encoding="utf-8")
    example = document[document.index("    gsm8k:\n") :].partition("\n\n")[0]
    plain = yaml.safe_load(example)
    names = {"gsm8k": "gsm8k", "wikitext": "wikitext", "python": "codesearchnet"}
    assert set(plain) == set(names)
    for name, of in names.items():
        pattern = plain[name]["in"]
        storage.write_bytes(str(tmp_path / pattern.replace("*", Path(RAW[of].name).stem)), RAW[of].data)
    (tmp_path / "datasets.yaml").write_text(example)
    monkeypatch.chdir(tmp_path)
    command = readme.command("liquid prepare")
    assert main(command.split()[1:]) == 0
    found = all_texts(str(tmp_path / "manifest.jsonl"))
    assert found == {"math_tool": RAW["gsm8k"].texts, "lm": RAW["wikitext"].texts, "code": RAW["codesearchnet"].texts}


# ------------------------------------------------------------------------------------------------ training and capture


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return build(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def raw_world(tiny: Tiny, tmp_path: Path) -> dict[str, object]:
    """A raw GSM8K-shaped file, a text, a catalog and a manifest that names the raw input; gives options for both."""
    rng = random.Random(5)
    problems = [texts.word_problem(rng).partition("\nAnswer: ")[::2] for _ in range(40)]
    rows = [{"question": question.removeprefix("Question: "), "answer": answer} for question, answer in problems]
    plain = {
        "gsm": {"type": "math_tool", "in": "raw/gsm*.jsonl", "out": "out/gsm", "weight": 0.5},
        "text": {"type": "lm", "in": "raw/text.txt", "out": "out/text", "manifest": "manifest.jsonl"},
        "unused": {"type": "lm", "in": "raw/not-there.txt", "out": "out/unused"},
    }
    storage.write_bytes(f"{tmp_path}/raw/gsm-train.jsonl", jsonl([*rows, "no object"]))
    prose = "\n\n".join(texts.paragraph(rng, 60) for _ in range(40))
    storage.write_bytes(f"{tmp_path}/raw/text.txt", prose.encode())
    put(tmp_path, plain)
    (tmp_path / "manifest.jsonl").write_text('{"path": "raw/gsm-train.jsonl", "type": "math_tool", "weight": 0.5}\n')
    folders = {f"{kind}_logits_dir": tmp_path / "signal" / kind for kind in ("math", "code")}
    return {"dataset_manifest": tmp_path / "manifest.jsonl", "data_cache": tmp_path / "tokens", **folders}


def test_capture_and_training_prepare_what_they_need_and_say_so(
    tiny: Tiny, raw_world: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # 192 tokens: of a question longer than the window nothing is learnt
    assert main(["capture", *tiny.capture_words(**raw_world, prepare_data="auto", seq_len=192)]) == 0
    assert json.loads(capsys.readouterr().out)["written"] == 40
    assert not (tmp_path / "out" / "text").exists()  # capture has no use for it
    begun = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "gsm").glob("*.jsonl")}
    raw_world |= {"block_size": 192}
    words = tiny.train_words(tmp_path / "run", **raw_world, max_steps=4, eval_every=0, prepare_data="auto")
    assert main(["train", *words, f"--datasets_yaml={tmp_path / 'datasets.yaml'}"]) == 0
    assert {path: path.stat().st_mtime_ns for path in begun} == begun
    provenance = tmp_path / "run" / "run" / "provenance"
    readiness = json.loads((provenance / "data_readiness.json").read_text())
    done = readiness["preparation"]
    assert {name: one["status"] for name, one in done.items()} == {"gsm": "complete", "text": "prepared"}
    assert done["gsm"]["counts"]["records"] == 40
    assert done["gsm"]["counts"]["rejected"] == 1
    assert done["gsm"]["rejects"].endswith("rejects.jsonl")
    assert set(readiness["types"]) == {"lm", "math_tool"}
    snapshot = yaml.safe_load((provenance / "datasets_snapshot.yaml").read_text())
    assert snapshot["datasets"] == yaml.safe_load((tmp_path / "datasets.yaml").read_text())
    lines = [json.loads(line) for line in (provenance / "manifest_snapshot.jsonl").read_text().splitlines()]
    assert {(line["path"], line["weight"]) for line in lines} == {
        (f"{tmp_path}/out/gsm/gsm-*.jsonl", 0.5),
        (f"{tmp_path}/out/text/text-*.jsonl", 1.0),
    }
    assert (tmp_path / "run" / "run" / "final.pt").exists()


def test_skip_and_a_dry_run_prepare_nothing_and_name_the_line(
    tiny: Tiny, raw_world: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for extra in (["--prepare_data=skip"], ["--dry_run"]):
        words = tiny.train_words(tmp_path / "run", **raw_world, max_steps=2, eval_every=0)
        assert main(["train", *words, *extra]) == 3
        error = capsys.readouterr().err
        assert "manifest.jsonl:1: the dataset gsm is not prepared" in error
        assert "liquid prepare --datasets_yaml=" in error
        assert not (tmp_path / "out").exists()
    assert main(["prepare", f"--datasets_yaml={tmp_path / 'datasets.yaml'}", "--only=gsm,text"]) == 0
    assert main(["capture", *tiny.capture_words(**raw_world, prepare_data="skip")]) == 0
    words = tiny.train_words(tmp_path / "run", **raw_world, max_steps=2, eval_every=0)
    assert main(["train", *words, "--prepare_data=skip"]) == 0


def test_a_line_of_another_type_than_its_dataset_is_refused(
    tiny: Tiny, raw_world: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "manifest.jsonl").write_text('{"path": "raw/gsm-train.jsonl", "type": "lm"}\n')
    assert main(["train", *tiny.train_words(tmp_path / "run", **raw_world)]) == 3
    assert "manifest.jsonl:1: the line's type is not that of the dataset gsm" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------- toolkit

TOOLKIT = """
import argparse, json, os, pathlib, sys, yaml
from helper import upper
parser = argparse.ArgumentParser()
parser.add_argument("--datasets_yaml"); parser.add_argument("--out")
options = parser.parse_args()
secrets = [name for name, value in os.environ.items() if "planted" in value]
print("environment", secrets, os.environ["HOME"] == os.path.expanduser("~"), flush=True)
print("says planted0123456789 aloud", flush=True)
for name, entry in yaml.safe_load(open(options.datasets_yaml)).items():
    assert entry["out"] == f"{options.out}/{name}"
    with open(f"{entry['out']}/part.jsonl", "w") as out:
        for path in entry["in"]:
            for line in open(path):
                print(json.dumps({"text": upper(line.strip())}), file=out)
"""
HELPER = "def upper(text):\n    return text.upper()\n"


def toolkit_zip(path: Path, **members: str) -> list[str]:
    """Write a toolkit; gives the words that name it."""
    plain = {"prepare_py": TOOLKIT, "helper_py": HELPER, **members}
    path.write_bytes(zipped({name.replace("_py", ".py"): text.encode() for name, text in plain.items()}))
    return [f"--prep_toolkit_zip_uri={path}"]


@pytest.fixture
def strange(tmp_path: Path) -> str:
    """A catalog with a dataset for a toolkit and one without."""
    plain = {
        "strange": {"type": "lm", "in": "in.strange", "out": "out", "format": "toolkit"},
        "plain": {"type": "lm", "in": "in.txt", "out": "plain"},
    }
    return put(tmp_path, plain, in_strange=b"one\ntwo\n", in_txt=b"words\n")


def test_a_toolkit_is_run_when_named_and_gets_no_secrets(
    strange: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_TOKEN", "planted0123456789")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/planted/key.json")
    assert "can only be prepared by a toolkit" in prepare(capsys, strange, code=2)
    assert not (tmp_path / "plain").exists()
    words = toolkit_zip(tmp_path / "t.zip")
    sha256 = hashlib.sha256((tmp_path / "t.zip").read_bytes()).hexdigest()
    extract = tmp_path / "extracted"
    words += [f"--prep_toolkit_sha256={sha256.upper()}", f"--prep_extract_dir={extract}"]
    assert main(["prepare", f"--datasets_yaml={strange}", *words]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["strange"]["toolkit_sha256"] == sha256
    assert "toolkit: environment [] True" in captured.err
    assert "toolkit: says *** aloud" in captured.err
    assert "planted" not in caplog.text
    found = [json.loads(line)["text"] for line in (tmp_path / "out/strange-00000-00000.jsonl").read_text().splitlines()]
    assert found == ["ONE", "TWO"]
    assert not list(extract.iterdir())
    again = prepare(capsys, strange)  # complete: no toolkit is needed
    assert again["strange"]["status"] == "complete"
    toolkit_zip(tmp_path / "t.zip", helper_py="def upper(text):\n    return text * 2\n")
    assert prepare(capsys, strange, *words[:1])["strange"]["status"] == "prepared"  # another toolkit
    assert "oneone" in (tmp_path / "out/strange-00000-00000.jsonl").read_text()


@pytest.mark.parametrize(
    ("members", "options", "code", "says"),
    [
        ({}, ["--prep_toolkit_sha256=" + "0" * 64], 2, "hash is not the expected one"),
        ({"prepare_py": "import sys; print('bad luck'); sys.exit(7)"}, [], 3, "exit code 7 (bad luck)"),
        ({"prepare_py": ""}, [], 3, "wrote nothing for strange"),
        ({}, ["--only=plain"], 2, "no dataset needs the toolkit"),
        ({}, ["--prepare_data=skip"], 2, "never run with --prepare_data=skip"),
    ],
)
def test_a_toolkit_that_cannot_be_used_is_one_message(
    strange: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    members: dict[str, str],
    options: list[str],
    code: int,
    says: str,
) -> None:
    words = toolkit_zip(tmp_path / "t.zip", **members)
    assert says in prepare(capsys, strange, *words, *options, code=code)
    assert not (tmp_path / "out").exists()


def test_a_toolkit_that_hangs_is_killed_with_all_its_children(
    strange: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pids = tmp_path / "pids"
    child = "import time, signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    script = f"""
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", {child!r}])
open({str(pids)!r}, "w").write(f"{{os.getpid()}} {{child.pid}}")
time.sleep(600)
"""
    begun = time.monotonic()
    words = [*toolkit_zip(tmp_path / "t.zip", prepare_py=script), "--prep_timeout_s=2"]
    assert "still running after 2 s" in prepare(capsys, strange, *words, code=3)
    assert time.monotonic() - begun < 30
    for pid in pids.read_text().split():
        assert not alive(int(pid))


def test_a_toolkit_ends_with_the_command_that_runs_it(strange: str, tmp_path: Path) -> None:
    script = f"import os, time\nopen({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()) + ' ')\ntime.sleep(600)\n"
    words = [f"--datasets_yaml={strange}", *toolkit_zip(tmp_path / "t.zip", prepare_py=script)]
    process = Forked(["-m", "liquid_llm.cli.main", "prepare", *words], stdout=False)
    deadline = time.monotonic() + 60
    while not ((tmp_path / "pid").exists() and " " in (tmp_path / "pid").read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.terminate()
    _, error = process.communicate(timeout=60)
    assert process.returncode == 75, error
    assert not alive(int((tmp_path / "pid").read_text()))


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"  # a child nobody waits for stays as a zombie until init takes it


def _with_link(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        link = zipfile.ZipInfo("prepare.py")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")


def _with_member(name: str) -> Any:
    return lambda path: path.write_bytes(zipped({"prepare.py": b"", name: b"x"}))


UNSAFE = {
    "above": (_with_member("../above.py"), "outside the folder"),
    "absolute": (_with_member("/tmp/absolute.py"), "outside the folder"),
    "link": (_with_link, "link or a special file"),
    "bomb": (lambda path: path.write_bytes(zipped({"prepare.py": bytes(2**26)})), "far more"),
    "no zip": (lambda path: path.write_bytes(b"no zip at all"), "this zip is damaged"),
    "no entry": (lambda path: path.write_bytes(zipped({"sub/prepare.py": b""})), "entry point"),
}


@pytest.mark.parametrize("name", UNSAFE)
def test_an_unsafe_toolkit_is_refused_before_anything_of_it_runs(
    strange: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    make, says = UNSAFE[name]
    make(tmp_path / "t.zip")
    before = sorted(path for path in tmp_path.parent.iterdir())
    code = 3 if name == "no entry" else 4
    words = [f"--prep_toolkit_zip_uri={tmp_path / 't.zip'}", f"--prep_extract_dir={tmp_path / 'x'}"]
    assert says in prepare(capsys, strange, *words, code=code)
    assert sorted(path for path in tmp_path.parent.iterdir()) == before
    assert not (tmp_path / "out").exists()
    assert not [path for path in (tmp_path / "x").rglob("*") if path.is_file()]


def test_the_environment_of_a_toolkit_has_nothing_that_leads_to_a_secret() -> None:
    environ = {"HF_TOKEN": "a", "AWS_SECRET_ACCESS_KEY": "b", "GOOGLE_APPLICATION_CREDENTIALS": "/c", "PATH": "/bin"}
    environ |= {"HTTPS_PROXY": "http://u:p@proxy", "HTTP_PROXY": "http://proxy:80", "HOME": os.path.expanduser("~")}
    cleaned = clean_environment(environ, Path("/nowhere"))
    assert cleaned == {"PATH": "/bin", "HTTP_PROXY": "http://proxy:80", "HOME": "/nowhere"}
