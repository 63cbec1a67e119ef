"""examples/studies/texts.py: what is held out is in nothing that is trained on."""

import gzip
import json
import runpy
import sys

from tests.support.sources import REPOSITORY

from liquid_llm.cli.main import main

SCRIPT = str(REPOSITORY / "examples" / "studies" / "texts.py")


def article(number: int) -> str:
    lines = "\n".join(f" Line {line} of article {number} : {'word ' * (90 + line)}\n" for line in range(5))
    return f" \n = Article {number} = \n \n{lines}"


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_training_and_held_out_texts_share_nothing(tmp_path, monkeypatch, capsys):
    raw, out = tmp_path / "raw", tmp_path / "out"
    raw.mkdir()
    (raw / "wikitext2_valid.txt").write_text("".join(article(n) for n in range(40)), encoding="utf-8")
    for part, count in (("train", 520), ("test", 70)):
        problems = ({"question": f"How much is {part} {n}?", "answer": f"It is {n}.\n#### {n}"} for n in range(count))
        (raw / f"gsm8k_{part}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in problems))
    tasks = (
        {"task_id": f"HumanEval/{n}", "prompt": f"def f{n}():\n", "canonical_solution": f"    return {n}\n"}
        for n in range(164)
    )
    (raw / "HumanEval.jsonl.gz").write_bytes(gzip.compress("".join(json.dumps(one) + "\n" for one in tasks).encode()))
    monkeypatch.setattr(sys, "argv", [SCRIPT, str(raw), str(out)])
    runpy.run_path(SCRIPT, run_name="__main__")
    assert capsys.readouterr().out.splitlines() == [
        "trained on: lm 26, math_tool 500, code 130, word 300",
        "held out: lm 42, math_tool 60, code 34, word 100, question 100",
    ]
    trained = {json.dumps(row) for type in ("lm", "math_tool", "code", "word") for row in rows(out / f"{type}.jsonl")}
    held = [row for path in sorted((out / "held_out").glob("*.jsonl")) for row in rows(path)]
    assert not trained & {json.dumps(row) for row in held}
    whole = "".join(sorted(trained))
    for row in held:
        said = row.get("text") or row.get("prompt") or row["messages"][0]["content"]
        assert json.dumps(said.strip())[1:-1] not in whole, row
    assert main(["inspect", str(out / "manifest.jsonl")]) == 0
