"""Which combinations of values cannot work, in words: every problem of a configuration at once."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from liquid_llm.errors import UsageError
from liquid_llm.losses.divergences import get_divergence
from liquid_llm.models.spec import parse_student
from liquid_llm.options import ADAMW, ADAMW8BIT, ANNEAL, AUTO_BATCH, TRAIN
from liquid_llm.registry import TRACKERS_OF_EXTRA
from liquid_llm.schedules import parse_piecewise
from liquid_llm.sources import BLOCKS

if TYPE_CHECKING:
    from liquid_llm.config import CaptureConfig, DataConfig, PrepareConfig, RunConfig, TeacherConfig


def run_problems(config: RunConfig, *, block_size_known: bool) -> list[str]:
    """Every combination of values that cannot work, in words.

    ``block_size_known``: a checkpoint cannot change it any more.
    """
    problems: list[str] = []
    data, teacher, objective, optimizer = config.data, config.teacher, config.objective, config.optimizer
    if config.face == ANNEAL:
        problems += _data_problems(data, "a dataset or a local folder") + _stored_problems(config)
    problems += [
        f"sources: {type} has a store and layout blocks: a store serves samples or windows, and no joined texts"
        for type, source in config.source.named.items()
        if source.store is not None and source.layout == BLOCKS
    ]
    if config.face == TRAIN:
        if not data.manifest:
            problems.append("--dataset_manifest is missing: name a JSONL manifest")
        problems += _teacher_problems(config)
        if block_size_known and data.seq_len > data.block_size:
            problems.append(
                f"--seq_len={data.seq_len} is longer than --block_size={data.block_size}: raise --block_size"
            )
        if objective.gamma > 0 and config.student.resume_uri is None and config.student.lora is None:
            problems.append(
                "--keep_old_logit_l2 needs --resume_gcs_uri: without it there are no old logits to stay near"
            )
        if not 0 <= objective.anneal_share <= 1:
            problems.append(f"--kd_anneal_pct must lie between 0 and 1; got {objective.anneal_share}")
        if not 0 <= data.val_fraction < 1:
            problems.append(f"--val_fraction must be at least 0 and below 1; got {data.val_fraction}")
    for name, alpha in (
        ("alpha", objective.alpha),
        ("kd_alpha_start", objective.alpha_start),
        ("kd_alpha_end", objective.alpha_end),
    ):
        if not 0 <= alpha <= 1:
            problems.append(f"--{name} must lie between 0 and 1; got {alpha}")
    problems += [
        f"--trackers={name}: the package {name} is not installed: pip install 'liquid-llm[track]', or {name} alone"
        for name in config.output.trackers
        if name in TRACKERS_OF_EXTRA and importlib.util.find_spec(name) is None
    ]
    if len(optimizer.betas) != 2 or not all(0 <= beta < 1 for beta in optimizer.betas):
        problems.append(f"--betas takes two numbers from 0 to below 1; got {','.join(map(str, optimizer.betas))}")
    if any(length < 2 for length in config.evaluation.context_lengths):
        problems.append(
            f"--eval_ctx_lens takes lengths of at least 2; got {','.join(map(str, config.evaluation.context_lengths))}"
        )
    problems += _collect(lambda: parse_student(config.student.spec))
    problems += _collect(lambda: parse_schedule(objective.alpha_schedule, "--alpha_schedule", 1.0))
    problems += _collect(lambda: parse_schedule(objective.temp_schedule, "--temp_schedule", None))
    problems += _divergence_problems(config) + _sharding_problems(config) + _optimizer_problems(config)
    problems += _adapter_problems(config)
    return problems + _batch_problems(config, block_size_known) + _token_problems(teacher) + toolkit_problems(data)


def _divergence_problems(config: RunConfig) -> list[str]:
    asked = {"--divergence": config.objective.divergence}
    for type, source in config.source.named.items():
        if source.divergence is not None:
            asked[f"the divergence of {type}"] = source.divergence
    problems = _share_problems(config.objective.distilled_share)
    for where, spec in asked.items():
        try:
            get_divergence(spec)
        except ValueError as error:
            problems.append(f"{where}: {error}")
    return problems


def _share_problems(share: float) -> list[str]:
    return [f"--kd_positions must lie above 0 and at most at 1; got {share}"] if share > 1 else []


def _batch_problems(config: RunConfig, block_size_known: bool) -> list[str]:
    automatic, tokens = config.data.batch_size == AUTO_BATCH, config.optimizer.tokens_per_step
    problems = []
    if automatic and tokens is None:
        problems.append("--batch_size=auto needs --tokens_per_step, which says how many tokens an optimizer step takes")
    if automatic and "grad_accum" in config.given:
        problems.append("--grad_accum follows from --batch_size=auto and --tokens_per_step: leave it out")
    if tokens is not None and not automatic:
        problems.append("--tokens_per_step goes with --batch_size=auto: leave it out, or let the batch be chosen")
    block = config.data.block_size
    if automatic and tokens is not None and block_size_known and tokens % block:
        near = max(1, round(tokens / block)) * block
        advice = f"give a multiple of --block_size={block}, such as {near}"
        problems.append(f"--tokens_per_step={tokens} is no whole number of blocks: {advice}")
    if config.price_per_hour is not None and not config.dry_run:
        problems.append("--price_per_hour goes with --dry_run, which says what a run costs before it begins")
    return problems


def _sharding_problems(config: RunConfig) -> list[str]:
    problems = []
    if config.teacher.is_dealt_out and not config.asked_online:
        problems.append("--teacher_shard=full: no online teacher is asked in this run; leave it out, or name one")
    if config.teacher.is_dealt_out and config.teacher.stream:
        problems.append(
            "--teacher_stream: with --teacher_shard=full the teacher is asked by all ranks in one order; leave one out"
        )
    if config.student.is_dealt_out and config.student.compile is True:
        problems.append(
            "--compile=true: with --shard=full the student's blocks are gathered between them; leave one out"
        )
    return problems + _quantise_problems(config.teacher)


def _quantise_problems(teacher: TeacherConfig) -> list[str]:
    if teacher.quantisation is None or importlib.util.find_spec("torchao") is not None:
        return []
    given = f"--teacher_quantize={teacher.quantize}"
    return [f"{given}: the package torchao is not installed: pip install 'liquid-llm[quantize]'"]


def _optimizer_problems(config: RunConfig) -> list[str]:
    kind, problems = config.optimizer.kind, []
    if kind == ADAMW8BIT and importlib.util.find_spec("torchao") is None:
        problems.append(f"--optimizer={kind}: the package torchao is not installed: pip install 'liquid-llm[torchao]'")
    if kind != ADAMW and config.student.is_dealt_out:
        problems.append(f"--optimizer={kind} takes whole weights: leave out --shard=full, or take adamw")
    return problems


def _adapter_problems(config: RunConfig) -> list[str]:
    student = config.student
    if student.lora is None:
        given = [name for name in ("lora_alpha", "lora_target_modules") if name in config.given]
        return [f"--{name} goes with --lora_r, which says the rank of the adapter" for name in given]
    problems = []
    if importlib.util.find_spec("peft") is None:
        problems.append("--lora_r: the package peft is not installed: pip install 'liquid-llm[lora]'")
    if student.is_dealt_out:
        problems.append("--lora_r leaves little to deal out: leave out --shard=full")
    if student.resume_uri is None and any(_collect(lambda: parse_student(student.spec))):
        return problems  # which is said by itself
    if student.resume_uri is None and parse_student(student.spec).teacher is not None:
        problems.append(
            "--lora_r trains an adapter of a student that is whole: train the cut first, and give the folder "
            "that liquid export makes of it as --student"
        )
    return problems


def _data_problems(data: DataConfig, what: str) -> list[str]:
    """Where one of the two ways to name data is wanted."""
    if data.dataset_name and data.manifest:
        return ["give one of --dataset_name and --dataset_manifest, not both"]
    if not data.dataset_name and not data.manifest:
        return [f"--dataset_name is missing: name {what}, or a JSONL manifest with --dataset_manifest"]
    return []


def _stored_problems(config: RunConfig) -> list[str]:
    """What is lacking of a run whose signal all comes from stores."""
    lacking = not config.source.stores or (config.data.dataset_name and config.source("lm").store is None)
    if config.teacher.mode == "precomputed" and lacking:
        return ["--signal lm=URI is missing: --teacher_mode=precomputed reads its signal there"]
    return []


def _teacher_problems(config: RunConfig) -> list[str]:
    teacher = config.teacher
    if not teacher.hybrid:
        if teacher.mode == "online" and not teacher.online_id:
            return ["--lm_teacher_id is missing: --hybrid=false with --teacher_mode=online scores everything with it"]
        if teacher.mode == "precomputed" and not config.source.stores:
            named = "--math_logits_dir, --code_logits_dir and --signal TYPE=URI"
            return [f"{named} are all missing: --teacher_mode=precomputed reads its signal there"]
    return []


def _token_problems(teacher: TeacherConfig) -> list[str]:
    sources = [name for name in ("token_file", "token_uri", "token_secret") if getattr(teacher, name)]
    if len(sources) > 1:
        return ["give one of --hf_token_file, --hf_token_uri and --hf_token_secret, not several"]
    return []


def capture_problems(config: CaptureConfig) -> list[str]:
    """Every combination of values that cannot work, in words."""
    problems = _share_problems(config.store.distilled_share)
    if not config.teacher.stored_id:
        problems.append("--mc_teacher_id is missing: name the teacher to capture")
    if config.data.dataset_name:
        problems += _data_problems(config.data, "a dataset")
    elif not config.data.manifest:
        problems.append("--dataset_manifest is missing: name a JSONL manifest")
    if not config.source.stores:
        problems.append(
            "--math_logits_dir, --code_logits_dir and --signal TYPE=URI are all missing: say where the signal goes"
        )
    problems += _unit_problems(config)
    problems += _quantise_problems(config.teacher) + _served_problems(config)
    return problems + _token_problems(config.teacher) + toolkit_problems(config.data)


def _served_problems(config: CaptureConfig) -> list[str]:
    served, store, given = config.served, config.store, config.given
    if served.url is None:
        names = ("served_model", "served_as", "served_requests", "hidden_states_dir")
        return [f"--{name} goes with --teacher_url, the server that it is about" for name in names if name in given]
    problems = []
    if config.teacher.quantisation is not None:
        problems.append("--teacher_quantize is for a teacher that is opened here; how the server's is: --served_as")
    problems += _address_problems(served.url)
    if served.words is not None and not re.fullmatch(r"[\w.+=/@ -]+(,[\w.+=/@ -]+)*", served.words):
        problems.append(f"--served_as takes words separated by commas, such as bfloat16,awq; got {served.words!r}")
    if served.tells_states:
        return problems
    told = "a server's log-probabilities tell k ids and the rest's mass at T = 1 alone"
    other = "or give --hidden_states_dir, with which any can be had"
    if "codec" in given and store.codec != "topk":
        problems.append(f"--codec={store.codec}: {told}: leave --codec out, {other}")
    if store.distilled_share < 1.0:
        problems.append("--kd_positions needs the teacher's entropies, which a server does not tell: leave it out")
    if given.get("held_out_tokens"):
        problems.append(f"--held_out_tokens: {told}, and what is held out is stored nearly whole: leave it out")
    return problems


def _address_problems(url: str) -> list[str]:
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable or parts.query or parts.fragment:
        return ["--teacher_url is no address of a server: give http://HOST:PORT or https://HOST"]
    if "@" in parts.netloc:
        return ["--teacher_url has a name or password in it: give the server's key in LIQUID_TEACHER_API_KEY"]
    return []


def _unit_problems(config: CaptureConfig) -> list[str]:
    store = config.store
    if store.layout != "units":
        return [f"--unit goes with --logits_format=units: leave out {store.format}, or --unit"] if store.unit else []
    problems = [] if store.unit is None else _collect(lambda: parse_share(str(store.unit)))
    if not problems and (store.share or (0, 1))[1] > 1 and config.data.prepare == "force":
        problems.append("--prepare_data=force: several tasks cannot prepare anew at once: run liquid prepare first")
    if config.data.dataset_name:
        problems.append("--unit goes over the files of a manifest: name one with --dataset_manifest")
    return problems


def parse_share(text: str) -> tuple[int, int]:
    """``I/N``, the share I of N, counted from 0. Raises UsageError for what is none."""
    found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text.strip())
    share = (int(found[1]), int(found[2])) if found else (0, 0)
    if not share[0] < share[1]:
        expected = "I/N with I from 0 to N - 1, such as 0/8 to 7/8 for eight tasks"
        raise UsageError("no share of the units", where="--unit", got=repr(text), expected=expected)
    return share


def _collect(parse: Callable[[], object]) -> list[str]:
    try:
        parse()
    except UsageError as error:
        return [str(error).removesuffix(".")]
    return []


def parse_schedule(text: str | None, option: str, maximum: float | None) -> tuple[tuple[int, float], ...]:
    """The entries of a schedule as it was written; none without one. Raises ``UsageError`` for one that is none."""
    return parse_piecewise(text, option=option, maximum=maximum) if text is not None else ()


def toolkit_problems(data: DataConfig | PrepareConfig) -> list[str]:
    """What cannot work of the options for an outside toolkit, in words."""
    if data.toolkit_uri is not None:
        skipped = data.prepare == "skip"
        return ["--prep_toolkit_zip_uri is never run with --prepare_data=skip: leave one out"] if skipped else []
    given = (("prep_toolkit_sha256", data.toolkit_sha256), ("prep_extract_dir", data.toolkit_dir))
    return [f"--{name} is of no use without --prep_toolkit_zip_uri" for name, value in given if value is not None]
