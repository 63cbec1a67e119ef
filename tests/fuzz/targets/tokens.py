"""The cache of tokens: however it is damaged, what is read is what was tokenised, or is tokenised again."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from tests.fuzz.bytes_to_choices import Choices, edit_bytes, edit_json, write_files
from tests.support.datasets import UNFRAMED
from tests.support.tokenizers import tiny_tokenizer

from liquid_llm.data.tokens import TokenDataset, build_token_dataset

_TOKENIZER = tiny_tokenizer()
_TEXTS = (
    b'{"text": "the river"}\n{"prompt": "two and two", "completion": "four"}\n{"text": "a cook", "sample_id": "c"}\n'
)


def seeds() -> Iterator[bytes]:
    yield b""
    yield bytes([3, 1, 2, 1, 0])
    yield bytes(range(20))


def _build(source: Path, cached: Path) -> TokenDataset:
    return build_token_dataset([str(source)], "lm", _TOKENIZER, "h", cached, framing=UNFRAMED)


@cache
def _source() -> Path:
    """Where the records lie all the time: the cache is known by their place and time."""
    path = Path(tempfile.mkdtemp(prefix="fuzz-tokens-")) / "a.jsonl"
    path.write_bytes(_TEXTS)
    return path


@cache
def _whole() -> tuple[dict[str, bytes], list[tuple[str, list[int]]]]:
    """The files of a whole cache and the samples in it."""
    with tempfile.TemporaryDirectory() as folder:
        found = _samples(_build(_source(), Path(folder)))
        files = {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}
        return {name: data for name, data in files.items() if not name.endswith(".lock")}, found


def _samples(dataset: TokenDataset) -> list[tuple[str, list[int]]]:
    return [(dataset.sample_id(n), dataset.input_ids(n).tolist()) for n in range(len(dataset))]


def check(data: bytes, folder: Path) -> None:
    choices = Choices(data)
    files, expected = _whole()
    files = dict(files)
    while choices:
        name = choices.one(sorted(files))
        if choices.below(8) == 0 and not name.endswith(".sha256"):  # without it nothing vouches for the others
            del files[name]
        elif name.endswith(".json") and choices.below(2):
            files[name] = edit_json(files[name], choices)
        else:
            files[name] = edit_bytes(files[name], choices)
    write_files(files, folder)
    assert _samples(_build(_source(), folder)) == expected
