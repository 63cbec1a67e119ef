"""How good a student is on text that it was not trained on, and how near to its teacher.

measure    a figure of a position: cross-entropy, KL, agreement, overlap, confidence (``measures``)
text sums  the measures of each text added up (``sums``), so that figures have an error and differences can be paired
evaluator  the rows that a run writes while it trains (``evaluator``)
"""

from liquid_llm.evaluation.evaluator import MEASURED, Evaluator, Score
from liquid_llm.evaluation.judge import Judge
from liquid_llm.evaluation.measures import NUM_BINS, PositionMeasures, compare
from liquid_llm.evaluation.result import Evaluation
from liquid_llm.evaluation.sums import Estimate, TextSums

__all__ = [
    "MEASURED",
    "NUM_BINS",
    "Estimate",
    "Evaluation",
    "Evaluator",
    "Judge",
    "PositionMeasures",
    "Score",
    "TextSums",
    "compare",
]
