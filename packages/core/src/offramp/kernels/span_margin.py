"""How far the best class is ahead of the second over a span: what tells that a diffusion language model has settled."""

from __future__ import annotations

import torch
from torch import Tensor

from offramp.errors import BadArgument
from offramp.kernels._select import select
from offramp.kernels.head_stats import head_stats


def span_margin(values: Tensor, where: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """Return the mean over the marked positions of top-1 minus top-2 logit, float32 [rows].

    values: logits [rows, positions, classes], or with `weight` [classes, width] hidden states [rows, positions, width],
    whose logits (plus `bias`) are then never kept; where: bool [rows, positions]. A row without a marked position, or
    with a NaN or infinite logit at one, is NaN: it was not looked at, so it is never sure. One class alone is ahead by
    infinity. Raises `BadArgument`. Paper: the gap in float32 that SchED averages (arXiv 2512.02892).
    """
    if values.dim() != 3 or where.dtype != torch.bool or where.shape != values.shape[:2] or not values.shape[2]:
        raise BadArgument(
            f"span_margin takes [rows, positions, classes or width] and a bool mask [rows, positions], not "
            f"{list(values.shape)} and {where.dtype} {list(where.shape)}"
        )
    if weight is None:
        if bias is not None:
            raise BadArgument("span_margin: bias= goes with weight=; logits have it already")
        return select("span_margin", reference, values, where)(values, where)
    # every position is projected, also those nobody marked: choosing them would wait for the device
    found = head_stats(values.flatten(0, 1), weight, bias, needs=frozenset())
    return average((found.first - found.second).view(where.shape), where)


def reference(values: Tensor, where: Tensor) -> Tensor:
    """Compute `span_margin` of logits with torch."""
    if values.shape[-1] == 1:
        gap = torch.full(where.shape, torch.inf, device=values.device)
        top = values[..., 0].float()
    else:
        pair = values.topk(2, -1).values.float()  # topk takes NaN for the largest
        top, gap = pair[..., 0], pair[..., 0] - pair[..., 1]
    return average(gap.masked_fill(~top.isfinite(), torch.nan), where)


def average(gap: Tensor, where: Tensor) -> Tensor:
    """Return the mean of `gap` [rows, positions] where marked, NaN for a row with nothing marked."""
    return gap.masked_fill(~where, 0).sum(-1) / where.sum(-1)
