"""An outside preparation toolkit: a zip that turns raw inputs of formats unknown here into plain JSONL.

What a toolkit is: a zip with ``prepare.py`` (or ``__main__.py``) at its top. It is run, only when somebody names it, as

    python prepare.py --datasets_yaml=FILE --out=FOLDER

in the folder it was unpacked to. FILE maps the name of each dataset that states ``format: toolkit`` to its ``type``,
``in`` (a list of local files) and ``out`` (FOLDER/NAME, which exists). The toolkit writes ``*.jsonl`` or ``*.jsonl.gz``
files of ``{"text": …}`` objects there and exits with 0. What it wrote is then an input like any other: checked, named,
left out where it repeats, and sharded.

It runs with this user's rights and is not a sandbox. It gets no token: every variable whose name looks like a secret is
left out of its environment, and so are the ones that say where credentials lie; its HOME is an empty folder.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import yaml

from liquid_llm import storage
from liquid_llm.errors import DataError, Interrupted, UsageError
from liquid_llm.masking import looks_secret, process_masker
from liquid_llm.preparation.catalog import Dataset
from liquid_llm.runtime import StopSignal
from liquid_llm.storage import FileInfo

log = logging.getLogger(__name__)

ENTRY_POINTS = ("prepare.py", "__main__.py")
MAX_UNPACKED_BYTES = 2 * 2**30
_ENDINGS = (".jsonl", ".jsonl.gz", ".jsonl.zst")
_CREDENTIAL_PLACES = re.compile(
    "GOOGLE_APPLICATION_CREDENTIALS|CLOUDSDK_CONFIG|AWS_SHARED_CREDENTIALS_FILE|AWS_CONFIG_FILE|HF_HOME|HF_TOKEN_PATH"
    "|XDG_CONFIG_HOME|XDG_CACHE_HOME|NETRC"
)
_USERINFO = re.compile(r"://[^/\s]*@")
_LINE_BYTES = 4096
_LAST_LINES = 3
_GRACE_SECONDS = 2.0
_POLL_SECONDS = 0.05
_Datasets = Mapping[str, tuple[Dataset, Sequence[FileInfo]]]


@dataclass(frozen=True)
class ToolkitOptions:
    """What a person said of a toolkit."""

    uri: str
    sha256: str | None
    folder: Path
    timeout_seconds: float


@dataclass(frozen=True)
class Toolkit:
    """A toolkit at hand: a local zip and its hash."""

    options: ToolkitOptions
    archive: Path
    sha256: str

    @contextlib.contextmanager
    def convert(self, datasets: _Datasets) -> Iterator[dict[str, list[FileInfo]]]:
        """Run the toolkit over the inputs of ``datasets``; gives the files it wrote for each, while entered.

        Raises:
            StorageError: the zip is unsafe (a member outside its folder, a link, far too large) or damaged, or an input
                cannot be fetched.
            DataError: it has no entry point, fails, takes too long, or writes nothing for a dataset.
            Interrupted: the process was asked to stop.
        """
        options = self.options
        with storage.scratch("toolkit", options.folder) as own, storage.scratch("toolkit") as work:
            unpacked = own / "toolkit"  # what is run is what was checked
            storage.unpack_zip(self.archive, unpacked, max_bytes=MAX_UNPACKED_BYTES, where=options.uri)
            entry = next((unpacked / name for name in ENTRY_POINTS if (unpacked / name).is_file()), None)
            if entry is None:
                expected = f"{' or '.join(ENTRY_POINTS)} at its top"
                raise DataError("the toolkit has no entry point", where=options.uri, expected=expected)
            catalog = _write_catalog(work, datasets)
            words = [sys.executable, str(entry), f"--datasets_yaml={catalog}", f"--out={work / 'out'}"]
            _run(words, unpacked, clean_environment(os.environ, work / "home"), options)
            yield {name: _outputs(work / "out" / name, name, options) for name in datasets}


@contextlib.contextmanager
def fetch(options: ToolkitOptions) -> Iterator[Toolkit]:
    """The toolkit, for as long as it is needed.

    Raises:
        UsageError: its hash is not the expected one.
        StorageError: it cannot be read.
    """
    with storage.scratch("toolkit") as folder:
        archive = folder / "toolkit.zip"
        storage.download(options.uri, archive)
        got = storage.sha256(archive)
        if options.sha256 is None:
            log.warning("%s is run unchecked: give --prep_toolkit_sha256=%s to have it checked", options.uri, got)
        elif got != options.sha256.lower():
            raise UsageError(
                "the toolkit's hash is not the expected one",
                where=options.uri,
                got=got,
                expected=options.sha256,
                remedy="nothing of it was run: correct --prep_toolkit_sha256 or get the toolkit again",
            )
        yield Toolkit(options, archive, got)


def clean_environment(environ: Mapping[str, str], home: Path) -> dict[str, str]:
    """``environ`` without anything that is, or leads to, a secret."""
    kept = {
        name: value
        for name, value in environ.items()
        if not looks_secret(name) and not _CREDENTIAL_PLACES.fullmatch(name) and not _USERINFO.search(value)
    }
    return {**kept, "HOME": str(home)}


def _write_catalog(work: Path, datasets: _Datasets) -> Path:
    (work / "home").mkdir()
    plain = {}
    for name, (dataset, files) in datasets.items():
        out = work / "out" / name
        out.mkdir(parents=True)
        inputs = [_local(info, work / "in" / name / f"{number:05d}-{info.name}") for number, info in enumerate(files)]
        plain[name] = {"type": dataset.type, "in": inputs, "out": str(out)}
    catalog = work / "datasets.yaml"
    catalog.write_text(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return catalog


def _local(info: FileInfo, copy: Path) -> str:
    if not storage.is_remote(info.uri):
        return str(storage.local_path(info.uri))
    storage.download(info.uri, copy)
    return str(copy)


def _outputs(folder: Path, name: str, options: ToolkitOptions) -> list[FileInfo]:
    files = [info for info in storage.list_files(str(folder)) if info.name.endswith(_ENDINGS)]
    if not files:
        raise DataError(
            f"the toolkit wrote nothing for {name}", where=options.uri, expected=f"*{' or *'.join(_ENDINGS)} files"
        )
    return files


def _run(words: list[str], folder: Path, environ: dict[str, str], options: ToolkitOptions) -> None:
    """Run the toolkit in a process group of its own; none of it is left when this returns or raises."""
    log.info("running the toolkit %s, for %g s at most", options.uri, options.timeout_seconds)
    last: list[str] = []
    with StopSignal() as stop:
        process = subprocess.Popen(
            words,
            cwd=folder,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        reader = threading.Thread(target=_log_output, args=(process.stdout, last), daemon=True)
        reader.start()
        try:
            deadline = time.monotonic() + options.timeout_seconds
            while process.poll() is None and time.monotonic() < deadline and not stop.requested:
                time.sleep(_POLL_SECONDS)
            code = process.poll()
        finally:
            _end_group(process)
            reader.join(_GRACE_SECONDS)
        if stop.requested:
            raise Interrupted("stopped while the toolkit ran; nothing of it is kept", remedy="run the command again")
    if code == 0:
        return
    got = f"exit code {code}" if code is not None else f"still running after {options.timeout_seconds:g} s"
    said = f" ({' / '.join(last)})" if last else ""
    remedy = "raise --prep_timeout_s" if code is None else "its output is in the log"
    raise DataError("the toolkit failed", where=options.uri, got=got + said, remedy=remedy)


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """Ask the whole process group to end, then kill what is left of it."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, PermissionError):  # nobody is left (macOS says the latter)
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE_SECONDS)


def _log_output(stream: IO[bytes], last: list[str]) -> None:
    masker = process_masker()
    with stream:
        while line := stream.readline(_LINE_BYTES):
            text = masker.text(line.decode(errors="replace").rstrip())
            log.info("toolkit: %s", text)
            last.append(text[:200])
            del last[:-_LAST_LINES]
