"""Surveys of data files beside their caches: however they are damaged, a run sees what it would have seen."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from tests.fuzz.bytes_to_choices import Choices, edit_files, write_files
from tests.support.datasets import UNFRAMED
from tests.support.tokenizers import tiny_tokenizer

from liquid_llm.data.many_files import Cut, FileCaches, ManyFiles

_TOKENIZER = tiny_tokenizer()
_CUT = Cut(window=8, val_fraction=0.4, held_tokens=10, held_samples=1)
_TEXTS = (
    b'{"text": "the river"}\n{"prompt": "two and two", "completion": "four"}\n{"text": "a cook", "sample_id": "c"}\n',
    b'{"text": "the cook and the river"}\n{"text": "two rivers and a cook", "sample_id": "d"}\n',
)


def seeds() -> Iterator[bytes]:
    yield b""
    yield bytes([0, 0, 3, 1, 2, 1, 0])
    yield bytes([1, 1, 200, 3])
    yield bytes(range(20))


def _read(files: list[str], folder: Path) -> ManyFiles:
    caches = FileCaches("lm", _TOKENIZER, "h", folder, framing=UNFRAMED, layout="samples")
    return ManyFiles.read(caches, _CUT, files, ["a", "b"])


@cache
def _sources() -> list[str]:
    """Where the records lie all the time: a cache is known by their place and time."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-surveys-"))
    for number, text in enumerate(_TEXTS):
        (folder / f"{number}.jsonl").write_bytes(text)
    return [str(path) for path in sorted(folder.iterdir())]


@cache
def _whole() -> tuple[dict[str, bytes], Any]:
    """The files of whole caches with their surveys, and what is seen of them."""
    with tempfile.TemporaryDirectory() as folder:
        found = _seen(_read(_sources(), Path(folder)))
        files = {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}
        return {name: data for name, data in files.items() if not name.endswith(".lock")}, found


def _seen(files: ManyFiles) -> Any:
    samples = [(files.sample_id(n), files.sample(n).input_ids.tolist()) for n in range(len(files))]
    held = files.held_out
    names = [] if held is None else [held.sample_id(n) for n in range(len(held))]
    lengths = [files.histogram()[0].tolist(), files.histogram()[1].tolist(), files.counts.tolist()]
    kept = [files.num_tokens, files.unseen, files.held, files.shards, files.shard_tokens.tolist(), files.fingerprint]
    return samples, names, lengths, kept, files.meta


def check(data: bytes, folder: Path) -> None:
    choices = Choices(data)
    files, expected = _whole()
    files = dict(files)
    surveys = sorted(name for name in files if name.startswith(".") and name.endswith(".json"))
    assert len(surveys) == len(_TEXTS)
    edit_files(files, surveys, choices, one_in=2)
    write_files(files, folder)
    assert _seen(_read(_sources(), folder)) == expected
