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
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from liquid_llm.errors import UsageError
from liquid_llm.options import AUTO, Option, options_of
from liquid_llm.sources import NONE, overlay, read_signals, read_sources

TRUE_WORDS = {"true", "1", "yes", "on"}
FALSE_WORDS = {"false", "0", "no", "off"}

_DATE = re.compile(r"\$\(date \+(?P<format>[^)]*)\)")


class Parser(argparse.ArgumentParser):
    """argparse, raising ``UsageError`` where it would print a usage page."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, where=self.prog, remedy=f"see {self.prog} --help")


def build_parser(face: str, prog: str, description: str, extra: Sequence[Option] = ()) -> Parser:
    """The parser of one face with some options more; values not given stay absent from the namespace."""
    parser = Parser(prog=prog, description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.add_argument("--config", metavar="FILE", help="YAML file of options; the command line wins")
    groups: dict[str, argparse._ArgumentGroup] = {}
    for option in (*extra, *options_of(face)):
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
            action = "extend" if option.kind == "sources" else "store"
            group.add_argument(f"--{option.name}", type=convert, help=text, metavar=metavar, action=action)
    return parser


def parse(
    face: str, argv: Sequence[str], prog: str, description: str, extra: Sequence[Option] = ()
) -> dict[str, object]:
    """The options given, by name, from the command line and (behind it) from ``--config FILE``.

    ``extra`` options are this command's beside those of the face.

    Raises:
        UsageError: an unknown option or a value that cannot be used.
    """
    parser = build_parser(face, prog, description, extra)
    namespace, unknown = parser.parse_known_args(normalise(argv))
    if unknown:
        raise unknown_option(unknown[0], [option.name for option in (*extra, *options_of(face))] + ["config"], prog)
    given: dict[str, object] = vars(namespace)
    config_file = given.pop("config", None)
    if "signal" in given:
        given["sources"] = _signals(given.pop("signal"), prog)
    if config_file is not None:
        given = overlay(read_config_file(Path(str(config_file)), face, extra), given)
    return {name: _expand_dates(value) for name, value in given.items()}


def _signals(texts: object, where: object) -> dict[str, dict[str, object]]:
    assert isinstance(texts, Sequence)
    try:
        return read_signals(list(texts))
    except ValueError as error:
        raise UsageError(str(error), where=f"{where}: --signal") from None


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
    return value_of(option.kind, choices=option.choices, minimum=option.minimum, above=option.above)


def value_of(
    kind: str, *, choices: Collection[str] = (), minimum: float | None = None, above: float | None = None
) -> Callable[[str], object]:
    """:func:`converter` of an option that is not in the table."""

    def convert(text: str) -> object:
        try:
            value = _convert(kind, text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"got {text!r}, expected {_KIND_WORDS[kind]}") from None
        missed = [one for one in (value if isinstance(value, tuple) else (value,)) if choices and one not in choices]
        if missed:
            raise argparse.ArgumentTypeError(f"got {text!r}, expected one of {', '.join(choices)}")
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            if minimum is not None and not value >= minimum:
                raise argparse.ArgumentTypeError(f"got {text}, expected at least {minimum:g}")
            if above is not None and not value > above:
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
    "sources": "comma-separated TYPE=URI",
}
_METAVARS = {
    "auto int": "INT|auto",
    **{kind: kind.upper() for kind in ("str", "int", "float", "ints", "floats", "size", "names")},
    "sources": "TYPE=SPEC",
}
_UNITS = {"": 2**30, "mib": 2**20, "gib": 2**30, "tib": 2**40, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_MOST_BARE = 4096  # GiB; a larger number alone is likely meant in another unit
_SIZE = re.compile(r"(?P<number>\d+(\.\d+)?)\s*(?P<unit>[A-Za-z]*)")


def _convert(kind: str, text: str) -> object:
    if kind.startswith("auto "):
        return AUTO if text.lower() == AUTO else _convert(kind.removeprefix("auto "), text)
    if kind == "size":
        return _size(text)
    if kind == "str":
        if not text:
            raise ValueError("empty")
        return text
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


def read_config_file(path: Path, face: str, extra: Sequence[Option] = ()) -> dict[str, object]:
    """Options from a YAML mapping ``name: value``, checked exactly as on the command line.

    ``extra`` options are known beside those of the face.

    Raises:
        UsageError: the file is missing, is not a mapping, or holds an unknown option or an unusable value.
    """
    import yaml

    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError("cannot read the configuration file", where=path, got=error.strerror) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError("not a YAML file", where=path, got=" ".join(str(error).split())) from None
    if not isinstance(loaded, Mapping):
        raise UsageError(
            "not a mapping of options", where=path, got=type(loaded).__name__, expected="name: value lines"
        )
    known = {option.name: option for option in (*extra, *options_of(face))}
    values: dict[str, object] = {}
    for key, value in loaded.items():
        name = str(key).replace("-", "_")
        if name == "sources" and "signal" in known:
            try:
                values[name] = read_sources(value)
            except ValueError as error:
                raise UsageError(str(error), where=f"{path}: {name}") from None
            continue
        if name not in known:
            raise unknown_option(f"--{name}", list(known), str(path))
        text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        try:
            values[name] = converter(known[name])(text)
        except argparse.ArgumentTypeError as error:
            raise UsageError(str(error), where=f"{path}: {name}") from None
    if "signal" in values:
        values = overlay(values, {"sources": _signals(values.pop("signal"), path)})
    return values


def _expand_dates(value: object) -> object:
    if isinstance(value, str):
        return expand_date(value)
    return {key: _expand_dates(one) for key, one in value.items()} if isinstance(value, dict) else value


def expand_date(text: str) -> str:
    """Expand a literal ``$(date +FORMAT)`` (UTC), left in a URI by a launcher that has no shell."""
    now = datetime.datetime.now(datetime.timezone.utc)
    return _DATE.sub(lambda match: now.strftime(match["format"].strip("'\"")), text)


def unknown_word(what: str, word: str, known: Sequence[str], where: str) -> UsageError:
    """For the name of a command or action that there is not."""
    near = difflib.get_close_matches(word, known, n=1)
    remedy = f"did you mean {near[0]}?" if near else f"use one of {', '.join(known)}"
    return UsageError(f"unknown {what}", where=where, got=repr(word), remedy=remedy)


def unknown_option(word: str, known: Sequence[str], where: str) -> UsageError:
    """For a word that no option takes."""
    if not word.startswith("-"):
        return UsageError("unexpected word", where=where, got=repr(word), expected="--option=value")
    name = word.lstrip("-").partition("=")[0]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    remedy = f"did you mean --{near[0]}?" if near else f"see {where} --help"
    return UsageError(f"unknown option --{name}", where=where, remedy=remedy)


def _show(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
