"""``liquid demo`` from end to end with a small teacher: what `make demo` runs, at a fraction of its size."""

import json
import shlex
from pathlib import Path

import pytest
from tests.support import readme
from tests.support.tiny import build
from transformers import AutoModelForCausalLM

from liquid_llm.cli.main import main
from liquid_llm.metrics import read_metrics

pytestmark = pytest.mark.slow


def test_the_demo_runs_every_stage_and_shows_its_result(tmp_path, capsys):
    tiny = build(tmp_path / "tiny", teacher_steps=150)
    base = tmp_path / "demo"
    words = ["demo", "--dir", str(base), "--teacher", str(tiny.teacher), "--scale", "0.1"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    runs = {name: base / "runs" / name for name in ("plain", "distilled")}
    assert {path.name for path in (base / "runs").iterdir()} == set(runs)
    assert shown.index("first result, distilled") < shown.index("held-out text and word problems")
    for words_shown in ("before", "teacher", "Verdict on distilled", "bytes a token", "peak host memory"):
        assert words_shown in shown
    assert str(runs["distilled"] / "report.html") in shown
    check_summary(json.loads((runs["distilled"] / "summary.json").read_text()), base, runs)
    teacher, before = (AutoModelForCausalLM.from_pretrained(base / name).config for name in ("teacher", "before"))
    assert before.num_hidden_layers == max(1, teacher.num_hidden_layers * 4 // 5) < teacher.num_hidden_layers
    assert before.hidden_size == teacher.hidden_size
    signal = [path for type in ("lm", "math_tool", "code") for path in (base / "signal" / type).glob("shard-*")]
    assert len(signal) >= 3, "the layout that capture writes when nothing is said"
    rows = {name: read_metrics(run) for name, run in runs.items()}
    assert main(words) == 0, "a second call shows the result again"
    again = capsys.readouterr().out
    assert (
        shown[shown.index("held-out text") : shown.index("stored signal")].splitlines()[:12]
        == (again[again.index("held-out text") : again.index("stored signal")].splitlines()[:12])
    )
    assert rows == {name: read_metrics(run) for name, run in runs.items()}, "nothing is trained twice"
    for words_of_page in ("liquid inspect", "liquid store stats runs/demo"):
        command = readme.command(words_of_page).replace("runs/demo", str(base), 1)
        assert main(shlex.split(command)[1:]) == 0, "what the page on the first run looks at is there"


def check_summary(summary: dict, base: Path, runs: dict[str, Path]) -> None:
    """What is written agrees with what the stages left behind."""
    rows = {row["student"]: row for row in summary["rows"]}
    assert list(rows) == ["before", "plain", "distilled", "teacher"]
    for row in rows.values():
        assert set(row["by_type"]) == {"lm", "math_tool", "code"}
        assert row["ce"] > 0
        assert row["answers"] == 8
        assert row["continuations"] == 5 + 8, "five prompts, and the openings of the held-out texts"
    assert rows["teacher"]["kl"] == 0 < rows["before"]["kl"]
    assert [one["measure"] for one in summary["verdicts"]] == ["ce", "kl", "agreement", "answers"]
    verdict = summary["verdicts"][0]
    assert verdict["difference"] == pytest.approx(rows["distilled"]["ce"] - rows["plain"]["ce"])
    assert {row["student"] for row in summary["samples"]} == {row["student"] for row in summary["answers"]} == set(rows)
    captured = json.loads((base / "capture.json").read_text())
    on_disk = sum(path.stat().st_size for path in (base / "signal").rglob("*") if path.is_file())
    assert captured["bytes"] == pytest.approx(on_disk, rel=0.1)
    steps, seconds = summary["training_steps"], summary["training_seconds"]
    for name, run in runs.items():
        trained = [row for row in read_metrics(run) if row["kind"] == "train"]
        assert trained[-1]["step"] == steps[name]
        coverage = {row["kd_coverage"] for row in trained}
        assert coverage == ({1.0} if name == "distilled" else {0.0}) or (name == "plain" and coverage == {None})
    in_as_long = 1 + captured["seconds"] / seconds["distilled"]
    assert steps["plain"] / steps["distilled"] == pytest.approx(1.1 * in_as_long, rel=0.05)


def test_a_scale_that_makes_no_sense_is_refused(tmp_path, capsys):
    assert main(["demo", "--dir", str(tmp_path), "--scale", "0"]) == 2
    assert "--scale" in capsys.readouterr().err
