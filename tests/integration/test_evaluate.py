"""``liquid evaluate`` by the real command: its figures against float64 passes over every held-out text."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from tests.support.models import tiny_model
from tests.support.tiny import Tiny, build
from tests.support.tokenizers import tiny_tokenizer
from transformers import AutoModelForCausalLM

from liquid_llm import storage
from liquid_llm.cli.main import main
from liquid_llm.data.tokens import is_held_out
from liquid_llm.jobs.evaluate_answers import wilson_interval
from liquid_llm.metrics import read_metrics
from liquid_llm.models.loading import load_tokenizer
from liquid_llm.study.verdict import quantile

pytestmark = pytest.mark.slow

FURTHER = {
    "agreement": "val_agreement",
    "overlap": "val_overlap",
    "calibration": "val_calibration",
    "teacher_calibration": "val_calibration_teacher",
    "bits_per_byte": "val_bits_per_byte",
    "teacher_bits_per_byte": "val_bits_per_byte_teacher",
}
BLOCK, BITS = 64, 1 / math.log(2)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Tiny:
    return build(tmp_path_factory.mktemp("tiny"), teacher_steps=60)


@pytest.fixture(scope="module")
def run(world, tmp_path_factory) -> Path:
    """A run whose types have three kinds of teacher: a model, a store, none."""
    assert main(["capture", *world.capture_words(code_logits_dir=None, signal="code=none", codec="topk", topk=24)]) == 0
    output = tmp_path_factory.mktemp("out")
    sizes = {"max_steps": 8, "eval_every": 4, "eval_measures": True}
    words = world.train_words(output, code_logits_dir=None, signal="code=none", **sizes)
    assert main(["train", *words]) == 0
    return output / "run"


def evaluate(*words, code=0):
    assert main(["evaluate", *map(str, words)]) == code


def found(*words, folder):
    """What ``--json`` holds."""
    evaluate(*words, f"--json={folder / 'found.json'}")
    return json.loads((folder / "found.json").read_text())


def held_out(world, type, fraction=0.2):
    """Token ids of the held-out records, framed as the tiny tokenizer's teacher expects, by id."""
    tokenizer, end = tiny_tokenizer(), 0
    rows = map(json.loads, (world.root / f"{type}.jsonl").read_text().splitlines())
    chosen = [row for row in rows if is_held_out(row["sample_id"], fraction)]
    return {row["sample_id"]: ([end, *tokenizer(row["text"])["input_ids"], end], row["text"]) for row in chosen}


def plain(model, ids):
    """Log-probabilities in float64 of every token but the first."""
    with torch.no_grad():
        logits = model.double()(input_ids=torch.tensor([ids])).logits[0, :-1]
    return torch.log_softmax(logits, dim=-1)


