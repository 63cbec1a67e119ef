"""What the pages of the documentation say is there: options, commands, messages, variables, links, places in pages."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from docs import generate, tree
from tests.support import readme
from tests.support.readme import REPOSITORY
from tests.support.sources import module_files

from liquid_llm.cli.parse import parse as parse_words

DOCS = REPOSITORY / "docs"
PAGES = [REPOSITORY / "README.md", *sorted(path for path in DOCS.glob("*.md") if path.name != "LOG.md")]
COMMANDS = {command.words: command for command in generate.commands()}
OPTIONS = {
    name
    for command in (*COMMANDS.values(), generate.common())
    for option in command.options
    for name in (option.name, *option.aliases)
}
# Options of other programs that pages name, and what stands for any option.
OTHERS = {
    *("cpu", "env", "multi_gpu", "num_processes", "kill_on_bad_exit", "nnodes", "nproc_per_node", "standalone"),
    *("rdzv_backend", "rdzv_endpoint", "shutdown_timeout", "signals_to_handle", "array", "nodes", "region"),
    *("display_name", "model", "model_args", "target", "no_deps", "help", "version", "config", "no_index", "option"),
    *("rounds", "millions", "passes"),
    *("max_logprobs", "hf_overrides", "speculative_config", "kv_transfer_config"),
}  # fmt: skip
_CODE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
_FACES = {
    "python -m stage1_hybrid.precompute_hybrid_logits": "liquid capture",
    "python -m stage1_hybrid.cli": "liquid train",
    "python -m trainer.entrypoint": "liquid anneal",
}


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_option_that_a_page_names_is_one(path: Path) -> None:
    named = {name.replace("-", "_") for name in re.findall(r"(?<![\w-])--([a-zA-Z][\w-]*)", text_of(path))}
    assert not {name for name in named - OPTIONS - OTHERS if name.removeprefix("no_") not in OPTIONS}


def written_commands() -> Iterator[tuple[str, str]]:
    """Page and command: those of ``sh`` blocks, of indented lines, and in the text."""
    for path in PAGES:
        text = text_of(path)
        found = readme.commands(text)
        found += [line.split("  ")[0] for line in re.findall(r"^    (liquid \w.*)$", text, re.M)]
        found += [f"{code} …" for code in _CODE.findall(text) if code.startswith("liquid ")]  # a mention, seldom whole
        for command in dict.fromkeys(found):
            for start, ours in _FACES.items():
                command = command.replace(start, ours)
            if command.startswith("liquid "):
                yield path.name, command


@pytest.mark.parametrize(("page", "command"), sorted(set(written_commands())))
def test_every_command_that_a_page_shows_is_understood(page: str, command: str, tmp_path: Path) -> None:
    """By the program's own parser; of one that is cut short (``…``) or has placeholders, the words that are there."""
    words = shlex.split(command.partition(" # ")[0].replace(" …", "").replace(" ...", ""))[1:]
    if not words or words[0] in ("--help", "help") or words[0].isupper():
        return
    found = max((name for name in COMMANDS if tuple(words[: len(name)]) == name), key=len, default=None)
    if found is None:  # a command of commands alone, such as `liquid store`
        assert any(name[0] == words[0] for name in COMMANDS), f"no command {words[0]}"
        return
    of, rest = COMMANDS[found], without_file(words[len(found) :])
    if words[0] == "study" and rest[:1] == ["anneal"]:
        return  # its options are those of another face, which the command itself chooses
    if any("|" in word or word.isupper() for word in rest) or "…" in command:
        rest = [word for word in rest if word.startswith("--") and "=" in word and "…" not in word]
    positionals = of.positionals if any(not word.startswith("-") for word in rest) else ()
    parse_words(of.options, rest, of.name, "", face=of.face, positionals=positionals)  # type: ignore[arg-type]


