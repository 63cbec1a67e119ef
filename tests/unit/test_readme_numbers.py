"""Every number in README.md is that of the source which this table names: the log, the results, a page, the program."""

from __future__ import annotations

import re

import pytest
from tests.support.readme import REPOSITORY

from liquid_llm import errors

LOG = "docs/LOG.md"
TAIL_KEEPS = (
    "32,768 tokens a step 100 bytes keep all of the gain that full logits have over plain training, at 1,024 tokens "
    "97.6 % at T=1 and 91 to 92 % at T=2"
)

# Words of README -> a file, and words in it, or several such. Each number of the former is, rounded as it stands there,
# a number of the latter.
SOURCES: dict[str, list[tuple[str, str]]] = {
    "Python 3.10 or newer": [("pyproject.toml", 'requires-python = ">=3.10"')],
    "a student of 24 layers out of a teacher of 30": [(LOG, "24 of 30 layers by importance, 48 steps")],
    "held-out loss, nats a token | 3.61 | 2.70 | 2.66 | 2.62 |": [(LOG, "3.607 | 2.700 | 2.656 | 2.620")],
    "KL from the teacher | 1.10 | 1.55 | **0.63** | 0 |": [
        (LOG, "KL from the teacher | 1.097 | 1.557 | 0.633 | 0 |"),
        (LOG, "KL 0.633 against 1.550"),  # the run of the day after
    ],
    "first choice | 50 % | 54 % | **63 %**": [(LOG, "agreement | 50 % | 54 % | 63 %")],
    "(-0.04, 95 % interval -0.09 to +0.01)": [(LOG, "cross-entropy -0.043 (-0.093 to +0.008)")],
    "A student of 16 million parameters": [("docs/results.md", "`liquid-16m` (16 million parameters")],
    "**0.19 nats better than plain training**": [("docs/results.md", "0.185 nats at alpha 0.7")],
    "(three seeds, 95 % interval 0.12 to 0.25)": [(LOG, "by 0.185 nats (0.120 to 0.249)")],
    "a store of about 100 bytes a token": [(LOG, "Does a store of about 100 bytes keep 97 % of the gain")],
    "178 of transformers' 189 families": [(LOG, "178 of 189 (94 %)")],
    "about 104 bytes on school mathematics, 122 on Python and 141 on prose": [
        (LOG, "103.7 bytes a position on school mathematics, 121.6 on Python and 140.6 on prose")
    ],
    "instead of 98,304": [(LOG, "`full` | 0.000 | 0.000 | 1.00x | 98,304")],
    "With 32,768 tokens a step it kept all of what full logits gain in held-out loss; with 1,024 tokens 97.6 % at T=1 "
    "and 91 to 92 % at T=2": [
        (
            "docs/decisions/0009-codec-tail.md",
            TAIL_KEEPS,
        )
    ],
    "could not reach the bucket within 20 s": [("src/liquid_llm/wiring/mirrors.py", "SENDING_SECONDS = 20.0")],
    "Apache License 2.0": [("LICENSE", "Version 2.0")],
}
# What is no figure: the share that all intervals have, the step that a run begins with.
PLAIN = ("95 % interval", "before step 1,")
EXIT_CODES = re.compile(r"^## Exit codes\n(.*?)(?=^## )", re.M | re.S)
_NUMBER = re.compile(r"(?<![\w.])[-+]?\d[\d,]*(?:\.\d+)?(?![\w])")


def flat(text: str) -> str:
    return re.sub(r"\s+", " ", text.replace("−", "-"))


def numbers(text: str) -> list[str]:
    return [one.rstrip(",") for one in _NUMBER.findall(text)]


def prose() -> str:
    """README without its code, its commands and the targets of its links."""
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"^```.*?^```|^    .*?$", "", text, flags=re.M | re.S)
    text = EXIT_CODES.sub(lambda match: re.sub(r"(?:(?<=· )|^)\d+ ", "", match[0], flags=re.M), text)
    return flat(re.sub(r"\]\([^)]*\)", "]", re.sub(r"`[^`\n]*`", "", text)))


@pytest.mark.parametrize("words", SOURCES)
def test_each_figure_is_its_source_s(words: str) -> None:
    assert words in prose(), "README does not say this any more: take it out of the table"
    found = []
    for file, said in SOURCES[words]:
        text = flat((REPOSITORY / file).read_text(encoding="utf-8"))
        assert flat(said) in text, f"{file} does not say this"
        found += [float(one.replace(",", "")) for one in numbers(flat(said))]
    for plain in PLAIN:
        words = words.replace(plain, "")
    for number in numbers(words):
        decimals = len(number.partition(".")[2])
        value, half = abs(float(number.replace(",", ""))), 0.5 * 10**-decimals + 1e-9
        assert any(abs(value - abs(one)) <= half for one in found), f"{number} is not in {found}"


def test_no_number_is_without_a_source() -> None:
    left = prose()
    for words in (*sorted(SOURCES, key=len, reverse=True), *PLAIN):
        left = left.replace(words, "")
    alone = [left[max(0, one.start() - 40) : one.end() + 20] for one in _NUMBER.finditer(left)]
    assert not alone, "name the source of these numbers in SOURCES"


def test_the_exit_codes_are_those_of_the_errors() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.LiquidError)]
    section = EXIT_CODES.search((REPOSITORY / "README.md").read_text(encoding="utf-8"))
    assert section
    listed = {int(one) for one in re.findall(r"(?:^|· )(\d+) ", section[1].strip(), re.M)}
    assert listed == {kind.exit_code for kind in kinds} - {errors.LiquidError.exit_code} | {0, 130}
