"""What a student says while it trains: samples of given prompts and held-out answers, by the real command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.processes import run
from tests.support.tiny import Tiny, build
from transformers import AutoModelForCausalLM, AutoTokenizer

from liquid_llm import answers, storage
from liquid_llm.cli.main import main
from liquid_llm.metrics import read_metrics, without_timings
from liquid_llm.report import build_report
from liquid_llm.wiring import rehearsal

pytestmark = pytest.mark.slow

LINES = ["Question: <b>Ada</b> has 3 & more", "The"]
QUIET: dict[str, Any] = {
    "math_logits_dir": None, "code_logits_dir": None, "hybrid": False,
    "max_steps": 12, "eval_every": 4, "save_every": 2, "keep_last": 10, "trackers": "none", "batch_size": 2,
    "block_size": 192,
}  # fmt: skip


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Maths are prompts with completions that end in ``#### n``, code conversations, lm is text."""
    tiny = build(tmp_path_factory.mktemp("tiny"))
    for kind in ("math_tool", "code"):
        rows = [json.loads(line) for line in (tiny.root / f"{kind}.jsonl").read_text().splitlines()]
        for number, row in enumerate(rows):
            text = row.pop("text")
            if kind == "math_tool":
                prompt, answer, completion = text.partition("\nAnswer:")
                row |= {"prompt": prompt + answer, "completion": f"{completion}\n#### {number}"}
            else:
                said = (("user", text[:20]), ("assistant", f"#### {number}"))
                row |= {"messages": [{"role": role, "content": words} for role, words in said]}
        write(tiny.root / f"{kind}.jsonl", rows)
    write(tiny.root / "prompts.jsonl", [*LINES, {"prompt": LINES[1]}, {"messages": [{"role": "user", "content": "x"}]}])
    return tiny


def words(tiny: Tiny, output: Path | str, **options: Any) -> list[str]:
    told = {**QUIET, "lm_teacher_id": tiny.teacher, "chat_template": "chatml", **options}
    return ["train", *tiny.train_words(output, **told)]


def asked(tiny: Tiny) -> dict[str, Any]:
    return {"sample_prompts": tiny.root / "prompts.jsonl", "sample_tokens": 9, "eval_answers": 7, "answer_tokens": 5}


@pytest.fixture(scope="module")
def spoken(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("spoken")
    assert main(words(tiny, output, **asked(tiny))) == 0
    return output / "run"


def rows_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]


def test_training_is_the_same_to_the_bit_whatever_is_asked(tiny: Tiny, spoken: Path, tmp_path: Path) -> None:
    assert main(words(tiny, tmp_path)) == 0
    silent = tmp_path / "run"
    assert not (silent / "samples.jsonl").exists(), "off by default"
    first, second = (torch.load(run / "final.pt", weights_only=True) for run in (spoken, silent))
    assert all(torch.equal(value, second["student"][name]) for name, value in first["student"].items())
    assert torch.equal(first["random"]["torch"], second["random"]["torch"])

    def figures(run: Path) -> list[dict[str, Any]]:
        rows = [without_timings(row) for row in read_metrics(run)]
        for row in rows:
            for one in (row, *row["by_type"].values()):
                one.pop("answers", None)
                one.pop("answers_right", None)
        return rows

    assert figures(spoken) == figures(silent)


def test_each_evaluation_says_what_the_student_then_says(spoken: Path, tiny: Tiny) -> None:
    rows = rows_of(spoken)
    assert [row["step"] for row in rows] == [step for step in (0, 4, 8, 12) for _ in range(4)]
    assert [row["prompt"] for row in rows[:3]] == [LINES[0], LINES[1], LINES[1]]
    assert rows[3]["prompt"] == "<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n"
    assert rows[1]["text"] == rows[2]["text"], "a line and an object ask the same"
    assert set(rows[0]) == {"step", "prompt", "text", "repeated_4grams"}
    state = torch.load(spoken / "final.pt", weights_only=True)["student"]
    model = AutoModelForCausalLM.from_pretrained(spoken / "student")
    model.load_state_dict(state, strict=False)
    tokenizer = AutoTokenizer.from_pretrained(spoken / "student")
    for row in rows[-4:]:
        ids = [tokenizer.bos_token_id, *tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]]
        start = len(ids)
        with torch.no_grad():
            while len(ids) < start + 9:
                token = int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
                if token == tokenizer.eos_token_id:
                    break
                ids.append(token)
        assert tokenizer.decode(ids[start:], skip_special_tokens=True) == row["text"]


def test_held_out_answers_are_counted_by_type(spoken: Path) -> None:
    evaluations = [row for row in read_metrics(spoken) if row["kind"] == "eval"]
    assert [row["answers"] for row in evaluations] == [7] * 4
    for row in evaluations:
        by_type = {type: one["answers"] for type, one in row["by_type"].items() if "answers" in one}
        assert sum(by_type.values()) == 7
        assert set(by_type) <= {"math_tool", "code"}
        assert row["answers_right"] == sum(row["by_type"][type]["answers_right"] for type in by_type)


