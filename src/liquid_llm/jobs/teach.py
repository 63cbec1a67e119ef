"""What a teacher rank of a training job does: it opens the teachers that training ranks name, and answers them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from liquid_llm.config import RunConfig
from liquid_llm.distributed_link import TeacherLink
from liquid_llm.models.heads import check_documents
from liquid_llm.runtime import StopSignal, keep_freed_memory
from liquid_llm.teachers.online import OnlineTeacher, open_online
from liquid_llm.teachers.remote import serve
from liquid_llm.teachers.teacher import TeacherSetup
from liquid_llm.wiring.places import cache_dir
from liquid_llm.wiring.teachers import ONLINE, choose_attention_of
from liquid_llm.wiring.tokens import read_token


def run_teacher(config: RunConfig, link: TeacherLink, device: torch.device) -> None:
    """Hold the teachers of a run until the ranks that train are done.

    Raises:
        LiquidError: any problem a user can cause; ``RankError`` with the exit code of the ranks that train.
    """
    if device.type == "cpu":
        keep_freed_memory()
    token = read_token(config.teacher)

    def open_teacher(spec: str, wanted: Mapping[str, Any]) -> OnlineTeacher:
        setup = TeacherSetup(
            tokenizer=None,
            tokenizer_hash="",
            vocab_size=wanted["vocab_size"],
            context=wanted["context"],
            device=device,
            cache=cache_dir(),
            precision=config.teacher.precision,
            attention=partial(choose_attention_of, config.teacher),
            token=token,
            quantise=config.teacher.quantisation,
        )
        teacher = open_online(spec.removeprefix(ONLINE), setup)
        if wanted["documents"]:
            check_documents(teacher.model)
        return teacher

    with StopSignal() as stop:
        serve(link, open_teacher, lambda: stop.requested)
