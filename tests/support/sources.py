"""The project's own sources as syntax trees: which module imports which, and what a module does when imported."""

from __future__ import annotations

import ast
import functools
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
SOURCE = REPOSITORY / "src"


def module_files() -> dict[str, Path]:
    """Dotted name -> file, for every module below ``src``."""
    found = {}
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@functools.cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


@dataclass(frozen=True)
class Import:
    """One import: the module or name imported, where, and whether importing the file runs it."""

    name: str
    line: int
    at_import_time: bool


def imports(module: str, tree: ast.Module, known: set[str]) -> list[Import]:
    """Every import in ``tree``, type-only ones left out; names among ``known`` are resolved to modules."""
    return list(_imports(module, tree, frozenset(known)))


@functools.cache
def _imports(module: str, tree: ast.Module, known: frozenset[str]) -> list[Import]:
    at_import_time, for_types = {id(node) for node in _run_at_import(tree)}, _type_only(tree)
    found = []
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(module, node)
            inside = [f"{base}.{alias.name}" for alias in node.names]
            names = [name if name in known else base for name in inside]
        else:
            continue
        found += [Import(name, node.lineno, id(node) in at_import_time) for name in dict.fromkeys(names)]
    return found


def imported_at_start(module: str, files: dict[str, Path]) -> dict[str, str]:
    """All modules that ``import module`` brings in, each with the module that asks for it. Only ours are followed."""
    known, reached, waiting = set(files), {module: module}, [module]
    while waiting:
        current = waiting.pop()
        parents = [current.rsplit(".", depth)[0] for depth in range(1, current.count(".") + 1)]
        needed = [found.name for found in imports(current, parse(files[current]), known) if found.at_import_time]
        for name in parents + needed:
            if name not in reached:
                reached[name] = current
                if name in known:
                    waiting.append(name)
    return reached


def is_standard_library(name: str) -> bool:
    return name.split(".")[0] in sys.stdlib_module_names


# Last names of calls that reach outside the process or change it.
_DOES_THINGS = re.compile(
    "open|print|input|exec|eval|basicConfig|dictConfig|fileConfig|captureWarnings|mkdir|makedirs|unlink|rename"
    "|read_text|read_bytes|write_text|write_bytes|exists|is_file|is_dir|glob|iterdir|cwd|getcwd|chdir|expanduser"
    "|urlopen|urlretrieve|load_dataset|from_pretrained|hf_hub_download|snapshot_download|download|system|Popen"
    "|seed|manual_seed|set_num_threads|set_default_dtype|filterwarnings|simplefilter|signal|register|getenv|putenv"
    "|import_module|__import__|gethostname|is_available|device_count"
)
_DOES_THINGS_BELOW = ("subprocess.", "socket.", "requests.", "urllib.request.", "shutil.", "sys.path.")


def import_effects(tree: ast.Module) -> list[str]:
    """What importing the module does beyond defining names, as ``line: what``; empty for a quiet module."""
    found = []
    for node in _run_at_import(tree):
        if isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant):
            found.append(f"{node.lineno}: a statement that only has an effect: {ast.unparse(node)}")
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if _DOES_THINGS.fullmatch(name.rsplit(".", 1)[-1]) or name.startswith(_DOES_THINGS_BELOW):
                found.append(f"{node.lineno}: calls {name}")
        elif isinstance(node, ast.Attribute | ast.Name) and re.fullmatch(r"(.*\.)?environb?", ast.unparse(node)):
            found.append(f"{node.lineno}: reads the environment")
        elif isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(target, ast.Attribute | ast.Subscript) for target in targets):
                found.append(f"{node.lineno}: changes something elsewhere: {ast.unparse(node)}")
    return found


def _run_at_import(tree: ast.Module) -> Iterator[ast.AST]:
    """Nodes evaluated when the module is imported: no function bodies, no ``__main__`` and no type-only blocks."""
    waiting: list[ast.AST] = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and _guard(node) in ("main", "typing"):
            waiting += node.orelse
            continue
        yield node
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            waiting += [*node.decorator_list, *node.args.defaults, *(d for d in node.args.kw_defaults if d is not None)]
        elif isinstance(node, ast.Lambda):
            waiting += [*node.args.defaults, *(d for d in node.args.kw_defaults if d is not None)]
        else:
            waiting += ast.iter_child_nodes(node)


def _guard(node: ast.If) -> str | None:
    test = ast.unparse(node.test)
    if test in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
        return "typing"
    return "main" if test == "__name__ == '__main__'" else None


def _type_only(tree: ast.Module) -> set[int]:
    blocks = (node for node in ast.walk(tree) if isinstance(node, ast.If) and _guard(node) == "typing")
    return {id(inner) for block in blocks for statement in block.body for inner in ast.walk(statement)}


def _absolute(module: str, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    raise ValueError(f"{module}, line {node.lineno}: relative imports are not used in this project")
