"""The Hugging Face token: from the environment, a file, an object at a URL, or Google Secret Manager; and the key of a
teacher's server, from the environment. Never logged."""

from __future__ import annotations

import base64
import os
from pathlib import Path

from liquid_llm import storage
from liquid_llm.config import TeacherConfig
from liquid_llm.errors import StorageError, UsageError
from liquid_llm.served.client import KEY_VARIABLE

_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")


def read_token(config: TeacherConfig) -> str | None:
    """The token a run uses, or None: then only public or local models can be read.

    Raises:
        UsageError: the named file is missing or empty.
        StorageError: the named object or secret cannot be read.
    """
    if config.token_file is not None:
        try:
            return _strip(Path(config.token_file).read_bytes(), "--hf_token_file")
        except OSError as error:
            raise UsageError(
                "cannot read the token file", where=f"--hf_token_file={config.token_file}", got=error.strerror
            ) from None
    if config.token_uri is not None:
        return _strip(storage.read_small(config.token_uri), "--hf_token_uri")
    if config.token_secret is not None:
        return _strip(_read_secret(config.token_secret), "--hf_token_secret")
    return next((os.environ[name] for name in _VARIABLES if os.environ.get(name)), None)


def read_server_key() -> str | None:
    """The key of a teacher's server, or None. Raises UsageError for one that is none."""
    value = os.environ.get(KEY_VARIABLE)
    key = _strip(value.encode("utf-8", "surrogateescape"), KEY_VARIABLE) if value else None
    if key is not None and not (key.isascii() and key.isprintable()):
        raise UsageError("the key holds characters that no header can have", where=KEY_VARIABLE)
    return key


def _strip(content: bytes, option: str) -> str:
    try:
        token = content.decode("utf-8").strip()
    except UnicodeDecodeError:
        raise UsageError("the token is not text", where=option) from None
    if not token or any(character.isspace() for character in token):
        raise UsageError("the token is empty or holds spaces or several lines", where=option)
    return token


def _read_secret(name: str) -> bytes:
    """Latest version of ``projects/P/secrets/S[/versions/V]`` by Secret Manager's REST interface."""
    import google.auth
    from google.auth.exceptions import GoogleAuthError
    from google.auth.transport.requests import AuthorizedSession
    from requests import RequestException

    resource = name if "/versions/" in name else f"{name}/versions/latest"
    where = f"--hf_token_secret={name}"
    if not resource.startswith("projects/") or "/secrets/" not in resource:
        raise UsageError("not a secret's name", where=where, expected="projects/PROJECT/secrets/NAME")
    try:
        credentials, _ = google.auth.default(scopes=["https://www.googleapis.com/auth/cloud-platform"])
        endpoint = os.environ.get("SECRET_MANAGER_ENDPOINT", "https://secretmanager.googleapis.com")
        session = AuthorizedSession(credentials)  # type: ignore[no-untyped-call]
        answer = session.get(f"{endpoint}/v1/{resource}:access", timeout=30)
    except (GoogleAuthError, RequestException) as error:
        raise StorageError("cannot reach Secret Manager", where=where, got=str(error)) from None
    if answer.status_code != 200:
        remedy = "check its name, and that the account may access the secret (Secret Manager Secret Accessor)"
        raise StorageError("Secret Manager refused", where=where, got=f"HTTP {answer.status_code}", remedy=remedy)
    try:
        return base64.b64decode(answer.json()["payload"]["data"], validate=True)
    except (ValueError, KeyError, TypeError):
        raise StorageError("Secret Manager gave an answer without a secret", where=where) from None
