"""What a run was: its configuration, data, software and machine, written before step one.

    provenance/options.yaml              the options that were given: --config with this file runs the same again; its
                                         first line is a hash of the others, as half of it would be options too
    provenance/config.json               the configuration as it was understood
    provenance/manifest_snapshot.jsonl   the manifest's lines at that moment
    provenance/data_readiness.json       samples, tokens and stored signal found, by type
    provenance/datasets_snapshot.yaml    named datasets
    provenance/environment.json          packages, git commit, hardware, choices with reasons, command line
    provenance/history.json              each session with the step it began at, its options, and what changed in them

A *session* is one process working on the run. A continued run keeps the environments of its earlier sessions, newest
last, under ``earlier_sessions``. Everything passes through ``masking`` first: no secret reaches a file.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from liquid_llm import storage
from liquid_llm.errors import StorageError, first_line
from liquid_llm.masking import Masker, secret_values
from liquid_llm.parsing import ParseError, parse_json, parse_yaml
from liquid_llm.storage import write_bytes

FOLDER = "provenance"
OPTIONS = "options.yaml"
CONFIG, MANIFEST, READINESS = "config.json", "manifest_snapshot.jsonl", "data_readiness.json"
DATASETS, ENVIRONMENT = "datasets_snapshot.yaml", "environment.json"
HISTORY = "history.json"

PACKAGES = (
    "liquid-llm torch transformers accelerate datasets pyarrow numpy safetensors tokenizers fsspec gcsfs zstandard "
    "tensorboard rich gguf pyyaml flash-attn"
)
_VARIABLES = (  # prefixes of the environment variables that change what a run does
    *("AIP_", "CLOUD_ML_", "CLUSTER_SPEC", "CUDA_", "HF_", "LIQUID_", "MKL_", "NCCL_", "OMP_", "PYTORCH_", "TORCH_"),
    *("TOKENIZERS_", "TRANSFORMERS_", "SLURM_", "STORAGE_EMULATOR_HOST", "LOCAL_RANK", "MASTER_", "RANK", "WORLD_SIZE"),
)
_MAX_EARLIER_SESSIONS = 20
_MAX_HISTORY = 500
_GIT_TIMEOUT_SECONDS = 10.0

_HASH_LINE = "# sha256 of the lines below: "

_log = logging.getLogger(__name__)


def write_provenance(
    folder: str | Path,
    *,
    config: Mapping[str, Any],
    manifest: Sequence[Mapping[str, Any]],
    readiness: Mapping[str, Any],
    datasets: Mapping[str, Any],
    choices: Mapping[str, Mapping[str, str]],
    options: Mapping[str, Any] | None = None,
    extra: Mapping[str, Any] | None = None,
    argv: Sequence[str] | None = None,
    environ: Mapping[str, str] | None = None,
    now: datetime | None = None,
) -> None:
    """Write the six files, each atomically, with secrets masked.

    Args:
        folder: the run directory, or the store that a capture fills: a path or any URL.
        config: nested plain values, as are all that follow.
        manifest: one mapping a manifest line; empty without a manifest.
        readiness: what was found of data and stored signal.
        datasets: named datasets with configuration, revision, splits.
        choices: automatic decisions, ``{"device": {"value": "cpu", "reason": "no GPU"}}``.
        options: option name -> value, as a person gave them.
        extra: further keys of ``environment.json`` (where the student came from, teachers, parameters).
        argv: the command line; this process's if None.
        environ: the environment variables; this process's if None.
        now: time of writing, this moment if None.

    Raises:
        StorageError: a file cannot be written.
        TypeError: something other than a plain value was given.
    """
    environ = os.environ if environ is None else environ
    masker = Masker(secret_values(environ))
    place = storage.join(str(folder), FOLDER)

    def write(name: str, text: str) -> None:
        # undecodable file names hold lone surrogates
        write_bytes(storage.join(place, name), text.encode("utf-8", errors="backslashreplace"))

    environment = {
        **describe_environment(argv=argv, environ=environ, now=now),
        "choices": choices,
        **(extra or {}),
        "earlier_sessions": _earlier_sessions(storage.join(place, ENVIRONMENT)),
    }
    kept = yaml.safe_dump(mask_words(options or {}, masker), sort_keys=False, allow_unicode=True)
    write(OPTIONS, f"{_HASH_LINE}{_hash(kept.encode('utf-8', errors='backslashreplace'))}\n{kept}")
    write(CONFIG, _json(masker.value(config)))
    write(MANIFEST, "".join(_json(masker.value(line), None) for line in manifest))
    write(READINESS, _json(masker.value(readiness)))
    write(DATASETS, yaml.safe_dump(masker.value(datasets), sort_keys=False, allow_unicode=True))
    write(ENVIRONMENT, _json(masker.value(environment)))


def add_to_history(
    folder: str | Path,
    *,
    step: int,
    start: str,
    options: Mapping[str, Any],
    counted: Mapping[str, Any],
    changed: Callable[[Mapping[str, Any], Mapping[str, Any]], Mapping[str, Any]],
    now: datetime | None = None,
) -> Mapping[str, Any]:
    """Add this session to ``history.json`` and return what changed since the one before, {} for the first.

    Args:
        folder: the run directory.
        step: where the session begins.
        start: what it began from, in a word.
        options: as they run it again.
        counted: what changes its numbers, as plain values.
        changed: gives what differs between ``counted`` of the session before and of this one.

    Raises:
        StorageError: the file cannot be written.
    """
    uri = storage.join(str(folder), FOLDER, HISTORY)
    masker = Masker(secret_values(os.environ))
    sessions: list[Any] = []
    try:
        found = parse_json(storage.read_small(uri)) if storage.exists(uri) else []
        sessions = found if isinstance(found, list) else []
    except (StorageError, ValueError) as error:
        _log.warning("%s: the history so far is unreadable and left out (%s)", uri, error)
    last = sessions[-1] if sessions and isinstance(sessions[-1], dict) else {}
    known = last.get("counted")
    counted = mask_words(counted, masker)
    differs = changed(known, counted) if isinstance(known, dict) else {}
    moment = (now or datetime.now(timezone.utc)).astimezone(timezone.utc)
    entry = {
        "started_at": moment.isoformat(timespec="seconds"),
        "step": step,
        "start": start,
        "changed": differs,
        "options": mask_words(options, masker),
        "counted": counted,
    }
    kept = [*sessions[:1], *sessions[1:][-_MAX_HISTORY:], entry]
    write_bytes(uri, _json(kept).encode("utf-8", errors="backslashreplace"))
    return differs


def parse_kept_options(text: bytes) -> Any:
    """What ``options.yaml`` of a run says; a release before wrote no hash, and is believed.

    Raises:
        ParseError: it is no YAML, or not what was written.
    """
    first, _, rest = text.partition(b"\n")
    line = first.decode("ascii", errors="replace")
    if line.startswith(_HASH_LINE) and line.removeprefix(_HASH_LINE) != _hash(rest):
        raise ParseError("it has been changed or damaged since it was written: its first line is a hash of the others")
    return parse_yaml(text)


def _hash(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()


def mask_words(value: Any, masker: Masker) -> Any:
    """Masked by what a word looks like, not by its option's name: ``--hf_token_secret`` names a place."""
    if isinstance(value, Mapping):
        return {name: mask_words(one, masker) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [mask_words(one, masker) for one in value]
    return masker.text(value) if isinstance(value, str) else value


def describe_environment(
    *, argv: Sequence[str] | None = None, environ: Mapping[str, str] | None = None, now: datetime | None = None
) -> dict[str, Any]:
    """Software, machine and command line as nested plain values. **Not masked**: ``write_provenance`` does that."""
    environ = os.environ if environ is None else environ
    moment = now or datetime.now(timezone.utc)
    return {
        "started_at": moment.astimezone(timezone.utc).isoformat(timespec="seconds"),
        "command": list(sys.argv if argv is None else argv),
        "python": {"version": platform.python_version(), "implementation": platform.python_implementation()},
        "packages": package_versions(),
        "git": git_state(Path(__file__).resolve().parent),
        "hardware": hardware(),
        "variables": {name: environ[name] for name in sorted(environ) if name.startswith(_VARIABLES)},
    }


def package_versions(names: Sequence[str] = tuple(PACKAGES.split())) -> dict[str, str | None]:
    """Installed versions of the packages that decide a run's numbers; None for one that is not installed."""
    return {name: _version(name) for name in names}


@cache  # what is imported stays what it is while the process lives, and each is a file to be found and parsed
def _version(name: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(name)
    return None


def git_state(folder: Path) -> dict[str, Any]:
    """``{"commit", "modified", "reason"}`` of the checkout that tracks ``folder``; without one, None and the reason.

    A folder that merely lies inside somebody's repository (a virtual environment, say) is not tracked by it.
    """
    try:
        if _git(folder, "ls-files", "--", "."):
            commit = _git(folder, "rev-parse", "HEAD").strip()
            changes = _git(folder, "status", "--porcelain", "--untracked-files=no").splitlines()
            reason = f"{len(changes)} tracked files differ from the commit" if changes else "clean checkout"
            return {"commit": commit, "modified": bool(changes), "reason": reason}
        reason = "the code is not tracked by a git checkout"
    except FileNotFoundError:
        reason = "git is not installed"
    except subprocess.TimeoutExpired:
        reason = f"git took longer than {_GIT_TIMEOUT_SECONDS:.0f} s"
    except subprocess.CalledProcessError as error:
        reason = first_line(error.stderr or f"git ended with {error.returncode}")
    return {"commit": None, "modified": None, "reason": reason}


def _git(folder: Path, *words: str) -> str:
    # Inside a git hook GIT_DIR names another repository; and a look must not take the repository's lock.
    environ = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    environ |= {"LC_ALL": "C", "GIT_OPTIONAL_LOCKS": "0"}
    words = ("git", "-C", str(folder), *words)
    return subprocess.run(
        words, capture_output=True, text=True, check=True, timeout=_GIT_TIMEOUT_SECONDS, env=environ
    ).stdout


def hardware() -> dict[str, Any]:
    """CPU model, cores, memory in bytes (and the container's limit, where it has one), and GPUs of this machine."""
    import torch

    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    built = torch.version.cuda
    missing = "torch is built without CUDA" if built is None else f"torch is built for CUDA {built} but sees no device"
    cpu = re.search(r"^(?:model name|Model)\s*:\s*(.*)$", _read("/proc/cpuinfo"), re.MULTILINE)  # Linux only
    limits = [_read(f"/sys/fs/cgroup/{name}").strip() for name in ("memory.max", "memory/memory.limit_in_bytes")]
    # cgroup v1 writes "no limit" as a huge number, v2 as a word
    limit = next((int(text) for text in limits if text.isdigit() and int(text) < 2**60), None)
    return {
        "host": platform.node(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": cpu[1].strip() if cpu else platform.processor() or None,
        "num_cores": os.cpu_count(),
        "num_usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": _memory_bytes(),
        "memory_limit_bytes": limit,
        "gpus": [{"name": one.name, "memory_bytes": int(one.total_memory)} for one in found],
        "gpus_reason": f"CUDA {built}" if found else missing,
    }


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not on every system
        return None


def _read(path: str) -> str:
    with contextlib.suppress(OSError):
        return Path(path).read_text(encoding="utf-8", errors="replace")
    return ""


def _earlier_sessions(uri: str) -> list[dict[str, Any]]:
    """The environments of the sessions before this one, oldest first."""
    try:
        if not storage.exists(uri):
            return []
        last = parse_json(storage.read_small(uri))
    except (StorageError, ValueError) as error:
        _log.warning("%s: the earlier session's environment is unreadable and left out (%s)", uri, error)
        return []
    if not isinstance(last, dict):
        return []
    earlier = last.pop("earlier_sessions", [])
    return [*(earlier if isinstance(earlier, list) else []), last][-_MAX_EARLIER_SESSIONS:]


def _json(value: object, indent: int | None = 2) -> str:
    return json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False) + "\n"
