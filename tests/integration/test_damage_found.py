"""``liquid doctor`` and ``liquid inspect`` over every file of every kind of folder, damaged in every way."""

from __future__ import annotations

import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.support.undisturbed import Undisturbed, contents

from liquid_llm.cli.main import main
from liquid_llm.jobs.doctor import examine

pytestmark = pytest.mark.slow
JOBS = ("hybrid", "capture", "capture of .pt files", "preparation")


def flip(data: bytes, draw: random.Random) -> bytes:
    place = draw.randrange(len(data))
    return data[:place] + bytes([data[place] ^ (1 << draw.randrange(8))]) + data[place + 1 :]


DAMAGES: dict[str, Callable[[bytes, random.Random], bytes | None]] = {
    "flipped": flip,
    "cut": lambda data, draw: data[: draw.randrange(len(data))],
    "longer": lambda data, draw: data + draw.randbytes(40),
    "zeros": lambda data, draw: bytes(len(data)),
    "empty": lambda data, draw: b"",
    "noise": lambda data, draw: draw.randbytes(len(data)),
    "deep": lambda data, draw: b"[" * 100_000,
    "lost": lambda data, draw: None,
}
# What nothing goes by; rows, of which a kill leaves any beginning; what a preparation goes by that is not complete.
_UNREAD = r"tb/|report\.html|\.lock|log\.txt|provenance/|student/|manifest\.jsonl|metrics|samples|.*/input-"
NOT_LOOKED_AT = re.compile(_UNREAD)
# In other files a number may be another number. Checkpoints, records and shards have sums.
SUMMED = re.compile(r".*\.(pt|safetensors)|.*\.meta\.json")


def damage(folder: Path, name: str, kind: str, draw: random.Random) -> None:
    path = folder / name
    data = DAMAGES[kind](path.read_bytes(), draw)
    path.unlink()  # names of one checkpoint are links to one file
    if data is not None:
        path.write_bytes(data)


def look(folder: Path, name: str, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(str(folder))
    for words in (["doctor", str(folder)], ["inspect", str(folder)], ["doctor", str(folder / name)]):
        assert main(words) in (0, 2, 3, 4), (name, kind, words)
        assert "Traceback" not in capsys.readouterr().err
    assert contents(str(folder)) == before
    if NOT_LOOKED_AT.match(name):
        return
    certain = kind in ("zeros", "empty", "noise", "deep") or (kind in ("flipped", "cut") and SUMMED.fullmatch(name))
    if certain:
        assert not examine(str(folder)).whole, (name, kind)


@pytest.mark.parametrize("name", ["capture", "preparation"])
def test_every_file_damaged_in_one_way(
    name: str, undisturbed: Undisturbed, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw = random.Random(name)
    damage_each(Path(undisturbed[name][1]), tmp_path / "copy", lambda: [draw.choice(list(DAMAGES))], draw, capsys)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", JOBS)
def test_every_file_damaged_in_every_way(
    name: str, undisturbed: Undisturbed, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw = random.Random(name)
    damage_each(Path(undisturbed[name][1]), tmp_path / "copy", lambda: [*DAMAGES, "flipped", "cut"], draw, capsys)


def damage_each(
    whole: Path,
    copy: Path,
    kinds: Callable[[], list[str]],
    draw: random.Random,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert examine(str(whole)).whole
    seen: set[str] = set()
    for name, data in contents(str(whole)).items():
        alike = re.sub(r"\d+|[0-9a-f]{12,}", "N", name)  # of many records alike, one
        if alike in seen or not data:
            continue
        seen.add(alike)
        for kind in kinds():
            shutil.copytree(whole, copy)
            damage(copy, name, kind, draw)
            look(copy, name, kind, capsys)
            shutil.rmtree(copy)


@pytest.mark.parametrize("kind", ["cut", "empty", "lost", "deep"])
def test_a_preparation_run_again_mends_any_file_of_its_own(kind: str, undisturbed: Undisturbed, tmp_path: Path) -> None:
    job, draw = undisturbed["preparation"][0], random.Random(kind)
    words = job.words(str(tmp_path), tmp_path)
    assert main(words) == 0
    whole = _of_use(tmp_path / "out")
    for name in whole:
        if name == "manifest.jsonl" and kind in ("cut", "deep"):
            continue  # lines that are not its own stay; whoever reads them says what is wrong
        damage(tmp_path / "out", name, kind, draw)
        assert main(words) == 0, name
        assert _of_use(tmp_path / "out") == whole, name


def _of_use(folder: Path) -> dict[str, bytes]:
    """All but what a preparation goes by until it is complete, and what people alone read of it."""
    found = contents(str(folder))
    return {name: data for name, data in found.items() if "/input-" not in name and "/rejects" not in name}
