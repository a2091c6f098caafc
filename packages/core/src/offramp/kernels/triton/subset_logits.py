"""`subset_logits` in Triton: one program per row, which reads the weight's rows of its ids and nothing else."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _kernel(x, w, ids, bias, out, width, classes, count, stride_x, stride_w, HAS_BIAS: tl.constexpr,
            BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    cls = tl.load(ids + row * count + n, mask=n < count, other=0)
    known = (cls >= 0) & (cls < classes)
    acc = tl.zeros((BLOCK_N,), tl.float32)
    for k in range(0, width, BLOCK_K):
        at = k + tl.arange(0, BLOCK_K)
        left = tl.load(x + row * stride_x + at, mask=at < width, other=0).to(tl.float32)
        mask = known[:, None] & (at[None, :] < width)
        right = tl.load(w + cls[:, None] * stride_w + at[None, :], mask=mask, other=0).to(tl.float32)
        acc += tl.sum(right * left[None, :], 1)
    if HAS_BIAS:
        acc += tl.load(bias + cls, mask=known, other=0).to(tl.float32)
    acc = tl.where(known, acc, float("nan"))
    tl.store(out + row * count + n, acc.to(out.dtype.element_ty), mask=n < count)


def subset_logits(hidden: Tensor, weight: Tensor, ids: Tensor, bias: Tensor | None = None) -> Tensor:
    """Launch one program per row and block of ids."""
    x = hidden.reshape(-1, hidden.shape[-1])
    x = x if x.stride(-1) == 1 else x.contiguous()
    w = weight if weight.stride(1) == 1 else weight.contiguous()
    out = torch.empty(ids.shape, dtype=hidden.dtype, device=hidden.device)
    if out.numel():
        count = ids.shape[-1]
        block = min(16, triton.next_power_of_2(count))
        _kernel[x.shape[0], triton.cdiv(count, block)](
            x, w, ids.contiguous(), w if bias is None else bias.contiguous(), out, w.shape[1], w.shape[0], count,
            x.stride(0), w.stride(0), HAS_BIAS=bias is not None, BLOCK_N=block, BLOCK_K=128,
        )  # fmt: skip
    return out
