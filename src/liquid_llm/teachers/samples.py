"""What the teacher side needs of a dataset."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from liquid_llm.data.types import Sample


class SampleSource(Protocol):
    """Tokenised samples by index, such as ``TokenDataset``.

    Attributes:
        lengths: [samples] int64, tokens of each.
    """

    @property
    def lengths(self) -> NDArray[np.int64]: ...

    def __len__(self) -> int: ...

    def sample_id(self, index: int) -> str: ...

    def sample(self, index: int) -> Sample: ...
