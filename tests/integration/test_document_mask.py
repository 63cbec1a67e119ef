"""``--document_mask`` by the real commands: student and teacher see each text of a block as if it stood alone."""

import json

import pytest
import torch
from tests.support.annealing import anneal, rows
from tests.support.models import tiny_config
from tests.support.tiny import VOCAB_SIZE
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def short_texts(tiny, tmp_path_factory):
    """A folder of short texts; all that are held out fit into one block."""
    folder = tmp_path_factory.mktemp("short")
    texts = [json.loads(line)["text"][:70] for line in (tiny.root / "lm.jsonl").read_text().splitlines()]
    for name, part in (("train", texts[:50]), ("validation", texts[50:56])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
    return folder


def run(tiny, folder, output, **options):
    given = {"dataset_name": folder, "block_size": 256, "batch_size": 2, "precision": "float32", "train_steps": 4}
    return anneal(tiny, output, **{**given, "teacher_precision": "float32", "student": tiny.student, **options})


def loss_alone(model, tokenizer, texts):
    """Mean loss of the held-out texts, each by itself between two end-of-text tokens, without a line of ours."""
    end = tokenizer.eos_token_id
    total, count = 0.0, 0
    for line in (texts / "validation.jsonl").read_text().splitlines():
        text = tokenizer(json.loads(line)["text"], add_special_tokens=False)["input_ids"]
        ids = torch.tensor([[end, *text, end]])
        with torch.no_grad():
            logits = model.eval()(input_ids=ids).logits[0, :-1]
        total += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        count += ids.shape[1] - 1
    return total / count, count


def test_evaluation_says_what_each_text_says_alone(tiny, short_texts, tmp_path):
    assert run(tiny, short_texts, tmp_path / "run", document_mask=True, grad_checkpoint=True) == 0
    evaluated = rows(tmp_path / "run", "eval")[-1]
    tokenizer = AutoTokenizer.from_pretrained(tiny.teacher)
    for name, place in (("val_loss_teacher", tiny.teacher), ("val_loss_student", tmp_path / "run" / "student")):
        model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
        loss, count = loss_alone(model, tokenizer, short_texts)
        assert evaluated["by_type"]["lm"]["positions"] == count
        assert evaluated[name] == pytest.approx(loss, rel=1e-5), name
    assert all(row["kd_coverage"] == 1.0 for row in rows(tmp_path / "run"))


def test_it_makes_a_difference(tiny, short_texts, tmp_path):
    assert run(tiny, short_texts, tmp_path / "joined") == 0
    assert run(tiny, short_texts, tmp_path / "apart", document_mask=True) == 0
    teacher = [rows(tmp_path / name, "eval")[0]["val_loss_teacher"] for name in ("joined", "apart")]
    assert abs(teacher[0] - teacher[1]) > 1e-3


def test_what_cannot_keep_documents_apart_is_refused_before_any_data(tiny, short_texts, tmp_path, capsys):
    (tmp_path / "opt.json").write_text(tiny_config("opt", VOCAB_SIZE).to_json_string())
    student = {"student": tmp_path / "opt.json", "document_mask": True}
    assert run(tiny, tmp_path / "nowhere", tmp_path / "run", **student) == 2
    assert "cannot keep the documents of a block apart" in capsys.readouterr().err


def test_where_no_texts_are_joined_it_says_that_it_changes_nothing(tiny, short_texts, tmp_path, caplog):
    file = tmp_path / "samples.yaml"
    file.write_text("sources: {lm: {layout: samples}}\n")
    assert run(tiny, short_texts, tmp_path / "run", document_mask=True, config=file) == 0
    assert "--document_mask changes nothing here" in caplog.text
