"""Logits of a few classes per row: what a gate looks at instead of the whole vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor

from offramp.errors import BadArgument
from offramp.kernels._select import select


def subset_logits(hidden: Tensor, weight: Tensor, ids: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return `hidden @ weight[ids].T` row by row: k products per row instead of one per class.

    hidden: [..., width]; weight: [classes, width]; ids: int64 [..., k], each row's own; bias: [classes] or None.
    Returns [..., k] in the type of `hidden`. The nodes of a draft tree are rows like any others, so one call serves
    them all (SpecEE's merged mapping, arXiv 2504.08850). Raises `BadArgument` for ids that are no classes; on a GPU,
    where looking would wait for the device, their logits are NaN.
    """
    if hidden.shape[:-1] != ids.shape[:-1] or weight.dim() != 2 or hidden.shape[-1] != weight.shape[-1]:
        raise BadArgument(
            f"subset_logits takes hidden [..., width], weight [classes, width] and ids [..., k], not "
            f"{list(hidden.shape)}, {list(weight.shape)} and {list(ids.shape)}"
        )
    given = [] if bias is None else [bias]
    return select("subset_logits", reference, hidden, weight, ids, *given)(hidden, weight, ids, bias)


def reference(hidden: Tensor, weight: Tensor, ids: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute `subset_logits` with torch: gathered rows of the weight, one small product per row."""
    try:
        rows = torch.nn.functional.embedding(ids, weight)  # a gather that refuses negative ids too
    except IndexError as error:
        raise BadArgument(f"subset_logits: ids must be classes, 0 to {weight.shape[0] - 1}: {error}") from error
    found = (rows @ hidden.unsqueeze(-1)).squeeze(-1)
    return found if bias is None else found + bias[ids]


def among(logits: Tensor, ids: Tensor) -> Tensor:
    """Return whether the argmax of logits [rows, classes] is one of ids [rows, k], as a bool mask [rows]."""
    return (logits.argmax(-1, keepdim=True) == ids).any(-1)
