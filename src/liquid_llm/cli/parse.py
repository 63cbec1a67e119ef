"""Words of a command line -> the values the user gave, and only those.

Options are accepted with ``-`` or ``_``, booleans bare or with a value, lists comma-separated. An unknown option ends
with exit code 2 and the nearest known one. Values a user did not give are absent, so that the configuration can take
them from a file or from checkpoint metadata before it takes a default.
"""

from __future__ import annotations

import argparse
import datetime
import difflib
import re
import textwrap
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from liquid_llm.cli.completion import offer, offer_names
from liquid_llm.errors import UsageError
from liquid_llm.options import AUTO, OPTIONS, RUN, Option
from liquid_llm.parsing import MAX_YAML_BYTES, ParseError, parse_yaml
from liquid_llm.sources import NONE, is_blank, overlay, read_by_type, read_sources
from liquid_llm.verbosity import LEVELS, QUIET, ask

TRUE_WORDS = {"true", "1", "yes", "on"}
FALSE_WORDS = {"false", "0", "no", "off"}

AS_JSON = Option("json", "bool", RUN, "json", False, "print one JSON object")
_TALK = (  # every command has these, and what it does is the same with them
    Option("quiet", "bool", RUN, "quiet", False, "errors alone on standard error; results stay on standard output"),
    Option("log_level", "str", RUN, "log_level", None, "the least that is said on standard error", choices=LEVELS),
)
_AS_IT_IS = "  "
_BY_TYPE = "sources."  # before the field of an option that is given by type
_DATE = re.compile(r"\$\(date \+(?P<format>[^)]*)\)")


class Parser(argparse.ArgumentParser):
    """argparse, raising ``UsageError`` where it would print a usage page."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, where=self.prog, remedy=f"see {self.prog} --help")


class _Help(argparse.HelpFormatter):
    """argparse's help, in which an example stays one line, to be copied."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        lines = [[line] if line.startswith(_AS_IT_IS) else textwrap.wrap(line, width) for line in text.splitlines()]
        return "\n".join(indent + one for line in lines for one in line or [""])


@dataclass(frozen=True)
class Positional:
    """A word of a command line that is no option: a file, folder or URL. ``many``: one or several of them, a list."""

    name: str
    metavar: str
    help: str
    many: bool = False


