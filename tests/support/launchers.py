"""Launchers without their machines: what their programs are given, and what `liquid` and torchrun make of the words."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.support.pythons import add_program
from torch.distributed.run import get_args_parser

from liquid_llm.cli.parse import parse
from liquid_llm.config import build_capture_config, build_config_to_measure, build_run_config
from liquid_llm.options import CAPTURE, options_of


def run_script(words: Sequence[str], programs: Path, **env: str) -> subprocess.Popen[str]:
    """A bash script and its words as a process group that finds ``programs`` before any others of their names."""
    return subprocess.Popen(
        ["bash", *words],
        env={**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def record(words: Sequence[str], folder: Path, *programs: str, **env: str) -> list[list[str]]:
    """Run a bash script in which ``programs`` do nothing: the words that each call of one is given, its name first."""
    recorded = folder / "recorded"
    for name in programs:
        body = f"import json, sys\nopen({str(recorded)!r}, 'a').write(json.dumps([{name!r}, *sys.argv[1:]]) + '\\n')"
        add_program(folder / "bin", name, body)
    process = run_script(words, folder / "bin", **env)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    return [json.loads(line) for line in recorded.read_text().splitlines()]


def check_liquid(words: Sequence[str]) -> None:
    """Read the words of ``liquid train``, ``anneal``, ``capture`` or ``memory`` of one of them as it would.

    Raises:
        UsageError: an option or a value is not one of its own.
    """
    measured = words[0] == "memory"
    face, *rest = [word for word in words[measured:] if not (measured and word.startswith("--gpu_memory="))]
    given = parse(options_of(face), rest, f"liquid {face}", "", face=face)
    if measured:
        build_config_to_measure(face, given)
    elif face == CAPTURE:
        build_capture_config(given)
    else:
        build_run_config(face, given)


def read_torchrun(words: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """What torchrun makes of its words, and the words of the ``liquid`` that it runs."""
    read = vars(get_args_parser().parse_args(list(words)))
    assert read["module"]
    assert read["training_script"] == "liquid_llm"
    return read, read["training_script_args"]
