"""What processes of tests have loaded before they begin: it takes a second or two of each that must do it itself.

Nothing here may start a thread or ask for a device: the server that has it loaded forks.
"""

from __future__ import annotations

import gc
import importlib

from tests.support import predictions

for name in (
    "datasets",
    "tensorboard.summary.writer.event_file_writer",
    "torch.distributed.checkpoint.default_planner",
    "torch.distributed.checkpoint.hf_storage",
    "torch.distributed.fsdp",
    "torch.utils.tensorboard",
    "transformers.generation",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.lfm2.modeling_lfm2",
    "transformers.models.llama.modeling_llama",
    "liquid_llm.jobs.capture",
    "liquid_llm.jobs.evaluate",
    "liquid_llm.jobs.train",
):
    importlib.import_module(name)

predictions.share()

gc.collect()
gc.freeze()  # a process that is forked would copy what its collections look at
