"""Capture by several processes: one that ends leaves the others working, and running again captures what is missing."""

import json
import os
import signal

import pytest
from tests.support.dying import at_batch
from tests.support.processes import launch, wait
from tests.support.tiny import QUICK, Tiny, build

from liquid_llm.cli.main import main

pytestmark = pytest.mark.slow
CAPTURE = "stage1_hybrid.precompute_hybrid_logits"


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Tiny:
    return build(tmp_path_factory.mktemp("tiny"))


def lose_the_device() -> None:
    def act() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    at_batch(3, act)


def be_asked_to_stop() -> None:
    at_batch(3, lambda: os.kill(os.getpid(), signal.SIGTERM))


def be_killed() -> None:
    at_batch(3, lambda: os.kill(os.getpid(), signal.SIGKILL))


@pytest.mark.parametrize(("fault", "code"), [(lose_the_device, 6), (be_asked_to_stop, 75), (be_killed, -9)])
def test_a_rank_that_ends_leaves_the_others_working(world: Tiny, tmp_path, capsys, fault, code) -> None:
    folders = {"math_logits_dir": tmp_path / "math", "code_logits_dir": tmp_path / "code"}
    words = world.capture_words(**folders, batch_size=1, logits_format="pt", **QUICK)
    ranks = launch(CAPTURE, words, tmp_path / "said", fault=(1, fault))
    assert wait(ranks) == [0, code], "\n".join(rank.said for rank in ranks)
    done = json.loads(ranks[0].said.splitlines()[-1])
    assert (done["failed"], done["interrupted"], done["skipped"]) == (0, False, 0)
    assert 30 < done["written"] < 50, "about half of the samples are its share"
    capsys.readouterr()
    assert main(["capture", *words]) == 0
    rest = json.loads(capsys.readouterr().out)
    assert rest["written"] + rest["skipped"] == 80
    assert rest["written"] > 0
    assert rest["skipped"] >= done["written"]
    if code == 75:
        stopped = next(json.loads(line) for line in ranks[1].said.splitlines() if line.startswith("{"))
        assert stopped["interrupted"]
        assert rest["skipped"] == done["written"] + stopped["written"]
