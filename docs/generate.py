"""Pages of the documentation that are made from the program itself, so that they cannot say something else.

``docs/tree.py`` puts them where a page has the marker ``<!-- generated: NAME -->``. Needs no package but the project,
so that tests read the same.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
SOURCE = REPOSITORY / "src"


@dataclass(frozen=True)
class Command:
    """A command that takes options: its words (``("store", "pack")``) and what its parser was made of."""

    words: tuple[str, ...]
    description: str
    options: tuple[object, ...]
    positionals: tuple[object, ...]
    face: str

    @property
    def name(self) -> str:
        return " ".join(("liquid", *self.words))


@dataclass(frozen=True)
class _Choice:
    """A first word that is one of a few."""

    metavar: str
    help: str
    name: str = "word"
    many: bool = False


class _Seen(Exception):
    """A parser was about to be made."""


def commands() -> list[Command]:
    """Every command of ``liquid``, as the program's own parsers have it, in the order of its ``--help``."""
    return list(_commands(()))


def _commands(words: tuple[str, ...]) -> Iterator[Command]:
    found, help_text = _ask(words)
    if found is not None:
        yield found
        return
    usage, _, about = help_text.partition("\n\n")
    names = re.findall(r"^  ([a-z]\w*) ", about, re.M)
    first = _ask((*words, names[0]))
    if first[0] is not None or first[1].startswith("usage: "):
        for name in names:
            yield from _commands((*words, name))
    else:  # its first word is no command of its own
        yield Command(words, about.partition("\n")[0], (), (_Choice(usage.split()[-2], ", ".join(names)),), "")


def _ask(words: tuple[str, ...]) -> tuple[Command | None, str]:
    """What ``liquid WORDS --help`` makes its parser of, or, where it lists further commands, what it prints."""
    from liquid_llm.cli import main, parse

    found: list[Command] = []

    def see(
        options: Sequence[object], prog: str, description: str, face: str, positionals: Sequence[object], _: object
    ) -> None:
        found.append(Command(words, description, tuple(options), tuple(positionals), face))
        raise _Seen

    printed, real = io.StringIO(), parse.build_parser
    parse.build_parser = see  # type: ignore[assignment]
    try:
        with contextlib.redirect_stdout(printed), contextlib.suppress(_Seen, SystemExit):
            main._command([*words, "--help"])
    finally:
        parse.build_parser = real
    return (found[0] if found else None), printed.getvalue()


_KINDS = {
    "str": "text",
    "int": "whole number",
    "float": "number",
    "bool": "switch",
    "ints": "whole numbers, comma-separated",
    "floats": "numbers, comma-separated",
    "auto int": "whole number or `auto`",
    "auto bool": "switch or `auto`",
    "names": "names, comma-separated",
    "spec": "NAME or NAME:option=number",
    "sources": "TYPE=VALUE, several times or comma-separated",
    "texts": "text, several times",
    "size": "bytes, as `22GiB`",
}


def options_page() -> str:
    """Every option of every command: name, what it takes, default, meaning, what other trainers call it."""
    return "\n".join(line for command in (*commands(), common()) for line in _command_section(command))


def common() -> Command:
    """What every command takes beside its own options."""
    from liquid_llm.cli.parse import _TALK

    about = "Beside these each takes --help, and --config FILE, a YAML file of its options; the command line wins."
    return Command(("COMMAND",), about, _TALK, (), "")


def _command_section(command: Command) -> Iterator[str]:
    yield f"\n## {command.name}\n"
    if command.description:
        yield f"{_cell(command.description)}\n"
    if command.positionals:
        yield "| word | what |\n|---|---|"
        yield from (f"| `{_cell(one.metavar)}` | {_cell(one.help)} |" for one in command.positionals)
        yield ""
    groups: dict[str, list[object]] = {}
    for option in command.options:
        groups.setdefault(option.group, []).append(option)
    for group, options in groups.items():
        if len(groups) > 1:
            yield f"\n### {group} {{ #{'-'.join((*command.words, group))} }}\n"
        yield "| option | takes | default | meaning |\n|---|---|---|---|"
        yield from (_option_row(command, option) for option in options)
        yield ""


def _option_row(command: Command, option: object) -> str:
    default = option.default_for(command.face)
    takes = ", ".join(f"`{word}`" for word in option.choices) if option.choices else _KINDS[option.kind]
    if option.kind in ("spec", "names") and option.choices:
        takes = f"{_KINDS[option.kind]}: {takes}"
    meaning = _cell(option.help)
    if option.minimum is not None:
        meaning += f"; at least {option.minimum:g}"
    if option.above is not None:
        meaning += f"; above {option.above:g}"
    if option.reference is not None:
        meaning += f"; the reference command takes {_default(option.reference)}"
    if option.aliases:
        meaning += f". Also {', '.join(f'`--{alias}`' for alias in option.aliases)}"
    anchor = "-".join((*command.words, option.name))
    return f'| <a id="{anchor}"></a>`--{option.name}` | {takes} | {_default(default)} | {meaning} |'


