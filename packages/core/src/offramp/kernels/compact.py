"""Keep the rows that go on: from a mask to dense rows of any number of tensors, in order."""

from __future__ import annotations

import torch
from torch import Tensor

from offramp.errors import BadArgument
from offramp.kernels._select import select


def compact(mask: Tensor, *tensors: Tensor, count: int | None = None) -> tuple[Tensor, ...]:
    """Return (index, *rows): the numbers of the rows where `mask` is true, int64 [count], and those rows of `tensors`.

    mask: bool [rows]; tensors: [rows, ...] each, of any type, contiguous or not. count: how many are true, where the
    caller knows; nothing then waits for the device, and without it the count is read from there once. With a count of
    all or none, rows are views. Raises `BadArgument`. Put results back with `scatter(index, values, out)`.
    """
    if mask.dtype != torch.bool or mask.dim() != 1:
        raise BadArgument(f"compact takes a bool mask [rows], not {mask.dtype} {list(mask.shape)}")
    for tensor in tensors:
        if tensor.shape[:1] != mask.shape:
            raise BadArgument(f"compact: {list(tensor.shape)} has not one row for each of the mask's {len(mask)}")
    if count is not None and not 0 <= count <= len(mask):
        raise BadArgument(f"compact: count={count} is no number of rows, 0 to {len(mask)}")
    if count is not None and count in (0, len(mask)):  # as it always is of one row: there is nothing to look for
        return (torch.arange(count, device=mask.device), *(tensor[:count] for tensor in tensors))
    return select("compact", reference, mask, *tensors)(mask, *tensors, count=count)


def reference(mask: Tensor, *tensors: Tensor, count: int | None = None) -> tuple[Tensor, ...]:
    """Compute `compact` with torch."""
    index = mask.nonzero() if count is None else torch.nonzero_static(mask, size=count)
    index = index.squeeze(-1)
    return (index, *(tensor.index_select(0, index) for tensor in tensors))
