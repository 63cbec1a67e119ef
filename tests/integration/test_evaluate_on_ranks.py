"""``liquid evaluate`` on several processes: the figures and answers of one, and one message when it cannot be."""

import json
import os
import random
import signal
from importlib.util import find_spec
from pathlib import Path

import pytest
from tests.integration.test_lm_eval import TASK
from tests.support import texts
from tests.support.processes import launch, run, wait
from tests.support.tiny import Tiny, build

from liquid_llm.cli.main import main
from liquid_llm.evaluation.judge import Judge

pytestmark = pytest.mark.slow
COMMAND = "liquid_llm.cli.main"
ASKED = 20  # prompts: two batches of them


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Tiny:
    world = build(tmp_path_factory.mktemp("tiny"))
    rng = random.Random(5)
    sums = [(rng.randrange(99), rng.randrange(99)) for _ in range(ASKED)]
    rows = [{"prompt": f"{a}+{b}=", "completion": f" #### {a + b}", "sample_id": f"{a}+{b}"} for a, b in sums]
    rows.append({"text": " ".join(texts.paragraph(rng) for _ in range(30)), "sample_id": "longer than a batch"})
    (world.root / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return world


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory) -> Path:
    """A run whose types have three kinds of teacher: a model, a store, none."""
    assert main(["capture", *world.capture_words(code_logits_dir=None, signal="code=none", codec="topk", topk=24)]) == 0
    output = tmp_path_factory.mktemp("out")
    sizes = {"max_steps": 4, "eval_every": 0, "save_every": 0, "eval_ctx_lens": "32,64"}
    assert main(["train", *world.train_words(output, code_logits_dir=None, signal="code=none", **sizes)]) == 0
    return output / "run"


