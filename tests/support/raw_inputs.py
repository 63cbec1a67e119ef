"""Raw inputs shaped like the published datasets, made here: what each download holds, with invented words.

``RAW`` maps a format to its file name, the type of its texts, its bytes, and the texts that must come out.
"""

from __future__ import annotations

import gzip
import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow
from pyarrow import parquet


@dataclass(frozen=True)
class Raw:
    """One raw input and what is in it."""

    name: str
    type: str
    data: bytes
    texts: list[str]


def jsonl(rows: Sequence[Any]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def as_parquet(rows: list[dict[str, Any]], row_group_size: int = 2) -> bytes:
    file = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), file, row_group_size=row_group_size)
    return file.getvalue()


def zipped(members: Mapping[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(zipfile.ZipInfo(name), data, zipfile.ZIP_DEFLATED)
    return file.getvalue()


WIKITEXT = (
    " \n = Lamp tower = \n \n The lamp tower is a <unk> near the harbour , built in 1 @,@ 204 days . \n \n"
    " = = History = = \n \n It burned once . \n \n = Old bridge = \n \n The bridge is old . \n"
)
ARTICLES = [
    (
        " = Lamp tower = \n\n The lamp tower is a <unk> near the harbour , built in 1 @,@ 204 days . \n\n"
        " = = History = = \n\n It burned once . \n\n"
    ),
    " = Old bridge = \n\n The bridge is old . \n",
]

_GSM8K = [
    {"question": "Ada packs 3 bags of 4 nuts.\nHow many?", "answer": "3*4=<<3*4=12>>12 nuts.\n#### 12"},
    {"question": "Boris has 9 ropes and sells 2. How many are left?", "answer": "9-2=<<9-2=7>>7\n#### 7"},
]
_SVAMP = [
    {"ID": "chal-1", "Body": "A shelf holds 8 jars, 2 break.", "Question": "How many are left?", "Answer": 6.0}
    | {"Equation": "( 8.0 - 2.0 )", "Type": "Subtraction"},
    {"ID": "chal-2", "Body": "3 boxes hold 1.5 kg each.", "Question": "How much in all?", "Answer": 4.5}
    | {"Equation": "( 3.0 * 1.5 )", "Type": "Multiplication"},
]
_ASDIV = b"""<?xml version="1.0" encoding="UTF-8"?>
<Machine-Reading-Corpus-File>
  <ProblemSet>
    <Problem ID="nluds-0001" Grade="1" Source="http://example.org">
      <Body>Seven red and two green lamps are lit.</Body>
      <Question>How many lamps are lit &amp; bright?</Question>
      <Solution-Type>Addition</Solution-Type>
      <Answer>9 (lamps)</Answer>
      <Formula>7+2=9</Formula>
    </Problem>
    <Problem ID="nluds-0002" Grade="2" Source="http://example.org">
      <Body>A rope is cut.</Body><Question>Which part is longer?</Question>
      <Solution-Type>Comparison</Solution-Type><Answer>first</Answer><Formula>7&gt;5</Formula>
    </Problem>
  </ProblemSet>
</Machine-Reading-Corpus-File>
"""
_FUNCTIONS = [
    {"repo": "a/b", "path": "m.py", "func_name": "f", "language": "python", "code": "def f():\n    return 1"}
    | {"original_string": 'def f():\n    """One."""\n    return 1', "docstring": "One.", "partition": "train"},
    {"repo": "a/b", "path": "n.py", "func_name": "g", "language": "python", "code": "def g(): ..."}
    | {"original_string": "def g(): ...", "docstring": "", "partition": "train"},
]
_HUMANEVAL = [{"task_id": "T/0", "prompt": "def f(x):\n", "canonical_solution": "    return x\n", "test": "assert f"}]
_DOCUMENTS = ["First page.\nWith two lines.", "Zweite Seite: ä ö ü \u2028 end."]

RAW = {
    "wikitext": Raw(
        "wikitext-9-raw-v1.zip",
        "lm",
        zipped({"wikitext-9-raw/wiki.train.raw": WIKITEXT.encode(), "wikitext-9-raw/": b"", "LICENSE": b"words"}),
        ARTICLES,
    ),
    "c4": Raw(
        "c4-train.00000-of-01024.json.gz",
        "lm",
        gzip.compress(jsonl([{"text": text, "timestamp": "2019-04-25T12:57:54Z", "url": "u"} for text in _DOCUMENTS])),
        _DOCUMENTS,
    ),
    "dolma": Raw(
        "books-0000.json.gz",
        "lm",
        gzip.compress(jsonl([{"id": "x", "text": text, "source": "b", "metadata": {"n": 1}} for text in _DOCUMENTS])),
        _DOCUMENTS,
    ),
    "fineweb-edu": Raw(
        "000_00000.parquet",
        "lm",
        as_parquet([{"text": text, "id": "<urn>", "score": 3.1, "int_score": 3} for text in _DOCUMENTS * 1]),
        _DOCUMENTS,
    ),
    "gsm8k": Raw(
        "train.jsonl",
        "math_tool",
        jsonl(_GSM8K),
        [f"Question: {row['question']}\nAnswer: {row['answer']}" for row in _GSM8K],
    ),
    "svamp": Raw(
        "SVAMP.json",
        "math_tool",
        json.dumps(_SVAMP, indent=4).encode(),
        [
            "Question: A shelf holds 8 jars, 2 break. How many are left?\nAnswer: 8-2=<<8-2=6>>6\n#### 6",
            "Question: 3 boxes hold 1.5 kg each. How much in all?\nAnswer: 3*1.5=<<3*1.5=4.5>>4.5\n#### 4.5",
        ],
    ),
    "asdiv": Raw(
        "ASDiv.xml",
        "math_tool",
        _ASDIV,
        [
            (
                "Question: Seven red and two green lamps are lit. How many lamps are lit & bright?\n"
                "Answer: 7+2=<<7+2=9>>9 lamps\n#### 9"
            ),
            "Question: A rope is cut. Which part is longer?\nAnswer: 7>5\n#### first",
        ],
    ),
    "codesearchnet": Raw(
        "python.zip",
        "code",
        zipped(
            {
                "python/final/jsonl/train/python_train_1.jsonl.gz": gzip.compress(jsonl(_FUNCTIONS[1:])),
                "python/final/jsonl/train/python_train_0.jsonl.gz": gzip.compress(jsonl(_FUNCTIONS[:1])),
                "python_licenses.pkl": b"\x80\x04never read",
            }
        ),
        [row["original_string"] for row in _FUNCTIONS],
    ),
    "humaneval": Raw("HumanEval.jsonl.gz", "code", gzip.compress(jsonl(_HUMANEVAL)), ["def f(x):\n    return x\n"]),
    "jsonl": Raw("plain.jsonl", "lm", jsonl([{"text": text} for text in _DOCUMENTS]), _DOCUMENTS),
    "txt": Raw("plain.txt", "lm", b"One line.\nAnother.\n\nA paragraph.\n", ["One line.\nAnother.\n\nA paragraph."]),
}
