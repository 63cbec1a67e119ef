"""What it takes to score very many tokens with a large teacher, to keep its signal and to train on it: arithmetic.

    python benchmarks/scaling/internet.py                                            the table of docs/scaling.md
    python benchmarks/scaling/internet.py --tokens 5e11 --parameters 32e9 --hidden 5120 --gpu-hour 2.1
    python benchmarks/scaling/internet.py --rate 11000                               tokens a second that you measured

Measured is one figure: 27,600 tokens a second of an 8B teacher with codec ``tail`` on one H200, encoding and all
(docs/LOG.md, "First time on a GPU"). Other teachers take as many times longer as they have parameters, other cards as
their makers' rates of dense bfloat16 products differ. Prices are examples: see ``Prices``.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields

VOCAB = 128_256
MEASURED_RATE, MEASURED_PARAMETERS, MEASURED_CARD = 27_600.0, 8.03e9, "H200"
CARDS = {"H200": 989e12, "H100": 989e12, "L4": 121e12}  # operations a second, dense bfloat16, as NVIDIA says
TEXT_BYTES = 4.2  # of a token: 50 MB of JSON lines made 12.4 million (docs/LOG.md, "Data side")
TOKENISED = 1.1e6  # tokens a second of one idle core (there, too)
SHARD_TOKENS = 32e6  # of a data file of 128 MiB
SIGNAL_SHARD_BYTES = 64e6


@dataclass(frozen=True)
class Teacher:
    name: str
    parameters: float
    hidden: int


TEACHERS = (Teacher("8B", 8.03e9, 4096), Teacher("70B", 70.6e9, 8192))
# Bytes a position. ``tail`` with SmolLM2 as a teacher: mathematics and prose as it is, and a mean with few draws.
SIGNALS: dict[str, tuple[float, float]] = {
    "tail": (104.0, 141.0),
    "tail, few draws": (40.0, 50.0),
}


@dataclass(frozen=True)
class Prices:
    """US dollars. Those of the store and the network are Google's example (cloud.google.com/storage/pricing-examples:
    a region of the United States, to the Internet); those of an hour are round numbers, not anybody's list.
    """

    gpu_hour: float = 3.0
    gb_month: float = 0.020
    gb_out: float = 0.12
    thousand_writes: float = 0.005
    thousand_reads: float = 0.0004


def capture_rate(parameters: float, card: str = MEASURED_CARD) -> float:
    """Tokens a second of one card: measured for 8B on an H200, else in proportion."""
    return MEASURED_RATE * (MEASURED_PARAMETERS / parameters) * (CARDS[card] / CARDS[MEASURED_CARD])


def gpu_hours(tokens: float, rate: float) -> float:
    return tokens / rate / 3600


def bytes_of(tokens: float, teacher: Teacher) -> dict[str, tuple[float, float]]:
    """Least and most bytes of each kind of signal."""
    exact = {"full logits, bfloat16": 2.0 * VOCAB, "hidden states, bfloat16": 2.0 * teacher.hidden}
    kinds = {name: (size, size) for name, size in exact.items()} | SIGNALS
    return {name: (tokens * low, tokens * high) for name, (low, high) in kinds.items()}


def requests(tokens: float, signal_bytes: float) -> tuple[float, float]:
    """Objects written by a capture in units and read by an epoch of whole shards: a unit has a marker beside shards."""
    units = max(1.0, tokens / SHARD_TOKENS)
    shards = max(units, signal_bytes / SIGNAL_SHARD_BYTES)
    return shards + units, shards + 2 * units


def size(amount: float) -> str:
    """Decimal bytes, three digits."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if amount < 999.5:
            return f"{amount:.3g} {unit}"
        amount /= 1000
    return f"{amount:.3g} PB"


def dollars(amount: float) -> str:
    """Two digits, which is more than prices have."""
    if amount < 0.005:
        return "under $0.01"
    if amount < 99.5:
        return f"${amount:.2g}"
    digits = len(f"{amount:.0f}") - 2
    return f"${round(amount, -digits):,.0f}"


