"""What can be named on a command line or in a configuration file, and where it lies: one line each.

A new codec, divergence, teacher or tracker is a file and a line here. Only names are held, so that ``--help`` can list
them without importing what they stand for.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

CODECS = {
    "tail": "liquid_llm.signal_store.codecs.tail:TailCodec",
    "full": "liquid_llm.signal_store.codecs.full:FullCodec",
    "topk": "liquid_llm.signal_store.codecs.topk:TopKCodec",
    "sampled": "liquid_llm.signal_store.codecs.sampled:SampledCodec",
}

DIVERGENCES = {
    "forward_kl": "liquid_llm.losses.divergences.forward_kl:ForwardKL",
    "reverse_kl": "liquid_llm.losses.divergences.reverse_kl:ReverseKL",
    "jsd": "liquid_llm.losses.divergences.jsd:JSD",
    "skew_kl": "liquid_llm.losses.divergences.skew_kl:SkewKL",
    "skew_reverse_kl": "liquid_llm.losses.divergences.skew_reverse_kl:SkewReverseKL",
    "decoupled_topk": "liquid_llm.losses.divergences.decoupled_topk:DecoupledTopK",
    "tail_aware": "liquid_llm.losses.divergences.tail_aware:TailAware",
}

TEACHERS = {
    "online": "liquid_llm.teachers.online:open_online",
    "store": "liquid_llm.teachers.stored:open_stored",
}

TRACKERS = {
    "mlflow": "liquid_llm.trackers.mlflow:MlflowTracker",
    "trackio": "liquid_llm.trackers.trackio:TrackioTracker",
    "wandb": "liquid_llm.trackers.wandb:WandbTracker",
    "tensorboard": "liquid_llm.trackers.tensorboard:TensorBoardTracker",
}
# Trackers whose package is in no requirement, of the package's own name: they come with the extra ``track``.
TRACKERS_OF_EXTRA = ("mlflow", "trackio", "wandb")


def load(table: Mapping[str, str], name: str) -> Any:
    """The object that ``name`` stands for in one of the tables, imported now.

    Raises:
        KeyError: the table has no such name; what reads a user's words checks them against it before.
    """
    module, _, attribute = table[name].partition(":")
    return getattr(importlib.import_module(module), attribute)
