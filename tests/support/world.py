"""A small offline world in which the reference command lines run as written.

    hf/       a Hugging Face cache: the models the commands name, small and with random weights but of the real
              architectures, one tokenizer trained on our texts, and the dataset wikitext / wikitext-103-raw-v1
    objects/  what the bucket liquid-llm-bucket-2 holds: shards of the three types, their manifest, two students

The world is built once a test session and shared by its processes; each process serves its own copy of the bucket
from a real fake-gcs-server.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tests.support import texts
from tests.support.gcs import FakeGcs, running_server
from tests.support.pythons import Pythons
from tests.support.servers import server

BUCKET = "liquid-llm-bucket-2"
MANIFEST = f"gs://{BUCKET}/datasets/stage1/manifests/stage1.jsonl"
STAGE0_STUDENT = f"gs://{BUCKET}/stage0/checkpoints/vertex_runs/20251007-174419/best.pt"
STAGE1_STUDENT = f"gs://{BUCKET}/stage1/stage1.pt"
REPOSITORY = Path(__file__).resolve().parents[2]
VOCAB_SIZE = 1024

# Settings of the machine the tests run on that would reach into the world.
_FOREIGN = ("AIP_", "HF_", "CLOUD_ML_", "CLUSTER_SPEC", "HUGGING", "TRANSFORMERS_", "STORAGE_", "GCSFS_", "PYTEST_")


@dataclass(frozen=True)
class World:
    """A built world whose bucket is being served.

    Attributes:
        hf_home: the Hugging Face cache.
        bucket: the folder the served bucket's objects lie in; looking there is quicker than asking the server.
        env: the whole environment for a child process.
        workdir: a folder for child processes to run in.
    """

    hf_home: Path
    bucket: Path
    env: dict[str, str]
    workdir: Path

    def run(
        self, command: str | Sequence[str], *, timeout: float = 240, cwd: Path | None = None, **env: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in this world: a string goes through bash, as a reader of the README would run it."""
        argv = ["bash", "-c", command] if isinstance(command, str) else list(command)
        return subprocess.run(
            argv,
            env={**self.env, **env},
            cwd=cwd or self.workdir,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def run_forked(self, command: str) -> subprocess.CompletedProcess[str]:
        """The same, but that ``python`` and ``liquid`` have the libraries already; not for how they start."""
        with Pythons(Path(tempfile.mkdtemp()), _with_models_of(self.hf_home)) as pythons:
            return self.run(command, PATH=os.pathsep.join([str(pythons.folder), self.env["PATH"]]))

    def put(self, name: str, data: bytes) -> None:
        """Put an object into the bucket, by the front door: the server keeps attributes beside what it is sent."""
        _upload(self.env["STORAGE_EMULATOR_HOST"], name, data)

    def new_bucket(self, name: str) -> None:
        """Make another bucket, empty, on the same server."""
        FakeGcs(self.env["STORAGE_EMULATOR_HOST"], self.bucket.parent).new_bucket(name)

    def objects(self, bucket: str) -> list[str]:
        """Names of all objects in a bucket, as the server tells them."""
        url = f"{self.env['STORAGE_EMULATOR_HOST']}/storage/v1/b/{bucket}/o"
        with urllib.request.urlopen(url, timeout=30) as answer:
            return [item["name"] for item in json.load(answer).get("items", [])]


@cache
def _with_models_of(hf_home: Path) -> Any:
    """A server whose libraries have looked for their cache, and whether there is a hub, when they were imported."""
    offline = dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"), "1")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_FOREIGN)}
    return server("tests.support.preloaded", {**kept, **offline, "HF_HOME": str(hf_home)})


def build(folder: Path) -> None:
    """Make ``hf/`` and ``objects/`` in ``folder``."""
    rng = random.Random(20251007)
    articles = [texts.article(rng) for _ in range(160)]
    problems = [texts.word_problem(rng) for _ in range(64)]
    lengths = [100 if number == 7 else rng.randrange(7) for number in range(64)]  # one is longer than a window
    functions = [texts.function(rng, extra_steps=length) for length in lengths]
    tokenizer = train_tokenizer([line for lines in articles for line in lines] + problems + functions)
    _write_models(folder / "hf" / "hub", tokenizer)
    _write_dataset(folder / "hf" / "datasets", articles)
    bucket = folder / "objects"
    _write_shards(bucket / "datasets" / "stage1", articles, problems, functions)
    _write_students(bucket, len(tokenizer))


@contextlib.contextmanager
def served(built: Path, folder: Path) -> Iterator[World]:
    """Serve a fresh copy of ``built``'s bucket from ``folder``."""
    workdir = folder / "work"
    workdir.mkdir(parents=True)
    with running_server(folder) as server:
        server.new_bucket(BUCKET)
        for path in sorted((built / "objects").rglob("*")):
            if path.is_file():
                _upload(server.base, path.relative_to(built / "objects").as_posix(), path.read_bytes())
        env = {key: value for key, value in os.environ.items() if not key.startswith(_FOREIGN)}
        env |= {
            "STORAGE_EMULATOR_HOST": server.base,
            "HF_HOME": str(built / "hf"),
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "XDG_CACHE_HOME": str(folder / "cache"),
            "PYTHONPATH": str(REPOSITORY / "src"),
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        }
        yield World(hf_home=built / "hf", bucket=server.root / BUCKET, env=env, workdir=workdir)


def _upload(base: str, name: str, data: bytes) -> None:
    query = urllib.parse.urlencode({"uploadType": "media", "name": name})
    url = f"{base}/upload/storage/v1/b/{BUCKET}/o?{query}"
    request = urllib.request.Request(url, data, {"Content-Type": "application/octet-stream"})
    with urllib.request.urlopen(request, timeout=30):
        pass


def train_tokenizer(lines: list[str]) -> Any:
    """A byte-level BPE tokenizer of ``VOCAB_SIZE`` entries whose first is the end-of-text token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[end],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(lines, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=end, eos_token=end, unk_token=end)


def _write_models(hub: Path, tokenizer: Any) -> None:
    import torch
    from transformers import GPT2LMHeadModel, LlamaForCausalLM

    vocab = len(tokenizer)
    padded = vocab + 40  # an embedding longer than the tokenizer, as many published models have
    recipes: dict[str, Any] = {
        "gpt2-xl": lambda: GPT2LMHeadModel(_gpt2_config(vocab, positions=1024)),
        "meta-llama/Llama-3.2-3B": lambda: LlamaForCausalLM(_llama_config(vocab, hidden=64, layers=2)),
        "meta-llama/Llama-3.1-8B": lambda: LlamaForCausalLM(_llama_config(padded, hidden=96, layers=3)),
    }
    for seed, (name, make) in enumerate(recipes.items()):
        revision = hashlib.sha1(name.encode(), usedforsecurity=False).hexdigest()
        root = hub / ("models--" + name.replace("/", "--"))
        (root / "refs").mkdir(parents=True)
        (root / "refs" / "main").write_text(revision)
        torch.manual_seed(seed)
        make().save_pretrained(root / "snapshots" / revision)
        tokenizer.save_pretrained(root / "snapshots" / revision)


def _gpt2_config(vocab: int, positions: int) -> Any:
    from transformers import GPT2Config

    return GPT2Config(
        vocab_size=vocab, n_positions=positions, n_embd=64, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )


def _llama_config(vocab: int, hidden: int, layers: int) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        bos_token_id=0,
        eos_token_id=0,
    )


def _liquid_config(vocab: int) -> Any:
    from transformers import Lfm2Config

    return Lfm2Config(
        vocab_size=vocab,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=["conv", "full_attention", "conv"],
        max_position_embeddings=2048,
        block_auto_adjust_ff_dim=False,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )


def _write_dataset(cache: Path, articles: list[list[str]]) -> None:
    """Put the dataset where an earlier load from the hub would have left it, under both of its names."""
    from datasets import disable_progress_bars
    from datasets.packaged_modules.json.json import Json

    disable_progress_bars()
    cuts = {"train": articles[:128], "validation": articles[128:144], "test": articles[144:]}
    source = cache.parent / "source"
    source.mkdir(parents=True)
    files = {}
    for split, part in cuts.items():
        files[split] = str(source / f"{split}.jsonl")
        rows = [{"text": line} for lines in part for line in lines]
        Path(files[split]).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = "wikitext-103-raw-v1"
    Json(
        cache_dir=str(cache),
        dataset_name="wikitext",
        config_name=config,
        config_id=config,  # the id made from data files could be guessed by no later load
        hash="made",
        data_files=files,
    ).download_and_prepare()
    shutil.copytree(cache / "wikitext", cache / "Salesforce___wikitext")
    shutil.rmtree(source)


def _write_shards(stage1: Path, articles: list[list[str]], problems: list[str], functions: list[str]) -> None:
    """Shards in three formats; maths records have ids, prose and code records are named by their text."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    prose = [line.strip() for lines in articles[:80] for line in lines if len(line) > 40]
    maths = [{"text": text, "type": "math_tool", "sample_id": f"math-{i:05d}"} for i, text in enumerate(problems)]
    core, maths_shards, code = stage1 / "core" / "shards", stage1 / "math" / "shards", stage1 / "code" / "shards"
    for folder in (core, maths_shards, code, stage1 / "manifests"):
        folder.mkdir(parents=True)
    for number in (0, 1):
        part = f"part-{number:05d}"
        (core / f"{part}.jsonl").write_bytes(_lines([{"text": text, "type": "lm"} for text in prose[number::2]]))
        (maths_shards / f"{part}.jsonl.gz").write_bytes(gzip.compress(_lines(maths[number::2]), mtime=0))
        pq.write_table(pa.table({"text": functions[number::2]}), code / f"{part}.parquet")
    places = f"gs://{BUCKET}/datasets/stage1"
    manifest = [
        {"path": f"{places}/core/shards/*.jsonl", "type": "lm", "weight": 1.0},
        {"path": f"{places}/math/shards/*.jsonl.gz", "type": "math_tool", "weight": 0.5},
        {"path": f"{places}/code/shards/*.parquet", "type": "code", "weight": 0.5},
    ]
    (stage1 / "manifests" / "stage1.jsonl").write_bytes(_lines(manifest))


def _lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _write_students(bucket: Path, vocab: int) -> None:
    """Weights with their configuration, as a foreign trainer might leave them: no optimizer, no sidecar."""
    import torch
    from transformers import GPT2LMHeadModel, Lfm2ForCausalLM

    torch.manual_seed(10)
    students = {
        STAGE0_STUDENT: GPT2LMHeadModel(_gpt2_config(vocab, positions=1024)),  # it is evaluated at 1024 tokens too
        STAGE1_STUDENT: Lfm2ForCausalLM(_liquid_config(vocab)),
    }
    for uri, model in students.items():
        path = bucket / uri.removeprefix(f"gs://{BUCKET}/")
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"student": model.state_dict(), "config": model.config.to_dict()}, path)
