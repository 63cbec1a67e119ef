"""What the model of memory answers: bytes by stage and by consumer, and what has to be free for them.

peak        the most bytes of tensors alive at the same time
rest        bytes of tensors between two steps
allowance   what a device takes beside tensors: kept apart from the peak in every figure and every sentence
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from liquid_llm.formatting import format_bytes

STUDENT, GRADIENTS, MOMENTS = "student weights", "gradients", "optimizer moments"
TEACHER, TEACHER_WORK, REFERENCE = "teacher weights", "teacher activations", "reference student"
EXCHANGE = "gathered weights and their exchange"
ACTIVATIONS, LOSS, SIGNAL, CODEC, BATCH = "activations", "loss buffers", "teacher signal", "codec buffers", "batch"

# Matrix libraries keep workspaces of their own: cuBLAS 8 MiB a handle and 32 on Hopper, cuDNN and reductions some more.
# The CUDA context itself, about half a GiB, is no part of it: memory is free or not with the context in place.
WORKSPACE_BYTES = 128 * 2**20
# Of the tensors: holes that the allocator cannot fill, because shapes differ from one micro-batch to the next.
FRAGMENTATION_SHARE = 0.05


@dataclass(frozen=True)
class MemoryPrediction:
    """Memory of a job on its device.

    Attributes:
        peak_bytes: see the module; the sum of ``consumers``.
        rest_bytes: see the module.
        stages: the most bytes alive in each stage.
        consumers: bytes of each consumer at the peak, the largest first.
        peak_stage: the stage of the peak.
        peak_batch: the micro-batch of the peak, in words.
        device: ``cpu`` or the kind of accelerator.
        measured_part: what was measured on small tensors and scaled up, in words; "" where all is worked out.
    """

    peak_bytes: int
    rest_bytes: int
    stages: Mapping[str, int]
    consumers: Mapping[str, int]
    peak_stage: str
    peak_batch: str
    device: str
    measured_part: str = ""

    @property
    def workspace_bytes(self) -> int:
        """Allowance for what libraries take beside tensors."""
        return 0 if self.device == "cpu" else WORKSPACE_BYTES

    @property
    def fragmentation_bytes(self) -> int:
        """Allowance for memory that the allocator holds and cannot use."""
        return int(self.peak_bytes * FRAGMENTATION_SHARE)

    @property
    def needed_bytes(self) -> int:
        """What has to be free before the job begins: the peak and both allowances."""
        return self.peak_bytes + self.workspace_bytes + self.fragmentation_bytes

    def largest(self, count: int = 3) -> str:
        """The largest consumers in words: ``teacher weights 6.0 GiB, ...``."""
        return ", ".join(f"{name} {format_bytes(size)}" for name, size in list(self.consumers.items())[:count])

    def as_dict(self) -> dict[str, Any]:
        """Plain values, allowances included."""
        return {
            **asdict(self),
            "workspace_bytes": self.workspace_bytes,
            "fragmentation_bytes": self.fragmentation_bytes,
            "needed_bytes": self.needed_bytes,
        }
