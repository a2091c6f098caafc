"""`fill_kv` in Triton: one launch for all blocks of a kind; a program makes one head of one row in one block."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from offramp.kernels.fill_kv import Projection


@triton.jit
def _moments(x, row, width, CENTER: tl.constexpr, EPS: tl.constexpr, BLOCK_K: tl.constexpr):
    """Mean (0 of an RMS norm) and 1 / root mean square of one row, in float32."""
    total = 0.0
    square = 0.0
    for k in range(0, width, BLOCK_K):
        at = k + tl.arange(0, BLOCK_K)
        h = tl.load(x + row * width + at, mask=at < width, other=0).to(tl.float32)
        total += tl.sum(h, 0)
        square += tl.sum(h * h, 0)
    mean = total / width if CENTER else 0.0
    if CENTER:  # around the mean, in a second pass: the difference of two large sums would cancel
        square = 0.0
        for k in range(0, width, BLOCK_K):
            at = k + tl.arange(0, BLOCK_K)
            h = tl.load(x + row * width + at, mask=at < width, other=0).to(tl.float32)
            h = tl.where(at < width, h - mean, 0.0)
            square += tl.sum(h * h, 0)
    return mean, 1.0 / tl.sqrt(square / width + EPS)


@triton.jit
def _kernel(x, table, slots, cos, sin, width, room, dim, stride_batch, stride_head, stride_slot,
            COLUMNS: tl.constexpr, ROTATES: tl.constexpr, BIAS: tl.constexpr, KEY_NORM: tl.constexpr,
            NORM_BIAS: tl.constexpr, CENTER: tl.constexpr, KEY_NORM_EPS: tl.constexpr, EPS: tl.constexpr,
            BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    block = tl.program_id(2) // 2
    is_value = tl.program_id(2) % 2
    kind = tl.pointer_type(x.dtype.element_ty)
    entry = table + block * COLUMNS
    norm = tl.load(entry).to(kind)
    weight = tl.load(entry + 1 + is_value).to(kind)
    cache = tl.load(entry + 3 + is_value).to(kind)
    mean, rsqrt = _moments(x, row, width, CENTER, EPS, BLOCK_K)
    d = tl.arange(0, BLOCK_D)
    half = dim // 2
    pair = tl.where(d < half, d + half, d - half)
    made = tl.zeros((BLOCK_D,), tl.float32)
    other = tl.zeros((BLOCK_D,), tl.float32)
    for k in range(0, width, BLOCK_K):
        at = k + tl.arange(0, BLOCK_K)
        h = tl.load(x + row * width + at, mask=at < width, other=0).to(tl.float32)
        h = (h - mean) * rsqrt * tl.load(norm + at, mask=at < width, other=0).to(tl.float32)
        if NORM_BIAS:
            h += tl.load(tl.load(entry + 5).to(kind) + at, mask=at < width, other=0).to(tl.float32)
        h = h.to(x.dtype.element_ty).to(tl.float32)  # the norm hands on the type of the state
        mask = (d[:, None] < dim) & (at[None, :] < width)
        w = tl.load(weight + (head * dim + d[:, None]) * width + at[None, :], mask=mask, other=0).to(tl.float32)
        made += tl.sum(w * h[None, :], 1)
        if ROTATES:  # the other half of the head: read once more, from a cache that just held it
            w = tl.load(weight + (head * dim + pair[:, None]) * width + at[None, :], mask=mask, other=0).to(tl.float32)
            other += tl.sum(w * h[None, :], 1)
    if BIAS:
        bias = tl.load(entry + 6 + is_value).to(kind)
        made += tl.load(bias + head * dim + d, mask=d < dim, other=0).to(tl.float32)
        other += tl.load(bias + head * dim + pair, mask=d < dim, other=0).to(tl.float32)
    if is_value == 0:
        if KEY_NORM:
            key_norm = tl.load(entry + 8).to(kind)
            unit = 1.0 / tl.sqrt(tl.sum(tl.where(d < dim, made * made, 0.0), 0) / dim + KEY_NORM_EPS)
            made = made * unit * tl.load(key_norm + d, mask=d < dim, other=0).to(tl.float32)
            other = other * unit * tl.load(key_norm + pair, mask=d < dim, other=0).to(tl.float32)
        if ROTATES:
            sign = tl.where(d < half, -1.0, 1.0)
            c = tl.load(cos + row * dim + d, mask=d < dim, other=0).to(tl.float32)
            s = tl.load(sin + row * dim + d, mask=d < dim, other=0).to(tl.float32)
            made = made * c + sign * other * s
    slot = tl.load(slots + row)
    there = (slot >= 0) & (slot < room) & (d < dim)
    target = cache + row * stride_batch + head * stride_head + slot * stride_slot + d
    tl.store(target, made.to(x.dtype.element_ty), mask=there)


def fill_kv(
    hidden: Tensor, blocks: Sequence[Projection], keys: Sequence[Tensor], values: Sequence[Tensor],
    slots: Tensor, cos: Tensor | None, sin: Tensor | None,
) -> None:  # fmt: skip
    """Launch once per group of blocks of one kind: same norm, biases and cache layout."""
    x = hidden.contiguous()
    groups: dict[object, list[tuple[Projection, Tensor, Tensor]]] = {}
    for block, key, value in zip(blocks, keys, values, strict=True):
        groups.setdefault(_kind(block, key, value), []).append((block, key, value))
    for members in groups.values():
        _launch(x, members, slots.long().contiguous(), cos, sin)


def _kind(block: Projection, key: Tensor, value: Tensor) -> object:
    norm, key_norm = block.norm, block.key_norm
    biased = [t is not None for t in (block.key_bias, block.value_bias, norm.bias)]
    return (norm.eps, norm.center, key_norm and key_norm.eps, *biased, key.shape, key.stride(), value.stride())


def _launch(
    x: Tensor, members: list[tuple[Projection, Tensor, Tensor]], slots: Tensor, cos: Tensor | None, sin: Tensor | None
) -> None:
    rows, width = x.shape
    first, key, value = members[0]
    heads, room, dim = key.shape[1:]
    held: list[Tensor] = []  # what the table points at must live until the launch

    def pointer(tensor: Tensor | None, otherwise: int = 0) -> int:
        if tensor is None:  # never read, where it is 0
            return otherwise
        held.append(tensor.to(x.dtype).contiguous())
        return held[-1].data_ptr()

    biased = first.key_bias is not None or first.value_bias is not None
    zeros = pointer(x.new_zeros(heads * dim)) if biased else 0
    ones = pointer(x.new_ones(max(width, dim)))
    copies = []
    table = []
    for block, key_cache, value_cache in members:
        alike = key_cache.stride() == value_cache.stride()
        caches = [_writable(t, x.dtype, alike) for t in (key_cache, value_cache)]
        copies += list(zip((key_cache, value_cache), caches, strict=True))
        norm, key_norm = block.norm, block.key_norm
        table.append([
            pointer(norm.weight, ones), pointer(block.key), pointer(block.value),
            caches[0].data_ptr(), caches[1].data_ptr(),
            pointer(norm.bias), pointer(block.key_bias, zeros), pointer(block.value_bias, zeros),
            0 if key_norm is None else pointer(key_norm.weight, ones),
        ])  # fmt: skip
    stride = copies[0][1].stride()
    pointers = torch.tensor(table, dtype=torch.long).to(x.device, non_blocking=True)
    rotates = cos is not None and sin is not None
    cos_, sin_ = (x, x) if cos is None or sin is None else (cos.to(x.dtype).contiguous(), sin.to(x.dtype).contiguous())
    _kernel[rows, heads, 2 * len(members)](
        x, pointers, slots, cos_, sin_, width, room, dim, *stride[:3], COLUMNS=len(table[0]), ROTATES=rotates,
        BIAS=biased, KEY_NORM=first.key_norm is not None,
        NORM_BIAS=first.norm.bias is not None, CENTER=first.norm.center, EPS=first.norm.eps,
        KEY_NORM_EPS=0.0 if first.key_norm is None else first.key_norm.eps,
        BLOCK_D=triton.next_power_of_2(dim), BLOCK_K=64,
    )  # fmt: skip
    for cache, written in copies:
        if written is not cache:
            cache.copy_(written)


def _writable(cache: Tensor, dtype: torch.dtype, alike: bool) -> Tensor:
    """Return the cache itself where the kernel can write into it, else a copy that is written back."""
    return cache if alike and cache.dtype == dtype and cache.stride(-1) == 1 else cache.to(dtype).contiguous()
