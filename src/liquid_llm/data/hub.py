"""Plain text by name: a dataset of the Hugging Face hub, of its offline cache, or of a local folder.

row: one entry of the dataset's text column, or of those that hold conversations (``messages``) or prompts with their
completions; document: what becomes one sample of type ``lm``.

A row is a document, with one exception. Line-oriented datasets (WikiText) have a row for every line of a running
text, each still ending in its newline, and ``""`` for a blank line. Joining those by end-of-text tokens would teach
a student that texts end after a line, so the lines are put together again (``texts.wikitext_articles``).
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from liquid_llm.data.learning import USUAL, Learning
from liquid_llm.data.records import FORMS, Body, BodyError, read_body
from liquid_llm.data.texts import wikitext_articles
from liquid_llm.data.tokens import BatchTokenizer, TellProgress, TokenDataset, split, tokenize
from liquid_llm.data.types import TextRecord
from liquid_llm.errors import DataError, UsageError, first_line
from liquid_llm.framing import Framing
from liquid_llm.storage import translate_errors

_log = logging.getLogger(__name__)
_ALIASES = {"train": ("train", "training"), "validation": ("validation", "valid", "val", "dev", "eval")}
_ROWS_PER_READ = 1000


def load_hub_dataset(
    name: str,
    config: str | None,
    tokenizer: BatchTokenizer,
    tokenizer_hash: str,
    cache_dir: str | Path,
    *,
    framing: Framing,
    validation_fraction: float,
    token: str | None = None,
    layout: str | None = None,
    progress: TellProgress | None = None,
    learning: Learning = USUAL,
) -> tuple[TokenDataset, TokenDataset]:
    """The dataset's training and validation split, tokenised as ``lm`` text and cached like any other source.

    Args:
        name: hub id (``org/name`` or ``org/name@revision``) or a local folder, of data files or of ``save_to_disk``.
        config: configuration of the dataset, or None.
        framing: of every text.
        validation_fraction: of the training documents, held out by hash where there is no validation split.
        layout: as for ``tokens.tokenize``.
        token: for private and gated datasets; None uses the one a person signed in with, if any.
        learning: what is learnt of a conversation, or of a prompt with its completion.

    Raises:
        UsageError: the library ``datasets`` is not installed.
        DataError: no such dataset, configuration, split or column of text; offline and not in the cache; data
            that cannot be read; a conversation or completion that is none.
        StorageError: access refused, or the disk is full.
    """
    tables = _load(name, config, token)
    label = name if config is None else f"{name} ({config})"
    table = _find_split(tables, "train", label)
    columns = _columns(table.features, label)
    lines = len(columns) == 1 and columns[0] != "messages" and rows_are_lines(_rows(table, columns[0]))

    def read(table: Any, split_name: str) -> TokenDataset:
        rows = HubRows(table, columns, label, split_name, lines)
        options: dict[str, Any] = {"framing": framing, "layout": layout, "progress": progress, "learning": learning}
        return tokenize(rows, tokenizer, tokenizer_hash, cache_dir, **options)

    if any(alias in tables for alias in _ALIASES["validation"]):
        return read(table, "train"), read(_find_split(tables, "validation", label), "validation")
    _log.warning("%s has no validation split: %g of its training text is held out", label, validation_fraction)
    return split(read(table, "train"), validation_fraction)


def rows_are_lines(rows: Iterable[str]) -> bool:
    """Whether rows are lines of running texts: the first thousand that are not blank all end in their only newline."""
    first = list(islice((row for row in rows if row.strip()), 1000))
    return bool(first) and all(row.endswith("\n") and row.count("\n") == 1 for row in first)


class HubRows:
    """One split as a ``RecordSource``.

    Args:
        columns: the one of texts, or those of a record's body (``records.FORMS``).
        lines: its rows are lines of running texts.
    """

    type = "lm"
    num_files = 1  # a table, whatever it lies in

    def __init__(self, table: Any, columns: Sequence[str], label: str, split_name: str, lines: bool) -> None:
        self._table, self._columns, self._label, self._split, self._lines = table, columns, label, split_name, lines
        self._is_text = len(columns) == 1 and columns[0] != "messages"
        self._row = 0
        files = [os.stat(file["filename"]) for file in table.cache_files]
        versions = [[status.st_size, status.st_mtime_ns] for status in files]
        column = columns[0] if self._is_text else list(columns)
        self.identity: object = [label, split_name, column, lines, len(table), versions or table._fingerprint]

    @property
    def fraction_read(self) -> float:
        return self._row / max(1, len(self._table))

    def __iter__(self) -> Iterator[tuple[int, TextRecord]]:
        is_empty = True
        for number, body in self._bodies():
            self._row = number + 1
            if body.whole.strip():
                is_empty = False
                name = f"{self._split}-{number}"
                said = body.prompt, body.messages, body.prompt_messages
                yield number, TextRecord(body.text, self.type, name, *said)
        if is_empty:
            raise DataError(f"the {self._split} split has no text", where=self._label)

    def _bodies(self) -> Iterator[tuple[int, Body]]:
        if self._is_text:
            rows = _rows(self._table, self._columns[0])
            texts = wikitext_articles(rows) if self._lines else enumerate(rows)
            yield from ((number, Body(text or "")) for number, text in texts)
            return
        batches = self._table.select_columns(list(self._columns)).iter(_ROWS_PER_READ)
        bodies = (dict(zip(batch, row, strict=True)) for batch in batches for row in zip(*batch.values(), strict=True))
        for number, row in enumerate(bodies):
            try:
                yield number, read_body(row)
            except BodyError as error:
                raise DataError(str(error), where=self.location(number), got=error.got) from error

    def location(self, number: int) -> str:
        return f"{self._label}, {self._split} row {number}"


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
                loaded = datasets.load_from_disk(name)
                return loaded if hasattr(loaded, "keys") else {"train": loaded}  # a single split was saved
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


def _find_split(tables: Any, name: str, label: str) -> Any:
    for alias in _ALIASES[name]:
        if alias in tables:
            return tables[alias]
    raise DataError(
        f"the dataset has no {name} split",
        where=label,
        got=", ".join(tables) or "a single unnamed split",
        expected=" or ".join(_ALIASES[name]),
    )


def _columns(features: Any, label: str) -> Sequence[str]:
    """``text``, or those of conversations or of prompts with completions, or the only column of strings."""
    columns = [
        name for name, feature in features.items() if getattr(feature, "dtype", "") in ("string", "large_string")
    ]
    bodies = [form for form in FORMS if set(form) <= set(features) and (form != ("text",) or "text" in columns)]
    if bodies or len(columns) == 1:
        return bodies[0] if bodies else columns
    raise DataError(
        "the dataset has no column of strings named text",
        where=label,
        got=", ".join(f"{name} ({getattr(feature, 'dtype', feature)})" for name, feature in features.items()),
        expected="text, messages, or prompt and completion",
    )


def _one_line(error: BaseException) -> str:
    return "; ".join(line for line in str(error).splitlines() if line).rstrip(".")
