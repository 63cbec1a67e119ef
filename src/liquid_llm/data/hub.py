"""Plain text by name: a dataset of the Hugging Face hub, of its offline cache, or of a local folder.

row: one entry of the dataset's text column; document: what becomes one sample of type ``lm``.

A row is a document, with one exception. Line-oriented datasets (WikiText) have a row for every line of a running
text, each still ending in its newline, and ``""`` for a blank line. Joining those by end-of-text tokens would teach
a student that texts end after a line, so the lines are put together again, verbatim: a document begins at each
article heading (`` = Title = ``), or after about 32,000 characters where there are none.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from liquid_llm.data.tokens import BatchTokenizer, Progress, TokenDataset, split, tokenize
from liquid_llm.data.types import Record
from liquid_llm.errors import DataError, UsageError, first_line
from liquid_llm.storage import translate_errors

_log = logging.getLogger(__name__)
_ALIASES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval"),
    "test": ("test", "testing"),
}
_HEADING = re.compile(r"^ ?= [^=].* = ?\n$")
_DOCUMENT_CHARACTERS = 1 << 15
_ROWS_PER_READ = 1000


def load_hub_dataset(
    name: str,
    config: str | None,
    tokenizer: BatchTokenizer,
    tokenizer_hash: str,
    cache_dir: str | Path,
    *,
    eos_id: int,
    splits: Sequence[str] = ("train", "validation"),
    text_column: str | None = None,
    validation_fraction: float = 0.05,
    token: str | None = None,
    progress: Progress | None = None,
) -> dict[str, TokenDataset]:
    """The dataset's splits, tokenised as ``lm`` text and cached like any other source.

    Args:
        name: hub id (``org/name`` or ``org/name@revision``) or a local folder, of data files or of ``save_to_disk``.
        config: configuration of the dataset, or None.
        splits: of ``train``, ``validation``, ``test``; other usual names (``valid``, ``dev``) are found too.
        text_column: None takes ``text``, or the only column of strings.
        validation_fraction: of the training documents, held out by hash where there is no validation split.
        token: for private and gated datasets; None uses the one a person signed in with, if any.

    Returns:
        by the names in ``splits``.

    Raises:
        UsageError: the library ``datasets`` is not installed.
        DataError: no such dataset, configuration, split or column; offline and not in the cache; unreadable data.
        StorageError: access refused, or the disk is full.
    """
    tables = _load(name, config, token)
    label = name if config is None else f"{name} ({config})"
    train = _table(tables, "train", label)
    column = _text_column(train.features, text_column, label)
    lines = rows_are_lines(_rows(train, column))

    def tokenized(table: Any, kind: str) -> TokenDataset:
        source = HubRows(table, column, label, kind, lines)
        return tokenize(source, tokenizer, tokenizer_hash, cache_dir, eos_id=eos_id, progress=progress)

    made: dict[str, TokenDataset] = {}
    if "validation" in splits and not _split_names(tables, "validation"):
        _log.warning("%s has no validation split: %g of its training text is held out", label, validation_fraction)
        made["train"], made["validation"] = split(tokenized(train, "train"), validation_fraction)
    return {kind: made[kind] if kind in made else tokenized(_table(tables, kind, label), kind) for kind in splits}


def rows_are_lines(rows: Iterable[str]) -> bool:
    """Whether rows are lines of running texts: the first thousand that are not blank all end in their only newline."""
    first = list(islice((row for row in rows if row.strip()), 1000))
    return bool(first) and all(row.endswith("\n") and row.count("\n") == 1 for row in first)


def documents(rows: Iterable[str], lines: bool) -> Iterator[tuple[int, str]]:
    """(number of its first row, text) of each document in ``rows``; ``lines`` as ``rows_are_lines`` says."""
    begun: list[str] = []
    start = characters = 0
    for number, row in enumerate(rows):
        if not lines:
            if row.strip():
                yield number, row
            continue
        if begun and (characters >= _DOCUMENT_CHARACTERS or _HEADING.match(row)):
            yield start, "".join(begun)
            begun, characters = [], 0
        if not begun and not row.strip():
            continue
        start = start if begun else number
        begun.append(row or "\n")
        characters += len(row)
    if begun:
        yield start, "".join(begun)


class HubRows:
    """One split as a source of records for ``tokenize``."""

    type = "lm"

    def __init__(self, table: Any, column: str, label: str, kind: str, lines: bool) -> None:
        self._table = table
        self._column = column
        self._label = label
        self._kind = kind
        self._lines = lines
        self._row = 0
        files = [os.stat(file["filename"]) for file in table.cache_files]
        versions = [[status.st_size, status.st_mtime_ns] for status in files]
        self.identity: object = [label, kind, column, lines, len(table), versions or table._fingerprint]

    @property
    def fraction_read(self) -> float:
        return self._row / max(1, len(self._table))

    def __iter__(self) -> Iterator[tuple[int, Record]]:
        number = -1
        for number, text in documents(_rows(self._table, self._column), self._lines):
            self._row = number + 1
            yield number, Record(text, self.type, f"{self._kind}-{number}")
        if number < 0:
            raise DataError(f"the {self._kind} split has no text", where=self._label)

    def place(self, number: int) -> str:
        return f"{self._label}, {self._kind} row {number}"


def _rows(table: Any, column: str) -> Iterator[str]:
    files = _whole_files(table)
    if files is not None:
        for file in files:
            yield from _streamed(file, column)
        return
    for batch in table.select_columns([column]).iter(_ROWS_PER_READ):
        yield from (row or "" for row in batch[column])


def _whole_files(table: Any) -> list[str] | None:
    """The Arrow files a table consists of, in order; None where it is a selection of their rows, or lies in memory."""
    import pyarrow as pa

    files = [file["filename"] for file in table.cache_files]
    if not files or table._indices is not None:
        return None
    rows = 0
    for file in files:
        # mapped, so that only the headers of its batches are read
        with pa.memory_map(file) as source, pa.ipc.open_stream(source) as stream:
            rows += sum(batch.num_rows for batch in stream)
    return files if rows == len(table) else None


def _streamed(file: str, column: str) -> Iterator[str]:
    """One column, read batch by batch: the library maps the file, and what was read of it would stay resident."""
    import pyarrow as pa

    with pa.OSFile(file) as source:
        with pa.ipc.open_stream(source) as whole:
            wanted = pa.ipc.IpcReadOptions(included_fields=[whole.schema.get_field_index(column)])
        source.seek(0)
        with pa.ipc.open_stream(source, options=wanted) as stream:
            for batch in stream:
                yield from (row or "" for row in batch.column(0).to_pylist())


def _load(name: str, config: str | None, token: str | None) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise UsageError(
            "a text dataset needs the package datasets, which is not installed",
            where=name,
            remedy="install it with pip install datasets, or use liquid train with a manifest of JSONL files",
        ) from error
    folder = Path(name)
    saved = any((folder / file).is_file() for file in ("dataset_dict.json", "state.json"))
    path, _, revision = name.partition("@") if not folder.exists() else (name, "", "")
    with _quiet(datasets), translate_errors(name):
        try:
            if saved:
                return datasets.load_from_disk(name)
            return datasets.load_dataset(path, config, revision=revision or None, token=token)
        except ConnectionError as error:
            raise DataError(
                f"the dataset is not in the local cache, and the hub cannot be reached ({first_line(error)})",
                where=name,
                remedy="load it once with a network, or copy the cache of a machine that has it and set HF_HOME, "
                "or give a local folder of data files",
            ) from error
        except FileNotFoundError as error:
            remedy = "check the spelling and, if it is private or gated, sign in"
            raise DataError(f"no such dataset ({first_line(error)})", where=name, remedy=remedy) from error
        except datasets.exceptions.DatasetsError as error:
            raise DataError(f"the dataset cannot be read ({first_line(error)})", where=name) from error
        except ValueError as error:  # its own messages list the configurations there are
            got = f"configuration {config}" if config else "no configuration"
            raise DataError(f"the dataset cannot be loaded ({_one_line(error)})", where=name, got=got) from error


@contextlib.contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    """Without the library's own progress bars and remarks, for as long as it loads."""
    bars = not datasets.utils.are_progress_bars_disabled()
    verbosity = datasets.utils.logging.get_verbosity()
    datasets.utils.disable_progress_bars()
    datasets.utils.logging.set_verbosity_error()
    try:
        yield
    finally:
        datasets.utils.logging.set_verbosity(verbosity)
        if bars:
            datasets.utils.enable_progress_bars()


