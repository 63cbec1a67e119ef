"""The eager form with its divergence compiled: for those divergences that have no kernels of their own.

What compilers make of a divergence is a few passes over the rows instead of a dozen or two. Finishing, cross-entropy
and the distance to a reference student stay as they are. Rows may be few or many in a call: after a second size torch
compiles for every size at once. It takes seconds, and is kept for the process.

Training and evaluation, T = 1 and others, a chunk of one row, and teachers of other vocabularies are each a kind of
their own. torch gives up after eight kinds of one function, which a run can come to in its middle, so more are allowed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from liquid_llm.losses.divergences import SliceGradient, Softmax, SparseRows, get_divergence
from liquid_llm.losses.rows.choice import COMPILED
from liquid_llm.losses.rows.eager import RowLoss
from liquid_llm.losses.rows.giving_up import or_else

_MOST_KINDS = 64


class CompiledRows(RowLoss):
    """See the module and ``RowLoss``."""

    def _diverge(self, student: Softmax, teacher: Softmax | SparseRows, gradient: SliceGradient | None) -> Tensor:
        from torch._dynamo import config as dynamo_config

        compiled = _compile(self._objective.divergence, self._divergence.temperature, isinstance(teacher, Softmax))

        def work() -> Tensor:
            with dynamo_config.patch(recompile_limit=_MOST_KINDS):
                found: Tensor = compiled(student, teacher, gradient)
                return found

        return or_else(COMPILED, work, functools.partial(super()._diverge, student, teacher, gradient))


@functools.lru_cache(maxsize=64)
def _compile(spec: str, temperature: float, dense: bool) -> Callable[..., Any]:
    divergence = get_divergence(spec, temperature)
    compiled: Callable[..., Any] = torch.compile(divergence.dense if dense else divergence.sparse, fullgraph=True)
    return compiled
