"""What docs/architecture.md says a new idea costs: its recipes are applied to a copy of the sources, which is run."""

from __future__ import annotations

import ast
import csv
import importlib.util
import json
import os
import re
import subprocess
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tests.support import forked
from tests.support.recipes import EXAMPLES, PAGE, Recipe, apply, read_recipes
from tests.support.servers import LIBRARIES
from tests.support.sources import REPOSITORY, imports, parse
from tests.support.teachers import IDENTITY, batch_of, make_samples, random_logits
from tests.support.tiny import VOCAB_SIZE, Tiny, build
from tests.support.tokenizers import tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from liquid_llm.errors import ModelError, SignalError
from liquid_llm.metrics import read_metrics
from liquid_llm.models.loading import LoadedModel
from liquid_llm.signal_store.codecs import PayloadError
from liquid_llm.teachers.online import OnlineTeacher
from liquid_llm.teachers.teacher import TeacherSetup

RECIPES = read_recipes(PAGE.read_text(encoding="utf-8"))
COSTS = {
    "A divergence": "1 file and 1 line",
    "A codec": "1 file and 1 line",
    "A teacher": "1 file and 1 line",
    "A tracker": "1 file and 1 line",
    "A student preset": "1 line",
}
NUM_IDS = 20


def cost(recipe: Recipe) -> str:
    lines = sum(len(added) for _, _, added, _ in recipe.patches) + len(recipe.removed)
    files = len(recipe.files)
    parts = [(files, "file"), (lines, "line")]
    return " and ".join(f"{count} {word}{'s' * (count > 1)}" for count, word in parts if count)


def test_each_recipe_costs_what_its_heading_says() -> None:
    assert {recipe.name: cost(recipe) for recipe in RECIPES} == COSTS
    assert {recipe.name: recipe.cost for recipe in RECIPES} == COSTS


def test_a_recipe_that_needs_more_than_it_says_is_seen() -> None:
    page = PAGE.read_text(encoding="utf-8")
    line = '+    "eight_bits": "liquid_llm.signal_store.codecs.eight_bits:EightBitsCodec",\n'
    (codec,) = [one for one in read_recipes(page.replace(line, f"{line}+    # and this\n")) if one.name == "A codec"]
    assert cost(codec) == "1 file and 2 lines"


def test_every_example_is_in_one_recipe_and_knows_nothing_of_the_others() -> None:
    named = [Path(example).name for recipe in RECIPES for example, _ in recipe.files]
    assert sorted(named) == sorted(path.name for path in EXAMPLES.glob("*.py"))
    others = {f"liquid_llm.{Path(goes_to).stem}" for recipe in RECIPES for _, goes_to in recipe.files}
    for path in EXAMPLES.glob("*.py"):
        assert ast.get_docstring(parse(path)), path.name
        found = {entry.name for entry in imports(path.stem, parse(path), set())}
        assert not {name for name in found for other in others if name.startswith(other)}


