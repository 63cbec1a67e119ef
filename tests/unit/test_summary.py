"""What a run has come to: shares of the gap, words for what is missing, and what is printed."""

import json
from pathlib import Path

import pytest

from liquid_llm.jobs.run_result import show_run
from liquid_llm.metrics import MetricsWriter, RowFile
from liquid_llm.report.data import read_run
from liquid_llm.report.summary import summarise, write_summary


def write(folder: Path, *evaluations: dict, types=("lm", "code")) -> Path:
    with MetricsWriter(folder, resume_step=None) as rows:
        for step, row in enumerate(evaluations):
            by_type = {type: {"ce": 3.0, "tokens": 10} for type in types}
            if step:
                rows.write("train", 10 * step, {"tokens": 20, "seconds": 2.0, "by_type": by_type})
            if row:
                rows.write("eval", 10 * step, row)
    return folder


def row(loss: float, teacher: float | None, shared: float | None = None, lm: float = 5.0) -> dict:
    found = {"val_loss_student": loss, "val_kd": 0.5, "by_type": {"lm": {"val_loss": lm, "val_loss_teacher": 3.0}}}
    more = {"val_loss_teacher": teacher, "val_loss_student_with_teacher": shared}
    return found | {name: value for name, value in more.items() if value is not None}


def test_the_gap_is_of_positions_that_the_teacher_was_asked_for(tmp_path):
    run = write(tmp_path, row(6.0, 2.0, shared=5.0, lm=5.0), row(5.0, 2.0, shared=4.25, lm=4.5), types=("lm",))
    whole, lm = summarise(read_run(run))["rows"]
    assert whole == {"type": "all", "before": 6.0, "after": 5.0, "teacher": 2.0, "gap_closed": 0.25, "kl": 0.5}
    assert lm == {"type": "lm", "before": 5.0, "after": 4.5, "teacher": 3.0, "gap_closed": 0.25, "kl": None}


@pytest.mark.parametrize(
    ("evaluations", "said"),
    [
        ([{}, {}], "Nothing is held out"),
        (
            [row(6.0, 2.0), row(4.0, 2.0)],
            "from 6.000 to 4.000 nats a token: 50% of the way to the teacher,",
        ),
        ([row(6.0, 2.0), row(1.5, 2.0)], "from 6.000 to 1.500 nats a token: past the teacher, which has 2.000"),
        ([row(6.0, None), row(4.0, None)], "Held-out loss went from 6.000 to 4.000 nats a token."),
        ([row(1.0, 2.0), row(1.5, 2.0)], "Held-out loss went from 1.000 to 1.500 nats a token."),
        ([row(1.0, 2.0), row(1.5, 2.0)], "The lowest loss was 1.000, at step 0: training has made it worse."),
        ([row(3.0, 2.0), row(2.0, 2.0), row(2.5, 2.0)], "The lowest loss was 2.000, at step 10: best.pt has those"),
        ([row(6.0, 2.0), row(4.0, 2.0)], "No validation samples of type code: it is trained on and not judged."),
    ],
)
def test_what_is_said(evaluations, said, tmp_path):
    assert said in " ".join(summarise(read_run(write(tmp_path, *evaluations)))["sentences"])


def test_one_evaluation_has_no_before(tmp_path):
    [whole, _] = summarise(read_run(write(tmp_path, {}, row(4.0, 2.0))))["rows"]
    assert (whole["before"], whole["after"], whole["gap_closed"]) == (None, 4.0, None)


def test_it_is_kept_and_printed_with_the_last_samples_alone(tmp_path, capsys):
    write(tmp_path, row(6.0, 2.0), row(1.0, 2.0))
    with RowFile(tmp_path / "samples.jsonl", resume_step=None) as samples:
        for step, text in ((0, "early"), (10, "\n\n"), (10, "x" * 500)):
            samples.write({"step": step, "prompt": "[bold]Ada", "text": text})
    found = write_summary(tmp_path)
    assert json.loads((tmp_path / "summary.json").read_text()) == found
    assert [one["text"] for one in found["samples"]] == ["\n\n", "x" * 500]
    assert (found["steps"], found["tokens"], found["tokens_per_second"]) == (10, 20, 10.0)
    show_run(found, tmp_path, "gs://b/run with space")
    shown = capsys.readouterr().out
    assert "early" not in shown
    assert "[bold]Ada\n  (line ends alone)" in shown
    assert "x" * 160 + "…" in shown
    assert ">100%" in shown
    assert "liquid evaluate 'gs://b/run with space'" in shown


def test_a_file_of_odd_rows_is_summed_up_all_the_same(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"kind": "eval", "step": 1, "val_loss_student": null, "by_type": [1]}\n')
    (tmp_path / "samples.jsonl").write_text('{"step": 1}\n{"step": 1, "prompt": 3, "text": null}\n')
    found = summarise(read_run(tmp_path))
    assert found["rows"] == found["samples"] == []
