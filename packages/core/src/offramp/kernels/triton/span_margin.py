"""`span_margin` of logits in Triton: one program per position, which reads nothing where the position is not marked."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from offramp.kernels.span_margin import average


@triton.jit
def _kernel(values, where, out, classes, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64)
    first = tl.full((), -float("inf"), tl.float32)
    second = tl.full((), -float("inf"), tl.float32)
    stop = tl.where(tl.load(where + place) != 0, classes, 0)
    for start in range(0, stop, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(values + place * classes + at, mask=at < classes, other=-float("inf")).to(tl.float32)
        x = tl.where(x != x, float("inf"), x)  # NaN is lost in a maximum; infinity is reported as NaN
        top = tl.max(x, 0)
        here = tl.min(tl.where(x == top, at, 2147483647), 0)
        runner = tl.max(tl.where(at == here, -float("inf"), x), 0)
        second = tl.where(top > first, tl.maximum(first, runner), tl.maximum(second, top))
        first = tl.maximum(first, top)
    finite = (first > -float("inf")) & (first < float("inf"))
    tl.store(out + place, tl.where(finite, first - second, float("nan")))


def span_margin(values: Tensor, where: Tensor) -> Tensor:
    """Launch one program per position, then average with torch."""
    out = torch.empty(where.shape, dtype=torch.float32, device=values.device)
    if out.numel():
        block = min(4096, triton.next_power_of_2(values.shape[2]))
        marks = where.contiguous().view(torch.uint8)
        _kernel[(out.numel(),)](values.contiguous(), marks, out, values.shape[2], BLOCK=block)
    return average(out, where)
