"""What a shell offers when a word of a ``liquid`` command is half typed, through argcomplete.

The shell runs the command itself for each such word, with the line in its environment. It goes its usual way until it
knows which words may follow (``offer``), says them, and ends: there is no second table of commands and options.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

SHELLS = ("bash", "fish", "zsh")
_ASKED = "_ARGCOMPLETE"  # set by what ``liquid completion`` prints; counts the words that are no arguments


def is_asked() -> bool:
    """Whether a shell asks, and nothing is to be run."""
    return _ASKED in os.environ


def words_so_far() -> list[str]:
    """The whole words of the line before the one that is being typed, without the program's name."""
    from argcomplete.lexers import split_line

    line, point = os.environ["COMP_LINE"], int(os.environ["COMP_POINT"])
    *_, words, _ = split_line(line, point)
    words = words[int(os.environ[_ASKED]) :]
    if words[:1] == ["help"]:  # what comes after it is what would come without it
        os.environ[_ASKED] = str(int(os.environ[_ASKED]) + 1)
        words = words[1:]
    return list(words)


def offer(parser: argparse.ArgumentParser) -> None:
    """Say what may follow of the words that are this parser's; does not return where a shell asks."""
    if not is_asked():
        return
    import argcomplete

    # What stands before this parser's own words, names of commands, is no argument of it.
    os.environ[_ASKED] = str(int(os.environ[_ASKED]) + len(parser.prog.split()) - 1)
    argcomplete.autocomplete(parser, always_complete_options="long")


def offer_names(names: Sequence[str], prog: str) -> None:
    """The same where one of some names comes first, as a command or an action."""
    parser = argparse.ArgumentParser(prog=prog, add_help=False)
    parser.add_argument("name", choices=list(names))
    offer(parser)


def shell_code(shell: str) -> str:
    """What that shell is to run when it starts, so that it asks."""
    from argcomplete.shell_integration import shellcode

    return str(shellcode(["liquid"], shell=shell))
