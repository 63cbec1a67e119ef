"""The distillation loss: what it consumes, its plain specification, and the version that trains."""

from liquid_llm.losses.fused import fused_loss
from liquid_llm.losses.objective import Objective
from liquid_llm.losses.plan import LossPlan, choose_plan
from liquid_llm.losses.reference import reference_loss
from liquid_llm.losses.signals import DenseSignal, LogitsSignal, LossOutput, OutputHead, Signal, SparseSignal

__all__ = [
    "DenseSignal",
    "LogitsSignal",
    "LossOutput",
    "LossPlan",
    "Objective",
    "OutputHead",
    "Signal",
    "SparseSignal",
    "choose_plan",
    "fused_loss",
    "reference_loss",
]
