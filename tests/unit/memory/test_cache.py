"""Answers kept on disk: found again, made again when damaged, and never mixed up."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from liquid_llm.memory import MemoryPrediction
from liquid_llm.memory import cache as cached
from liquid_llm.memory.cache import forget, remember, remember_config

ANSWER = MemoryPrediction(30, 10, {"forward": 30}, {"a": 20, "b": 10}, "forward", "2 x 3 tokens", "cuda")


class Oracle:
    """Counts how often it is asked."""

    def __init__(self, answer: MemoryPrediction = ANSWER) -> None:
        self.answer, self.asked = answer, 0

    def __call__(self) -> MemoryPrediction:
        self.asked += 1
        return self.answer


@pytest.fixture(autouse=True)
def nothing_remembered() -> Iterator[None]:
    forget()
    yield
    forget()


def test_an_answer_is_given_once_in_a_process_and_once_on_a_machine(tmp_path: Path) -> None:
    oracle = Oracle()
    for _ in range(2):
        assert remember(tmp_path, "training", {"x": 1}, oracle) == ANSWER
    assert oracle.asked == 1
    forget()
    assert remember(tmp_path, "training", {"x": 1}, oracle) == ANSWER
    assert oracle.asked == 1
    (file,) = tmp_path.iterdir()
    assert file.stat().st_size < 1000


def test_other_questions_other_answers(tmp_path: Path) -> None:
    other = Oracle(replace(ANSWER, rest_bytes=11))
    remember(tmp_path, "training", {"x": 1}, Oracle())
    for kind, question in (("training", {"x": 2}), ("capture", {"x": 1}), ("training", {"x": "1"})):
        assert remember(tmp_path, kind, question, other).rest_bytes == 11
    assert other.asked == 3
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize(
    "damage", ["", "{", "[]", "null", '{"peak_bytes": 3}', json.dumps({**ANSWER.as_dict(), "peak_bytes": 31})]
)
def test_a_damaged_file_is_made_again(tmp_path: Path, damage: str) -> None:
    oracle = Oracle()
    remember(tmp_path, "training", {"x": 1}, oracle)
    (file,) = tmp_path.iterdir()
    whole = file.read_text()
    file.write_text(damage)
    forget()
    assert remember(tmp_path, "training", {"x": 1}, oracle) == ANSWER
    assert oracle.asked == 2
    assert file.read_text() == whole
    assert list(tmp_path.iterdir()) == [file]  # nothing half-written is left


def test_without_a_folder_nothing_is_written_and_one_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    assert remember(None, "training", {"x": 1}, Oracle()) == ANSWER
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert remember(blocked / "memory", "training", {"x": 1}, Oracle()) == ANSWER
    assert list(tmp_path.iterdir()) == [blocked]


@pytest.mark.parametrize("damage", [None, "", "[]", "{}", "{"])
def test_a_slow_configuration_is_read_once(tmp_path: Path, damage: str | None) -> None:
    reads = []

    def read() -> dict[str, object]:
        reads.append(1)
        return {"model_type": "llama", "hidden_size": 8}

    for _ in range(2):
        assert remember_config(tmp_path, "revision", read)["hidden_size"] == 8
    assert len(reads) == 1
    (file,) = tmp_path.iterdir()
    if damage is not None:
        file.write_text(damage)
    remember_config(tmp_path, "revision", read)
    assert len(reads) == 1 + (damage is not None)
    remember_config(tmp_path, "another", read)
    remember_config(None, "revision", read)
    assert len(reads) == 3 + (damage is not None)


def test_other_versions_of_libraries_or_sources_ask_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    oracle = Oracle()
    remember(tmp_path, "training", {}, oracle)
    versions = cached._versions()
    for place in range(len(versions)):
        changed = [*versions[:place], versions[place] + "x", *versions[place + 1 :]]
        monkeypatch.setattr(cached, "_versions", lambda changed=changed: changed)
        remember(tmp_path, "training", {}, oracle)
    assert oracle.asked == 1 + len(versions)


def test_the_sources_that_count_are_there() -> None:
    root = Path(cached.__file__).parent.parent
    assert all((root / name).exists() for name in cached._SOURCES)


def test_an_answer_goes_to_plain_values_and_back() -> None:
    assert MemoryPrediction.from_dict(json.loads(json.dumps(ANSWER.as_dict()))) == ANSWER
    assert ANSWER.as_dict()["needed_bytes"] == ANSWER.needed_bytes
