"""What a codec gives back of its stored bytes, for all positions at once."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from benchmarks.retention.data import Texts
from benchmarks.retention.sketch import Sketch
from numpy.typing import NDArray
from torch import Tensor

from liquid_llm.losses.signals import DenseSignal, LogitsSignal, OutputHead, Signal, SparseSignal
from liquid_llm.signal_store.codecs import get_codec


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
        """[rows, vocab] at the temperature: the sketch's; likeliest ids as they are, the rest scaled to its mass."""
        assert self.hidden is not None
        assert self.head is not None
        assert self.temperature is not None
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
            assert self.temperature is not None
            assert self.head is not None
            logits = torch.empty(rows.numel(), self.head.vocab_size, dtype=torch.float16, device=rows.device)
            for begin in range(0, rows.numel(), 2048):
                part = self.log_probs(rows[begin : begin + 2048]) * self.temperature
                logits[begin : begin + 2048] = part.clamp_(min=-60000)
            mask = torch.ones(rows.numel(), dtype=torch.bool, device=rows.device)
            return LogitsSignal(logits, mask, num_signal=rows.numel())
        if self.hidden is not None:
            assert self.head is not None
            return DenseSignal(self.hidden[rows], self.head)
        assert self.columns is not None
        assert self.temperature is not None
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


def sketch_arm(
    texts: Texts, held: Texts, teacher: OutputHead, num_bytes: int, exact: int, temperatures: Sequence[float]
) -> tuple[float, dict[float, Kept]]:
    """The texts through a sketch, and how many bytes it takes; prints how far it is from the teacher."""
    assert texts.hidden is not None
    assert held.hidden is not None
    order = torch.randperm(texts.hidden.shape[0], generator=torch.Generator().manual_seed(5))
    sketch = Sketch(teacher, texts.hidden[order[:12288].to(texts.hidden.device)], num_bytes)
    extra = 2.0 * exact  # what codec ``tail`` takes for an exact id and its level
    held_rows, rows = sketch.rows(held.hidden), sketch.rows(texts.hidden)
    kept = {}
    for temperature in sorted({*temperatures, 0.7, 1.3}):
        mine = Kept(num_bytes + extra, temperature, hidden=held_rows, head=sketch.head(temperature))
        if exact:
            mine.exact = (held.hidden, teacher, exact)
        print(f"  T={temperature:g}: {quality(teacher, held, mine, temperature)}", flush=True)
        if temperature in temperatures:
            kept[temperature] = replace(mine, hidden=rows)
            if exact:
                kept[temperature].exact = (texts.hidden, teacher, exact)
    return num_bytes + extra, kept


@torch.no_grad()
def quality(teacher: OutputHead, held: Texts, kept: Kept, temperature: float) -> str:
    """KL(teacher || stored) by type, and the bias of ids' mean probabilities: frequent ids to rare ones."""
    assert held.hidden is not None
    owner = np.repeat(held.types, np.diff(held.starts))
    words = []
    truth = torch.zeros(teacher.vocab_size, device=held.hidden.device, dtype=torch.float64)
    found = truth.clone()
    for kind in dict.fromkeys(held.types):
        rows = torch.from_numpy(np.flatnonzero(owner == kind)[:4096]).to(held.hidden.device)
        total = 0.0
        for part in rows.split(1024):
            p = torch.log_softmax(teacher.logits(held.hidden[part]) / temperature, 1)
            q = kept.log_probs(part)
            total += float((p.exp() * (p - q)).sum())
            truth += p.exp().sum(0).double()
            found += q.exp().sum(0).double()
        words.append(f"{kind} {total / rows.numel():.4f}")
    order = truth.argsort(descending=True)
    parts = [order[:100], order[100:1000], order[1000:10000], order[10000:]]
    biases = [f"{100 * float(found[part].sum() / truth[part].sum() - 1):+.2f}" for part in parts if part.numel()]
    return f"KL {', '.join(words)}; mass of ids by frequency off by {', '.join(biases)} %"
