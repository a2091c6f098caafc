"""Attention of one new token for some rows of a batch, on the cache of the whole batch as it lies."""

from __future__ import annotations

import torch
from torch import Tensor

from offramp.errors import BadArgument
from offramp.kernels._select import select


def row_attention(
    query: Tensor, keys: Tensor, values: Tensor, rows: Tensor, lengths: Tensor, scale: float | None = None
) -> Tensor:
    """Return softmax(query @ keys.T * scale) @ values of each query over the first `lengths` slots of its own row.

    query: [n, heads, head_dim]; keys, values: [batch, kv_heads, room, head_dim], read where they are, never copied;
    rows, lengths: int64 [n], each query's row of the batch and how many of its slots are filled; scale: default
    head_dim ** -0.5. Returns [n, heads, head_dim]. Heads that share keys lie side by side. No slots give zeros. Raises
    `BadArgument`, also for rows and lengths outside the cache; on a GPU, where looking would wait for the device, such
    a query is NaN.
    """
    fits = keys.dim() == 4 and keys.shape == values.shape and query.dim() == 3 and query.shape[2] == keys.shape[3]
    if not fits or query.shape[1] % keys.shape[1]:
        raise BadArgument(
            f"row_attention takes query [n, heads, head_dim] and keys, values [batch, kv_heads, room, head_dim], heads "
            f"a multiple of kv_heads, not {list(query.shape)}, {list(keys.shape)} and {list(values.shape)}"
        )
    if rows.shape != query.shape[:1] or lengths.shape != query.shape[:1]:
        raise BadArgument(
            f"row_attention takes rows and lengths [{len(query)}], not {list(rows.shape)} and {list(lengths.shape)}"
        )
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if not len(query):
        return query.clone()
    run = select("row_attention", reference, query, keys, values, rows, lengths)
    return run(query, keys, values, rows, lengths, scale)


def reference(query: Tensor, keys: Tensor, values: Tensor, rows: Tensor, lengths: Tensor, scale: float) -> Tensor:
    """Compute `row_attention` with torch: one row after the other, on views of the cache (a GPU waits once)."""
    out = torch.empty_like(query)
    batch, _, room, _ = keys.shape
    for i, (row, length) in enumerate(torch.stack([rows, lengths], -1).tolist()):
        if not (0 <= row < batch and 0 <= length <= room):
            raise BadArgument(f"row_attention: row {row} with {length} slots is not in a cache of {batch} x {room}")
        if not length:
            out[i] = 0
            continue
        key, value = keys[row : row + 1, :, :length], values[row : row + 1, :, :length]
        grouped = query.shape[1] != keys.shape[1]
        out[i] = torch.nn.functional.scaled_dot_product_attention(
            query[i : i + 1, :, None], key, value, scale=scale, enable_gqa=grouped
        )[0, :, 0]
    return out