def assert_equal(found, expected, place=""):
    """Counts and words to the letter, sums of float64 to their rounding."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), place
        for key in expected:
            assert_equal(found[key], expected[key], f"{place}/{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), place
        for number, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_equal(one, other, f"{place}/{number}")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-12), place
    else:
        assert found == expected, place


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_find_what_one_process_finds_and_the_main_one_tells_it(world, trained, tmp_path, size):
    words = ["evaluate", str(trained), str(trained / "student"), "--answers=0", "--batch_size=1"]
    assert main([*words, f"--json={tmp_path / 'alone.json'}"]) == 0
    beside = (trained / "evaluation.json").read_text()
    (trained / "evaluation.json").unlink()
    ranks = launch(COMMAND, [*words, f"--json={tmp_path / 'ranks.json'}"], tmp_path / "said", size)
    assert wait(ranks) == [0] * size, "\n".join(rank.said for rank in ranks)
    found, expected = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("ranks", "alone"))
    assert {type for row in expected[0]["texts"] for type in [row["type"]]} == {"lm", "math_tool", "code"}
    assert expected[0]["measures"]["by_length"].keys() == {"32", "64"}
    assert expected[0]["measures"]["all"].keys() >= {"ce", "kl", "agreement", "calibration", "bits_per_byte", "overlap"}
    assert_equal(found, expected)
    assert_equal(json.loads((trained / "evaluation.json").read_text()), json.loads(beside))
    assert "evaluate: " in ranks[0].said
    assert ranks[0].said.count("held-out text, each figure") == 1
    assert not any(rank.said for rank in ranks[1:]), "the main one alone speaks"


def test_prompts_are_dealt_out_and_their_answers_put_together(world, trained, tmp_path):
    records = f"--records=sums={world.root / 'sums.jsonl'}"
    words = ["evaluate", str(trained / "student"), str(world.teacher), records, f"--teacher={world.teacher}"]
    words += ["--block_size=64", f"--answers={ASKED}", "--answer_tokens=6", f"--data_cache={tmp_path / 'cache'}"]
    assert main([*words, f"--json={tmp_path / 'alone.json'}"]) == 0
    run(COMMAND, [*words, f"--json={tmp_path / 'ranks.json'}"], tmp_path / "said")
    found, expected = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("ranks", "alone"))
    assert [len(one["answers"]) for one in expected] == [ASKED, ASKED]
    assert len(expected[0]["teacher_answers"]) == ASKED
    assert len({row["id"] for row in expected[1]["answers"]}) == ASKED, "else their order does not show"
    assert_equal(found, expected)


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is an extra")
def test_benchmarks_are_dealt_out_by_student(world, trained, tmp_path):
    data = tmp_path / "test.jsonl"
    data.write_text("".join(json.dumps({"question": f"Is {number} a number?"}) + "\n" for number in range(8)))
    (tmp_path / "own.yaml").write_text(TASK.format(data=data))
    records = f"--records=sums={world.root / 'sums.jsonl'}"
    words = ["evaluate", str(trained / "student"), str(world.teacher), records, "--teacher=none", "--block_size=64"]
    words += [f"--tasks={tmp_path / 'own.yaml'}", "--answers=0", f"--json={tmp_path / 'ranks.json'}"]
    ranks = launch(COMMAND, words, tmp_path / "said")
    assert wait(ranks) == [0, 0], "\n".join(rank.said for rank in ranks)
    assert [one["tasks"]["own"]["samples"] for one in json.loads((tmp_path / "ranks.json").read_text())] == [8, 8]
    assert ranks[0].said.count("lm-eval: ") == 1, "each took one of the two"


def break_down() -> None:
    """The second batch of this rank does not fit into memory, not even a row of it."""
    measure, calls = Judge._measure, []

    def broken(self, *given):
        calls.append(1)
        if len(calls) == 2:
            raise torch_out_of_memory()
        return measure(self, *given)

    Judge._measure = broken


def torch_out_of_memory() -> BaseException:
    import torch

    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")


def be_terminated() -> None:
    """In the second batch of this rank."""
    measure, calls = Judge._measure, []

    def broken(self, *given):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return measure(self, *given)

    Judge._measure = broken


@pytest.mark.parametrize(
    ("fault", "code", "said"),
    [(break_down, 6, "the device's memory does not suffice"), (be_terminated, 143, "terminated before")],
)
def test_a_rank_that_ends_while_it_measures_ends_all_with_its_code_and_one_message(
    world, trained, tmp_path, fault, code, said
):
    words = ["evaluate", str(trained), "--answers=0", "--batch_size=1", f"--json={tmp_path / 'found.json'}"]
    ranks = launch(COMMAND, words, tmp_path / "said", fault=(1, fault))
    assert wait(ranks, 120) == [code, code], "\n".join(rank.said for rank in ranks)
    assert ranks[1].said.count(said) == 1
    assert "error" not in ranks[0].said
    assert "Traceback" not in ranks[0].said + ranks[1].said
    assert not (tmp_path / "found.json").exists()


def test_hosts_that_lack_the_texts_or_have_others_end_all_with_one_message(world, trained, tmp_path):
    words = ["evaluate", str(trained / "student"), "--records=sums=own.jsonl", "--teacher=none", "--block_size=64"]
    for name, other, code, said in (
        ("lacking", None, 3, "matches no file"),
        ("older", 9, 3, "read different texts"),
    ):
        for host, kept in enumerate((None, other)):
            (tmp_path / name / f"host-{host}").mkdir(parents=True)
            rows = (world.root / "sums.jsonl").read_text().splitlines(keepends=True)
            if host == 0 or kept is not None:
                (tmp_path / name / f"host-{host}" / "own.jsonl").write_text("".join(rows[:kept]))
        ranks = launch(COMMAND, words, tmp_path / name, apart=True)
        assert wait(ranks) == [code, code], "\n".join(rank.said for rank in ranks)
        assert ranks[1].said.count(said) == 1
        assert "error" not in ranks[0].said


def test_what_cannot_be_written_ends_all_with_one_message(world, trained, tmp_path):
    (tmp_path / "file").write_text("")
    words = ["evaluate", str(trained / "student"), f"--records=sums={world.root / 'sums.jsonl'}", "--teacher=none"]
    words += ["--block_size=64", "--answers=0", f"--json={tmp_path / 'file' / 'found.json'}"]
    ranks = launch(COMMAND, words, tmp_path / "said")
    assert wait(ranks) == [4, 4], "\n".join(rank.said for rank in ranks)
    assert ranks[0].said.count("error:") == 1
    assert "error" not in ranks[1].said