def build_parser(
    options: Sequence[Option],
    prog: str,
    description: str,
    face: str,
    positionals: Sequence[Positional],
    examples: Sequence[str] = (),
) -> Parser:
    """The parser of one command; values not given stay absent from the namespace.

    What ``--help`` says first is how the command is written and a whole example. The list of all options in brackets
    that argparse puts there would be 60 lines of a training command; each stands below with its meaning.
    """
    known = [f"--{alias} (--{option.name})" for option in options for alias in option.aliases]
    epilog = f"Names that other trainers have are taken too: {', '.join(known)}." if known else ""
    words = [one.metavar + (" ..." if one.many else "") for one in positionals]
    lines = [description]
    lines += ["", "for example:", *(f"{_AS_IT_IS}{prog} {one}" for one in examples)] if examples else []
    parser = Parser(
        prog=prog,
        usage=" ".join([prog, *words, "[--option=value ...]"]),
        description="\n".join(lines),
        epilog=epilog,
        formatter_class=_Help,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    for one in positionals:
        nargs = {"nargs": "+"} if one.many else {}
        parser.add_argument(one.name, metavar=one.metavar, type=_path, help=one.help, **nargs)  # type: ignore[arg-type]
    if options:
        parser.add_argument("--config", metavar="FILE", help="YAML file of options; the command line wins")
    groups: dict[str, argparse._ArgumentGroup] = {}
    for option in (*options, *_TALK):
        group = groups.setdefault(option.group, parser.add_argument_group(option.group))
        default = option.default_for(face)
        shown = "" if default in (None, (), False, "") else f" [{_show(default)}]"
        text = (option.help + shown).replace("%", "%%")
        convert = converter(option)
        if option.kind.endswith("bool"):
            metavar = "BOOL" if option.kind == "bool" else "BOOL|auto"
            group.add_argument(f"--{option.name}", nargs="?", const=True, type=convert, help=text, metavar=metavar)
            without, hidden = f"--no_{option.name}", argparse.SUPPRESS
            group.add_argument(without, dest=option.name, action="store_const", const=False, help=hidden)
        else:
            metavar = "{" + ",".join(option.choices) + "}" if option.choices else _METAVARS[option.kind]
            action = "extend" if option.kind in ("sources", "texts") else "store"
            added = group.add_argument(f"--{option.name}", type=convert, help=text, metavar=metavar, action=action)
            if option.choices:
                added.completer = lambda choices=option.choices, **_: choices  # type: ignore[attr-defined]
    return parser


def _with_own_names(argv: Sequence[str], options: Sequence[Option]) -> list[str]:
    """The words with our name of an option where they have the one other trainers have for it."""
    own = {alias: option.name for option in options for alias in option.aliases}
    out = []
    for word in argv:
        name, equals, value = word.removeprefix("--").partition("=")
        out.append(f"--{own[name]}{equals}{value}" if word.startswith("--") and name in own else word)
    return out


def _let_switches_stand_alone(argv: Sequence[str], options: Sequence[Option]) -> list[str]:
    """The words with ``=true`` behind each bare switch before a word that cannot be its value: ``--json RUN``."""
    switches = {f"--{one.name}": TRUE_WORDS | FALSE_WORDS | {AUTO} for one in options if one.kind.endswith("bool")}
    return [
        f"{word}=true" if word in switches and after.lower() not in switches[word] else word
        for word, after in zip(argv, (*argv[1:], ""), strict=False)
    ]


def parse(
    options: Sequence[Option],
    argv: Sequence[str],
    prog: str,
    description: str,
    *,
    face: str = "",
    positionals: Sequence[Positional] = (),
    examples: Sequence[str] = (),
    read_file: Callable[[Path], Mapping[str, object]] | None = None,
) -> dict[str, object]:
    """What is given, by name, from the command line and (behind it) from ``--config FILE``.

    Args:
        options: those of the command.
        face: whose defaults the help shows.
        positionals: words it takes beside options; all must be there.
        examples: whole commands that the help shows first, without ``prog``.
        read_file: gives the options of ``--config FILE``, where that may hold more than options.

    Raises:
        UsageError: an unknown option or a value that cannot be used.
    """
    parser = build_parser(options, prog, description, face, positionals, examples)
    offer(parser)
    words = _with_own_names(normalise(argv), options)
    if positionals:
        words = _let_switches_stand_alone(words, (*options, *_TALK))
    namespace, unknown = parser.parse_known_args(words)
    if unknown:
        raise unknown_option(unknown[0], (*options, *_TALK), prog)
    given: dict[str, object] = vars(namespace)
    for name, value in given.items():
        if value == []:  # what argparse makes of --name=--
            raise UsageError("no value for this option", where=f"{prog}: --{name}", got="'--'")
    config_file = given.pop("config", None)
    if sources := _take_by_type(given, options, prog):
        given["sources"] = sources
    if config_file is not None:
        path = Path(str(config_file))
        given = overlay(read_config_file(path, (*options, *_TALK)) if read_file is None else read_file(path), given)
    _take_talk(given, prog)
    return {name: expand_dates(value) for name, value in given.items()}


def _take_talk(given: dict[str, object], prog: str) -> None:
    """Take how much is to be said out of ``given``, and see to it. Raises UsageError where both options are given."""
    quiet, level = given.pop("quiet", False), given.pop("log_level", None)
    if quiet and level is not None:
        raise UsageError("--quiet and --log_level say different things", where=prog, remedy="leave one out")
    if quiet or level is not None:
        ask(QUIET if quiet else str(level))


HELP = ("-h", "--help", "help")


def overview(what: str, known: Mapping[str, str], prog: str, description: str) -> str:
    """What ``--help`` shows where a command has others in it: name -> what it does."""
    lines = [f"usage: {prog} {what.upper()} [--option=value ...]", "", description, ""]
    lines += [f"  {name:<10} {text}" for name, text in known.items()]
    return "\n".join([*lines, "", f"{prog} {what.upper()} --help lists what it takes."])


def choose(what: str, known: Mapping[str, str], words: Sequence[str], prog: str, description: str) -> str:
    """The first word: one of ``known`` (name -> what it does). ``--help`` lists them and exits.

    Raises:
        UsageError: there is none, or another.
    """
    if not words:
        offer_names(list(known), prog)
        raise UsageError(f"no {what} is named", where=prog, expected=f"one of {', '.join(known)}")
    if words[0] in HELP:
        print(overview(what, known, prog, description))
        raise SystemExit(0)
    if words[0] not in known:
        near = difflib.get_close_matches(words[0], known, n=1)
        remedy = f"did you mean {near[0]}?" if near else f"use one of {', '.join(known)}"
        raise UsageError(f"unknown {what}", where=prog, got=repr(words[0]), remedy=remedy)
    return words[0]


def _path(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a folder, file or URL")
    return text


def _take_by_type(given: dict[str, object], options: Sequence[Option], where: object) -> dict[str, dict[str, object]]:
    """Take the options that are by type out of ``given``: type -> what is given of it."""
    sources: dict[str, dict[str, object]] = {}
    for option in options:
        if option.kind != "sources" or option.name not in given:
            continue
        texts = given.pop(option.name)
        assert isinstance(texts, Sequence)
        try:
            for type, fields in read_by_type(option.field.removeprefix(_BY_TYPE), texts).items():
                sources.setdefault(type, {}).update(fields)
        except ValueError as error:
            raise UsageError(str(error), where=f"{where}: --{option.name}") from None
    return sources


def normalise(argv: Sequence[str]) -> list[str]:
    """Spell every option with underscores: ``--grad-accum=2`` becomes ``--grad_accum=2``; values are untouched."""
    out = []
    for word in argv:
        if word.startswith("--") and len(word) > 2:
            name, equals, value = word[2:].partition("=")
            word = "--" + name.replace("-", "_") + equals + value
        out.append(word)
    return out


def converter(option: Option) -> Callable[[str], object]:
    """A function text -> value of this option, raising ``argparse.ArgumentTypeError`` with what was expected."""
    kind, choices, minimum, above = option.kind, option.choices, option.minimum, option.above

    def convert(text: str) -> object:
        try:
            value = _convert(kind, text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"got {text!r}, expected {_KIND_WORDS[kind]}") from None
        words = value if isinstance(value, tuple) else (str(value).partition(":")[0] if kind == "spec" else value,)
        missed = [one for one in words if choices and one not in choices]
        if missed:
            known = (*choices, f"or {NONE} alone") if kind == "names" else choices
            raise argparse.ArgumentTypeError(f"got {text!r}, expected one of {', '.join(known)}")
        for one in value if isinstance(value, tuple) else (value,):
            if isinstance(one, bool) or not isinstance(one, (int, float)):
                continue
            if minimum is not None and not one >= minimum:
                raise argparse.ArgumentTypeError(f"got {text}, expected at least {minimum:g}")
            if above is not None and not one > above:
                raise argparse.ArgumentTypeError(f"got {text}, expected more than {above:g}")
        return value

    return convert


_KIND_WORDS = {
    "str": "text",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "auto int": "a whole number or auto",
    "auto bool": "true, false or auto",
    "size": "a size of memory, such as 22 (GiB), 22GiB, 24GB or 22528MiB",
    "ints": "comma-separated whole numbers",
    "floats": "comma-separated numbers",
    "names": "comma-separated names",
    "spec": "a name, or name:option=number",
    "sources": "comma-separated TYPE=VALUE",
    "texts": "text",
}
_METAVARS = {
    "auto int": "INT|auto",
    **{kind: kind.upper() for kind in ("str", "int", "float", "ints", "floats", "size", "names")},
    "sources": "TYPE=VALUE",
    "texts": "TEXT",
}
_UNITS = {"": 2**30, "mib": 2**20, "gib": 2**30, "tib": 2**40, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_MOST_BARE = 4096  # GiB; a larger number alone is likely meant in another unit
_SIZE = re.compile(r"(?P<number>\d+(\.\d+)?)\s*(?P<unit>[A-Za-z]*)")


def _convert(kind: str, text: str) -> object:
    if kind.startswith("auto "):
        return AUTO if text.lower() == AUTO else _convert(kind.removeprefix("auto "), text)
    if kind == "size":
        return _size(text)
    if kind in ("str", "spec", "texts"):
        if not text:
            raise ValueError("empty")
        return (text,) if kind == "texts" else text
    if kind == "int":
        return int(text)
    if kind == "float":
        value = float(text)
        if value != value or value in (float("inf"), float("-inf")):
            raise ValueError("not finite")
        return value
    if kind == "bool":
        word = text.lower()
        if word in TRUE_WORDS | FALSE_WORDS:
            return word in TRUE_WORDS
        raise ValueError(text)
    parts = [part.strip() for part in text.split(",")]
    if kind in ("names", "sources"):
        if not all(parts):
            raise ValueError("empty")
        return () if parts == [NONE] else tuple(parts)
    one: Callable[[str], object] = int if kind == "ints" else float
    return tuple(one(part) for part in parts)


def _size(text: str) -> int:
    """Bytes. A number alone counts GiB; units are read in any case."""
    match = _SIZE.fullmatch(text.strip())
    if match is None or match["unit"].lower() not in _UNITS:
        raise ValueError(text)
    number, unit = float(match["number"]), match["unit"].lower()
    if not unit and number > _MOST_BARE:  # as nvidia-smi prints it, in MiB
        raise ValueError(text)
    return round(number * _UNITS[unit])


def read_config_file(path: Path, options: Sequence[Option]) -> dict[str, object]:
    """Options from a YAML mapping ``name: value``, checked as on the command line; null and blank are not given.

    Raises:
        UsageError: the file is missing, is not a mapping, gives a name twice, or holds an unknown option or an unusable
            value.
    """
    return read_options(load_yaml(path), options, path)


def read_options(loaded: object, options: Sequence[Option], where: object) -> dict[str, object]:
    """The same from such a mapping.

    Raises:
        UsageError: it is none, gives a name twice, or holds an unknown option or an unusable value.
    """
    if loaded is None:  # a file of comments
        return {}
    if not isinstance(loaded, Mapping):
        raise UsageError(
            "not a mapping of options", where=where, got=type(loaded).__name__, expected="name: value lines"
        )
    known = {option.name: option for option in options}
    own = {alias: option.name for option in options for alias in option.aliases}
    values: dict[str, object] = {}
    seen: dict[str, object] = {}
    for key, value in loaded.items():
        name = str(key).replace("-", "_")
        name = own.get(name, name)
        if name in seen:
            raise UsageError("an option is given twice", where=where, got=f"{seen[name]} and {key}", remedy="keep one")
        seen[name] = key
        if name not in known and not (name == "sources" and "signal" in known):
            raise unknown_option(f"--{name}", options, str(where))
        if is_blank(value) or value == "None":  # as Python spells null
            continue
        try:
            values[name] = read_sources(value) if name == "sources" else converter(known[name])(_as_words(value))
        except (ValueError, argparse.ArgumentTypeError) as error:
            raise UsageError(str(error), where=f"{where}: {name}") from None
    sources = _take_by_type(values, options, where)
    return overlay(values, {"sources": sources}) if sources else values


def _as_words(value: object) -> str:
    """A YAML value as it would be written on a command line."""
    if isinstance(value, Mapping):
        raise argparse.ArgumentTypeError(f"got a mapping, {value!r:.80}, expected a value")
    if isinstance(value, list) and any(is_blank(one) or one == "None" for one in value):
        raise argparse.ArgumentTypeError(f"got {value!r:.80}, expected no empty value in a list")
    words = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    if "\0" in words:
        raise argparse.ArgumentTypeError(f"got {words!r:.80}, expected text without zero bytes")
    return words


def load_yaml(path: Path) -> object:
    """What a YAML file holds, every plain word but null as it is written: ``0:30`` is a schedule and no time of day.

    Raises:
        UsageError: it cannot be read, is not YAML, or a mapping in it has a key twice.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, object]:
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            twice = next((key for key in keys if keys.count(key) > 1), None)
            if twice is not None:
                raise UsageError("a key is given twice", where=path, got=twice, remedy="keep one")
            return dict(super().construct_mapping(node, deep))

    Loader.yaml_implicit_resolvers = {
        first: [(tag, words) for tag, words in those if tag.endswith((":null", ":merge"))]
        for first, those in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    try:
        with path.open("rb") as stream:
            return parse_yaml(stream.read(MAX_YAML_BYTES + 1), Loader)
    except OSError as error:
        raise UsageError("cannot read the configuration file", where=path, got=error.strerror) from None
    except ParseError as error:
        raise UsageError("not a YAML file", where=path, got=error) from None


def expand_dates(value: object) -> object:
    if isinstance(value, str):
        return expand_date(value)
    return {key: expand_dates(one) for key, one in value.items()} if isinstance(value, dict) else value


def expand_date(text: str) -> str:
    """Expand a literal ``$(date +FORMAT)`` (UTC), left in a URI by a launcher that has no shell.

    Raises:
        UsageError: a format that is no text.
    """
    now = datetime.datetime.now(datetime.timezone.utc)
    try:
        return _DATE.sub(lambda match: now.strftime(match["format"].strip("'\"")), text)
    except ValueError as error:
        raise UsageError("not the format of a date", where=ascii(text), got=error) from None


def unknown_option(word: str, options: Sequence[Option], where: str) -> UsageError:
    """For a word that none of ``options`` takes: says which command has it, and what does the same here."""
    if not word.startswith("-"):
        return UsageError("unexpected word", where=where, got=repr(word), expected="--option=value")
    name = word.lstrip("-").partition("=")[0]
    elsewhere = [one for one in OPTIONS if one.name == name or (one.kind.endswith("bool") and f"no_{one.name}" == name)]
    if elsewhere:
        commands = " and ".join(f"liquid {face}" for one in elsewhere for face in one.faces)
        there = elsewhere[0]
        field = there.field.removeprefix(_BY_TYPE)
        here = next((one.name for one in options if (one.group, one.field) == (there.group, field)), None)
        alone = ", with one type of text," if field != there.field else ""
        instead = f"see {where} --help" if here is None else f"here{alone} it is --{here}"
        remedy = f"it is an option of {commands}; {instead}"
    else:
        known = [*(option.name for option in options), *(["config"] if options else [])]
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        remedy = f"did you mean --{near[0]}?" if near else f"see {where} --help"
    return UsageError(f"unknown option --{name}", where=where, remedy=remedy)


def _show(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
