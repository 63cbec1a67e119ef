from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
from tests.support import forked
from tests.support.datasets import UNFRAMED
from tests.support.tokenizers import tiny_tokenizer

from liquid_llm.data import hub
from liquid_llm.data.hub import HubRows, load_hub_dataset, rows_are_lines
from liquid_llm.data.records import Body
from liquid_llm.data.tokens import TokenDataset, is_held_out
from liquid_llm.data.types import TextRecord
from liquid_llm.errors import DataError

TOKENIZER = tiny_tokenizer()


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")


def folder(path: Path, **splits: list[Any]) -> str:
    path.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        lines = [row if isinstance(row, dict) else {"text": row} for row in rows]
        (path / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def load(name: str, tmp_path: Path, config: str | None = None, **options: Any) -> tuple[TokenDataset, TokenDataset]:
    options = {"framing": UNFRAMED, "validation_fraction": 0.05, **options}
    return load_hub_dataset(name, config, TOKENIZER, "h", tmp_path / "tokens", **options)


def texts(dataset: TokenDataset) -> list[str]:
    return [TOKENIZER.decode(dataset.input_ids(n)) for n in range(len(dataset))]


PAGES = [f"Page {n}.\nIt has two lines." for n in range(30)]


def test_rows_are_documents(tmp_path: Path) -> None:
    name = folder(tmp_path / "pages", train=[*PAGES, "", "  "], validation=["Held out page."])
    train, validation = load(name, tmp_path)
    assert texts(train) == PAGES
    assert texts(validation) == ["Held out page."]
    assert train.type == validation.type == "lm"


def test_lines_are_put_together_again(tmp_path: Path) -> None:
    lines = [
        "",
        " = Mills = \n",
        "",
        " A mill grinds . \n",
        " It has a wheel . \n",
        "",
        " = = Parts = = \n",
        " Stone . \n",
    ]
    second = ["", " = Rivers = \n", "", " A river flows . \n", ""]
    name = folder(tmp_path / "wiki", train=[*lines, *second], validation=second)
    train, validation = load(name, tmp_path)
    assert texts(train) == [
        " = Mills = \n\n A mill grinds . \n It has a wheel . \n\n = = Parts = = \n Stone . \n\n",
        " = Rivers = \n\n A river flows . \n\n",
    ]
    assert texts(validation) == [" = Rivers = \n\n A river flows . \n\n"]


@pytest.mark.parametrize(
    ("rows", "lines"),
    [
        (["a\n", "", "b\n"], True),
        (["a\n", "b"], False),
        (["a\nb\n"], False),
        (["a", "b"], False),
        (["", " "], False),
        ([], False),
        (["a\n"] * 1000 + ["b"], True),
    ],
)
def test_what_counts_as_lines(rows: list[str], lines: bool) -> None:
    assert rows_are_lines(rows) is lines


@pytest.mark.parametrize("alias", ["validation", "valid", "val", "dev", "eval"])
def test_other_names_of_splits(tmp_path: Path, alias: str) -> None:
    table = datasets.DatasetDict(
        {
            "training": datasets.Dataset.from_dict({"text": PAGES}),
            alias: datasets.Dataset.from_dict({"text": ["Held out page."]}),
        }
    )
    table.save_to_disk(tmp_path / "saved")
    assert [texts(dataset) for dataset in load(str(tmp_path / "saved"), tmp_path)] == [PAGES, ["Held out page."]]


def test_a_single_split_that_was_saved_is_for_training(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": PAGES}).save_to_disk(tmp_path / "saved")
    train, validation = load(str(tmp_path / "saved"), tmp_path, validation_fraction=0.3)
    assert sorted(texts(train) + texts(validation)) == sorted(PAGES)


def test_without_a_validation_split_some_is_held_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    name = folder(tmp_path / "pages", train=PAGES)
    train, validation = load(name, tmp_path, validation_fraction=0.3)
    expected = [text for n, text in enumerate(PAGES) if is_held_out(f"train-{n}", 0.3)]
    assert texts(validation) == expected
    assert 3 < len(expected) < 15
    assert sorted(texts(train) + expected) == sorted(PAGES)
    assert f"{name} has no validation split: 0.3 of its training text is held out" in caplog.text


def test_a_configuration(tmp_path: Path) -> None:
    for config in ("one", "two"):
        folder(tmp_path / "many" / config, train=[f"{config}: {page}" for page in PAGES], validation=["held"])
    (tmp_path / "many" / "README.md").write_text(
        "---\nconfigs:\n"
        + "".join(
            f"- config_name: {config}\n  data_files:\n  - split: train\n    path: {config}/train.jsonl\n"
            f"  - split: validation\n    path: {config}/validation.jsonl\n"
            for config in ("one", "two")
        )
        + "---\n"
    )
    train, _ = load(str(tmp_path / "many"), tmp_path, "two")
    assert texts(train)[0] == "two: " + PAGES[0]
    with pytest.raises(DataError, match=r"'three' not found.*one.*two.*; got configuration three"):
        load(str(tmp_path / "many"), tmp_path, "three")
    with pytest.raises(DataError, match=r"Config name is missing.*got no configuration"):
        load(str(tmp_path / "many"), tmp_path)


def test_the_text_column(tmp_path: Path) -> None:
    rows = [{"id": n, "content": page, "title": str(n)} for n, page in enumerate(PAGES)]
    name = folder(tmp_path / "pages", train=rows, validation=rows)
    with pytest.raises(
        DataError, match=r"no column of strings named text; got id \(int64\), content \(string\), title"
    ):
        load(name, tmp_path)


def test_the_only_column_of_strings_is_taken(tmp_path: Path) -> None:
    rows = [{"id": n, "content": page} for n, page in enumerate(PAGES)]
    assert texts(load(folder(tmp_path / "pages", train=rows, validation=rows), tmp_path)[0]) == PAGES


def test_the_cache_follows_the_data(tmp_path: Path) -> None:
    name = folder(tmp_path / "pages", train=PAGES, validation=["held"])
    load(name, tmp_path)
    before = sorted((tmp_path / "tokens").glob("lm-*"))
    load(name, tmp_path)
    assert sorted((tmp_path / "tokens").glob("lm-*")) == before
    changed = [*PAGES[:-1], PAGES[-1].upper()]  # as many rows, as many characters
    folder(tmp_path / "pages", train=changed)
    assert texts(load(name, tmp_path)[0]) == changed


def test_a_training_split_that_is_not_there(tmp_path: Path) -> None:
    name = folder(tmp_path / "pages", validation=PAGES)
    with pytest.raises(DataError, match="the dataset has no train split; got validation; expected train"):
        load(name, tmp_path)


def test_a_split_without_text(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the validation split has no text"):
        load(folder(tmp_path / "pages", train=PAGES, validation=["", " "]), tmp_path)


@pytest.mark.filterwarnings("default")
def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    name = folder(tmp_path / "pages", train=PAGES)
    (tmp_path / "pages" / "train.jsonl").write_text("{broken")
    with pytest.raises(DataError, match="the dataset cannot be read"):
        load(name, tmp_path)


def test_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    with pytest.raises(DataError, match="no such dataset"):
        load(str(tmp_path / "nothing"), tmp_path)


def test_progress_bars_are_silenced_for_as_long_as_it_loads(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    datasets.utils.enable_progress_bars()  # whatever an earlier test of this process left
    verbosity = datasets.utils.logging.get_verbosity()
    load(folder(tmp_path / "pages", train=PAGES, validation=PAGES), tmp_path)
    assert capfd.readouterr() == ("", "")
    assert not datasets.utils.are_progress_bars_disabled()
    assert datasets.utils.logging.get_verbosity() == verbosity


def test_rows_are_the_same_from_files_from_memory_and_from_a_selection(tmp_path: Path) -> None:
    rows: list[str | None] = [None if n % 7 == 0 else f"row {n} of many" for n in range(2500)]
    made = datasets.Dataset.from_dict({"id": list(range(2500)), "text": rows})
    made.save_to_disk(tmp_path / "saved", num_shards=3)
    saved = datasets.load_from_disk(tmp_path / "saved")
    chosen = saved.select(range(2499, 0, -2))
    part = saved.select(range(100, 200))  # a slice keeps the whole file in its list
    expected = [(n, row) for n, row in enumerate(rows) if row]
    for table in (saved, made):
        assert len(saved.cache_files) == 3
        assert [(n, record.text) for n, record in HubRows(table, ["text"], "x", "train", False)] == expected
    for table, numbers in ((chosen, range(2499, 0, -2)), (part, range(100, 200))):
        texts_seen = [record.text for _, record in HubRows(table, ["text"], "x", "train", False)]
        assert texts_seen == [rows[n] for n in numbers if rows[n]]


READ_ALL = """
import resource, sys
import datasets
from liquid_llm.data.hub import HubRows
table = datasets.load_from_disk(sys.argv[1])
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
iter(HubRows(table.select(range(10)), ["text"], "x", "train", False)).__next__()
before = peak()
characters = sum(len(record.text) for _, record in HubRows(table, ["text"], "x", "train", False))
print(characters, peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts resident memory in Linux's unit")
def test_what_was_read_does_not_stay_in_memory(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": ["words and more words " * 100] * 50_000}).save_to_disk(tmp_path / "saved")
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run(
        [sys.executable, "-c", READ_ALL, str(tmp_path / "saved")],
        env={**os.environ, "PYTHONPATH": str(root / "src"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    characters, extra_kib = map(int, done.stdout.split())
    assert characters == 105_000_000
    assert extra_kib < 40_000  # measured 3,300; with the file mapped 103,700


OFFLINE = """
import datasets, huggingface_hub, importlib
for module in (huggingface_hub.constants, datasets.config):  # the environment, as a process reads it that begins
    importlib.reload(module)
from tests.support.datasets import UNFRAMED
from tests.support.tokenizers import tiny_tokenizer
from liquid_llm.data.hub import load_hub_dataset
from liquid_llm.errors import DataError
from liquid_llm.framing import Framing
try:
    options = {"framing": Framing(None, 0), "validation_fraction": 0.05}
    load_hub_dataset("nosuch/dataset", "plain", tiny_tokenizer(), "h", "tokens", **options)
except DataError as error:
    print(error)
"""


def test_offline_and_not_in_the_cache(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[3]
    env = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path),
        "PYTHONPATH": f"{root}{os.pathsep}{root / 'src'}",
    }
    done = forked.run(["-c", OFFLINE], cwd=tmp_path, env=env, check=True)
    assert done.stdout.startswith(
        "nosuch/dataset: the dataset is not in the local cache, and the hub cannot be reached ("
    )
    assert "Load it once with a network, or copy the cache of a machine that has it and set HF_HOME" in done.stdout
    assert done.stderr == ""


SAID = [{"role": "user", "content": "two and two?"}, {"role": "assistant", "content": "four"}]


@pytest.mark.parametrize(
    ("row", "columns", "expected"),
    [
        ({"messages": SAID, "id": "x", "source": "y"}, ("messages",), Body("", None, tuple(SAID))),
        ({"prompt": "two?", "completion": " four", "note": "z"}, ("prompt", "completion"), Body(" four", "two?")),
        ({"prompt": SAID[:1], "completion": SAID[1:]}, ("prompt", "completion"), Body("", None, tuple(SAID), 1)),
        ({"text": "a text", "messages": SAID}, ("text",), Body("a text")),
        ({"only": "a text", "id": 7}, ("only",), Body("a text")),
    ],
)
def test_conversations_and_prompts_are_found_by_their_columns(
    tmp_path: Path, row: dict[str, Any], columns: tuple[str, ...], expected: Body
) -> None:
    datasets.Dataset.from_list([row] * 3).save_to_disk(tmp_path / "saved")
    table = datasets.load_from_disk(tmp_path / "saved")
    assert tuple(hub._columns(table.features, "x")) == columns
    found = list(HubRows(table, columns, "x", "train", False))
    assert found == [(n, TextRecord(expected.text, "lm", f"train-{n}", *expected[1:])) for n in range(3)]


def test_a_row_that_is_no_conversation_says_where(tmp_path: Path) -> None:
    datasets.Dataset.from_list([{"messages": SAID}, {"messages": []}]).save_to_disk(tmp_path / "saved")
    rows = HubRows(datasets.load_from_disk(tmp_path / "saved"), ("messages",), "name", "train", False)
    with pytest.raises(DataError, match=r"name, train row 1: messages is not a list of messages; got \[\]"):
        list(rows)
