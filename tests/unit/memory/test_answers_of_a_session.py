"""What tests/support/predictions.py does for all others: one process works out a shape, all of a session know it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tests.support import forked
from tests.support.memory import shape_of
from tests.support.predictions import Answers

from liquid_llm import memory
from liquid_llm.memory.shapes import BatchShape

ASK = """
import sys
from tests.support.memory import shape_of
from liquid_llm import memory
from liquid_llm.memory.shapes import BatchShape
memory.work_out_training = lambda shape: sys.exit("worked out")
print(memory.predict_training(shape_of("llama-test", BatchShape(1, int(sys.argv[1])))))
"""


def ask(time: int) -> tuple[int, str]:
    done = forked.run(["-c", ASK, str(time)], env=dict(os.environ))
    return done.returncode, done.stdout.strip()


@pytest.mark.skipif("LIQUID_TESTS_FOLDER" not in os.environ, reason="this session has no folder")
def test_a_forked_process_knows_what_this_one_has_worked_out() -> None:
    answer = memory.predict_training(shape_of("llama-test", BatchShape(1, 7)))
    assert ask(7) == (0, str(answer))
    assert ask(6) == (1, ""), "of another shape nothing is known"


def test_only_the_same_question_is_answered(tmp_path: Path) -> None:
    ours, theirs = Answers(tmp_path), Answers(tmp_path)
    answer = memory.predict_training(shape_of("llama-test", BatchShape(1, 7)))
    ours["a"] = answer
    assert "b" not in ours
    assert "b" not in theirs
    assert "a" in theirs
    assert theirs["a"] == answer
    assert list(theirs["a"].consumers) == list(answer.consumers), "the largest first"
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [""]