# ------------------------------------------------------------------------------------------------------- the copy, run


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources with every recipe applied."""
    return apply(RECIPES, tmp_path_factory.mktemp("extended"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return build(tmp_path_factory.mktemp("tiny"), teacher_steps=150)


def liquid(sources: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(sources), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return forked.run(["-m", "liquid_llm", *words], env=environment, server=LIBRARIES)


def test_the_options_of_the_copy_list_what_was_added(extended: Path) -> None:
    for command, names in (("capture", {"eight_bits"}), ("train", {"hellinger", "csv"})):
        assert names <= set(re.findall(r"\w+", liquid(extended, command, "--help").stdout))


class _Answers(BaseHTTPRequestHandler):
    """Answers as a vLLM server does for the model in ``server.folder``."""

    def do_GET(self) -> None:
        assert self.path == "/v1/models"
        self._send({"data": [{"id": "tiny"}]})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert asked["model"] == "tiny"
        if self.path == "/tokenize":
            ids = self.server.tokenizer.encode(asked["prompt"], add_special_tokens=asked["add_special_tokens"])
            self._send({"tokens": ids})
            return
        assert self.path == "/v1/completions"
        said = [self._say(ids, asked["prompt_logprobs"]) for ids in asked["prompt"]]
        self.server.asked.append(len(said))
        choices = [{"index": number, "prompt_logprobs": one} for number, one in enumerate(said)]
        self._send({"choices": choices[::-1]})  # the order is not promised

    def _say(self, ids: Sequence[int], count: int) -> list[dict[str, dict[str, float]] | None]:
        with torch.no_grad():
            log_probs = self.server.model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
        rows: list[dict[str, dict[str, float]] | None] = [None]
        for token, row in zip(ids[1:], log_probs[:-1], strict=True):
            named = dict.fromkeys([*row.topk(count).indices.tolist(), token])
            rows.append({str(one): {"logprob": float(row[one])} for one in named})
        return rows

    def _send(self, value: object) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def server(tiny: Tiny) -> Iterator[ThreadingHTTPServer]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Answers) as server:
        server.tokenizer = AutoTokenizer.from_pretrained(tiny.teacher)
        server.model = AutoModelForCausalLM.from_pretrained(tiny.teacher).eval()
        server.asked = []
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.slow
def test_a_run_with_all_of_them(extended: Path, tiny: Tiny, server: ThreadingHTTPServer, tmp_path: Path) -> None:
    """Maths in 8 bits, code from a server, plain text by the Hellinger distance, a table of figures, the new shape."""
    store = tiny.root / "signal" / "math"
    words = tiny.capture_words(math_logits_dir=None, code_logits_dir=None, codec="eight_bits")
    captured = liquid(extended, "capture", *words, f"--signal=math_tool={store},code=none")
    assert captured.returncode == 0, captured.stderr
    assert json.loads((store / "store.json").read_text())["codec"] == "eight_bits"
    file = tmp_path / "run.yaml"
    url = f"http://127.0.0.1:{server.server_address[1]}"
    sources = {
        "lm": {"divergence": "hellinger"},
        "math_tool": {"teacher": f"store:{store}"},
        "code": {"teacher": f"served:{url}", "temperature": 1.0},
    }
    file.write_text(yaml.safe_dump({"sources": sources, "student": "liquid-8m", "trackers": ["csv"]}))
    words = tiny.train_words(
        tmp_path, math_logits_dir=None, code_logits_dir=None, student=None, max_steps=12, kd_temperature=2
    )
    trained = liquid(extended, "train", f"--config={file}", *words)
    assert trained.returncode == 0, trained.stderr
    run = tmp_path / "run"
    before, after = [row for row in read_metrics(run) if row["kind"] == "eval"][0::2]
    assert set(after["by_type"]) == {"lm", "math_tool", "code"}
    for type, row in after["by_type"].items():
        assert row["val_kd"] < before["by_type"][type]["val_kd"], type
    rows = [row for row in read_metrics(run) if row["kind"] == "train"]
    assert all(row["kd_coverage"] == 1.0 for row in rows)
    with (run / "metrics.csv").open(newline="") as lines:
        table = {(line["step"], line["name"]): line["value"] for line in csv.DictReader(lines)}
    assert float(table["12", "train/loss"]) == rows[-1]["loss"]
    assert not (run / "tb").exists()
    assert server.asked
    teachers = json.loads((run / "provenance" / "environment.json").read_text())["teachers"]
    assert teachers["served"]["url"] == url


def test_without_the_recipe_the_name_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    """The control of the run above: it is the recipes that make it work."""
    found = liquid(REPOSITORY / "src", "capture", *tiny.capture_words(), "--codec=eight_bits")
    assert found.returncode == 2
    assert "eight_bits" in found.stderr


# ---------------------------------------------------------------------------------------------- the examples themselves


def example(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_the_server_says_is_what_its_model_says(tiny: Tiny, server: ThreadingHTTPServer) -> None:
    served = example("served")
    setup = TeacherSetup(server.tokenizer, "", VOCAB_SIZE, 64, torch.device("cpu"), tiny.root)
    url = f"http://127.0.0.1:{server.server_address[1]}"
    teacher = served.open_served(f"{url}/", setup)
    batch = batch_of(make_samples(5, low=1, high=30))
    prepared = teacher.prepare(batch, 1.0)
    signal = teacher.signal(batch, prepared)
    assert signal.num_positions == batch.num_positions
    dense = OnlineTeacher(LoadedModel(server.model, None, IDENTITY), VOCAB_SIZE).signal(batch)
    exact = dense.head.logits(dense.hidden).log_softmax(-1)
    used = signal.weights > 0
    torch.testing.assert_close(signal.log_probs[used], exact.gather(1, signal.ids)[used], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(signal.weights.sum(1) + signal.tail_mass, torch.ones(batch.num_positions))
    top, targets = exact.topk(NUM_IDS).indices, batch.targets.unsqueeze(1)
    assert torch.equal(used.sum(1), NUM_IDS + (top != targets).all(1).int())  # the text's own token comes along
    part, positions = batch.rows(2, 4)
    assert torch.equal(teacher.signal(part, prepared.part(positions)).ids, signal.ids[positions])
    with pytest.raises(ModelError, match="another tokenizer than the student"):
        served.open_served(url, replace(setup, tokenizer=tiny_tokenizer(300)))
    with pytest.raises(SignalError, match="the teacher's server does not answer"):
        served.open_served("http://127.0.0.1:9", setup)


def test_eight_bits_are_a_byte_an_id_and_wrong_by_at_most_half_a_step() -> None:
    codec, logits = example("eight_bits").EightBitsCodec(), random_logits(20, 300)
    payload = codec.pack(codec.encode(logits.clone(), 1, 0))
    assert sum(tensor.nbytes for tensor in payload.values()) == 20 * 300
    found = codec.decode(payload, 3, 17, 2.0, 300).rows.float()
    exact = (logits - logits.amax(1, keepdim=True))[3:17].clamp(min=-16.0)
    assert float((found - exact).abs().max()) < 16.0 / 255 / 2 + 0.01
    with pytest.raises(PayloadError):
        codec.decode(payload, 0, 21, 2.0, 300)


def test_a_continued_run_has_each_number_once_in_its_table(tmp_path: Path) -> None:
    tracker = example("csv_file").CsvTracker
    for resume, steps in ((None, range(1, 6)), (3, range(4, 8))):
        one = tracker(tmp_path, resume)
        for step in steps:
            one.log({"kind": "train", "step": step, "loss": step / 3, "by_type": {"lm": {"ce": 1.0}}})
        one.close()
    with (tmp_path / "metrics.csv").open(newline="") as lines:
        found = [(int(one["step"]), one["name"], float(one["value"])) for one in csv.DictReader(lines)]
    expected = [[(n, "train/loss", n / 3), (n, "train/by_type/lm/ce", 1.0)] for n in range(1, 8)]
    assert found == [row for rows in expected for row in rows]