def without_file(words: list[str]) -> list[str]:
    """The words without ``--config FILE``, whose file a page only speaks of."""
    at = [n for n, word in enumerate(words) if word == "--config"]
    return [w for n, w in enumerate(words) if not w.startswith("--config") and n - 1 not in at]


def test_the_pages_hold_commands_of_every_kind() -> None:
    named = {shlex.split(command.partition(" # ")[0])[1] for _, command in written_commands()}
    assert {"train", "anneal", "capture", "prepare", "store", "evaluate", "study", "memory", "export"} <= named


# ------------------------------------------------------------------------------------------------ messages, variables


def explained() -> list[str]:
    """The messages that the page on troubleshooting explains."""
    return re.findall(r"^#### (.+)$", text_of(DOCS / "troubleshooting.md"), re.M)


@pytest.mark.parametrize("message", explained())
def test_every_message_that_is_explained_is_one_of_the_program(message: str) -> None:
    filled = message.replace("…", "something")
    assert any(one.fits(filled) for one in generate.messages()), "no error in src says this"


def test_a_message_of_hardly_a_word_explains_nothing() -> None:
    assert not [one for one in generate.messages() if one.fits("no such pupil") or one.fits("no fire")]


def test_the_messages_that_people_meet_first_are_explained() -> None:
    """Those of the reviews' new users, those that another system must answer for, and what several places say."""
    filled = [message.replace("…", "something") for message in explained()]
    for module, problem in (
        ("models/sources", "no such model"),
        ("models/sources", "access to this Hugging Face model is refused, or there is no such model"),
        ("cli/parse", "unknown option --{}"),
        ("storage", "no backend for {}:// is installed"),
        ("storage", "not found"),
        ("data", "the path matches no file"),
        ("checkpoint", "there is no checkpoint here"),
        ("", "another run, process {}, is using this run directory"),
        ("", "the loss or its gradient is not finite"),
        ("", "the device's memory does not suffice"),
        ("", "{} and {} have different tokenizers"),
    ):
        (message, *_) = [one for one in generate.messages() if one.problem == problem and module in one.module]
        assert any(message.fits(text) for text in filled), problem


def test_all_messages_are_listed_with_what_they_tell_to_do() -> None:
    page, found = generate.messages_page(), generate.messages()
    assert len(found) > 300
    assert {one.exit_code for one in found} >= {2, 3, 4, 5, 6, 75}
    assert page.count("\n| ") >= len(found)
    assert "--no-deps" in page


_READS = (
    r'(?:environ|given|environment)(?:\.get\(|\.setdefault\(|\[)\s*"(\w+)"',
    r'"(\w+)" (?:not )?in (?:os\.)?(?:environ|given)',
    r'\bnumber\("(\w+)"',
    r'_ASKED = "(\w+)"',
)
_LISTS = (r"_VARIABLES = \(([^)]*)\)\n", r"told = \(([^)]*)\)", r"environ for name in \(([^)]*)\)")


def variables_in_source() -> set[str]:
    """The environment's variables that the sources read or set, where the name stands in the source."""
    text = "\n".join(text_of(path) for path in module_files().values())
    names = {name for pattern in _READS for name in re.findall(pattern, text)}
    lists = [one for pattern in _LISTS for one in re.findall(pattern, text)]
    return {name for name in names | set(re.findall(r'"(\w+)"', " ".join(lists))) if name.isupper()}


def test_every_variable_of_the_environment_is_in_the_table_and_no_other() -> None:
    table = set(re.findall(r"`(_?[A-Z][A-Z0-9_]+)`", text_of(DOCS / "environment.md").partition("Libraries read")[0]))
    read = {name for name in variables_in_source() if not name.endswith("_") or name.startswith("MALLOC_")}
    assert {"HF_TOKEN", "AIP_MODEL_DIR", "RANK", "GLIBC_TUNABLES"} <= read
    assert read - table == set(), "read by the program, and not in docs/environment.md"
    source = "\n".join(text_of(path) for path in module_files().values())
    assert not {name for name in table if f'"{name}"' not in source}, "in docs/environment.md, and nowhere in src"


