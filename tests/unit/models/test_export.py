import json
import os

import pytest
import torch
from tests.support import forked
from tests.support.servers import LIBRARIES
from tests.support.tokenizers import tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from liquid_llm.models.export import save_student
from liquid_llm.models.positions import fit_positions
from liquid_llm.models.student import build_student

FRESH_PROCESS = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
ids = tokenizer("def add(a, b):", return_tensors="pt").input_ids
with torch.no_grad():
    logits = model(ids).logits[0, -1, :8].tolist()
written = model.generate(ids, max_new_tokens=5, do_sample=False)[0]
print(json.dumps({"logits": logits, "text": tokenizer.decode(written)}))
"""


@pytest.mark.parametrize("preset", ["liquid-test"])
def test_a_saved_student_opens_and_generates_in_a_fresh_process(preset, tmp_path):
    tokenizer = tiny_tokenizer()
    student = build_student(preset, vocab_size=512, bos_id=0, eos_id=0, block_size=64, seed=1)
    fit_positions(student, 64, rope_scale=2.0)
    folder = save_student(student, tokenizer, tmp_path / "run" / "student")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    words = ["-c", FRESH_PROCESS, str(folder)]
    done = forked.run(words, cwd=tmp_path, env=environment | {"HF_HUB_OFFLINE": "1"}, server=LIBRARIES)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    ids = tokenizer("def add(a, b):", return_tensors="pt").input_ids
    with torch.no_grad():
        expected = student.eval()(ids).logits[0, -1, :8]
    torch.testing.assert_close(torch.tensor(answer["logits"]), expected)
    assert answer["text"].startswith("def add(a, b):")
    assert len(answer["text"]) > len("def add(a, b):")


def test_saving_replaces_an_earlier_folder_and_leaves_nothing_else(tmp_path):
    folder = tmp_path / "student"
    folder.mkdir()
    (folder / "stale.bin").write_bytes(b"old")
    student = build_student("gpt2-test", vocab_size=512, bos_id=0, eos_id=0, block_size=8, seed=1)
    save_student(student, tiny_tokenizer(), folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["student"]
    assert not (folder / "stale.bin").exists()
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), loaded.parameters(), strict=True))
    assert len(AutoTokenizer.from_pretrained(folder)) == 512


def test_files_are_as_readable_as_their_folder(tmp_path):
    student = build_student("gpt2-test", vocab_size=512, bos_id=0, eos_id=0, block_size=8, seed=1)
    folder = save_student(student, tiny_tokenizer(), tmp_path / "student")
    assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {folder.stat().st_mode & 0o666}
