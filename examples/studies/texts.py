"""Texts for the studies of docs/results.md: what is trained on, and what is held out of all training.

    python examples/studies/texts.py RAW studies/texts

RAW is a folder with four published files, which are not part of this project:

    wikitext2_valid.txt       WikiText-2, raw, validation part (Merity et al. 2017)
    gsm8k_train.jsonl         GSM8K (Cobbe et al. 2021), any first part of its training file
    gsm8k_test.jsonl          its test file
    HumanEval.jsonl.gz        HumanEval (Chen et al. 2021)

Written below OUT: ``manifest.jsonl`` and a file for each type of text, and ``held_out/`` with files for ``liquid
evaluate --records``. Word problems come from the generator of ``liquid demo``. Nothing is drawn by chance: the same
files give the same texts.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from liquid_llm.data.records import Body, stable_sample_id
from liquid_llm.demo.word_problems import Problem, held_out_problems, word_problems
from liquid_llm.preparation.formats import Document, Reading, documents

TRAINED_ARTICLES = 26  # of 69; about 80,000 tokens
HELD_PASSAGES, PASSAGE = 80, range(400, 1200)  # characters
TRAINED_MATHS, HELD_MATHS = 500, 60
TRAINED_CODE = 130  # of 164
WORD_PROBLEMS, HELD_PROBLEMS = 300, 50  # the latter of each kind
WEIGHTS = {"lm": 0.35, "math_tool": 0.35, "code": 0.15, "word": 0.15}
SEED = 7


def read(path: Path, type: str) -> Iterator[Body]:
    """The documents of a published file, as ``liquid prepare`` reads them."""
    return (one.body for one in documents(str(path), Reading(type), lambda _: None) if isinstance(one, Document))


def passages(articles: Sequence[Body]) -> Iterator[Body]:
    """Paragraphs of middling length, at most three of an article."""
    for article in articles:
        lines = (line.strip() for line in article.text.splitlines())
        yield from islice((Body(f"{line}\n") for line in lines if len(line) in PASSAGE), 3)


def ask(problem: Problem) -> Body:
    """A word problem as a conversation."""
    turns = ({"role": "user", "content": problem.question}, {"role": "assistant", "content": problem.answer})
    return Body("", messages=turns)


def question(problem: Problem) -> Body:
    """A word problem whose reference is the bare result, so that an answer in any words can be marked."""
    return Body(str(problem.result), problem.question)


def write(path: Path, type: str, bodies: Sequence[Body]) -> None:
    """A file of records."""
    rows: list[dict[str, Any]] = [one.as_record(type, stable_sample_id(type, one.whole)) for one in bodies]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    """Read RAW, write OUT."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("raw", type=Path, metavar="RAW")
    parser.add_argument("out", type=Path, metavar="OUT")
    given = parser.parse_args()
    articles = list(read(given.raw / "wikitext2_valid.txt", "lm"))
    code = list(read(given.raw / "HumanEval.jsonl.gz", "code"))
    held_problems = [one for those in held_out_problems(HELD_PROBLEMS, SEED).values() for one in those]
    trained = {
        "lm": articles[:TRAINED_ARTICLES],
        "math_tool": list(islice(read(given.raw / "gsm8k_train.jsonl", "math_tool"), TRAINED_MATHS)),
        "code": code[:TRAINED_CODE],
        "word": [ask(one) for one in word_problems(WORD_PROBLEMS, SEED)],
    }
    held_out = {
        "lm": list(islice(passages(articles[TRAINED_ARTICLES:]), HELD_PASSAGES)),
        "math_tool": list(islice(read(given.raw / "gsm8k_test.jsonl", "math_tool"), HELD_MATHS)),
        "code": code[TRAINED_CODE:],
        "word": [ask(one) for one in held_problems],
        "question": [question(one) for one in held_problems],
    }
    for type, bodies in trained.items():
        write(given.out / f"{type}.jsonl", type, bodies)
    for type, bodies in held_out.items():
        write(given.out / "held_out" / f"{type}.jsonl", type, bodies)
    lines = [json.dumps({"path": f"{type}.jsonl", "type": type, "weight": weight}) for type, weight in WEIGHTS.items()]
    (given.out / "manifest.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for name, parts in (("trained on", trained), ("held out", held_out)):
        print(name + ":", ", ".join(f"{type} {len(bodies)}" for type, bodies in parts.items()))


if __name__ == "__main__":
    main()
