"""Where runs lie: a folder or a URL that holds one, or several below it.

a run    a folder with ``metrics.jsonl``, with a checkpoint's sidecar, or with ``provenance/`` beside nothing else's
below    in a folder at most ``_DEPTH`` under the one that was named, as a study's runs or an output's with several runs
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from liquid_llm import storage
from liquid_llm.errors import StorageError, UsageError
from liquid_llm.metrics import FILE_NAME, SAMPLES_FILE

PROVENANCE, SUMMARY_FILE, SIDECAR = "provenance", "summary.json", ".meta.json"
_STORE = "store.json"  # a store of signal has a provenance too
_KNOWN = (
    *(FILE_NAME, SAMPLES_FILE, SUMMARY_FILE),
    *(f"{name}{SIDECAR}" for name in ("best", "last", "final")),
    *(f"{PROVENANCE}/{name}" for name in ("config.json", "environment.json", "data_readiness.json")),
    *(f"{PROVENANCE}/{name}" for name in ("manifest_snapshot.jsonl", "datasets_snapshot.yaml")),
)
_DEPTH = 3
_SHOWN = 6  # names in a message


@dataclass(frozen=True)
class Opened:
    """The files of a run on this machine.

    Attributes:
        folder: where they are; of a run at a URL what a report reads, for as long as it is open.
        sizes: name of a data file in the run -> bytes, of a run at a URL alone.
    """

    folder: Path
    sizes: Mapping[str, int] | None = None


@contextmanager
def open_run(run: str) -> Iterator[Opened]:
    """The files of the run at a path or URL, on this machine.

    Raises:
        UsageError: there is none; says which there are below.
        StorageError: the place cannot be read.
    """
    if not storage.is_remote(run):
        folder = storage.local_path(run)
        if not folder.is_dir():
            raise UsageError("no such directory", where=run, remedy="give the directory of a run")
        if not _is_run(folder):
            raise _no_run(run)
        yield Opened(folder)
        return
    files = _list_files(run)
    wanted = [one for one in files if _is_read(one.name)]
    if not wanted:
        raise _no_run(run, files)
    with storage.scratch("report") as fetched:
        for one in wanted:
            storage.download(one.uri, fetched / one.name)
        yield Opened(fetched, {one.name: one.size for one in files})


def find_runs(place: str) -> list[str]:
    """The run at a path or URL, or those below it, sorted; [] without any.

    Raises:
        StorageError: the place cannot be read.
    """
    if storage.is_remote(place):
        return _remote_runs(place, _list_files(place))
    folder = storage.local_path(place)
    with storage.translate_errors(place):
        return [str(one) for one in _local_runs(folder, _DEPTH)] if folder.is_dir() else []


def last_part(run: str) -> str:
    """What a run is called: its folder's name."""
    if storage.is_remote(run):
        return run.rstrip("/").rsplit("/", 1)[-1]
    return storage.local_path(run).resolve().name


def _list_files(place: str) -> list[storage.FileInfo]:
    """What is below a URL; many web servers list no folders: they are asked for the files of a run by their names.

    Raises:
        StorageError: it cannot be reached, which a web server's empty list does not tell.
    """
    if not place.lower().startswith(("http://", "https://")):
        return storage.list_files(place)
    with suppress(StorageError):
        if listed := storage.list_files(place):
            return listed
    found = [(name, storage.stat(storage.join(place, name))) for name in _KNOWN]
    return [replace(one, name=name) for name, one in found if one is not None]


def _local_runs(folder: Path, depth: int) -> Iterator[Path]:
    if _is_run(folder):
        yield folder
    elif depth:
        for one in sorted(folder.iterdir()):
            if one.is_dir() and not one.is_symlink() and not one.name.startswith("."):
                yield from _local_runs(one, depth - 1)


def _is_run(folder: Path) -> bool:
    if (folder / FILE_NAME).is_file() or next(folder.glob(f"*{SIDECAR}"), None) is not None:
        return True
    return (folder / PROVENANCE).is_dir() and not (folder / _STORE).is_file()


def _remote_runs(place: str, files: Sequence[storage.FileInfo]) -> list[str]:
    folders = {one.name.rpartition("/")[0] for one in files if _marks_run(one.name.rpartition("/")[2])}
    found = sorted(one for one in folders if one.count("/") < _DEPTH)
    return [place] if "" in found else [storage.join(place, one) for one in found]


def _marks_run(name: str) -> bool:
    return name == FILE_NAME or name.endswith(SIDECAR)


def _is_read(name: str) -> bool:
    folder, _, file = name.rpartition("/")
    return (not folder and (_marks_run(file) or file in (SAMPLES_FILE, SUMMARY_FILE))) or folder == PROVENANCE


def _no_run(place: str, files: Sequence[storage.FileInfo] | None = None) -> UsageError:
    below = find_runs(place) if files is None else _remote_runs(place, files)
    if below:
        names = ", ".join(below[:_SHOWN]) + (f" and {len(below) - _SHOWN} more" if len(below) > _SHOWN else "")
        return UsageError(
            "this is no run directory",
            where=place,
            got=f"{len(below)} below it: {names}",
            remedy="give one of them, or compare them: liquid compare " + place,
        )
    return UsageError(
        "this is no run directory",
        where=place,
        expected=f"{FILE_NAME}, {PROVENANCE}/ or *{SIDECAR} in it",
        remedy="give the directory or URL a training run wrote to (hybrid face: the output URI's sub-directory)",
    )