def opened(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def expected_sums(student, teacher, ids):
    """The sums of one text by their definitions."""
    p, q, y = plain(student, ids), plain(teacher, ids), torch.tensor(ids[1:])
    rows = torch.arange(len(y))
    return {
        "positions": len(y),
        "ce": float(-p[rows, y].sum()),
        "teacher_ce": float(-q[rows, y].sum()),
        "kl": float((q.exp() * (q - p)).sum()),
        "agreement": int((p.argmax(1) == q.argmax(1)).sum()),
        "overlap": float(torch.minimum(p.exp(), q.exp()).sum()),
    }


def test_a_folder_beside_a_teacher_equals_float64_passes_over_every_text(world, run, tmp_path):
    words = [f"--dataset_manifest={world.manifest}", "--val_fraction=0.2", f"--block_size={BLOCK}"]
    (one,) = found(run / "student", *words, f"--teacher={world.teacher}", folder=tmp_path)
    student, teacher = opened(run / "student"), opened(world.teacher)
    total = dict.fromkeys(expected_sums(student, teacher, [0, 1]), 0.0)
    size = 0
    for type in ("math_tool", "code"):
        texts = {row["id"]: row for row in one["texts"] if row["type"] == type}
        wanted = held_out(world, type)
        assert set(texts) == set(wanted)
        for name, (ids, text) in wanted.items():
            expected = expected_sums(student, teacher, ids[:BLOCK])
            for key, value in expected.items():
                assert texts[name][key] == pytest.approx(value, rel=1e-4), (name, key)
            if len(ids) <= BLOCK:
                assert texts[name]["bytes"] == len(text.encode())
            for key, value in expected.items():
                total[key] += value
            size += texts[name]["bytes"]
    both = [one["measures"]["by_type"][type] for type in ("math_tool", "code")]
    positions = sum(part["positions"] for part in both)
    assert positions == total["positions"]
    for key in ("ce", "teacher_ce", "kl", "agreement", "overlap"):
        mean = sum(part[key]["value"] * part["positions"] for part in both) / positions
        assert mean == pytest.approx(total[key] / positions, rel=1e-4), key
    bits = sum(part["bits_per_byte"]["value"] * part["bytes"] for part in both)
    assert bits == pytest.approx(total["ce"] * BITS, rel=1e-4)
    assert sum(part["bytes"] for part in both) == size


def test_standard_errors_are_over_texts(world, run, tmp_path):
    (one,) = found(run / "student", f"--records=code={world.root / 'code.jsonl'}", "--block_size=64", folder=tmp_path)
    rows = one["texts"]
    assert len(rows) == one["measures"]["all"]["texts"] == 40
    mean = sum(row["ce"] for row in rows) / sum(row["positions"] for row in rows)
    spread = sum((row["ce"] - mean * row["positions"]) ** 2 for row in rows)
    error = math.sqrt(len(rows) / (len(rows) - 1) * spread) / sum(row["positions"] for row in rows)
    assert one["measures"]["all"]["ce"] == pytest.approx({"value": mean, "error": error})


def test_a_run_is_judged_on_what_it_held_out_beside_its_own_teachers(world, run, capsys):
    """The figures are those of the run's own rows, and each teacher tells what its signal holds."""
    evaluate(run)
    shown = capsys.readouterr().out
    one = json.loads((run / "evaluation.json").read_text())
    best = json.loads((run / "best.meta.json").read_text())["step"]
    (row,) = [row for row in read_metrics(run) if row["kind"] == "eval" and row["step"] == best]
    assert one["about"]["step"] == best
    assert set(one["teacher"]) == {"lm", "math_tool"}
    for type, measures in one["measures"]["by_type"].items():
        told = row["by_type"][type]
        assert measures["positions"] == told["positions"]
        assert measures["ce"]["value"] == pytest.approx(told["val_loss"], rel=1e-5)
        for figure, key in (("kl", "val_kd"), ("teacher_ce", "val_loss_teacher"), *FURTHER.items()):
            assert (figure in measures) == (key in told)
            if key in told:
                assert measures[figure]["value"] == pytest.approx(told[key], rel=1e-4)
    by_type = one["measures"]["by_type"]
    assert {"overlap", "teacher_bits_per_byte", "teacher_calibration"} <= set(by_type["lm"])
    assert {"agreement", "teacher_calibration"} <= set(by_type["math_tool"])
    assert not {"overlap", "teacher_ce"} & set(by_type["math_tool"]), "a sparse signal does not tell these"
    assert not {"kl", "agreement", "teacher_ce"} & set(by_type["code"])
    assert one["measures"]["all"]["ce"]["value"] == pytest.approx(row["val_loss_student"], rel=1e-5)
    for figure, key in FURTHER.items():
        assert one["measures"]["all"][figure]["value"] == pytest.approx(row[key], rel=1e-4), key
    for word in ("lm", "math_tool", "code", "all", "bits/byte", "ECE"):
        assert word in shown
    assert "positions that the teacher answers whole" in shown


def test_the_report_of_a_run_shows_the_measures(run):
    page = (run / "report.html").read_text()
    for heading in ("Agreement with the teacher", "Overlap with the teacher", "Bits a byte", "calibration error"):
        assert heading in page


def test_several_students_have_the_texts_in_common_and_one_pass_of_the_teacher(world, run, tmp_path, monkeypatch):
    from liquid_llm.teachers.online import OnlineTeacher

    asked = []
    signal = OnlineTeacher.signal
    monkeypatch.setattr(OnlineTeacher, "signal", lambda *args: asked.append(1) or signal(*args))
    students = [run, run / "student", run / "last.pt", world.teacher]
    words = [f"--teacher={world.teacher}", "--eval_ctx_lens=16,32"]
    several = found(*students, *words, folder=tmp_path)
    calls = len(asked)
    (alone,) = found(run, *words, folder=tmp_path)
    assert len(asked) == 2 * calls, "as many as for one student"
    assert [one["student"] for one in several] == list(map(str, students))
    assert len({tuple((row["type"], row["id"]) for row in one["texts"]) for one in several}) == 1
    assert_near(several[0]["measures"]["all"], alone["measures"]["all"])
    itself = several[3]["measures"]["all"]
    assert itself["kl"]["value"] == pytest.approx(0, abs=1e-5)
    assert itself["agreement"]["value"] == 1
    assert itself["overlap"]["value"] == pytest.approx(1, abs=1e-5)
    assert itself["ce"] == pytest.approx(itself["teacher_ce"], rel=1e-5)
    for one in several:
        lengths = one["measures"]["by_length"]
        assert set(lengths) == {"16", "32", "64"}
        assert lengths["64"]["all"] == one["measures"]["all"]
        assert lengths["16"]["by_type"]["lm"]["texts"] == lengths["64"]["by_type"]["lm"]["texts"]


def test_further_students_are_compared_with_the_first_text_by_text(world, run, tmp_path, capsys):
    """In the JSON, beside the run, in the table; the intervals by their formula from the sums of each text."""
    early = min(run.glob("step-*.pt"))
    first, second, itself = found(run, early, run, f"--teacher={world.teacher}", folder=tmp_path)
    assert first["measures"]["all"]["ce"] != second["measures"]["all"]["ce"]
    shown = " ".join(capsys.readouterr().out.split())
    assert first["compared"] == {}
    assert second["compared"]["with"] == str(run)
    assert itself == json.loads((run / "evaluation.json").read_text())
    assert all(one["difference"] == 0 for one in itself["compared"]["verdicts"])
    verdicts = {(one["type"], one["measure"]): one for one in second["compared"]["verdicts"]}
    kinds = ("all", "lm", "math_tool", "code")
    assert set(verdicts) == {(type, key) for type in kinds for key in ("ce", "kl", "agreement", "overlap")}
    for type, measures in (("all", second["measures"]["all"]), ("code", second["measures"]["by_type"]["code"])):
        beside = first["measures"]["all"] if type == "all" else first["measures"]["by_type"][type]
        for key in ("ce", "kl"):
            one = verdicts[type, key]
            assert one["difference"] == pytest.approx(measures[key]["value"] - beside[key]["value"], abs=1e-9)
            assert one["num_texts"] == measures["texts"]
    of_first = {row["id"]: row for row in first["texts"] if row["type"] == "code"}
    rows = [row for row in second["texts"] if row["type"] == "code"]
    total = sum(row["positions"] for row in rows)
    differences = [row["ce"] - of_first[row["id"]]["ce"] for row in rows]
    mean = sum(differences) / total
    spread = sum((one - mean * row["positions"]) ** 2 for one, row in zip(differences, rows, strict=True))
    error = math.sqrt(len(rows) / (len(rows) - 1) * spread) / total
    one = verdicts["code", "ce"]
    assert (one["high"] - one["low"]) / 2 == pytest.approx(quantile(len(rows) - 1) * error)
    assert f"{early} against {run}: {verdicts['all', 'ce']['sentence']}" in shown
    assert f"difference from {run} and its 95 % interval over texts" in shown
    assert "seed" not in verdicts["all", "ce"]["sentence"]
    found(run, folder=tmp_path)
    assert "difference from" not in capsys.readouterr().out


def test_a_run_behind_a_url_is_evaluated_where_it_lies(run, tmp_path):
    place = f"memory://{tmp_path.name}/run"
    for path in run.rglob("*"):
        if path.is_file() and path.name != ".lock" and "tb" not in path.parts:
            storage.write_bytes(f"{place}/{path.relative_to(run)}", path.read_bytes())
    students = [run, place, f"{place}/student", f"{place}/best.pt"]
    here, *there = found(*students, folder=tmp_path)
    for one in there:
        assert_near(one["measures"]["all"], here["measures"]["all"])
    assert json.loads(storage.read_bytes(f"{place}/evaluation.json"))["measures"] == there[0]["measures"]


def test_bfloat16_products_change_little(run, tmp_path):
    (exact,) = found(run, "--precision=float32", folder=tmp_path)
    (rounded,) = found(run, "--precision=bfloat16", folder=tmp_path)
    assert rounded["about"]["dtype"] == "bfloat16"
    ours, theirs = rounded["measures"]["all"]["ce"]["value"], exact["measures"]["all"]["ce"]["value"]
    assert 0 < abs(ours - theirs) < 0.01


def assert_near(got, expected):
    """Equal to rounding, number by number."""
    if isinstance(expected, dict):
        assert got.keys() == expected.keys()
        for key in expected:
            assert_near(got[key], expected[key])
    elif isinstance(expected, list):
        for one, other in zip(got, expected, strict=True):
            assert_near(one, other)
    else:
        assert got == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_with_no_teacher_the_student_stands_alone(world, run, tmp_path):
    (one,) = found(run, "--teacher=none", folder=tmp_path)
    assert one["teacher"] == {}
    assert {"ce", "bits_per_byte", "calibration"} <= set(one["measures"]["all"])
    assert not {"kl", "teacher_ce", "agreement", "overlap"} & set(one["measures"]["all"])
    assert all(not row["kl_positions"] for row in one["texts"])


def test_prompts_are_neither_positions_nor_bytes(world, run, tmp_path):
    rows = [
        {"prompt": "Question: what is it?\n", "completion": "It is a café, number 12."},
        {"prompt": "Question: and then?\n", "completion": "Then nothing."},
    ]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (one,) = found(run / "student", f"--records=qa={tmp_path / 'asked.jsonl'}", "--block_size=64", folder=tmp_path)
    tokenizer = tiny_tokenizer()
    for text, row in zip(sorted(one["texts"], key=lambda one: -one["bytes"]), rows, strict=True):
        assert text["bytes"] == len(row["completion"].encode())
        assert text["positions"] == len(tokenizer(row["completion"])["input_ids"]) + 1  # the end is learnt too


@pytest.fixture
def other_tokenizer(tmp_path):
    tokenizer = tiny_tokenizer(300)
    tokenizer.save_pretrained(tmp_path / "other")
    tiny_model("llama", 300).save_pretrained(tmp_path / "other")
    return tmp_path / "other"


def test_what_cannot_be_evaluated_is_said_in_one_message(world, run, tmp_path, other_tokenizer, capsys):
    texts = f"--dataset_manifest={world.manifest}"
    (tmp_path / "empty").mkdir()
    bare = tmp_path / "bare"
    shutil.copytree(run, bare, ignore=shutil.ignore_patterns("options.yaml", "student", "tb"))
    cases = [
        ((run / "student",), 2, "nothing says which texts"),
        ((run, texts, "--val_fraction=0"), 3, "no text is held out"),
        ((run, texts, "--dataset_name=x"), 2, "named twice"),
        ((run, f"--teacher={other_tokenizer}"), 2, "different tokenizers"),
        ((run, other_tokenizer), 2, "different tokenizers"),
        ((tmp_path / "empty", texts), 4, "no complete checkpoint"),
        ((run.parent, texts), 4, f"ame one of the runs in it: {run}"),
        ((tmp_path / "nothing", texts), 2, "no such model"),
        ((run / "none.pt", texts), 4, "no checkpoint"),
        ((run / "student", texts, "--which=best"), 2, "no student is one"),
        ((run, "--hf_token_file=/nowhere"), 2, "cannot read the token file"),
        ((run, "--which=step-99"), 4, "no such checkpoint"),
        ((bare,), 2, "does not say what it was trained on"),
        ((run, "--block_size=4096"), 2, "no positions that far|cannot see so long"),
        ((run, "--records=/nowhere/x.jsonl"), 3, "matches no file"),
        ((), 2, "STUDENT"),
    ]
    for words, code, said in cases:
        evaluate(*words, code=code)
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
        assert len(errors) == 1, words
        assert any(one in errors[0] for one in said.split("|")), (words, errors)


@pytest.fixture
def sums_world(tmp_path):
    """Little sums as prompts and completions, and a model that was trained on them until it knows them."""
    tokenizer = tiny_tokenizer()
    pairs = [(f"{a}+{b}=", f" #### {a + b}") for a in range(2, 5) for b in range(2, 5)]
    rows = [{"prompt": q, "completion": a, "sample_id": q} for q, a in pairs]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = tiny_model("llama", 512, seed=1, max_position_embeddings=128).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    ids = [[0, *tokenizer(q)["input_ids"], *tokenizer(a)["input_ids"], 0] for q, a in pairs]
    width = max(map(len, ids))
    batch = torch.tensor([one + [0] * (width - len(one)) for one in ids])
    labels = torch.tensor([one + [-100] * (width - len(one)) for one in ids])
    for _ in range(120):
        model(input_ids=batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, one in (("teacher", model.eval()), ("student", tiny_model("llama", 512, seed=2))):
        one.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    return tmp_path


def test_prompts_are_answered_and_marked_the_teachers_beside_them(sums_world, capsys):
    words = [f"--records=sums={sums_world / 'sums.jsonl'}", "--block_size=64", f"--teacher={sums_world / 'teacher'}"]
    (one,) = found(sums_world / "student", *words, "--answer_tokens=8", folder=sums_world)
    assert len(one["answers"]) == len(one["teacher_answers"]) == 9
    assert {row["id"] for row in one["answers"]} == {row["id"] for row in one["teacher_answers"]}
    for row in one["teacher_answers"]:
        a, b = row["id"].removesuffix("=").split("+")
        assert row["expected"] == str(int(a) + int(b))
        assert row["right"] == (row["said"] == row["expected"])
    told = one["measures"]["teacher_answers"]["all"]
    assert told["right"] == sum(row["right"] for row in one["teacher_answers"]) >= 6
    both = [sums_world / "student", sums_world / "teacher"]
    _, better = found(*both, *words, "--answer_tokens=8", folder=sums_world)
    (right,) = [row for row in better["compared"]["verdicts"] if row["measure"] == "answers"]
    assert (right["word"], right["num_texts"], right["difference"]) == ("better", 9, told["right"] / 9)
    assert one["measures"]["answers"]["all"]["right"] == 0
    shown = capsys.readouterr().out
    assert f"sums 0/9 (0% to 30%); the teacher {told['right']}/9" in shown
    (few,) = found(sums_world / "student", *words, "--answers=3", "--answer_tokens=8", folder=sums_world)
    assert len(few["answers"]) == 3
    (none,) = found(sums_world / "student", *words, "--answers=0", folder=sums_world)
    assert none["answers"] == []
    assert "answers" not in none["measures"]


def test_a_teacher_that_is_gated_is_asked_for_with_the_token_wherever_it_is_opened(sums_world, monkeypatch):
    """Behind the passes over the text too: what they found would be lost with it."""
    from liquid_llm.jobs import evaluate_answers

    tokens = []

    def load(name, *, token=None):
        tokens.append(token)
        return load_tokenizer(name, token=token)

    monkeypatch.setattr(evaluate_answers, "load_tokenizer", load)
    (sums_world / "token").write_text("hf_of_a_person")
    words = [f"--records=sums={sums_world / 'sums.jsonl'}", "--block_size=64", f"--teacher={sums_world / 'teacher'}"]
    words += ["--answer_tokens=2", f"--hf_token_file={sums_world / 'token'}"]
    found(sums_world / "student", *words, folder=sums_world)
    assert tokens == ["hf_of_a_person"]


def test_answers_that_cannot_be_had_are_said(world, run, capsys):
    evaluate(run, "--answers=5", code=2)
    said = capsys.readouterr().err
    assert "no held-out text has an answer that can be marked" in said
    assert "evaluate:" not in said  # before anything is measured


@pytest.mark.parametrize(("right", "total"), [(0, 9), (9, 9), (3, 20), (50, 100)])
def test_wilsons_interval_holds_the_shares_whose_test_does_not_refuse_them(right, total):
    """Its ends solve (share - p)^2 = z^2 p (1 - p) / n."""
    for end in wilson_interval(right, total):
        assert 0 <= end <= 1
        assert (right / total - end) ** 2 == pytest.approx(1.959964**2 * end * (1 - end) / total, abs=1e-12)
