"""`scatter` in Triton: one program per row and stretch of it; rows that do not exist are passed over."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def _kernel(index, values, out, rows, size, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(index + place)
    value = tl.load(values + place * size + at, mask=at < size, other=0)
    known = (row >= 0) & (row < rows)
    tl.store(out + row * size + at, value.to(out.dtype.element_ty), mask=known & (at < size))


def scatter(index: Tensor, values: Tensor, out: Tensor) -> Tensor:
    """Launch on `out` itself where its rows are dense, else on a copy that is written back."""
    if not values.numel():
        return out
    dense = out if out.is_contiguous() else out.contiguous()
    source = values.to(out.dtype).contiguous()
    size = source[0].numel()
    _kernel[len(index), triton.cdiv(size, BLOCK)](index.contiguous(), source, dense, len(out), size, BLOCK=BLOCK)
    if dense is not out:
        out.copy_(dense)
    return out
