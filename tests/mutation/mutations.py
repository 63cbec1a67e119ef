"""Small mistakes, made on purpose: every place of a source file where one can be put, and the file with it in place.

A mutant is one of these, at one place:

    comparison   == and !=, is and is not, in and not in, and each order turned round
    boundary     < and <=, > and >=
    arithmetic   + and -, * and /, // and *, % and *, shifts and bits likewise
    constant     a number one larger (a float twice as large, a zero one), True and False
    boolean      and for or, a negation taken away, the condition of an if or while turned round
    statement    a call, an assignment to an attribute or item, a raise, a break, a continue left out
    arguments    the first two positional arguments swapped, where one can be taken for the other

Words are left alone: docstrings and other texts, what an exception or a log says, annotations, decorators.
"""

from __future__ import annotations

import ast
import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Lt: ast.GtE,
    ast.LtE: ast.Gt,
    ast.Gt: ast.LtE,
    ast.GtE: ast.Lt,
}
BOUNDARIES: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
}
ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.BitXor: ast.BitOr,
}
WORDS = {
    "logger",
    "logging",
    "log",
    "_log",
    "warnings",
    "say",
    "_say",
}  # what calls of these are given is read by people
FOR_READERS = {"__repr__", "__str__"}
# Calls whose first two arguments may change places: no mistake at all.
NOT_SWAPPED = {"min", "max", "zip", "add", "add_", "mul", "mul_", "minimum", "maximum", "logaddexp", "equal", "gcd"}


@dataclass(frozen=True)
class Mutant:
    """One mistake, on lines ``line`` to ``last_line`` of the file: its bytes ``start`` to ``end`` become ``after``."""

    path: str
    function: str  # dotted name, empty at module level
    operator: str
    line: int
    last_line: int
    start: int
    end: int
    before: str
    after: str
    nth: int = 0  # of those in the same function that read alike

    @property
    def key(self) -> str:
        """What names the mutant whatever changes elsewhere in its file."""
        return f"{self.path}::{self.function}::{self.operator}::{self.before} -> {self.after}::{self.nth}"

    @property
    def name(self) -> str:
        """A short name, the same in every run."""
        return hashlib.sha256(self.key.encode()).hexdigest()[:8]

    def apply(self, source: str) -> str:
        data = source.encode()
        return (data[: self.start] + self.after.encode() + data[self.end :]).decode()


def mutants(path: str, source: str) -> list[Mutant]:
    """Every mutant of one file, in the order of its lines; each leaves a file that Python can read."""
    found, seen = [], Counter[str]()
    for mutant in _Finder(path, source).find():
        found.append(replace(mutant, nth=seen[mutant.key]))
        seen[mutant.key] += 1
    return found


def sample(found: list[Mutant], number: int, seed: int) -> list[Mutant]:
    """``number`` of them, chosen by a hash: the choice is even, and a change elsewhere in the code moves nothing."""
    return sorted(found, key=lambda mutant: hashlib.sha256(f"{seed} {mutant.key}".encode()).digest())[:number]


class _Finder:
    def __init__(self, path: str, source: str) -> None:
        self.path = path
        self.data = source.encode()
        self.tree = ast.parse(source)
        self.starts = [0]
        for line in self.data.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))

    def find(self) -> Iterator[Mutant]:
        for statement in self.tree.body:
            yield from self._visit(statement, "")

    def _visit(self, node: ast.AST, function: str) -> Iterator[Mutant]:
        if isinstance(node, ast.JoinedStr | ast.Import | ast.ImportFrom | ast.Assert | ast.pattern) or _says(node):
            return
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            if node.name in FOR_READERS:
                return
            function = f"{function}.{node.name}" if function else node.name
        alias = not function and isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr)  # of types
        for operator, after in () if alias else _changes(node):
            yield self._mutant(node, function, operator, after)
        if isinstance(node, ast.Raise):
            return  # what follows are its words
        for name, child in ast.iter_fields(node):
            if name in ("annotation", "returns", "decorator_list", "type_params"):
                continue
            for part in child if isinstance(child, list) else [child]:
                if isinstance(part, ast.AST):
                    yield from self._visit(part, function)

    def _mutant(self, node: ast.AST, function: str, operator: str, after: str) -> Mutant:
        where = node.test if operator == "boolean" and isinstance(node, ast.If | ast.While | ast.IfExp) else node
        assert isinstance(where, ast.expr | ast.stmt)
        assert where.end_lineno is not None
        assert where.end_col_offset is not None
        start = self.starts[where.lineno - 1] + where.col_offset
        end = self.starts[where.end_lineno - 1] + where.end_col_offset
        before = " ".join(self.data[start:end].decode().split())
        return Mutant(self.path, function, operator, where.lineno, where.end_lineno, start, end, before, after)


