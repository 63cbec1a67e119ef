"""What the model of memory has answered, for all processes of a session of tests.

Each run works out its memory before it begins, half a second of it; most runs of tests are of a few shapes. A process
remembers its answers by itself (``liquid_llm.memory``), and a run that is forked begins without any. Each shape is
still worked out once a session, by the code that is tested.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path

from tests.support.shared import FOLDER

from liquid_llm import memory
from liquid_llm.memory.prediction import MemoryPrediction


def share() -> None:
    """Let this process, and what is forked from it, look up what another of the session has worked out."""
    if FOLDER in os.environ:
        folder = Path(os.environ[FOLDER]) / "predictions"
        folder.mkdir(exist_ok=True)
        memory._ANSWERS = Answers(folder)


class Answers(dict[str, MemoryPrediction]):
    """Answers by their question, each in a file of ``folder`` beside."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def __contains__(self, question: object) -> bool:
        if not super().__contains__(question):
            try:
                answer = MemoryPrediction(**json.loads(self._place(question).read_text()))
            except FileNotFoundError:
                return False
            super().__setitem__(str(question), answer)
        return True

    def __setitem__(self, question: str, answer: MemoryPrediction) -> None:
        super().__setitem__(question, answer)
        part = self.folder / f"{os.getpid()}.part"
        part.write_text(json.dumps(asdict(answer)))
        part.rename(self._place(question))

    def _place(self, question: object) -> Path:
        return self.folder / hashlib.sha256(str(question).encode()).hexdigest()
