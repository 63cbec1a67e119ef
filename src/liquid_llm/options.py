"""Every option of the commands that run a job, once.

A *face* is a command that takes options: ``anneal`` (``python -m trainer.entrypoint``), ``train``
(``python -m stage1_hybrid.cli``), ``capture`` (``python -m stage1_hybrid.precompute_hybrid_logits``) and ``prepare`` (no
module, no reference). An option's ``field`` says which value of the configuration it sets; two options of different faces
may set the same field. Defaults live here and nowhere else: a value that a command has no option for has its default too.
``None`` means "decided by what the run finds" and the help text says how.

Only light imports: ``--help`` must answer at once.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, replace

from liquid_llm.registry import CODECS, DIVERGENCES, TRACKERS

ANNEAL, TRAIN, CAPTURE, PREPARE = "anneal", "train", "capture", "prepare"
TRAINING = (ANNEAL, TRAIN)
EVERY = (ANNEAL, TRAIN, CAPTURE)
PREPARING = (TRAIN, CAPTURE, PREPARE)

STUDENT, TEACHER, SERVED, DATA, OBJECTIVE, OPTIMIZER, EVALUATION, OUTPUT, STORE, RUN = (
    "student",
    "teacher",
    "served",
    "data",
    "objective",
    "optimizer",
    "evaluation",
    "output",
    "store",
    "run",
)

AUTO = "auto"
AUTO_BATCH = 0  # what stands for it in the configuration, until a batch is chosen
SHARDINGS = ("none", "full")
PRECISIONS = ("auto", "bfloat16", "float32")
QUANTISATIONS = ("none", "int8")
ALL_LINEAR = "all-linear"
ADAMW, ADAMW8BIT, MUON = OPTIMIZERS = ("adamw", "adamw8bit", "muon")


@dataclass(frozen=True)
class Option:
    """One command-line option.

    Attributes:
        name: spelled with underscores; ``-`` is accepted too.
        kind: ``str``, ``int``, ``float``, ``bool``, ``ints`` or ``floats`` (comma-separated); ``auto int`` and ``auto
            bool`` also take the word auto; ``names`` (comma-separated, each one of ``choices``, or none); ``spec``
            (one of ``choices``, options after it: ``NAME:option=number``); ``sources`` (``TYPE=VALUE``,
            comma-separated, may be given several times: a field of those types, see ``sources.py``); ``texts`` (may
            be given several times, each as it is).
        group, field: the configuration value it sets.
        default: the value when neither command line, configuration file nor checkpoint metadata says otherwise.
        reference: what the command's reference face takes instead of that default; None: the same. A reference's
            values are fixed, ours follow what was measured (docs/choosing.md).
        faces: the commands that take it.
        face_defaults: defaults that differ by command; also of one that does not take it, where that matters.
        choices: accepted words.
        minimum, above: smallest accepted number, or a number it must exceed.
        aliases: what other trainers call it, where it is the same thing; taken too.
    """

    name: str
    kind: str
    group: str
    field: str
    default: object
    help: str
    faces: tuple[str, ...] = TRAINING
    face_defaults: dict[str, object] = dataclasses.field(default_factory=dict)
    reference: object = None
    choices: tuple[str, ...] = ()
    minimum: float | None = None
    above: float | None = None
    aliases: tuple[str, ...] = ()

    def default_for(self, face: str) -> object:
        return self.face_defaults.get(face, self.default)

    def first_default(self, face: str) -> object:
        """What it was before there was a default that the reference does not have; by it, runs have their names."""
        return self.default_for(face) if self.reference is None else self.reference


# One line an option, so that the table reads as a table.
# fmt: off
OPTIONS = (
    # student
    Option("student", "str", STUDENT, "spec", "liquid-16m", "preset, Hugging Face id or folder, or config.json of the student; from:TEACHER,layers=N cuts it out of a teacher (docs/student.md)"),
    Option("resume_gcs_uri", "str", STUDENT, "resume_uri", None, "checkpoint, Hugging Face folder or zip the student starts from"),
    Option("rope_scale", "float", STUDENT, "rope_scale", None, "RoPE scaling factor of a rotary student", above=0),
    Option("precision", "str", STUDENT, "precision", "auto", "student's arithmetic; auto takes the faster one here", choices=PRECISIONS),
    Option("grad_checkpoint", "auto bool", STUDENT, "grad_checkpoint", AUTO, "recompute activations in the backward pass: less memory, a third more time; auto: only where it would not fit otherwise"),
    Option("compile", "auto bool", STUDENT, "compile", AUTO, "compile the student's blocks for micro-batches of blocks, whose shape is fixed; auto: on CUDA, where the run is long enough to gain by it (docs/gpu.md)"),
    Option("shard", "str", STUDENT, "shard", "none", "full: each of several processes holds a part of the student's weights, gradients and moments alone (FSDP2): for a student that no GPU holds", choices=SHARDINGS),
    Option("lora_r", "int", STUDENT, "lora_rank", 0, "train an adapter of this rank (LoRA, needs peft) and nothing else of the student, which must have weights (0: train all of it; docs/optimizers.md)", minimum=0),
    Option("lora_alpha", "float", STUDENT, "lora_alpha", None, "the adapter's part is multiplied by lora_alpha / lora_r (default: twice lora_r)", above=0),
    Option("lora_target_modules", "str", STUDENT, "lora_target_modules", ALL_LINEAR, "the maps that get an adapter, comma-separated (q_proj,v_proj); all-linear: all but the output head"),
    # teachers
    Option("teacher_name", "str", TEACHER, "online_id", None, "online teacher, or with --teacher_mode=precomputed the one whose stored signal --signal names (none: plain cross-entropy)", faces=(ANNEAL,)),
    Option("lm_teacher_id", "str", TEACHER, "online_id", None, "online teacher, for type=lm", faces=(TRAIN,)),
    Option("mc_teacher_id", "str", TEACHER, "stored_id", None, "teacher whose signal is stored, for maths and code", faces=(TRAIN, CAPTURE)),
    Option("hybrid", "bool", TEACHER, "hybrid", True, "route lm to the online teacher, maths and code to the store", faces=(TRAIN,), face_defaults={ANNEAL: False}),
    Option("hybrid_strict", "bool", TEACHER, "hybrid_strict", False, "skip KD for a maths or code batch with any record missing", faces=(TRAIN,)),
    Option("teacher_mode", "str", TEACHER, "mode", "online", "where all signal comes from (liquid train: with --hybrid=false); precomputed: from the stores that are named, and the teacher is never loaded", choices=("online", "precomputed")),
    Option("math_logits_dir", "str", TEACHER, "math_dir", None, "folder or URL of the stored maths signal", faces=(TRAIN, CAPTURE)),
    Option("code_logits_dir", "str", TEACHER, "code_dir", None, "folder or URL of the stored code signal", faces=(TRAIN, CAPTURE)),
    Option("signal", "sources", TEACHER, "sources.teacher", None, "teacher signal by type, TYPE=URI of its store, TYPE=online:MODEL or TYPE=none; several times or comma-separated", faces=EVERY),
    Option("teacher_precision", "str", TEACHER, "precision", "auto", "teacher's arithmetic; auto takes the faster one here", faces=EVERY, choices=PRECISIONS),
    Option("teacher_quantize", "str", TEACHER, "quantize", "none", "int8: the linear maps of an online teacher in 8 bits (needs torchao), for half of their memory in bfloat16; another teacher to a store (docs/teachers.md)", faces=EVERY, choices=QUANTISATIONS),
    Option("teacher_shard", "str", TEACHER, "shard", "none", "full: each of several processes holds a part of the online teacher's blocks alone, for a teacher that no GPU holds beside the student", choices=SHARDINGS),
    Option("teacher_stream", "bool", TEACHER, "stream", False, "form the teacher's signal on a stream of its own, beside the student's forward pass, for the memory of a teacher's pass more (docs/gpu.md)"),
    Option("teacher_ranks", "int", TEACHER, "ranks", 0, "of several processes the last so many hold the online teachers alone, and the others train without room for them; 0: each has its own (docs/scaling.md)", minimum=0),
    Option("hf_token_file", "str", TEACHER, "token_file", None, "file with a Hugging Face token (else HF_TOKEN)", faces=EVERY),
    Option("hf_token_uri", "str", TEACHER, "token_uri", None, "URL of an object with a Hugging Face token", faces=EVERY),
    Option("hf_token_secret", "str", TEACHER, "token_secret", None, "Secret Manager name of a Hugging Face token", faces=EVERY),
    Option("fa_wheel_gcs", "str", TEACHER, "fa_wheel_uri", None, "FlashAttention wheel to install where CUDA has none", faces=(TRAIN, CAPTURE)),
    Option("fa_wheel_sha256", "str", TEACHER, "fa_wheel_sha256", None, "expected hash of that wheel", faces=(TRAIN, CAPTURE)),
    # a teacher behind a server
    Option("teacher_url", "str", SERVED, "url", None, "score with the OpenAI-compatible server (vLLM) at this address, http://HOST:8000; --mc_teacher_id then names its tokenizer. Not tried against vLLM itself (docs/capture.md)", faces=(CAPTURE,)),
    Option("served_model", "str", SERVED, "model", None, "what that server calls the teacher (default: as --mc_teacher_id does)", faces=(CAPTURE,)),
    Option("served_as", "str", SERVED, "words", None, "what the server does not say of how it runs the teacher, such as revision, dtype and quantisation, comma-separated: bfloat16,awq; kept with the signal and compared", faces=(CAPTURE,)),
    Option("served_requests", "int", SERVED, "requests", 16, "texts that the server is asked about at a time", faces=(CAPTURE,), minimum=1),
    Option("hidden_states_dir", "str", SERVED, "states_dir", None, "folder that the server writes hidden states to, as it is seen from here: they are asked for instead of log-probabilities, and any codec can be had (docs/capture.md)", faces=(CAPTURE,)),
    # data
    Option("dataset_name", "str", DATA, "dataset_name", None, "text dataset: Hugging Face name or local folder", faces=(ANNEAL, CAPTURE)),
    Option("dataset_config", "str", DATA, "dataset_config", None, "configuration of that dataset", faces=(ANNEAL, CAPTURE)),
    Option("dataset_manifest", "str", DATA, "manifest", None, "JSONL manifest: path, type and weight a line", faces=EVERY),
    Option("block_size", "int", DATA, "block_size", 512, "context length in tokens; a checkpoint's own comes before this default", face_defaults={TRAIN: 1024}, minimum=2),
    Option("seq_len", "int", DATA, "seq_len", None, "longest window of a sample, in tokens (default: block_size; capture: 1024)", faces=(TRAIN, CAPTURE), face_defaults={CAPTURE: 1024}, minimum=2),
    Option("batch_size", "auto int", DATA, "batch_size", 8, "micro-batch size in blocks: batch_size x block_size tokens; auto: the most that fits, with --tokens_per_step", minimum=1),
    Option("batch_size", "int", DATA, "batch_size", 4, "samples scored at once: batch_size x seq_len tokens", faces=(CAPTURE,), minimum=1),
    Option("draw_group", "int", DATA, "draw_group", None, "micro-batches in a row that are drawn from one dataset, so that processes do the same kind of work at a time (default: their number when the run begins)", minimum=1),
    Option("order", "str", DATA, "order", AUTO, "shards: data files come in a random order, and the texts of a few are shuffled together, so that a store in a bucket is read file by file and memory does not grow with texts (blocks then end with their file); whole: all texts of a type are; auto: shards for types whose store is one of units behind a URL", choices=(AUTO, "whole", "shards")),
    Option("document_mask", "bool", DATA, "document_mask", False, "keep the documents of a block apart: each is to student and teacher as if it stood alone"),
    Option("val_fraction", "float", DATA, "val_fraction", 0.05, "share of a manifest's samples held out, by hash of the id", faces=(TRAIN,), face_defaults={CAPTURE: 0.0}, minimum=0),
    Option("begin_token", "str", DATA, "begin_token", "auto", "the token before each text: auto as the teacher expects it, or as the store or checkpoint has it; always; never", faces=EVERY, choices=("auto", "always", "never")),
    Option("num_workers", "int", DATA, "num_workers", 2, "reader and writer threads", faces=EVERY, minimum=0),
    Option("data_cache", "str", DATA, "cache_dir", None, "folder for tokenised data (default: ~/.cache/liquid-llm/data)", faces=EVERY),
    Option("learn", "str", DATA, "learn", "completion", "of a record with a prompt or messages: completion learns the completion or the assistant's turns alone, all everything", faces=EVERY, choices=("completion", "all")),
    Option("chat_template", "str", DATA, "chat_template", None, "how messages are written out: chatml, a Jinja file, or a Hugging Face id or folder whose tokenizer has a template (default: the tokenizer's own)", faces=EVERY),
    Option("prepare_data", "str", DATA, "prepare", "auto", "auto prepares datasets that lack complete shards, force all, skip none", faces=PREPARING, choices=("auto", "force", "skip")),
    Option("datasets_yaml", "str", DATA, "datasets_yaml", None, "raw inputs and where their shards go (default: datasets.yaml beside the manifest)", faces=(TRAIN, CAPTURE)),
    Option("datasets_yaml", "str", DATA, "datasets_yaml", None, "raw inputs and where their shards go; needed here", faces=(PREPARE,)),
    Option("only", "str", DATA, "only", None, "names of the datasets to prepare, comma-separated (default: all)", faces=(PREPARE,)),
    Option("prep_toolkit_zip_uri", "str", DATA, "toolkit_uri", None, "outside preparation toolkit, for datasets with format: toolkit; run only when named", faces=PREPARING),
    Option("prep_toolkit_sha256", "str", DATA, "toolkit_sha256", None, "expected hash of the toolkit", faces=PREPARING),
    Option("prep_extract_dir", "str", DATA, "toolkit_dir", None, "where the toolkit is unpacked", faces=PREPARING),
    Option("prep_timeout_s", "int", DATA, "toolkit_timeout_seconds", 3600, "longest the toolkit may run", faces=PREPARING, minimum=1),
    # objective
    Option("divergence", "spec", OBJECTIVE, "divergence", "forward_kl", "distance from the teacher that the KD term measures, with its options: jsd:beta=0.3 (docs/objectives.md)", choices=tuple(DIVERGENCES)),
    Option("divergence_by_type", "sources", OBJECTIVE, "sources.divergence", None, "the same for some types alone, such as math_tool=reverse_kl,code=jsd:beta=0.3", faces=(TRAIN,)),
    Option("alpha_by_type", "sources", OBJECTIVE, "sources.alpha", None, "weight of the KD term for some types, at every step, such as math_tool=0.5,code=0.7", faces=(TRAIN,)),
    Option("temperature_by_type", "sources", OBJECTIVE, "sources.temperature", None, "KD temperature for some types, such as math_tool=1,code=1.3", faces=(TRAIN,)),
    Option("alpha", "float", OBJECTIVE, "alpha", 0.5, "weight of the KD term", faces=(ANNEAL,), minimum=0),
    Option("T", "float", OBJECTIVE, "temperature", 1.0, "KD temperature", faces=(ANNEAL,), above=0),
    Option("alpha_schedule", "str", OBJECTIVE, "alpha_schedule", None, "step:value list for alpha", faces=(ANNEAL,)),
    Option("temp_schedule", "str", OBJECTIVE, "temp_schedule", None, "step:value list for the temperature", faces=(ANNEAL,)),
    Option("kd_temperature", "float", OBJECTIVE, "temperature", 1.0, "KD temperature", faces=(TRAIN,), reference=2.0, above=0),
    Option("kd_alpha_start", "float", OBJECTIVE, "alpha_start", 0.7, "KD weight at step 0", faces=(TRAIN,), minimum=0),
    Option("kd_alpha_end", "float", OBJECTIVE, "alpha_end", 0.4, "KD weight after the anneal", faces=(TRAIN,), minimum=0),
    Option("kd_anneal_pct", "float", OBJECTIVE, "anneal_share", 0.3, "share of max_steps over which it changes", faces=(TRAIN,), minimum=0),
    Option("kd_positions", "float", OBJECTIVE, "distilled_share", 1.0, "share of the positions that are distilled, by type: those where the student is least sure; the others have cross-entropy alone (1: all)", above=0),
    Option("keep_old_logit_l2", "float", OBJECTIVE, "gamma", 0.0, "weight of staying near the student's old logits", faces=(TRAIN,), minimum=0),
    Option("keep_old_logit_l2_fade_step", "int", OBJECTIVE, "gamma_fade_step", 30000, "step at which that weight reaches 0", faces=(TRAIN,), minimum=1),
    # optimizer
    Option("train_steps", "int", OPTIMIZER, "steps", 1000, "total optimizer steps", faces=(ANNEAL,), minimum=0),
    Option("max_steps", "int", OPTIMIZER, "steps", 1000, "total optimizer steps", faces=(TRAIN,), minimum=0),
    Option("grad_accum", "int", OPTIMIZER, "grad_accum", 1, "micro-batches an optimizer step", minimum=1),
    Option("tokens_per_step", "int", OPTIMIZER, "tokens_per_step", None, "with --batch_size=auto: batch_size x block_size x grad_accum, kept whatever fits", minimum=2),
    Option("optimizer", "str", OPTIMIZER, "kind", ADAMW, "adamw8bit keeps AdamW's moments in 8 bits, for a quarter of their memory (needs torchao); muon is Muon for hidden matrices and AdamW for all others (docs/optimizers.md)", choices=OPTIMIZERS),
    Option("lr", "float", OPTIMIZER, "lr", 2.5e-4, "learning rate reached after warm-up", above=0),
    Option("lr_peak", "float", OPTIMIZER, "lr_peak", None, "peak learning rate (default: lr)", above=0),
    Option("warmup_steps", "int", OPTIMIZER, "warmup_steps", 100, "steps of linear warm-up", minimum=0),
    Option("weight_decay", "float", OPTIMIZER, "weight_decay", 0.1, "decay of matrices", minimum=0),
    Option("betas", "floats", OPTIMIZER, "betas", (0.9, 0.95), "AdamW moments"),
    Option("grad_clip", "float", OPTIMIZER, "grad_clip", 1.0, "largest gradient norm (0: no clipping)", minimum=0),
    Option("skip_bad_steps", "int", OPTIMIZER, "skip_bad_steps", 0, "leave out steps whose loss or gradient is not finite, at most so many in a row (0: the first one ends the run)", minimum=0),
    Option("reset_optim", "bool", OPTIMIZER, "reset", False, "start optimizer, LR schedule and step afresh when resuming", faces=(ANNEAL,)),
    Option("reset_optim_on_ctx_change", "bool", OPTIMIZER, "reset_on_context_change", False, "the same when block_size differs from the checkpoint's", faces=(ANNEAL,)),
    # evaluation
    Option("eval_every", "int", EVALUATION, "every_steps", 500, "steps between evaluations (0: only before and after)", face_defaults={TRAIN: 1000}, minimum=0),
    Option("eval_ctx_lens", "ints", EVALUATION, "context_lengths", (), "context lengths to evaluate at, beside block_size"),
    Option("eval_measures", "bool", EVALUATION, "measures", False, "also agreement and overlap with the teacher, calibration and bits a byte at each evaluation (docs/evaluation.md)"),
    Option("eval_teacher", "auto bool", EVALUATION, "teacher", AUTO, "evaluate beside the teacher; auto: for types whose KD weight is above 0 at some step, as no other teacher is loaded"),
    Option("eval_tokens", "int", EVALUATION, "max_tokens", 65536, "validation tokens a type and length", minimum=2),
    Option("eval_answers", "int", EVALUATION, "answers", 0, "held-out prompts answered at each evaluation and marked: those whose answer ends in '#### 42', or is a number", minimum=0),
    Option("answer_tokens", "int", EVALUATION, "answer_tokens", 256, "longest of these answers, in tokens", minimum=1),
    Option("sample_prompts", "str", EVALUATION, "sample_prompts", None, "file of prompts, one a line or .jsonl: what the student says to each goes to samples.jsonl at each evaluation"),
    Option("sample_tokens", "int", EVALUATION, "sample_tokens", 64, "longest of these samples, in tokens", minimum=1),
    # output
    Option("output_gcs_uri", "str", OUTPUT, "uri", None, "where the run goes: path or URL (default: AIP_CHECKPOINT_DIR, else runs/ID here)"),
    Option("local_workdir", "str", OUTPUT, "workdir", None, "local folder of the run when the output is a URL"),
    Option("tensorboard_uri", "str", OUTPUT, "tensorboard_uri", None, "where TensorBoard events go too (default: AIP_TENSORBOARD_LOG_DIR)"),
    Option("model_uri", "str", OUTPUT, "model_uri", None, "where the finished student goes too (default: AIP_MODEL_DIR)"),
    Option("run_id", "str", OUTPUT, "run_id", None, "name of the run below the output (default: derived from the configuration)", faces=(TRAIN,)),
    Option("restart", "bool", OUTPUT, "restart", False, "ignore checkpoints in the run directory, and keep them aside"),
    Option("accept_changes", "bool", OUTPUT, "accept_changes", False, "continue a run although its data, batch, seed or reference weights are not those of its checkpoint"),
    Option("save_every", "int", OUTPUT, "save_every_steps", 500, "steps between snapshots (0: only at the end)", face_defaults={TRAIN: 2000}, minimum=0),
    Option("save_every_minutes", "float", OUTPUT, "save_every_minutes", 0.0, "minutes between time snapshots (0: none)", minimum=0),
    Option("keep_last", "int", OUTPUT, "keep_last", 3, "snapshots kept", minimum=1),
    Option("log_interval", "int", OUTPUT, "metrics_every_steps", 10, "steps between metric rows", faces=(ANNEAL,), minimum=1),
    Option("metrics_interval", "int", OUTPUT, "metrics_every_steps", 100, "steps between metric rows", faces=(TRAIN,), minimum=1),
    Option("trackers", "names", OUTPUT, "trackers", ("tensorboard",), "where metrics go beside metrics.jsonl, comma-separated (none: nowhere else)", choices=tuple(TRACKERS)),
    Option("upload_interval", "float", OUTPUT, "upload_every_seconds", 60.0, "seconds between uploads of metrics while training", above=0),
    # the store written by capture
    Option("logits_format", "str", STORE, "format", None, "one .pt a sample, or shards of thousands (default: as the folder has it; a new one: shards, by the reference command pt); units: shards by data file, see --unit", faces=(CAPTURE,), choices=("pt", "shards", "units")),
    Option("unit", "str", STORE, "unit", None, "I/N: capture share I of N (from 0) of the units: each data file of the manifest is one, with a completion marker of its own, so that any scheduler's tasks fill a store together (docs/capture.md)", faces=(CAPTURE,)),
    Option("keep_tokens", "bool", STORE, "keep_tokens", False, "leave the tokens of each unit that is captured in --data_cache, where a run with --order=shards finds them (what is not captured in units always leaves its tokens there)", faces=(CAPTURE,)),
    Option("codec", "str", STORE, "codec", "tail", "how a position is encoded", faces=(CAPTURE,), choices=tuple(CODECS)),
    Option("codec_options", "str", STORE, "codec_options", None, "settings of the codec: name=number,... (tail: draws_t1, draws_t2, draws_t4, by default for about 100 bytes a position, 40 in stores of 10 billion positions; sampled: draws, temperature; topk: k)", faces=(CAPTURE,)),
    Option("topk", "int", STORE, "topk", None, "ids kept a position by codec topk (default: 64)", faces=(CAPTURE,), minimum=1),
    Option("kd_positions", "float", STORE, "distilled_share", 1.0, "share of each sample's learnt positions that is stored, those where the teacher is least sure; the others train on cross-entropy (1: all)", faces=(CAPTURE,), above=0),
    Option("held_out_tokens", "int", STORE, "held_out_tokens", 16384, "tokens a type, of the samples that training holds out first (--val_fraction), whose signal is stored nearly whole as well, for evaluation: val_kd of stores in other codecs then compares (0: none)", faces=(CAPTURE,), reference=0, minimum=0),
    Option("overwrite", "bool", STORE, "overwrite", False, "replace existing records", faces=(CAPTURE,)),
    # run
    Option("seed", "int", RUN, "seed", 1234, "seed of data order and initial weights", faces=EVERY, minimum=0),
    Option("device", "str", RUN, "device", "auto", "where models run: cpu, cuda, cuda:1, ... (auto: a GPU where one can be used, else the CPU)", faces=EVERY),
    Option("deterministic", "bool", RUN, "deterministic", False, "the same bits every time on a GPU too, with slower kernels"),
    Option("dry_run", "bool", RUN, "dry_run", False, "check everything, take two steps, save nothing", faces=TRAINING),
    Option("price_per_hour", "float", RUN, "price_per_hour", None, "with --dry_run: what the machine costs, for the cost of the whole run", faces=TRAINING, minimum=0),
)
# fmt: on


# What people type who come from transformers' Trainer and TRL -> the value it sets here. Only what is the same thing:
# their per-device batch is a micro-batch of ours, their epochs and maximum lengths are something else.
ALIASES = {
    "model_name_or_path": (STUDENT, "spec"),
    "per_device_train_batch_size": (DATA, "batch_size"),
    "learning_rate": (OPTIMIZER, "lr"),
    "gradient_accumulation_steps": (OPTIMIZER, "grad_accum"),
    "max_grad_norm": (OPTIMIZER, "grad_clip"),
    "eval_steps": (EVALUATION, "every_steps"),
    "output_dir": (OUTPUT, "uri"),
    "save_steps": (OUTPUT, "save_every_steps"),
    "save_total_limit": (OUTPUT, "keep_last"),
    "logging_steps": (OUTPUT, "metrics_every_steps"),
    "report_to": (OUTPUT, "trackers"),
}
_TEACHER_ALIAS = {ANNEAL: "online_id", TRAIN: "online_id", CAPTURE: "stored_id"}  # of teacher_model_name_or_path


def _with_aliases(option: Option, face: str) -> Option:
    place = (option.group, option.field)
    names = [alias for alias, meant in ALIASES.items() if meant == place]
    if place == (TEACHER, _TEACHER_ALIAS.get(face)):
        names.append("teacher_model_name_or_path")
    return replace(option, aliases=tuple(names)) if names else option


def options_of(face: str, *, reference: bool = False) -> tuple[Option, ...]:
    """The options a command takes, in the order of the table; with the defaults of its reference where asked."""
    found = tuple(option for option in OPTIONS if face in option.faces)
    if not reference:
        return tuple(_with_aliases(option, face) for option in found)
    return tuple(one if one.reference is None else replace(one, default=one.reference) for one in found)


def reference_values(face: str) -> dict[str, object]:
    """Option -> what a reference command that does not say it means by that, where ``liquid`` means something else."""
    return {one.name: one.reference for one in options_of(face) if one.reference is not None}
