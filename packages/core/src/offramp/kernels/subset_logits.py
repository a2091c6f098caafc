"""Logits of a few classes per row: what a gate looks at instead of the whole vocabulary."""

from __future__ import annotations

from torch import Tensor


def subset_logits(hidden: Tensor, weight: Tensor, ids: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return `hidden @ weight[ids].T` row by row: k products per row instead of one per class.

    hidden: [..., width]; weight: [classes, width]; ids: int64 [..., k], each row's own; bias: [classes] or None.
    Returns [..., k] in the type of `hidden`. The nodes of a draft tree are rows like any others, so one call serves
    them all.
    """
    found = (weight[ids] @ hidden.unsqueeze(-1)).squeeze(-1)
    return found if bias is None else found + bias[ids]


def among(logits: Tensor, ids: Tensor) -> Tensor:
    """Return whether the argmax of logits [rows, classes] is one of ids [rows, k], as a bool mask [rows]."""
    return (logits.argmax(-1, keepdim=True) == ids).any(-1)
