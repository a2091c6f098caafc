"""`head_stats` in Triton: every program streams a stretch of classes once and keeps five numbers per row of it."""

from __future__ import annotations

from collections.abc import Set

import torch
import triton
import triton.language as tl
from torch import Tensor

from offramp.kernels.head_stats import HeadStats, Lora, Norm, merge_stacked

#: programs per weight: enough for two on each of 132 processors (H100), 256 partial results per row to merge
SPLITS = 256
BLOCK_V, BLOCK_K = 64, 128
#: the interpreter's dot takes bfloat16 for the integers that hold it, so it gets float32; the products are the same
WIDE = bool(triton.knobs.runtime.interpret)


@triton.jit
def _project(x, w, rows, width, classes, row, cls, stride_x, stride_w, BLOCK_K: tl.constexpr, IEEE: tl.constexpr,
             INT8: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """[rows of the block, classes of the block] products in float32."""
    acc = tl.zeros((row.shape[0], cls.shape[0]), tl.float32)
    for k in range(0, width, BLOCK_K):
        at = k + tl.arange(0, BLOCK_K)
        mask = (row[:, None] < rows) & (at[None, :] < width)
        left = tl.load(x + row[:, None] * stride_x + at[None, :], mask=mask, other=0)
        mask = (cls[:, None] < classes) & (at[None, :] < width)
        right = tl.load(w + cls[:, None].to(tl.int64) * stride_w + at[None, :], mask=mask, other=0)
        if INT8:
            right = right.to(left.dtype)
        if WIDE:
            left, right = left.to(tl.float32), right.to(tl.float32)
        # tf32 would round float32 weights to 10 bits; bfloat16 and float16 products are exact in float32 anyway
        acc = tl.dot(left, tl.trans(right), acc, input_precision="ieee" if IEEE else "tf32")
    return acc


@triton.jit
def _kernel(x, w, bias, scale, low, up, label_out, first_out, second_out, mass_out, moment_out, rows, width, classes,
            rank, per, softcap, stride_x, stride_w, stride_low, stride_up,
            HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_LORA: tl.constexpr, HAS_CAP: tl.constexpr,
            SUMS: tl.constexpr, IEEE: tl.constexpr, WIDE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr,
            BLOCK_K: tl.constexpr):  # fmt: skip
    split = tl.program_id(0)
    row = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    first = tl.full((BLOCK_R,), -float("inf"), tl.float32)
    second = tl.full((BLOCK_R,), -float("inf"), tl.float32)
    label = tl.zeros((BLOCK_R,), tl.int64)
    mass = tl.zeros((BLOCK_R,), tl.float32)
    moment = tl.zeros((BLOCK_R,), tl.float32)
    for block in range(0, per):
        cls = (split * per + block) * BLOCK_V + tl.arange(0, BLOCK_V)
        logit = _project(x, w, rows, width, classes, row, cls, stride_x, stride_w, BLOCK_K, IEEE, HAS_SCALE, WIDE)
        if HAS_SCALE:
            logit = logit * tl.load(scale + cls, mask=cls < classes, other=0).to(tl.float32)[None, :]
        if HAS_BIAS:
            logit = logit + tl.load(bias + cls, mask=cls < classes, other=0).to(tl.float32)[None, :]
        if HAS_LORA:
            logit = logit + _project(low, up, rows, rank, classes, row, cls, stride_low, stride_up, BLOCK_K, IEEE,
                                     False, WIDE)
        if HAS_CAP:  # tanh by the sigmoid, which does not overflow
            logit = softcap * (2 * tl.sigmoid(2 * logit / softcap) - 1)
        logit = tl.where(logit != logit, float("inf"), logit)  # a maximum loses NaN; infinity is reported as NaN
        logit = tl.where((cls < classes)[None, :], logit, -float("inf"))
        top = tl.max(logit, 1)
        place = tl.min(tl.where(logit == top[:, None], cls[None, :], 2147483647), 1)
        runner = tl.max(tl.where(cls[None, :] == place[:, None], -float("inf"), logit), 1)
        second = tl.where(top > first, tl.maximum(first, runner), tl.maximum(second, top))
        label = tl.where(top > first, place.to(tl.int64), label)  # an equal later one is not lower
        best = tl.maximum(first, top)
        if SUMS:
            # -inf - -inf is NaN: from here on the least float32 stands for -inf, and exp of less than -104 is 0
            base = tl.maximum(best, -3.0e38)
            old = tl.maximum(tl.maximum(first, -3.0e38) - base, -104.0)
            part = tl.maximum(logit - base[:, None], -104.0)
            e = tl.where(logit > -float("inf"), tl.exp(part), 0.0)
            moment = (moment + mass * old) * tl.exp(old) + tl.sum(e * part, 1)
            mass = mass * tl.exp(old) + tl.sum(e, 1)
        first = best
    at = split * rows + row
    tl.store(label_out + at, label, mask=row < rows)
    tl.store(first_out + at, first, mask=row < rows)
    tl.store(second_out + at, second, mask=row < rows)
    if SUMS:
        tl.store(mass_out + at, mass, mask=row < rows)
        tl.store(moment_out + at, moment, mask=row < rows)


def head_stats(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, norm: Norm | None, lora: Lora | None,
    softcap: float | None, scale: Tensor | None, needs: Set[str],
) -> HeadStats:  # fmt: skip
    """Launch over splits of the classes and blocks of rows, then merge the splits with torch.

    Norm and the first half of the LoRA delta are torch operations before it: [rows, width] is a thousandth of the
    weight's bytes.
    """
    rows, (classes, width) = hidden.shape[0], weight.shape
    x = (hidden if norm is None else norm(hidden)).contiguous()
    w = weight if weight.stride(1) == 1 else weight.contiguous()
    low = up = x
    if lora is not None:
        low, up = ((x @ lora.down.t()) * lora.scale).contiguous(), lora.up.to(x.dtype).contiguous()
    blocks = triton.cdiv(classes, BLOCK_V)
    per = triton.cdiv(blocks, SPLITS)
    splits = triton.cdiv(blocks, per)
    label = torch.empty((splits, rows), dtype=torch.long, device=x.device)
    first, second, mass, moment = torch.empty((4, splits, rows), dtype=torch.float32, device=x.device).unbind()
    block_r = min(64, max(16, triton.next_power_of_2(rows)))  # 16 is the least that the tensor cores take
    _kernel[splits, triton.cdiv(rows, block_r)](
        x, w, x if bias is None else bias.contiguous(), x if scale is None else scale.contiguous(), low, up,
        label, first, second, mass, moment, rows, width, classes, low.shape[1], per,
        1.0 if softcap is None else softcap, x.stride(0), w.stride(0), low.stride(0), up.stride(0),
        HAS_BIAS=bias is not None, HAS_SCALE=scale is not None, HAS_LORA=lora is not None, HAS_CAP=softcap is not None,
        SUMS=bool(needs), IEEE=x.dtype == torch.float32, WIDE=WIDE, BLOCK_R=block_r, BLOCK_V=BLOCK_V, BLOCK_K=BLOCK_K,
    )  # fmt: skip
    return merge_stacked(label, first, second, [mass, moment], needs)