def _split_names(tables: Any, kind: str) -> list[str]:
    return [alias for alias in _ALIASES[kind] if hasattr(tables, "keys") and alias in tables]


def _table(tables: Any, kind: str, label: str) -> Any:
    names = _split_names(tables, kind)
    if names:
        return tables[names[0]]
    if kind == "train" and not hasattr(tables, "keys"):  # a single split from save_to_disk
        return tables
    got = ", ".join(tables) if hasattr(tables, "keys") else "a single unnamed split"
    raise DataError(f"the dataset has no {kind} split", where=label, got=got, expected=" or ".join(_ALIASES[kind]))


def _text_column(features: Any, wanted: str | None, label: str) -> str:
    columns = [
        name for name, feature in features.items() if getattr(feature, "dtype", "") in ("string", "large_string")
    ]
    candidates = [wanted] if wanted else ["text", *(columns if len(columns) == 1 else ())]
    for candidate in candidates:
        if candidate in columns:
            return candidate
    raise DataError(
        f"the dataset has no column of strings named {wanted or 'text'}",
        where=label,
        got=", ".join(f"{name} ({getattr(feature, 'dtype', feature)})" for name, feature in features.items()),
    )


def _one_line(error: BaseException) -> str:
    return "; ".join(line for line in str(error).splitlines() if line).rstrip(".")
