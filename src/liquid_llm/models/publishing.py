"""A student's folder on the Hugging Face hub, through the hub's own client.

``HF_ENDPOINT`` and ``HF_HUB_OFFLINE`` hold as everywhere. The token is passed in, and shown nowhere.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from liquid_llm.errors import StorageError, UsageError, first_line
from liquid_llm.masking import Masker

log = logging.getLogger(__name__)

_NAME = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")
_PAUSES = (1.0, 4.0, 16.0)  # seconds before a request is made again
_OF_AN_EARLIER_MODEL = ["*.safetensors", "*.safetensors.index.json", "chat_template.*"]
_GIVE_TOKEN = "set HF_TOKEN, give --hf_token_file, --hf_token_uri or --hf_token_secret, or run: hf auth login"

Result = TypeVar("Result")


class Hub:
    """One repository that is written to.

    Args:
        repo: ``name`` or ``owner/name``.
        token: with the right to write; None takes the one a person has signed in with.

    Raises:
        UsageError: it is no name of a repository, there is no token, or nothing may be sent.
    """

    def __init__(self, repo: str, token: str | None) -> None:
        from huggingface_hub import HfApi, constants, get_token

        self._where = f"--push_to_hub={repo}"
        if not _NAME.fullmatch(repo) or ".." in repo or "--" in repo:
            raise UsageError("this is no name of a repository", where=self._where, expected="owner/name")
        if constants.HF_HUB_OFFLINE:
            raise UsageError("HF_HUB_OFFLINE is set, so nothing is sent", where=self._where, remedy="unset it")
        known = token or get_token()
        if known is None:
            raise UsageError("there is no Hugging Face token", where=self._where, remedy=_GIVE_TOKEN)
        self.repo = repo
        self._masker = Masker([known])
        self._api = HfApi(token=known)

    def look(self) -> None:
        """Ask whose token it is, before anything dear is done.

        Raises:
            UsageError: the hub refuses the token.
            StorageError: the hub cannot be reached or fails.
        """
        self._ask(self._api.whoami)

    def push(self, folder: Path, message: str, private: bool | None = None, files: Sequence[Path] = ()) -> str:
        """Make the repository where it is not there, and bring ``folder`` into it; returns its address.

        Weights and templates of an earlier model in it go; everything else stays.

        Args:
            private: whether a repository that is made is; one that is there stays as it is. None: as its owner has it.
            files: more files, put beside those of the folder.

        Raises:
            UsageError: the token may not write there.
            StorageError: the hub cannot be reached or fails.
        """
        from huggingface_hub import CommitOperationAdd

        place = self._ask(lambda: self._api.create_repo(self.repo, private=private, exist_ok=True))
        repo = str(place.repo_id)
        given: dict[str, Any] = {"repo_id": repo, "commit_message": message}
        self._ask(lambda: self._api.upload_folder(folder_path=folder, delete_patterns=_OF_AN_EARLIER_MODEL, **given))
        if files:
            adds = [CommitOperationAdd(path_in_repo=file.name, path_or_fileobj=file) for file in files]
            self._ask(lambda: self._api.create_commit(operations=adds, **given))
        return str(place)

    def _ask(self, call: Callable[[], Result]) -> Result:
        """Make a request, again while the hub is busy or away."""
        from huggingface_hub.utils.tqdm import disable_progress_bars

        disable_progress_bars()
        for pause in (*_PAUSES, None):
            try:
                return call()
            except Exception as error:
                found = self._explain(error, error) or self._explain(error.__cause__, error)  # some are wrapped
                if found is None:
                    raise
                if pause is None or not isinstance(found, StorageError):
                    raise found from None  # the client's own message has addresses, and may have more
                log.warning("%s: %s; again in %g s", self._where, found.problem, pause)
                time.sleep(pause)
        raise AssertionError("a request ends")

    def _explain(self, error: BaseException | None, said: BaseException) -> StorageError | UsageError | None:
        """What the hub's refusal means, in plain words; None for what is no answer of the hub.

        Args:
            said: whose words are passed on: ``error``, or what the client wrapped it in.
        """
        from huggingface_hub.errors import LocalTokenNotFoundError

        status = getattr(getattr(error, "response", None), "status_code", None)
        got = self._masker.text(first_line(" ".join(str(said).split())))
        if isinstance(error, LocalTokenNotFoundError):
            return UsageError("there is no Hugging Face token", where=self._where, remedy=_GIVE_TOKEN)
        if status == 401:
            return UsageError("the hub does not know this token", where=self._where, got="401", remedy=_GIVE_TOKEN)
        if status == 403:
            remedy = "give a token with the right to write there"
            return UsageError("the token may not write there", where=self._where, got="403", remedy=remedy)
        if status is not None and 400 <= status < 500 and status not in (408, 429):
            return UsageError("the hub refuses this", where=self._where, got=f"{status}: {got}")
        if isinstance(error, OSError) or type(error).__module__.startswith(
            "httpx"
        ):  # which of them the client uses varies
            got = f"status {status}" if status is not None else got
            remedy = "try again later: what has been exported stays"
            return StorageError("the hub does not answer as it should", where=self._where, got=got, remedy=remedy)
        return None
