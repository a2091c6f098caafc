"""Keys and values of blocks that did not run, from the state at the exit: state propagation into the caches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from offramp.errors import BadArgument
from offramp.kernels._select import select
from offramp.kernels.head_stats import Norm


class Projection(NamedTuple):
    """How one block makes keys and values: norm of the state, key and value weight [kv_heads * head_dim, width],
    biases [kv_heads * head_dim] or None, and a norm of each key head before it is rotated (Qwen3, Gemma3) or None.
    """

    norm: Norm
    key: Tensor
    value: Tensor
    key_bias: Tensor | None = None
    value_bias: Tensor | None = None
    key_norm: Norm | None = None


def fill_kv(
    hidden: Tensor,
    blocks: Sequence[Projection],
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    slots: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
) -> None:
    """Write into every block's cache the keys and values that it makes of `hidden`, as if each had been its input.

    hidden: [rows, width]; keys, values: per block [rows, kv_heads, room, head_dim], written in place at `slots` int64
    [rows]; cos, sin: [rows, head_dim] of the rotary embedding by halves (x * cos + rotate_half(x) * sin), None for
    models without. Raises `BadArgument`, also for slots beyond the room; on a GPU, where looking would wait for the
    device, those are not written. Paper: CALM's state propagation (arXiv 2207.07061).
    """
    _check(hidden, blocks, keys, values, slots, cos, sin)
    if hidden.shape[0] and blocks:
        given = [hidden, slots, *(t for t in (cos, sin) if t is not None), *keys, *values]
        given += [t for block in blocks for t in block[1:5] if isinstance(t, Tensor)]
        select("fill_kv", reference, *given)(hidden, blocks, keys, values, slots, cos, sin)


def reference(
    hidden: Tensor, blocks: Sequence[Projection], keys: Sequence[Tensor], values: Sequence[Tensor],
    slots: Tensor, cos: Tensor | None, sin: Tensor | None,
) -> None:  # fmt: skip
    """Compute `fill_kv` with torch, one block after the other."""
    room = keys[0].shape[2]
    if hidden.device.type == "cpu" and not 0 <= int(slots.min()) <= int(slots.max()) < room:
        raise BadArgument(f"fill_kv: slots must be 0 to {room - 1}, the room of the caches; got {slots.tolist()}")
    row = torch.arange(len(hidden), device=hidden.device)
    for block, key_cache, value_cache in zip(blocks, keys, values, strict=True):
        heads, _, dim = key_cache.shape[1:]
        x = block.norm(hidden)
        key = torch.nn.functional.linear(x, block.key, block.key_bias).unflatten(-1, (heads, dim))
        value = torch.nn.functional.linear(x, block.value, block.value_bias).unflatten(-1, value_cache.shape[1::2])
        key = key if block.key_norm is None else block.key_norm(key)
        key_cache[row, :, slots] = rotate(key, cos, sin).to(key_cache.dtype)
        value_cache[row, :, slots] = value.to(value_cache.dtype)


def rotate(key: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    """Return keys [rows, heads, head_dim] rotated by halves; cos, sin: [rows, head_dim] or None."""
    if cos is None or sin is None:
        return key
    low, high = key.chunk(2, -1)
    return key * cos[:, None] + torch.cat([-high, low], -1) * sin[:, None]


def _check(
    hidden: Tensor, blocks: Sequence[Projection], keys: Sequence[Tensor], values: Sequence[Tensor],
    slots: Tensor, cos: Tensor | None, sin: Tensor | None,
) -> None:  # fmt: skip
    if not len(blocks) == len(keys) == len(values):
        raise BadArgument(f"fill_kv: {len(blocks)} blocks, {len(keys)} key, {len(values)} value caches; give as many")
    if hidden.dim() != 2 or slots.shape != hidden.shape[:1]:
        raise BadArgument(
            f"fill_kv takes hidden [rows, width] and slots [rows], not {list(hidden.shape)} and {list(slots.shape)}"
        )
    if (cos is None) != (sin is None):
        raise BadArgument("fill_kv: give cos and sin, or neither")
    rows, width = hidden.shape
    for i, (block, key, value) in enumerate(zip(blocks, keys, values, strict=True)):
        wanted = (key.shape[1] * key.shape[-1], width) if key.dim() == 4 else ()
        if block.key.shape != wanted or key.shape != value.shape or key.shape[0] != rows or block.value.shape != wanted:
            raise BadArgument(
                f"fill_kv, block {i}: caches must be [{rows}, kv_heads, room, head_dim] and weights "
                f"[kv_heads * head_dim, {width}], not {list(key.shape)}, {list(value.shape)}, {list(block.key.shape)}, "
                f"{list(block.value.shape)}"
            )
        if block.key_norm is not None and (block.key_norm.center or block.key_norm.bias is not None):
            raise BadArgument(f"fill_kv, block {i}: key_norm must be an RMS norm without bias, as known models' are")
        if key.shape[2] != keys[0].shape[2]:
            raise BadArgument(f"fill_kv: block {i} has a cache for {key.shape[2]}, the first for {keys[0].shape[2]}")
        if cos is not None and cos.shape != (rows, key.shape[-1]):
            raise BadArgument(f"fill_kv: cos must be {[rows, key.shape[-1]]}, not {list(cos.shape)}")
