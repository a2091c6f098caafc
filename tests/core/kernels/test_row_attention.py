"""Attention of some rows on the cache of all, against float64 row by row."""

import pytest
import torch

from offramp.errors import BadArgument
from offramp.kernels.row_attention import row_attention

#: queries, batch, heads, kv_heads, room, head_dim
SHAPES = [
    (1, 1, 1, 1, 1, 1), (1, 1, 2, 1, 3, 4), (2, 3, 4, 2, 5, 8), (3, 2, 6, 3, 31, 16), (1, 4, 8, 8, 32, 8),
    (5, 5, 4, 1, 33, 12), (4, 7, 3, 3, 64, 5), (2, 2, 8, 2, 65, 32), (1, 1, 7, 7, 17, 3), (6, 3, 2, 2, 9, 64),
    (0, 2, 2, 1, 4, 4), (3, 9, 5, 1, 100, 6), (2, 1, 16, 4, 7, 10), (1, 2, 12, 4, 40, 20), (8, 8, 1, 1, 2, 2),
    (2, 4, 9, 3, 70, 7), (1, 3, 4, 4, 129, 16), (3, 3, 2, 1, 1, 9), (2, 6, 6, 2, 50, 33), (1, 1, 32, 8, 12, 8),
]  # fmt: skip


def wanted(query, keys, values, rows, lengths, scale):
    group = query.shape[1] // keys.shape[1]
    out = torch.zeros(query.shape, dtype=torch.float64)
    for i, (row, length) in enumerate(zip(rows.tolist(), lengths.tolist(), strict=True)):
        if length:
            k, v = (t[row, :, :length].double().repeat_interleave(group, 0) for t in (keys, values))
            out[i] = ((query[i].double()[:, None] @ k.mT * scale).softmax(-1) @ v)[:, 0]
    return out


def make(shape, dtype):
    n, batch, heads, kv_heads, room, dim = shape
    query, keys = torch.randn(n, heads, dim).to(dtype), torch.randn(batch, kv_heads, room, dim).to(dtype)
    values = torch.randn(batch, kv_heads, room, dim).to(dtype)
    return query, keys, values, torch.randint(batch, (n,)), torch.randint(1, room + 1, (n,))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scale", [None, 0.3])
def test_equals_float64(implementation, device, dtype, unit, shape, scale):
    given = make(shape, dtype)
    found = row_attention(*(t.to(device) for t in given), scale=scale)
    assert found.dtype == dtype and found.shape == given[0].shape
    exact = wanted(*given, shape[-1] ** -0.5 if scale is None else scale)
    # a mean of values up to 5: rounded weights, each off by the unit, and the rounded result
    assert ((found.cpu().double() - exact).abs() <= 5 * 4 * unit + 1e-5).all()


def test_what_lies_behind_the_length_is_not_read(implementation, device):
    query, keys, values, rows, _ = (t.to(device) for t in make((3, 2, 4, 2, 40, 8), torch.float32))
    lengths = torch.tensor([0, 7, 33], device=device)
    before = row_attention(query, keys, values, rows, lengths)
    for i, length in enumerate(lengths.tolist()):
        others = [int(n) for row, n in zip(rows, lengths, strict=True) if row == rows[i]]
        keys[rows[i], :, max(others) :] = values[rows[i], :, max(others) :] = torch.nan
        assert length == 0 or not before[i].isnan().any()
    torch.testing.assert_close(row_attention(query, keys, values, rows, lengths), before)
    assert not before[0].any()


def test_a_cache_that_is_a_view(implementation, device):
    query, keys, values, rows, lengths = (t.to(device) for t in make((3, 4, 4, 2, 20, 8), torch.float32))
    wide = torch.zeros(4, 2, 50, 8, device=device)
    wide[:, :, :20] = keys
    found = row_attention(query, wide[:, :, :20], values.transpose(1, 2).contiguous().transpose(1, 2), rows, lengths)
    torch.testing.assert_close(found, row_attention(query, keys, values, rows, lengths))


@pytest.mark.parametrize(("row", "length"), [(2, 3), (-1, 3), (0, 6), (0, -1)])
def test_outside_the_cache(implementation, device, row, length):
    query, keys, values, _, _ = (t.to(device) for t in make((2, 2, 2, 1, 5, 4), torch.float32))
    rows, lengths = torch.tensor([row, 1], device=device), torch.tensor([length, 2], device=device)
    if implementation == "torch":
        with pytest.raises(BadArgument, match=f"row {row} with {length} slots is not in a cache of 2 x 5"):
            row_attention(query, keys, values, rows, lengths)
    else:
        found = row_attention(query, keys, values, rows, lengths)
        assert found[0].isnan().all() and found[1].isfinite().all()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"query": torch.zeros(2, 3, 4)}, "a multiple of kv_heads"),
        ({"keys": torch.zeros(2, 2, 5, 3)}, "row_attention takes query"),
        ({"rows": torch.zeros(3, dtype=torch.long)}, r"rows and lengths \[2\]"),
    ],
)
def test_what_does_not_fit_is_said(change, said):
    number = torch.zeros(2, dtype=torch.long)
    cache = {"keys": torch.zeros(2, 2, 5, 4), "values": torch.zeros(2, 2, 5, 4)}
    with pytest.raises(BadArgument, match=said):
        row_attention(**{"query": torch.zeros(2, 4, 4), **cache, "rows": number, "lengths": number, **change})
