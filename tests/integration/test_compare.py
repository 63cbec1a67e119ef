"""``liquid compare`` and ``liquid report`` on folders and URLs: what several runs have come to, and what misleads."""

from __future__ import annotations

import functools
import http.server
import json
import re
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
from tests.support.gcs import Bucket
from tests.support.runs import make_run
from tests.unit.test_report import Page

from liquid_llm import storage
from liquid_llm.cli.main import main

SIGNAL = {"teacher_id": "SmolLM2-135M", "teacher_revision": "r1"}
SAMPLED = {**SIGNAL, "codec": "sampled", "codec_options": {"draws": 50}}


def change(folder: Path, name: str, **values: Any) -> None:
    """Set values of a run's provenance, by dotted name."""
    path = folder / "provenance" / name
    whole = json.loads(path.read_text())
    for key, value in values.items():
        *above, last = key.split("__")
        place = whole
        for one in above:
            place = place[one]
        place[last] = value
    path.write_text(json.dumps(whole))


def teach(folder: Path, codec: dict[str, Any]) -> None:
    online = {"id": "SmolLM2-135M", "revision": "r1", "types": ["lm"]}
    change(folder, "environment.json", teachers={"online": online, "math_tool": codec, "code": codec})


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four runs: a, b (another rate and output), c (another codec, shorter) and below/a, which is not finished."""
    root = tmp_path_factory.mktemp("private-place")
    small: dict[str, Any] = {"steps": 200, "eval_every": 50, "with_summary": False}
    for number, name in enumerate(("a", "b", "c", "below/a")):
        finished = name != "below/a"
        folder = make_run(
            root / name, finished=finished, **{**small, "steps": 100 if name == "c" else 200}, seed=number
        )
        teach(folder, SAMPLED)
        change(folder, "config.json", data__manifest=f"{root}/{'other' if name == 'b' else 'data'}/m.jsonl")
        change(folder, "environment.json", hardware__host="ada-laptop")
    change(root / "b", "config.json", optimizer__lr=5e-4, output__uri="/elsewhere/b", data__num_workers=7)
    teach(root / "c", {**SIGNAL, "codec": "full"})
    change(root / "below" / "a", "config.json", optimizer__steps=900)
    return root


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def compared(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["compare", "--json", *map(str, words)]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_what_each_has_come_to_and_in_what_they_differ(
    runs: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = compared(capsys, runs / "a", runs / "b")
    assert [one["run"] for one in found["runs"]] == ["a", "b"]
    for one in found["runs"]:
        rows = [json.loads(line) for line in (Path(one["where"]) / "metrics.jsonl").read_text().splitlines()]
        evaluations = [row for row in rows if row["kind"] == "eval"]
        assert one["by_type"]["all"]["after"] == evaluations[-1]["val_loss_student"]
        assert one["by_type"]["code"]["after"] == evaluations[-1]["by_type"]["code"]["val_loss"]
        assert one["best_loss"] == min(row["val_loss_student"] for row in evaluations)
        assert (one["steps"], one["of_steps"], one["finished"]) == (200, 200, True)
    assert found["differ"] == {
        "data.manifest": [f"{runs}/data/m.jsonl", f"{runs}/other/m.jsonl"],
        "optimizer.lr": [2e-3, 5e-4],
    }
    assert found["differ_without_effect"]["output.uri"] == ["/demo/runs", "/elsewhere/b"]
    assert found["differ_without_effect"]["data.num_workers"] == [None, 7]
    assert (found["common_step"], found["kl_compares"], found["page"]) == (None, True, "compare.html")


def test_the_page_is_one_file_with_a_line_for_each_run_and_no_path(
    runs: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", str(runs)]) == 0  # a folder stands for its runs
    told = capsys.readouterr().out
    for words in ("optimizer.lr", "0.0005", "below/a", "…/m.jsonl (2)", "not one quantity", "compare.html"):
        assert words in told, words
    html = (here / "compare.html").read_text(encoding="utf-8")
    page = Page(html)
    assert "default-src 'none'" in str(page.all("meta", **{"http-equiv": "Content-Security-Policy"})[0]["content"])
    assert not [attrs for _, attrs in page.elements if "src" in attrs or "style" in attrs]
    for secret in ("private-place", "ada-laptop", "/elsewhere"):
        assert secret not in html
    looks: dict[str, set[tuple[str, str]]] = {}
    for figure in re.findall(r"<figure.*?</figure>", html, flags=re.DOTALL):
        keys = re.findall(r'<path class="line (c\d d\d)".*?href="(#mark-\d)".*?</svg>([^<]+)</li>', figure)
        for style, mark, label in keys:
            looks.setdefault(label, set()).add((style, mark))
    assert set(looks) == {"a", "b", "c", "below/a"}
    assert all(len(own) == 1 for own in looks.values()), "the same look in all plots"
    assert len(set.union(*looks.values())) == len(looks), "and no two the same"


def test_divergences_of_other_codecs_are_apart_and_it_is_said(
    runs: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = compared(capsys, runs / "a", runs / "b", runs / "c")
    assert found["kl_compares"] is False
    [said] = [one for one in found["remarks"] if "KL" in one]
    assert said.startswith("KL from the teacher of math_tool, code is not one quantity")
    assert "a, b: sampled (draws 50) signal of SmolLM2-135M; c: the whole distribution of SmolLM2-135M" in said
    figures = re.findall(r"<figure.*?</figure>", (here / "compare.html").read_text(), flags=re.DOTALL)
    lines = {
        re.findall(r"<h3>(.*?) <small>", figure)[0]: sorted(
            re.findall(r"</svg>([^<]+)</li>", one)
            for one in figures
            if f"<h3>{re.findall(r'<h3>(.*?) <small>', figure)[0]} <small>" in one
        )
        for figure in figures
    }
    assert lines["KL from the teacher, lm"] == [["a", "b", "c"]], "asked while training: whole for all"
    assert lines["KL from the teacher, code"] == lines["KL from the teacher"] == [["a", "b"], ["c"]]
    assert found["common_step"] == 100, "c ends there"
    assert [one["loss_at_common_step"] for one in found["runs"]] == [
        next(
            row["val_loss_student"]
            for line in (Path(one["where"]) / "metrics.jsonl").read_text().splitlines()
            if (row := json.loads(line))["kind"] == "eval" and row["step"] == 100
        )
        for one in found["runs"]
    ]


def test_unfinished_empty_and_unlike_runs_are_taken_and_named(
    runs: Path, here: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    empty = shutil.copytree(runs / "b" / "provenance", tmp_path / "empty" / "provenance").parent
    other = make_run(tmp_path / "other", steps=60, eval_every=30, types=("lm", "x"), with_provenance=False)
    sidecar = json.loads((other / "last.meta.json").read_text())
    (other / "last.meta.json").write_text(json.dumps({**sidecar, "tokenizer_hash": "t2", "block_size": 64}))
    shutil.copytree(runs / "a", tmp_path / "a")
    for path in (tmp_path / "a" / "last.meta.json", tmp_path / "a" / "final.meta.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer_hash": "t1"}))
    blind = make_run(tmp_path / "blind", steps=60, eval_every=0)
    found = compared(capsys, tmp_path / "a", runs / "below" / "a", empty, other, blind)
    remarks = " ".join(found["remarks"])
    for words in (
        "below/a is not finished: its figures are of step 200 of 900.",
        "empty has no metrics yet",
        "blind was never judged",
        "different tokenizers",
        "Held-out text is not the same in all runs",
        "Not all are judged on the same types (of both kinds are lm)",
        "No configuration was kept of other",
    ):
        assert words in remarks, words
    assert [one["run"].split("/")[-1] for one in found["runs"]] == ["a", "a", "empty", "other", "blind"]
    assert len({one["run"] for one in found["runs"]}) == 5


def test_forty_runs_are_drawn_and_told_apart_as_far_as_looks_go(
    runs: Path, here: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for number in range(40):
        small: dict[str, Any] = {"steps": 6, "eval_every": 3, "types": ("lm",), "context_lengths": ()}
        make_run(tmp_path / "many" / f"r{number:02d}", **small, with_summary=False, with_provenance=number < 2)
    assert main(["compare", str(tmp_path / "many")]) == 0
    html = (here / "compare.html").read_text()
    assert "There are more than 32 runs" in html
    loss = re.findall(r'<figure class="card" id="plot-loss">.*?</figure>', html, flags=re.DOTALL)[0]
    styles = re.findall(r'<path class="line (c\d d\d)" d="M1 6h30"', loss)
    assert len(styles) == 40
    assert len(set(styles)) == 32


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["a"], "takes two runs"),
        (["a", "a/"], "takes two runs"),
        (["a", "nowhere"], "no such directory"),
        (["a", "a/provenance"], "no run directory"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_words(
    runs: Path, here: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    capsys.readouterr()
    assert main(["compare", *(f"{runs}/{word}" for word in words)]) == 2
    assert said in capsys.readouterr().err
    assert not list(here.iterdir())


def test_runs_in_a_bucket_are_reported_and_compared(
    runs: Path, here: Path, gcs: Bucket, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        for path in sorted((runs / name).rglob("*")):
            if path.is_file():
                storage.upload(path, f"{gcs.uri}/out/{name}/{path.relative_to(runs / name).as_posix()}")
    capsys.readouterr()
    assert main(["report", f"{gcs.uri}/out/a/"]) == 0
    assert capsys.readouterr().out == "a-report.html\n"
    far = (here / "a-report.html").read_bytes()
    assert main(["report", str(runs / "a"), f"--output={here / 'near.html'}"]) == 0
    assert far == (here / "near.html").read_bytes(), "sizes of checkpoints, which are not fetched, too"
    assert main(["report", f"{gcs.uri}/out/a", f"--output={gcs.uri}/pages/a.html"]) == 0
    assert storage.read_bytes(f"{gcs.uri}/pages/a.html") == far
    found = compared(capsys, f"{gcs.uri}/out", runs / "c", f"--output={gcs.uri}/pages/all.html")
    assert [one["run"] for one in found["runs"]] == ["a", "b", "c"]
    assert found["runs"][0]["where"] == f"{gcs.uri}/out/a"
    assert b"3 runs side by side" in storage.read_bytes(f"{gcs.uri}/pages/all.html")
    assert main(["report", f"{gcs.uri}/out"]) == 2
    assert f"2 below it: {gcs.uri}/out/a, {gcs.uri}/out/b" in capsys.readouterr().err
    assert main(["report", f"{gcs.uri}/nothing"]) == 2
    assert "no run" in capsys.readouterr().err


class _Unlisted(http.server.SimpleHTTPRequestHandler):
    """A web server that hands out files and lists no folder."""

    def list_directory(self, path: Any) -> None:
        self.send_error(403)

    def log_message(self, *_: object) -> None: ...


def test_a_run_at_a_web_server_that_lists_nothing_is_read_by_names(
    runs: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    handler = functools.partial(_Unlisted, directory=str(runs))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            url = f"http://127.0.0.1:{server.server_port}"
            found = compared(capsys, f"{url}/a", runs / "b")
            assert main(["report", f"{url}/nothing"]) == 2
        finally:
            server.shutdown()
            thread.join()
    assert [one["run"] for one in found["runs"]] == ["a", "b"]
    assert found["differ"].keys() == {"data.manifest", "optimizer.lr"}
    capsys.readouterr()
    before = storage.set_retry_policy(storage.RetryPolicy(attempts=2, first_seconds=0.01, max_seconds=0.02))
    try:
        assert main(["report", f"{url}/a"]) == 4, "a server that is gone is not a place without a run"
    finally:
        storage.set_retry_policy(before)
    assert "no run directory" not in capsys.readouterr().err
