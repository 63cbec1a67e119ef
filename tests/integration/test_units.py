"""Capture unit by unit through the real commands: tasks that share the data files, are killed, come again, meet."""

from __future__ import annotations

import json
import os
import random
import runpy
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from tests.support import texts
from tests.support.dying import at_batch
from tests.support.gcs import Bucket
from tests.support.processes import launch, wait
from tests.support.readme import REPOSITORY
from tests.support.tiny import QUICK, Tiny, build

import liquid_llm
from liquid_llm.cli.main import main
from liquid_llm.data.tokens import is_held_out
from liquid_llm.errors import DataError, UsageError
from liquid_llm.jobs import capture_units
from liquid_llm.metrics import read_metrics, without_timings
from liquid_llm.signal_store.description import HELD_OUT
from liquid_llm.signal_store.store import open_store

pytestmark = pytest.mark.slow
CAPTURE = "stage1_hybrid.precompute_hybrid_logits"
FILES, ROWS = 5, 8


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A world whose maths lies in five files behind a pattern, and whose code in one that is named."""
    made = build(tmp_path_factory.mktemp("units"))
    rng = random.Random(5)
    (made.root / "math").mkdir()
    for number in range(FILES):
        rows = [
            {"text": texts.word_problem(rng), "type": "math_tool", "sample_id": f"m{number}-{n}"} for n in range(ROWS)
        ]
        (made.root / "math" / f"part-{number}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made.draw_from(
        {"path": "math/*.jsonl", "type": "math_tool", "weight": 1.0},
        {"path": "code.jsonl", "type": "code", "weight": 1.0},
    )
    return made


@pytest.fixture(scope="module")
def filled(tiny: Tiny) -> Path:
    """Stores that two tasks have filled, one after the other."""
    for index in range(2):
        assert main(["capture", *words(tiny, tiny.root / "filled", unit=f"{index}/2")]) == 0
    return tiny.root / "filled"


@pytest.fixture
def folder(filled: Path, tmp_path: Path) -> Path:
    """A copy of the filled stores."""
    shutil.copytree(filled, tmp_path / "stores")
    return tmp_path / "stores"


def words(tiny: Tiny, stores: Path | str, **options: object) -> list[str]:
    folders = {"math_logits_dir": f"{stores}/math", "code_logits_dir": f"{stores}/code"}
    return tiny.capture_words(**{**folders, **QUICK, **options})


def run(capsys: pytest.CaptureFixture[str], argv: list[str], code: int = 0) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["capture", *argv]) == code
    summary: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return summary


def units(summary: dict[str, Any]) -> tuple[int, int, int, int]:
    return (summary["units"], summary["units_complete"], summary["units_skipped"], summary["units_of_all"])


def stats(capsys: pytest.CaptureFixture[str], store: Path | str) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["store", "stats", str(store), "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_tasks_share_the_files_and_skip_what_is_complete(tiny, folder, capsys) -> None:
    assert sorted(path.name.rpartition("-")[0] for path in (folder / "math" / "units").iterdir()) == [
        f"part-{number}.jsonl" for number in range(FILES)
    ], "each signal shard is called as its data shard"
    assert units(run(capsys, words(tiny, folder, unit="0/4"))) == (2, 2, 2, 6)
    assert units(run(capsys, words(tiny, folder, unit="7/9"))) == (0, 0, 0, 6)
    assert not list((tiny.root / "tokens" / "units").iterdir()), "no tokens stay behind"
    found = stats(capsys, folder / "math")
    assert (found["units"], found["units_planned"], found["types"]["math_tool"]["records"]) == (5, 5, 40)
    assert found["superseded"] == found["unreadable"] == 0
    argv = [str(folder / "math"), f"--teacher={tiny.teacher}", f"--manifest={tiny.manifest}", "--seq_len=64"]
    cache = folder / "tokens"
    assert main(["store", "verify", *argv, "--samples=6", f"--data_cache={cache}", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["samples"], found["with_record"], found["looked_at"]) == (FILES * ROWS + 40, FILES * ROWS, 6)
    kept = [path.name.partition("-")[0] for path in cache.iterdir() if path.is_dir()]
    assert sorted(kept) == ["code", *["math_tool"] * FILES], "a cache for each file, which a run finds, and none of all"


def test_inspect_and_doctor_know_a_store_of_units(folder, capsys) -> None:
    store = folder / "math"
    assert main(["inspect", str(store), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["kind"], found["layout"], found["units"], found["units_planned"]) == ("store", "units", 5, 5)
    assert main(["inspect", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["holds"]["code"]["units"] == 1
    assert main(["doctor", str(store)]) == 0
    assert "5 complete of 5 planned" in capsys.readouterr().out

    next((store / "units").glob("part-3*/shard-*")).unlink()
    assert main(["doctor", str(store)]) == 3
    assert "1 of its files is lost or cut" in capsys.readouterr().out, "no record that is there would show it"
    (marker,) = (store / "done").glob("part-1*")
    marker.write_bytes(marker.read_bytes()[:40])
    next((store / "done").glob("part-2*")).unlink()
    assert main(["doctor", str(store)]) == 3
    said = capsys.readouterr().out
    assert "its marker is damaged" in said
    assert "4 complete of 5 planned" in said


def test_units_have_the_samples_that_evaluation_takes_first(tiny, folder, capsys) -> None:
    for type, ids in (("math", [f"m{n}-{k}" for n in range(FILES) for k in range(ROWS)]), ("code", [])):
        held = open_store(str(folder / type / HELD_OUT))
        names = {name for name, _ in held.layout.records()}
        held.close()
        wanted = {name for name in ids or [f"code-{n}" for n in range(40)] if is_held_out(name, 0.05)}
        assert names == wanted
        assert wanted
        assert main(["doctor", str(folder / type)]) == 0
    capsys.readouterr()
    assert main(["inspect", "--json", str(folder / "math")]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["held_out"] == {"units": FILES, "codec": "tail"}
    assert units(run(capsys, words(tiny, folder, unit="0/1", held_out_tokens=0))) == (6, 6, 6, 6)
    summary = run(capsys, words(tiny, folder, unit="0/1", held_out_tokens=9))
    assert (units(summary), summary["written"]) == ((6, 6, 0, 6), 0), "asked for otherwise, they alone are looked at"
    assert units(run(capsys, words(tiny, folder, unit="0/1", held_out_tokens=9))) == (6, 6, 6, 6)


def test_what_has_changed_or_was_lost_is_done_again_and_nothing_else(tiny, folder, capsys) -> None:
    data = tiny.root / "math" / "part-1.jsonl"
    before = data.read_text()
    try:
        rows = before.splitlines()
        rows[3] = json.dumps({"text": "another text altogether", "type": "math_tool", "sample_id": "m1-3"})
        data.write_text("\n".join(rows) + "\n")
        next((folder / "math" / "units").glob("part-3*/shard-*")).unlink()
        summary = run(capsys, words(tiny, folder, unit="0/1"))
        assert units(summary) == (6, 6, 4, 6)
        assert (summary["written"], summary["skipped"]) == (1 + ROWS, ROWS - 1), "records that still hold are kept"
    finally:
        data.write_text(before)


def test_a_file_that_cannot_be_used_keeps_no_other_from_being_captured(tiny, folder, capsys) -> None:
    shutil.rmtree(folder / "math")
    data = tiny.root / "math" / "part-2.jsonl"
    before = data.read_text()
    try:
        data.write_text("no record\n")
        summary = run(capsys, words(tiny, folder, unit="0/1"), code=3)
        assert units(summary) == (6, 5, 1, 6)
        assert [name[:12] for name in summary["broken"]] == ["part-2.jsonl"]
    finally:
        data.write_text(before)
    assert units(run(capsys, words(tiny, folder))) == (6, 6, 5, 6), "a store of units goes on as one"


def be_killed() -> None:
    at_batch(2, lambda: os.kill(os.getpid(), signal.SIGKILL))


def be_asked_to_stop() -> None:
    at_batch(2, lambda: os.kill(os.getpid(), signal.SIGTERM))


@pytest.mark.parametrize(("fault", "code"), [(be_killed, -9), (be_asked_to_stop, 75)])
def test_half_a_unit_is_no_unit_and_is_gone_on_with(tiny, tmp_path, capsys, fault, code) -> None:
    argv = words(tiny, tmp_path, unit="5/6", batch_size=1)  # the 40 samples of code
    ranks = launch(CAPTURE, argv, tmp_path / "said", 1, fault=(0, fault))
    assert wait(ranks) == [code], ranks[0].said
    assert not list((tmp_path / "code").glob("done/*"))
    summary = run(capsys, argv)
    assert units(summary) == (1, 1, 0, 6)
    assert summary["written"] + summary["skipped"] == 40
    if code == 75:
        assert summary["skipped"] > 0, "what was begun is written"


def test_two_tasks_may_do_the_same_unit_at_once(tiny, tmp_path, capsys) -> None:
    argv = words(tiny, tmp_path, unit="1/2", logits_format="units", held_out_tokens=0)
    caches = [f"--data_cache={tmp_path}/tokens-{n}" for n in range(2)]  # two machines: no lock between them
    ranks = [launch(CAPTURE, [*argv, cache], tmp_path / f"said-{n}", 1)[0] for n, cache in enumerate(caches)]
    assert wait(ranks) == [0, 0]
    assert units(run(capsys, argv)) == (3, 3, 3, 6)
    found = stats(capsys, tmp_path / "math")
    assert (found["types"]["math_tool"]["records"] - found["superseded"], found["unreadable"]) == (2 * ROWS, 0)


def test_stores_of_the_same_texts_do_not_wait_for_each_other(tiny, tmp_path, capsys, monkeypatch) -> None:
    """As of two teachers on the GPUs of one machine: the second is captured while the first is at the same file."""
    whole, found = capture_units.write_marker, []

    def beside(*given: Any) -> None:
        if not found:
            found.append(None)
            found.append(run(capsys, words(tiny, tmp_path / "second", unit="0/6")))
        whole(*given)

    monkeypatch.setattr(capture_units, "write_marker", beside)
    assert main(["capture", *words(tiny, tmp_path / "first", unit="0/6")]) == 0
    assert units(found[1]) == (1, 1, 0, 6)


def train_rows(folder: Path) -> list[dict[str, Any]]:
    return [without_timings(row) for row in read_metrics(folder) if row["kind"] == "train"]


def test_training_reads_units_by_the_file_of_each_sample_from_a_bucket(tiny, gcs: Bucket, tmp_path, capsys) -> None:
    stores = f"{gcs.uri}/signal"
    cache = tmp_path / "tokens"
    assert units(run(capsys, words(tiny, stores, unit="0/1", keep_tokens=True, data_cache=cache))) == (6, 6, 0, 6)
    left = sorted(path.name for path in cache.iterdir() if path.is_dir())
    assert [name.partition("-")[0] for name in left] == ["code", *["math_tool"] * FILES, "units"]
    asked = {"math_logits_dir": f"{stores}/math", "code_logits_dir": f"{stores}/code", "lm_teacher_id": None}
    asked["data_cache"] = cache
    argv = ["train", *tiny.train_words(tmp_path / "run", **asked, max_steps=4, eval_every=4, save_every=2)]
    assert main(argv) == 0
    folder = tmp_path / "run" / "run"
    whole = train_rows(folder)
    assert [row["kd_coverage"] for row in whole] == [1.0] * 4
    assert sorted(path.name for path in cache.iterdir() if path.is_dir()) == left, "it has found what the units left"
    surveys = [path.name.partition("-")[0] for path in cache.glob(".*.json")]
    assert sorted(surveys) == [".code", *[".math_tool"] * FILES], "each data file has a cache of tokens of its own"
    (judged,) = [row for row in read_metrics(folder) if row["kind"] == "eval" and row["step"] == 4]
    told = {type: judged["by_type"][type]["val_kd_codec"] for type in ("code", "math_tool")}
    assert told == dict.fromkeys(told, "held_out:tail"), "the KL is of what units have of held-out samples"
    assert main(["evaluate", str(folder)]) == 0
    measures = json.loads((folder / "evaluation.json").read_text())["measures"]["by_type"]
    for type in told:
        assert measures[type]["ce"]["value"] == pytest.approx(judged["by_type"][type]["val_loss"], rel=1e-5)
    assert sorted(path.name for path in cache.iterdir() if path.is_dir()) == left, "nor does it want one of all files"
    kept = json.loads((folder / "step-00000002.meta.json").read_text())
    assert (sorted(kept["run"]["window_tokens"]), kept["versions"]["order"]) == (["code", "math_tool"], 3)
    for path in folder.glob("*.pt*"):  # as it was after step 2
        if not path.name.startswith("step-00000002"):
            path.unlink()
    capsys.readouterr()
    assert main([*argv, "--order=whole"]) == 2
    assert "has seen its texts in another order" in capsys.readouterr().err
    assert main(argv) == 0
    assert train_rows(folder) == whole, "to the bit"


def test_units_run_one_by_one_from_a_program(tiny, tmp_path) -> None:
    folders = {"math_logits_dir": tmp_path / "math", "code_logits_dir": tmp_path / "code"}
    given = {"mc_teacher_id": tiny.teacher, "dataset_manifest": tiny.manifest, "seq_len": 64, **folders}
    opened = liquid_llm.open_capture({**given, "data_cache": tmp_path / "tokens"})
    rows = list(opened.units())
    assert [row["number"] for row in rows] == list(range(6))
    assert not (tmp_path / "math").exists(), "nothing is begun before it is asked for"
    first, again = opened.run(rows[2]), opened.run(json.loads(json.dumps(rows[2])))
    assert (first["written"], first["complete"], first["was_complete"]) == (ROWS, True, False)
    assert (again["written"], again["complete"], again["was_complete"]) == (0, True, True)
    with pytest.raises(DataError, match="no such file"):
        opened.run({**rows[1], "file": str(tmp_path / "gone.jsonl")})
    with pytest.raises(UsageError, match="says which"):
        liquid_llm.open_capture({**given, "unit": "0/1"})


def test_the_example_for_ray_says_mistakes_before_ray_begins(tmp_path, capsys) -> None:
    main_of = runpy.run_path(str(REPOSITORY / "examples" / "capture_ray.py"))["main"]
    (tmp_path / "capture.yaml").write_text("mc_teacher_id: none\nno_option: 1\n")
    argv = [f"--config={tmp_path / 'capture.yaml'}"]
    assert main_of(argv) == 2
    assert capsys.readouterr().err.startswith("error: ")
    for option in ("--workers=0", "--workers=two", "--gpus=-1", "--cpus=nan"):
        with pytest.raises(SystemExit, match="2"):
            main_of([*argv, option])
        assert f"argument {option.partition('=')[0]}: invalid" in capsys.readouterr().err


def test_a_worker_of_ray_tells_what_goes_wrong_and_the_script_ends_with_its_code(tiny, tmp_path, capsys) -> None:
    """What a worker raised would be Ray's traceback, after Ray had tried again."""
    example = runpy.run_path(str(REPOSITORY / "examples" / "capture_ray.py"))
    options = {"mc_teacher_id": str(tiny.teacher), "dataset_manifest": str(tiny.manifest), "seq_len": 64}
    options |= {"math_logits_dir": str(tmp_path / "math"), "code_logits_dir": str(tmp_path / "code")}
    config = tmp_path / "capture.yaml"
    config.write_text(json.dumps({**options, "data_cache": str(tmp_path / "tokens")}))
    worker = example["Teacher"](str(config))
    units = list(liquid_llm.open_capture(config).units())
    (tmp_path / "math" / "units").mkdir(parents=True)
    (tmp_path / "math" / "units" / units[1]["name"]).write_text("no folder")
    rows = [worker({**units[0], "file": str(tmp_path / "gone.jsonl")}), worker(units[1])]
    assert [row["exit_code"] for row in rows] == [3, 4]
    assert example["report"](rows[:1]) == 3
    assert example["report"]([*rows, rows[0]]) == 4
    said = capsys.readouterr()
    assert f"\nerror: {units[1]['name']}: " in said.err
    assert "part of the path is a file" in said.err
    assert len(said.out.splitlines()) == 3, "no other file is waited for"
    rows = [example["Teacher"](str(tmp_path / "gone.yaml"))(units[0])]
    assert example["report"](rows) == 2, "as the worker's own machine may lack what this one has"


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        ({"unit": "4/4"}, 2, "from 0 to N - 1"),
        ({"unit": "half"}, 2, "no share of the units"),
        ({"unit": "0/1", "logits_format": "pt"}, 2, "--unit goes with"),
        ({"unit": "0/2", "prepare_data": "force"}, 2, "cannot prepare anew at once"),
        ({"logits_format": "shards"}, 3, "another layout"),
        ({"math_logits_dir": "{other}"}, 2, "not both"),
    ],
)
def test_mistakes_are_one_message(tiny, filled, tmp_path, capsys, options, code, said) -> None:
    given = {name: str(value).format(other=tmp_path / "other") for name, value in options.items()}
    argv = [*words(tiny, filled), *(f"--{name}={value}" for name, value in given.items())]
    assert main(["capture", *argv]) == code
    message = capsys.readouterr().err
    assert said in message
    assert "Traceback" not in message
