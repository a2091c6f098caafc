"""`row_attention` in Triton: one program per query and key head reads the slots of its row once, where they lie."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _kernel(query, keys, values, rows, lengths, out, scale, batch, room, group, dim, kv_heads,
            k_batch, k_head, k_slot, v_batch, v_head, v_slot,
            BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    row = tl.load(rows + n)
    length = tl.load(lengths + n)
    known = (row >= 0) & (row < batch) & (length >= 0) & (length <= room)
    g = tl.arange(0, BLOCK_G)
    d = tl.arange(0, BLOCK_D)
    at = (n * kv_heads * group + head * group + g[:, None]) * dim + d[None, :]
    mine = (g[:, None] < group) & (d[None, :] < dim)
    q = tl.load(query + at, mask=mine, other=0).to(tl.float32) * scale
    best = tl.full((BLOCK_G,), -float("inf"), tl.float32)
    mass = tl.zeros((BLOCK_G,), tl.float32)
    acc = tl.zeros((BLOCK_G, BLOCK_D), tl.float32)
    for start in range(0, tl.where(known, length, 0), BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        there = (s[:, None] < length) & (d[None, :] < dim)
        k = tl.load(keys + row * k_batch + head * k_head + s[:, None] * k_slot + d[None, :], mask=there, other=0)
        v = tl.load(values + row * v_batch + head * v_head + s[:, None] * v_slot + d[None, :], mask=there, other=0)
        # a product and a sum: a tensor-core dot wants 16 queries and more, decoding has 1 to 8 per key head
        score = tl.sum(q[:, None, :] * k.to(tl.float32)[None, :, :], 2)
        score = tl.where((s < length)[None, :], score, -float("inf"))
        top = tl.maximum(best, tl.max(score, 1))
        e = tl.exp(score - top[:, None])
        shrink = tl.exp(best - top)
        acc = acc * shrink[:, None] + tl.sum(e[:, :, None] * v.to(tl.float32)[None, :, :], 1)
        mass = mass * shrink + tl.sum(e, 1)
        best = top
    result = tl.where(known, acc / tl.maximum(mass, 1e-37)[:, None], float("nan"))
    tl.store(out + at, result.to(out.dtype.element_ty), mask=mine)


def row_attention(
    query: Tensor, keys: Tensor, values: Tensor, rows: Tensor, lengths: Tensor, scale: float
) -> Tensor:
    """Launch one program per query and key head."""
    n, heads, dim = query.shape
    batch, kv_heads, room, _ = keys.shape
    out = torch.empty((n, heads, dim), dtype=query.dtype, device=query.device)
    keys = keys if keys.stride(-1) == 1 else keys.contiguous()
    values = values if values.stride(-1) == 1 else values.contiguous()
    group = heads // kv_heads
    _kernel[n, kv_heads](
        query.contiguous(), keys, values, rows.long().contiguous(), lengths.long().contiguous(), out, scale, batch,
        room, group, dim, kv_heads, *keys.stride()[:3], *values.stride()[:3],
        BLOCK_G=triton.next_power_of_2(group), BLOCK_S=32, BLOCK_D=triton.next_power_of_2(dim),
    )  # fmt: skip
    return out
