"""`compact` in Triton: one program numbers the rows that stay, then each of their rows is copied by its own program."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def _number(mask, index, rows, count, BLOCK: tl.constexpr):
    before = 0
    for start in range(0, rows, BLOCK):
        row = start + tl.arange(0, BLOCK)
        stays = tl.load(mask + row, mask=row < rows, other=0).to(tl.int32)
        place = before + tl.cumsum(stays, 0) - stays
        tl.store(index + place, row.to(tl.int64), mask=(stays != 0) & (place < count))
        before += tl.sum(stays, 0)


@triton.jit
def _copy(source, index, out, rows, size, stride, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(index + place)
    known = (row >= 0) & (row < rows)
    value = tl.load(source + row * stride + at, mask=known & (at < size), other=0)
    tl.store(out + place * size + at, value, mask=at < size)


def compact(mask: Tensor, *tensors: Tensor, count: int | None = None) -> tuple[Tensor, ...]:
    """Launch the numbering and one copy per tensor; nothing waits for the device where `count` is given."""
    count = int(mask.sum()) if count is None else count
    # -1 where `count` is above what the mask holds, as `nonzero_static` fills it
    index = torch.full((count,), -1, dtype=torch.long, device=mask.device)
    if count:
        _number[(1,)](mask.contiguous().view(torch.uint8), index, mask.numel(), count, BLOCK=BLOCK)
    return (index, *(_rows(tensor, index) for tensor in tensors))


def _rows(tensor: Tensor, index: Tensor) -> Tensor:
    if not tensor.numel() or not len(index):
        return tensor.new_empty((len(index), *tensor.shape[1:]))
    flat = tensor.reshape(len(tensor), -1)
    flat = flat if flat.shape[1] < 2 or flat.stride(1) == 1 else flat.contiguous()
    flat = flat.view(torch.uint8) if flat.dtype == torch.bool else flat
    out = flat.new_empty((len(index), flat.shape[1]))
    grid = (len(index), triton.cdiv(flat.shape[1], BLOCK))
    _copy[grid](flat, index, out, len(flat), flat.shape[1], flat.stride(0), BLOCK=BLOCK)
    return out.view(tensor.dtype).view(len(index), *tensor.shape[1:])
