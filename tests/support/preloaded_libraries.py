"""Of what ``preloaded`` has, the part that needs nothing but torch and transformers, and nothing of this project."""

from __future__ import annotations

import gc
import importlib

for name in (
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint.default_planner",
    "torch.distributed.checkpoint.hf_storage",
    "transformers.generation",
    "transformers.models.lfm2.modeling_lfm2",
    "transformers.models.llama.modeling_llama",
):
    importlib.import_module(name)

gc.collect()
gc.freeze()  # a process that is forked would copy what its collections look at
