"""examples/*.yaml for ``--config``: each is read whole and dry-run, as it stands but for sizes and places."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from tests.support.readme import REPOSITORY
from tests.support.tiny import Tiny, words

from liquid_llm import options as option_table
from liquid_llm.cli.main import main
from liquid_llm.cli.parse import load_yaml, read_config_file
from liquid_llm.config import build_run_config
from liquid_llm.demo.pipeline import HELD_SIZES

pytestmark = pytest.mark.slow
EXAMPLES = REPOSITORY / "examples"
OTHERS = {"skypilot.yaml"}  # a launcher's own, see unit/test_launch_examples.py


def test_each_example_is_tried_here() -> None:
    assert {path.name for path in EXAMPLES.glob("*.yaml")} - OTHERS == set(JOBS)


# example -> command, what its first lines say is run before it, and what is smaller here or elsewhere
JOBS: dict[str, tuple[str, dict[str, Any]]] = {
    "laptop.yaml": ("train", {"batch_size": 2, "grad_accum": 1, "block_size": 64, "eval_tokens": 512}),
    "one-gpu.yaml": (
        "anneal",
        {"block_size": 32, "tokens_per_step": 128, "eval_ctx_lens": "16,32", "dataset_config": None},
    ),
}


@pytest.mark.parametrize("name", sorted(JOBS))
def test_an_example_is_dry_run(name: str, demo_folder: Path, scored: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    command, small = JOBS[name]
    assert f"liquid {command} --config examples/{name}" in (EXAMPLES / name).read_text()
    given = read_config_file(EXAMPLES / name, option_table.options_of(command))
    config = build_run_config(command, given)
    places = {"data_cache": scored.root / "tokens", "device": "cpu"}
    if command == "train":
        assert config.data.manifest == "runs/demo/data/manifest.jsonl"
        places |= {"student": scored.student, "signal": "lm=none"}
    else:
        layers = str(given["student"]).partition(",layers=")[2]
        assert str(given["student"]) == f"from:{given['teacher_name']},layers={layers}"
        places |= {"student": f"from:{scored.teacher},layers=1", "teacher_name": scored.teacher}
        places |= {"dataset_name": scored.root / "texts"}
    path = demo_folder / name
    lines = (EXAMPLES / name).read_text().splitlines()
    gone = [f"{key}:" for key, value in small.items() if value is None]
    path.write_text("\n".join(line for line in lines if not line.startswith(tuple(gone) or ("\0",))))
    assert main([command, f"--config={path}", *words({**small, **places}), "--dry_run"]) == 0
    assert "memory" in capsys.readouterr().out
    assert not list((demo_folder / "runs").glob("laptop*")), "a dry run leaves nothing"
    assert not list((demo_folder / "runs").glob("one-gpu*"))


def test_the_laptops_needs_nothing_but_what_the_demo_leaves() -> None:
    """Its places are in the demo's folder, one store for each of the demo's types."""
    given = load_yaml(EXAMPLES / "laptop.yaml")
    assert isinstance(given, dict)
    assert given["signal"] == [f"{type}=runs/demo/signal/{type}" for type in asdict(HELD_SIZES)]
    pipeline = (REPOSITORY / "src/liquid_llm/demo/pipeline.py").read_text()
    for part in ("data", "signal"):
        assert f'base / "{part}"' in pipeline
