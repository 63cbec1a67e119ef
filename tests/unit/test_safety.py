"""No source of ours calls what can run the code of others, or writes where a file of others says."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest
from tests.support.sources import module_files, parse

# What is called -> the modules that may, each for a reason said there. A dot in front: any method of that name.
FORBIDDEN: dict[str, set[str]] = {
    **{name: set() for name in ["eval", "exec", "compile", "__import__", "breakpoint", "tempfile.mktemp"]},
    **{f"pickle.{name}": set() for name in ["load", "loads", "Unpickler", "dump", "dumps"]},
    **{name: set() for name in ["marshal.loads", "shelve.open", "pandas.read_pickle", "np.load", "numpy.load"]},
    **{name: set() for name in ["torch.jit.load", "torch.hub.load"]},
    **{f"yaml.{name}": set() for name in ["load", "load_all", "unsafe_load", "full_load"]},
    **{f"os.{name}": set() for name in ["system", "popen", "execv", "execve", "spawnv"]},
    **{name: set() for name in [".extractall", ".extract", "shutil.unpack_archive", "tarfile.open"]},
    # exchanges of objects between ranks are pickles
    **{f".{name}": set() for name in ["all_gather_object", "broadcast_object_list", "gather_object"]},
    # of the converter to GGUF: a program that a person has installed or named
    "subprocess.run": {"liquid_llm.flash_attention", "liquid_llm.models.gguf_writing", "liquid_llm.provenance"},
    "subprocess.Popen": {"liquid_llm.preparation.toolkit"},
    "subprocess.check_output": set(),
    "subprocess.call": set(),
    "ElementTree.fromstring": {"liquid_llm.preparation.formats"},  # after a look for entities
}
# Arguments that are dangerous by their value: the only one allowed. True: the call must state it.
ARGUMENTS = {"trust_remote_code": False, "allow_pickle": False, "weights_only": True}
MUST_STATE = {"torch.load": "weights_only"}
IMPORTS = {"dill", "joblib", "cloudpickle", "marshal", "shelve", "jsonpickle"}


def problems(name: str, tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [one.name for one in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from (f"{name}:{node.lineno}: import {one}" for one in names if one.partition(".")[0] in IMPORTS)
        if isinstance(node, ast.Dict):  # arguments that are passed on
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and key.value in ARGUMENTS:
                    yield from _of_argument(name, str(key.value), value)
        if isinstance(node, ast.Call):
            yield from _of_call(name, node)


def _of_call(name: str, node: ast.Call) -> Iterator[str]:
    called = ast.unparse(node.func)
    last = "." + called.rpartition(".")[2] if "." in called else called
    for one in {called, last} & FORBIDDEN.keys():
        if name not in FORBIDDEN[one]:
            yield f"{name}:{node.lineno}: {one}"
    stated = {keyword.arg: keyword.value for keyword in node.keywords}
    for argument in stated.keys() & ARGUMENTS.keys():
        yield from _of_argument(name, str(argument), stated[argument])
    if called.startswith("subprocess.") and "shell" in stated:
        yield f"{name}:{node.lineno}: {called} with shell"
    if MUST_STATE.get(called) not in {None, *stated}:
        yield f"{name}:{node.lineno}: {called} without {MUST_STATE[called]}"


def _of_argument(name: str, argument: str, value: ast.expr) -> Iterator[str]:
    if not (isinstance(value, ast.Constant) and value.value is ARGUMENTS[argument]):
        yield f"{name}:{value.lineno}: {argument}={ast.unparse(value)}"


def test_nothing_of_ours_runs_what_others_wrote() -> None:
    found = {name: parse(path) for name, path in module_files().items()}
    assert [problem for name, tree in found.items() for problem in problems(name, tree)] == []


def test_each_exception_is_used() -> None:
    used = {
        (ast.unparse(node.func), name)
        for name, path in module_files().items()
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Call)
    }
    assert [(called, name) for called, names in FORBIDDEN.items() for name in names if (called, name) not in used] == []


@pytest.mark.parametrize(
    "line",
    [
        "pickle.loads(x)",
        "import dill",
        "torch.load(x)",
        "torch.load(x, weights_only=False)",
        "torch.load(x, weights_only=flag)",
        "Auto.from_pretrained(x, trust_remote_code=trust)",
        "options = {'trust_remote_code': True}",
        "np.load(x)",
        "archive.extractall(x)",
        "subprocess.run(x, shell=True)",
        "dist.broadcast_object_list(x)",
        "eval(x)",
    ],
)
def test_a_call_that_does_is_seen(line: str) -> None:
    assert list(problems("liquid_llm.flash_attention", ast.parse(line)))