def _changes(node: ast.AST) -> Iterator[tuple[str, str]]:
    """(operator, what stands there instead) for each mistake that can be made in ``node`` itself."""
    if isinstance(node, ast.expr):
        yield from _changed_expressions(node)
    if isinstance(node, ast.If | ast.While | ast.IfExp):
        if isinstance(node.test, ast.Name | ast.Attribute | ast.Call | ast.NamedExpr | ast.Subscript):
            yield "boolean", _text(ast.UnaryOp(ast.Not(), node.test))
    elif _can_go(node):
        yield "statement", "pass"


def _changed_expressions(node: ast.expr) -> Iterator[tuple[str, str]]:
    if isinstance(node, ast.Compare):
        for place, operation in enumerate(node.ops):
            for operator, table in (("comparison", COMPARISONS), ("boundary", BOUNDARIES)):
                if type(operation) in table:
                    ops = [*node.ops[:place], table[type(operation)](), *node.ops[place + 1 :]]
                    yield operator, _text(ast.Compare(node.left, ops, node.comparators))
    elif isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
        if not _is_text(node.left) and not _is_text(node.right):
            yield "arithmetic", _text(ast.BinOp(node.left, ARITHMETIC[type(node.op)](), node.right))
    elif isinstance(node, ast.BoolOp):
        yield "boolean", _text(ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values))
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield "boolean", _text(node.operand)
    elif isinstance(node, ast.Constant) and (value := _other(node.value)) is not None:
        yield "constant", repr(value)
    elif isinstance(node, ast.Call) and (swapped := _swap(node)) is not None:
        yield "arguments", ast.unparse(swapped)


def _text(node: ast.expr) -> str:
    return f"({ast.unparse(ast.fix_missing_locations(node))})"


def _other(value: object) -> object:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return 2 * value if value else 1.0
    return None


def _swap(call: ast.Call) -> ast.Call | None:
    arguments = call.args
    if len(arguments) < 2 or ast.unparse(call.func).split(".")[-1] in NOT_SWAPPED:
        return None
    first, second = arguments[:2]
    if not _alike(first, second) or ast.dump(first) == ast.dump(second):
        return None
    return ast.Call(call.func, [second, first, *arguments[2:]], call.keywords)


def _alike(first: ast.expr, second: ast.expr) -> bool:
    """Whether one can be taken for the other: a name and a text, say, would end in an error at once."""
    names = (ast.Name, ast.Attribute, ast.Subscript)
    return (isinstance(first, names) and isinstance(second, names)) or isinstance(first, type(second))


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str | bytes))


def _can_go(node: ast.AST) -> bool:
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Call)
    if isinstance(node, ast.Assign):
        return all(isinstance(target, ast.Attribute | ast.Subscript) for target in node.targets)
    return isinstance(node, ast.AugAssign | ast.Raise | ast.Break | ast.Continue)


def _says(node: ast.AST) -> bool:
    """Whether ``node`` is words for a reader: a text, a line of the log, a warning."""
    if isinstance(node, ast.Expr):
        node = node.value
    if isinstance(node, ast.Call):
        return ast.unparse(node.func).removeprefix("self.").split(".")[0] in WORDS
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def read(root: Path, path: str) -> list[Mutant]:
    return mutants(path, (root / path).read_text(encoding="utf-8"))