def few_digits(amount: float) -> str:
    return f"{amount:,.0f}" if amount >= 10 else f"{amount:.2g}"


def span(low: str, high: str) -> str:
    return low if low == high else f"{low} to {high}"


def table(
    counts: tuple[float, ...], teachers: tuple[Teacher, ...], prices: Prices, rate: float | None = None
) -> list[list[str]]:
    """Rows of words: a head, then one of each amount."""
    columns = [(tokens, teacher) for tokens in counts for teacher in teachers]
    rows = [
        [
            "",
            *(
                f"{tokens:.0e} tokens, {teacher.name}".replace("e+0", "e").replace("e+", "e")
                for tokens, teacher in columns
            ),
        ]
    ]

    def add(name: str, cells: list[str]) -> None:
        rows.append([name, *cells])

    for kind in bytes_of(1, teachers[0]):
        add(kind, [span(*map(size, bytes_of(tokens, teacher)[kind])) for tokens, teacher in columns])
    hours = {
        card: [gpu_hours(tokens, rate or capture_rate(teacher.parameters, card)) for tokens, teacher in columns]
        for card in ("H200", "L4")
    }
    for card, found in hours.items():
        fits = [card != "L4" or teacher.parameters < 10e9 for _, teacher in columns]
        add(
            f"GPU-hours, {card}",
            [f"{one:,.0f}" if fit else "does not fit" for one, fit in zip(found, fits, strict=True)],
        )
    add("days of 64 H200", [few_digits(one / 64 / 24) for one in hours["H200"]])
    add("their price", [dollars(one * prices.gpu_hour) for one in hours["H200"]])
    few = [bytes_of(tokens, teacher)["tail, few draws"] for tokens, teacher in columns]
    whole = [bytes_of(tokens, teacher)["tail"] for tokens, teacher in columns]
    kept = [pair if tokens >= 1e10 else other for pair, other, (tokens, _) in zip(few, whole, columns, strict=True)]
    add("`tail` kept a month", [span(*(dollars(one / 1e9 * prices.gb_month) for one in pair)) for pair in kept])
    add("taken out of the region once", [span(*(dollars(one / 1e9 * prices.gb_out) for one in pair)) for pair in kept])
    both = [requests(tokens, pair[1]) for (tokens, _), pair in zip(columns, kept, strict=True)]
    add(
        "objects written, their price",
        [f"{write:,.0f}, {dollars(write / 1e3 * prices.thousand_writes)}" for write, _ in both],
    )
    add(
        "objects read an epoch, their price",
        [f"{read:,.0f}, {dollars(read / 1e3 * prices.thousand_reads)}" for _, read in both],
    )
    add(
        "text, and core-hours to tokenise it",
        [f"{size(tokens * TEXT_BYTES)}, {few_digits(tokens / TOKENISED / 3600)}" for tokens, _ in columns],
    )
    return rows


def reading(tokens_per_second: float) -> dict[str, float]:
    """Bytes a second of each kind of signal that a student reads which takes so many tokens a second."""
    return {name: tokens_per_second * high for name, (_, high) in bytes_of(1, TEACHERS[0]).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=float, nargs="+", default=[1e9, 1e12])
    parser.add_argument("--parameters", type=float, help="of the teacher")
    parser.add_argument("--hidden", type=int, default=4096, help="its width")
    parser.add_argument("--rate", type=float, help="tokens a second of one GPU, if you have measured it")
    for field in fields(Prices):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=float, default=field.default, help="US dollars")
    options = parser.parse_args()
    prices = Prices(**{field.name: getattr(options, field.name) for field in fields(Prices)})
    teachers = TEACHERS
    if options.parameters:
        teachers = (Teacher(f"{options.parameters / 1e9:g}B", options.parameters, options.hidden),)
    for row in table(tuple(options.tokens), teachers, prices, options.rate):
        print("| " + " | ".join(row) + " |")
    print("\nbytes a second that a student reads which takes 59,000 tokens a second")
    for name, rate in reading(59_000).items():
        print(f"| {name} | {size(rate)} |")


if __name__ == "__main__":
    main()