def test_an_answer_that_is_right_counts(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The model's part is played by one that knows the reference of every other question.
    mark = answers.mark
    numbers = iter(range(10**6))

    def knowing(question: answers.Question, _: str) -> dict[str, Any]:
        return mark(question, question.reference if next(numbers) % 2 else "#### -1")

    monkeypatch.setattr(answers, "mark", knowing)
    assert main(words(tiny, tmp_path, max_steps=2, eval_every=0, eval_answers=6)) == 0
    rows = [row for row in read_metrics(tmp_path / "run") if row["kind"] == "eval"]
    assert [(row["answers_right"], row["answers"]) for row in rows] == [(3, 6), (3, 6)]


def test_a_run_that_goes_on_doubles_no_sample(tiny: Tiny, spoken: Path, tmp_path: Path) -> None:
    assert main(words(tiny, tmp_path, **asked(tiny))) == 0
    run = tmp_path / "run"
    whole = (run / "samples.jsonl").read_bytes()
    assert whole == (spoken / "samples.jsonl").read_bytes()
    for name in ("final", "last", "best", *(f"step-{step:08d}" for step in (8, 10, 12))):
        for suffix in (".pt", ".meta.json"):
            (run / f"{name}{suffix}").unlink(missing_ok=True)
    with (run / "samples.jsonl").open("ab") as file:
        file.write(b'{"step": 8, "prompt": "tor')
    kept = sorted(path.name for path in run.glob("step-*.pt"))
    assert kept[-1] == "step-00000006.pt", "an evaluation later than it is dropped"
    assert main(words(tiny, tmp_path, **asked(tiny))) == 0
    assert (run / "samples.jsonl").read_bytes() == whole


def test_a_dry_run_counts_what_is_said(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    spoken: list[float] = []
    measure = rehearsal.speaking_seconds

    def keep(*given: Any) -> float:
        spoken.append(measure(*given))
        return spoken[-1] + 1000.0

    monkeypatch.setattr(rehearsal, "speaking_seconds", keep)
    assert main(words(tiny, tmp_path / "out", dry_run="true", **asked(tiny))) == 0
    assert spoken[0] > 0
    assert json.loads(capsys.readouterr().out)["evaluation_seconds"] > 1000
    assert not (tmp_path / "out").exists()


def test_samples_are_mirrored_and_come_back(tiny: Tiny, tmp_path: Path) -> None:
    told = {**asked(tiny), "max_steps": 4}
    output = "memory://samples-mirror"
    assert main(words(tiny, output, local_workdir=tmp_path / "a", **told)) == 0
    mirrored = storage.read_bytes(f"{output}/run/samples.jsonl")
    (local,) = (tmp_path / "a").rglob("samples.jsonl")
    assert mirrored == local.read_bytes()
    assert main(words(tiny, output, local_workdir=tmp_path / "b", **{**told, "max_steps": 8})) == 0
    (again,) = (tmp_path / "b").rglob("samples.jsonl")
    assert again.read_bytes().startswith(mirrored)
    assert [row["step"] for row in rows_of(again.parent)][-1] == 8


def test_the_report_shows_samples_escaped(spoken: Path) -> None:
    page = Path(build_report(spoken)).read_text()
    assert '<h2 id="samples">Samples</h2>' in page
    assert "After: Question: &lt;b&gt;Ada&lt;/b&gt; has 3 &amp; more" in page
    assert "<b>Ada" not in page


def test_secrets_are_masked(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijklmnop")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("my token is hf_abcdefghijklmnop\r\n\r\nx\n")
    assert main(words(tiny, tmp_path, sample_prompts=prompts, max_steps=1, eval_every=0)) == 0
    assert "hf_abc" not in (tmp_path / "run" / "samples.jsonl").read_text()
    assert [row["prompt"] for row in rows_of(tmp_path / "run")][:2] == ["my token is ***", "x"]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ('{"prompt": "x"}\n{"prompt": 5}\n', "line 2"),
        ('{"prompt": "x"\n', "not JSON"),
        ("\n \n", "no prompts"),
        ('{"messages": [{"role": "user"}]}\n', "role and content"),
        ('"\\ud800"\n', "line 1"),
    ],
)
def test_what_is_no_prompt_is_said_before_data_is_read(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, told: str
) -> None:
    prompts = tmp_path / "p.jsonl"
    prompts.write_text(content)
    without_data = write(tmp_path / "m.jsonl", [{"path": str(tmp_path / "none.jsonl"), "type": "lm", "weight": 1.0}])
    assert main(words(tiny, tmp_path, sample_prompts=prompts, dataset_manifest=without_data)) == 2
    error = capsys.readouterr().err
    assert told in error
    assert "--sample_prompts" in error


def test_a_missing_file_and_answers_that_nothing_asks_are_refused(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(tiny, tmp_path, sample_prompts=tmp_path / "none.txt")) == 4
    assert "none.txt" in capsys.readouterr().err
    only_text = write(tmp_path / "m.jsonl", [{"path": str(tiny.root / "lm.jsonl"), "type": "lm", "weight": 1.0}])
    assert main(words(tiny, tmp_path, dataset_manifest=only_text, eval_answers=3)) == 2
    assert "--eval_answers=3" in capsys.readouterr().err


def test_a_student_that_is_dealt_out_says_what_a_whole_one_says(tiny: Tiny, tmp_path: Path) -> None:
    few = {"max_steps": 4, "eval_every": 2, "draw_group": 2, "grad_accum": 2, **asked(tiny)}
    runs = []
    for size, options in ((1, {}), (2, {"shard": "full"})):
        output = tmp_path / str(size)
        run("liquid_llm.cli.main", words(tiny, output, **few, **options), output / "said", size)
        runs.append(output / "run")
    assert rows_of(runs[1]) == rows_of(runs[0])
    assert len({row["text"] for row in rows_of(runs[0])}) > 1
    evaluated = [[row for row in read_metrics(run) if row["kind"] == "eval"] for run in runs]
    for found, expected in zip(*evaluated, strict=True):
        assert (found["answers"], found["answers_right"]) == (expected["answers"], expected["answers_right"])
        assert found["answers"] == 7
        assert found["val_loss_student"] == pytest.approx(expected["val_loss_student"], rel=1e-6)
    assert torch.allclose(*(torch.load(run / "last.pt")["optimizer"]["state"][0]["exp_avg"] for run in runs), atol=1e-5)
