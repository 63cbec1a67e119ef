"""Files and functions stay small enough to read in one go; what a command does has tests of its own."""

from __future__ import annotations

import ast
import re

from tests.support.sources import REPOSITORY, SOURCE, module_files, parse

MAX_FILE_LINES = 600
MAX_FUNCTION_LINES = 60

# ``path`` or ``path::function`` -> why it may be longer. Empty, and meant to stay so.
LONGER: dict[str, str] = {}

# Modules of ``jobs`` and ``wiring`` without a unit test: what they do shows in whole commands alone, in these tests.
WALKED = {
    "jobs/capture": "integration/test_hybrid_run.py",
    "jobs/capture_units": "integration/test_units.py",
    "jobs/compare": "integration/test_compare.py",
    "jobs/difference_table": "integration/test_evaluate.py",
    "jobs/run_result": "unit/test_summary.py",
    "jobs/dry_run": "integration/test_hybrid_run.py",
    "jobs/evaluate": "integration/test_evaluate.py",
    "jobs/evaluate_answers": "integration/test_evaluate.py",
    "jobs/evaluation_table": "integration/test_evaluate.py",
    "jobs/export": "integration/test_export.py",
    "jobs/inspect_data": "unit/jobs/test_inspect.py",
    "jobs/inspect_model": "unit/jobs/test_inspect.py",
    "jobs/inspect_run": "unit/jobs/test_inspect.py",
    "jobs/inspect_shown": "unit/jobs/test_inspect.py",
    "jobs/export_adapter": "integration/test_lora.py",
    "jobs/memory": "integration/test_memory_command.py",
    "jobs/prepare": "integration/test_prepare.py",
    "jobs/store": "integration/test_store_command.py",
    "jobs/teach": "integration/test_teacher_ranks.py",
    "jobs/study": "integration/test_study.py",
    "jobs/study_ahead": "integration/test_study.py",
    "jobs/study_result": "unit/study/test_results.py",
    "jobs/train": "integration/test_hybrid_run.py",
    "wiring/exports": "integration/test_export.py",
    "wiring/inputs": "integration/test_prepare.py",
    "wiring/judging": "integration/test_evaluate.py",
    "wiring/opening": "integration/test_evaluate.py",
    "wiring/parts": "integration/test_hybrid_run.py",
    "wiring/repeat": "integration/test_repeat.py",
    "wiring/shapes": "integration/test_memory_command.py",
    "wiring/served": "integration/test_served_teacher.py",
    "wiring/sharding": "integration/test_sharded.py",
    "wiring/students": "integration/test_annealing.py",
    "wiring/tokenizers": "integration/test_hybrid_run.py",
}

FILES = {str(path.relative_to(SOURCE)): path for path in module_files().values()}


def long_functions(tree: ast.Module) -> dict[str, int]:
    """Name -> lines of every function longer than the limit, from ``def`` to its last line without the docstring."""
    functions = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    lengths = {node.name: _num_lines(node) - _docstring_lines(node) for node in functions}
    return {name: lines for name, lines in lengths.items() if lines > MAX_FUNCTION_LINES}


def _num_lines(node: ast.stmt) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def _docstring_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    return _num_lines(node.body[0]) if ast.get_docstring(node) is not None else 0


def test_files_and_functions_are_short() -> None:
    lines = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in FILES.items()}
    assert not {name: count for name, count in lines.items() if count > MAX_FILE_LINES and name not in LONGER}
    functions = {
        f"{name}::{f}": count for name, path in FILES.items() for f, count in long_functions(parse(path)).items()
    }
    assert not {name: count for name, count in functions.items() if name not in LONGER}


def test_exceptions_exist_and_are_needed() -> None:
    for entry in LONGER:
        name, _, function = entry.partition("::")
        tree = parse(FILES[name])
        assert (
            function in long_functions(tree) if function else len(FILES[name].read_text().splitlines()) > MAX_FILE_LINES
        )


def test_a_long_function_is_seen() -> None:
    body = "\n".join("        pass" for _ in range(MAX_FUNCTION_LINES))
    words = '        """One\n        two."""'
    tree = ast.parse(f"class A:\n    def long(self):\n{words}\n{body}\n    def short(self):\n{words}\n        pass\n")
    assert long_functions(tree) == {"long": MAX_FUNCTION_LINES + 1}


def test_every_job_and_its_wiring_is_tested_where_it_is_said() -> None:
    modules = {name.removeprefix("liquid_llm/").removesuffix(".py") for name in FILES if not name.endswith("__.py")}
    there = {module for module in modules if module.startswith(("jobs/", "wiring/"))}
    tests = REPOSITORY / "tests"
    own = {module for module in there if (tests / "unit" / re.sub(r"(\w+)$", r"test_\1.py", module)).is_file()}
    assert not there - own - set(WALKED), "write its unit test, or name what walks it"
    assert not set(WALKED) - there
    assert not [test for test in WALKED.values() if not (tests / test).is_file()]
