"""One message for one cause: what is wrong with stored signal, said in a run's first words, and what would help."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.support.stores import SAMPLES, write
from tests.support.teachers import ListSource

from liquid_llm.data.types import Sample
from liquid_llm.errors import DataError, LiquidError
from liquid_llm.signal_store.description import STORE_FILE
from liquid_llm.signal_store.store import open_store
from liquid_llm.teachers.router import TeacherRouter
from liquid_llm.teachers.stored import StoredTeacher

Change = Callable[[Path, list[Sample]], list[Sample]]
WINDOW = 1024


def other_samples(folder: Path, samples: list[Sample]) -> list[Sample]:
    return [replace(one, sample_id=f"another {one.sample_id}") for one in samples]


def other_text(folder: Path, samples: list[Sample]) -> list[Sample]:
    return [replace(one, input_ids=np.flip(one.input_ids).copy()) for one in samples]


def longer_text(folder: Path, samples: list[Sample]) -> list[Sample]:
    return [replace(one, input_ids=np.concatenate((one.input_ids, one.input_ids)), learnt=None) for one in samples]


def other_type(folder: Path, samples: list[Sample]) -> list[Sample]:
    return [replace(one, type="code") for one in samples]


def bit_flips(folder: Path, samples: list[Sample]) -> list[Sample]:
    for path in folder.glob("*.pt"):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    return samples


def cut_short(folder: Path, samples: list[Sample]) -> list[Sample]:
    for path in folder.glob("*.pt"):
        path.write_bytes(path.read_bytes()[:100])
    return samples


def of_another_teacher(folder: Path, samples: list[Sample]) -> list[Sample]:
    values = json.loads((folder / STORE_FILE).read_text())
    (folder / STORE_FILE).write_text(json.dumps({**values, "teacher_id": "org/other"}))
    return samples


# cause -> what is said of it, and what would help; "capture again" only where it would, after what costs less
CAUSES: dict[Change, tuple[str, str, bool]] = {
    other_samples: ("none has a record", "Name the store that was captured of this manifest", False),
    other_text: ("is stale: the text differs from the captured", "Train on the texts that were captured, or", True),
    longer_text: (r"is stale: captured at \d+ tokens, \d+ wanted", r"Train with --seq_len=\d+ or less, or", True),
    other_type: ("is stale: it is the record of", "Name the store that was captured of this manifest", False),
    bit_flips: ("is corrupt: ", "Copy it again from where it is whole, or", True),
    cut_short: ("is corrupt: ", "Copy it again from where it is whole, or", True),
    of_another_teacher: ("is stale: captured with teacher", "Copy the store again, whole, from where it was", False),
}


@pytest.mark.parametrize("change", CAUSES)
def test_a_cause_has_its_words_and_its_remedy(change: Change, tmp_path: Path) -> None:
    write(tmp_path, SAMPLES, layout="pt")
    samples = change(tmp_path, list(SAMPLES))
    teacher = StoredTeacher(open_store(str(tmp_path)), strict=False)
    words, remedy, anew = CAUSES[change]
    with pytest.raises(DataError, match=rf"{words}.*\. {remedy}") as raised:
        TeacherRouter({"math_tool": teacher}).coverage({"math_tool": [ListSource(samples)]}, WINDOW)
    assert ("capture again" in str(raised.value)) == anew
    teacher.close()


def test_a_store_inside_the_folder_is_named(tmp_path: Path) -> None:
    write(tmp_path / "math", SAMPLES)
    with pytest.raises(LiquidError, match=r"is no signal store and holds one\. Name \S+/math\.") as raised:
        open_store(str(tmp_path))
    assert "apture" not in str(raised.value)