# ------------------------------------------------------------------------------------------------ links and the site


@pytest.mark.parametrize(
    "path", [*REPOSITORY.glob("*.md"), *sorted(DOCS.rglob("*.md"))], ids=lambda path: str(path.relative_to(REPOSITORY))
)
def test_links_lead_somewhere_and_to_a_place_in_it(path: Path) -> None:
    for target in re.findall(r"\]\((?!https?://)([^)\s]+)\)", text_of(path)):
        file, _, place = target.partition("#")
        to = path.parent / file if file else path
        assert to.exists(), target
        if place and to.suffix == ".md":
            assert place in places(text_of(to)), target


def places(text: str) -> set[str]:
    """What the headings of a page are called by a link."""
    plain = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    headings = [re.sub(r"[`*]", "", one) for one in re.findall(r"^#+ (.+)$", plain, re.M)]
    return {re.sub(r"[^\w\- ]", "", one).strip().lower().replace(" ", "-") for one in headings}


def test_the_tree_has_every_page_and_nothing_that_another_place_must_serve(tmp_path: Path) -> None:
    tree.write_tree(tmp_path)
    pages = {str(path.relative_to(tmp_path / "docs")) for path in (tmp_path / "docs").rglob("*.md")}
    assert {path.name for path in DOCS.glob("*.md")} <= pages
    assert {"decisions/index.md", "repository/README.md", "repository/examples/skypilot.yaml.md"} <= pages
    whole = {name: (tmp_path / "docs" / name).read_text(encoding="utf-8") for name in pages}
    assert not [name for name, text in whole.items() if "<!-- generated:" in text and "generate.py" not in text]
    for name, text in whole.items():
        if not name.startswith("repository/"):
            assert "```mermaid" not in text, name
            assert "](../" not in text.replace("](../../", "](../") or name.count("/"), f"{name} leads out of the site"
    assert "unpkg" not in (tmp_path / "mkdocs.yml").read_text()


def test_a_changed_diagram_without_a_new_picture_is_refused() -> None:
    page = text_of(DOCS / "architecture.md")
    assert "images/diagram-" in tree.with_pictures(page, "architecture.md")
    with pytest.raises(ValueError, match="no picture"):
        tree.with_pictures(page.replace("flowchart TD\n", "flowchart TD\n    more --> manifest\n"), "architecture.md")


def test_the_page_of_options_has_every_option_with_its_default() -> None:
    page = generate.options_page()
    for command in COMMANDS.values():
        assert f"\n## {command.name}\n" in page
        for option in command.options:
            row = re.search(rf'^\| <a id="{"-".join((*command.words, option.name))}"></a>.*$', page, re.M)
            assert row, f"{command.name} --{option.name}"
            assert row[0].replace("\\|", "").count("|") == 5, "four cells"
            default = option.default_for(command.face)
            if isinstance(default, int | float) and not isinstance(default, bool):
                assert f"| `{default:g}` |" in row[0] or f"| `{default}` |" in row[0]


def test_every_command_of_the_program_is_found() -> None:
    assert {("train",), ("store", "pack"), ("export",), ("doctor",)} <= COMMANDS.keys()
    assert {words[0] for words in COMMANDS} >= set(re.findall(r"^\| `liquid (\w+)`", text_of(PAGES[0]), re.M))


def test_the_site_is_built_strictly_in_ci() -> None:
    """``--quiet`` would have mkdocs overlook the warnings that ``--strict`` stops at."""
    (line,) = [line for line in text_of(REPOSITORY / "Makefile").splitlines() if "mkdocs build" in line]
    assert "--strict" in line
    assert "--quiet" not in line
    assert "\nmake docs\n" in text_of(REPOSITORY / ".ci" / "run")