def _default(value: object) -> str:
    if value in (None, (), ""):
        return "-"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return "`" + ",".join(str(one) for one in value) + "`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def _cell(text: str) -> str:
    """A help text as a cell of a table: nothing in it is taken for Markdown or HTML."""
    return re.sub(r"([\\*_<>\[\]|])", r"\\\1", text)


@dataclass(frozen=True)
class Message:
    """What an error says, with ``{}`` where the program fills something in, and what it tells to do."""

    error: str
    problem: str
    remedy: str
    exit_code: int
    module: str

    def fits(self, text: str) -> bool:
        """Whether ``text`` is this message with something in each of its places; one of hardly a word says nothing."""
        said = re.findall(r"\w", self.problem.replace("{}", ""))
        return (len(said) >= 8 or "{}" not in self.problem) and bool(
            re.fullmatch(".+?".join(map(re.escape, self.problem.split("{}"))), text)
        )


@functools.cache
def messages() -> list[Message]:
    """Every message that an error of ``errors.py`` is made with in ``src``, where its words stand in the source."""
    codes = _exit_codes()
    found: dict[tuple[str, str], Message] = {}
    for path in sorted(SOURCE.rglob("*.py")):
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(call, ast.Call) and call.args):
                continue
            name = getattr(call.func, "id", getattr(call.func, "attr", ""))
            words = _words(call.args[0])
            if name in codes and words and re.search(r"\w\w", words.replace("{}", "")):
                remedy = next((_words(one.value) or "" for one in call.keywords if one.arg == "remedy"), "")
                module = str(path.relative_to(SOURCE)).removesuffix(".py")
                found.setdefault((name, words), Message(name, words, remedy, codes[name], module))
    return sorted(found.values(), key=lambda one: (one.exit_code, one.problem.lower()))


def _exit_codes() -> dict[str, int]:
    from liquid_llm import errors

    kinds = vars(errors).values()
    return {k.__name__: k.exit_code for k in kinds if isinstance(k, type) and issubclass(k, errors.LiquidError)}


def _words(node: ast.expr) -> str | None:
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(str(one.value) if isinstance(one, ast.Constant) else "{}" for one in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return (_words(node.left) or "{}") + (_words(node.right) or "{}")
    if isinstance(node, ast.IfExp):
        return _words(node.body)
    return None


def messages_page() -> str:
    """All messages by exit code, with what they tell to do."""
    lines, code = [], None
    for one in messages():
        if one.exit_code != code:
            code = one.exit_code
            lines += [f"\n### Exit code {code}\n", "| message | it tells you to | from |\n|---|---|---|"]
        problem, remedy = (_cell(text.replace("{}", "…")) for text in (one.problem, one.remedy))
        lines.append(f"| {problem} | {remedy} | `{one.module}` |")
    return "\n".join(lines)


def api_page() -> str:
    """The public names of ``liquid_llm``, for mkdocstrings to fill in from their docstrings, in their order."""
    return "\n".join(f"\n::: {home}\n" for home in public_names())


def public_names() -> list[str]:
    """Where each name of ``liquid_llm.__all__`` is defined: ``module`` or ``module.name``."""
    import liquid_llm

    homes = (liquid_llm._HOMES[name] for name in liquid_llm.__all__ if name in liquid_llm._HOMES)
    return [home.rstrip(":").replace(":", ".") for home in homes]


def presets_page() -> str:
    """The student presets, as ``liquid models`` prints them."""
    from liquid_llm.cli import main

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        main.main(["models"])
    return f"```text\n{printed.getvalue().rstrip()}\n```"


def decisions_page() -> str:
    """The decisions by number, from their headings."""
    rows = ["# Decisions", "", "Why things are as they are, one page each.", ""]
    for path in sorted((REPOSITORY / "docs" / "decisions").glob("0*.md")):
        title = path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")
        number, _, words = title.partition(". ")
        rows.append(f"- [{number}. {words}]({path.name})")
    return "\n".join(rows)


PARTS = {"options": options_page, "messages": messages_page, "api": api_page, "presets": presets_page}


def fill_in(text: str) -> str:
    """``text`` with each marker replaced by the part it names."""
    return re.sub(r"^<!-- generated: (\w+) -->$", lambda m: PARTS[m[1]](), text, flags=re.M)
