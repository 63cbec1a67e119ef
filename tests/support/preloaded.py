"""What processes of tests have loaded before they begin: it takes a second or two of each that must do it itself.

Nothing here may start a thread or ask for a device: the server that has it loaded forks.
"""

from __future__ import annotations

import gc
import importlib

from tests.support import predictions
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from liquid_llm.provenance import package_versions

for name in (
    "datasets",
    "numpy.ctypeslib",
    "rich._emoji_codes",
    "tensorboard.summary.writer.event_file_writer",
    "torch.distributed.checkpoint.default_planner",
    "torch.distributed.checkpoint.hf_storage",
    "torch.distributed.fsdp",
    "torch.utils.serialization.config",
    "torch.utils.tensorboard",
    "transformers.convert_slow_tokenizer",
    "transformers.generation",
    "transformers.integrations.mistral",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.encoder_decoder.configuration_encoder_decoder",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.lfm2.modeling_lfm2",
    "transformers.models.llama.modeling_llama",
    "liquid_llm.jobs.capture",
    "liquid_llm.jobs.evaluate",
    "liquid_llm.jobs.train",
    "liquid_llm.signal_store.codecs.tail",
    "liquid_llm.trackers.tensorboard",
):
    importlib.import_module(name)

get_checkpoint_conversion_mapping("llama")  # a thousand regular expressions, before the first weights are read
package_versions()
predictions.share()

gc.collect()
gc.freeze()  # a process that is forked would copy what its collections look at
