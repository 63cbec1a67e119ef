"""A student's embedding and output head made of a larger model's, projected to the student's width.

The rows of the teacher's embedding are written in the directions in which they differ most: the first right singular
vectors of the matrix, as many as the student is wide. No other projection to that width keeps more of the rows' inner
products (Eckart and Young 1936), which is what the embedding knows of its tokens. They are scaled to the size that the
student's own rows began with, for which its blocks are made.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from liquid_llm.errors import ModelError

_ROWS = 8192  # of an embedding that are widened at a time


@torch.no_grad()
def take_embedding(student: Any, teacher: Any, vocab_size: int, where: str) -> dict[str, Any]:
    """Give ``student`` the embedding of ``teacher``, in place, and its head where they have heads of their own.

    Returns:
        What was taken, as plain values: ``embedding``, the width of student and teacher; ``kept``, the share of the
        embedding's squares that the projection keeps.

    Raises:
        ModelError: the teacher is narrower than the student, or its vocabulary smaller than ``vocab_size``.
    """
    ours, theirs = (model.get_input_embeddings().weight for model in (student, teacher))
    if theirs.shape[1] < ours.shape[1] or theirs.shape[0] < vocab_size:
        raise ModelError(
            "the model's embedding is smaller than the student's",
            where=where,
            got=f"{theirs.shape[0]} rows of {theirs.shape[1]}",
            expected=f"at least {vocab_size} rows of {ours.shape[1]}",
        )
    kept = _project(ours, theirs[:vocab_size])
    head, other = student.get_output_embeddings().weight, teacher.get_output_embeddings().weight
    if head is not ours:
        _project(head, other[:vocab_size])
    return {"embedding": [ours.shape[1], theirs.shape[1]], "kept": kept}


def _project(into: Tensor, rows: Tensor) -> float:
    """Fill ``into`` [n, narrow] with ``rows`` [n, wide], projected; returns the share of their squares that is kept."""
    rows = rows.to("cpu", torch.float32)
    products = sum((part.double().t() @ part.double() for part in torch.split(rows, _ROWS)), torch.zeros(()).double())
    # The eigenvectors of the small matrix are the right singular vectors, the largest last.
    values, vectors = torch.linalg.eigh(products)
    narrow = rows @ vectors[:, -into.shape[1] :].flip(1).float()
    into.copy_(narrow * (into.square().mean() / narrow.square().mean()).sqrt())
    return float(values[-into.shape[1] :].sum() / values.sum())
