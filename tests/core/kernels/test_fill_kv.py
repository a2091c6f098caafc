"""Keys and values of blocks that did not run, against the steps written out in float64."""

import pytest
import torch

from offramp.errors import BadArgument
from offramp.kernels.fill_kv import Projection, fill_kv
from offramp.kernels.head_stats import Norm

#: rows, blocks, width, kv_heads, head_dim, room, rotary, biased, layer norm, key norm
SHAPES = [
    (1, 1, 1, 1, 2, 1, 0, 0, 0, 0), (1, 1, 8, 1, 4, 3, 1, 0, 0, 0), (2, 3, 16, 2, 4, 5, 1, 0, 0, 0),
    (3, 2, 17, 3, 6, 9, 1, 1, 0, 0), (4, 1, 64, 4, 8, 2, 1, 0, 0, 1), (5, 2, 65, 1, 10, 7, 0, 1, 1, 0),
    (1, 4, 63, 2, 16, 33, 1, 1, 1, 1), (7, 1, 40, 5, 2, 4, 1, 0, 1, 0), (2, 2, 129, 2, 32, 3, 1, 0, 0, 1),
    (1, 1, 200, 1, 64, 1, 1, 1, 0, 0), (0, 2, 8, 1, 4, 3, 1, 0, 0, 0), (3, 0, 8, 1, 4, 3, 1, 0, 0, 0),
    (9, 1, 12, 2, 6, 5, 0, 0, 0, 0), (1, 5, 24, 3, 8, 6, 1, 1, 0, 1), (6, 2, 10, 1, 14, 8, 1, 0, 1, 1),
    (2, 1, 100, 2, 20, 11, 0, 1, 0, 1), (8, 1, 9, 1, 2, 2, 1, 1, 1, 0), (1, 2, 256, 2, 8, 4, 1, 0, 0, 0),
    (4, 3, 33, 2, 12, 5, 0, 0, 1, 1), (2, 2, 48, 6, 4, 10, 1, 1, 0, 0),
]  # fmt: skip


def make(shape, dtype, device):
    rows, blocks, width, heads, dim, room, rotary, biased, center, key_norm = shape

    def draw(*size, scale=1.0):
        return (torch.randn(*size) * scale).to(dtype).to(device)

    def block():
        norm = Norm(draw(width).abs(), 1e-5, draw(width) if center else None, bool(center))
        weights = [draw(heads * dim, width, scale=width**-0.5) for _ in range(2)]
        biases = [draw(heads * dim) if biased else None for _ in range(2)]
        return Projection(norm, *weights, *biases, Norm(draw(dim).abs(), 1e-6) if key_norm else None)

    caches = [[draw(rows, heads, room, dim) for _ in range(blocks)] for _ in range(2)]
    angle = torch.rand(rows, dim // 2, device=device) * 6
    turn = [torch.cat([f(angle)] * 2, -1).to(dtype) for f in (torch.cos, torch.sin)] if rotary else [None, None]
    slots = torch.randint(room, (rows,), device=device)
    return draw(rows, width), [block() for _ in range(blocks)], *caches, slots, *turn


def norm64(norm, x):
    x = x - x.mean(-1, keepdim=True) if norm.center else x
    x = x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight.double()
    return x if norm.bias is None else x + norm.bias.double()


def wanted(hidden, block, cos, sin, shape):
    x = norm64(block.norm, hidden.double())
    key, value = x @ block.key.double().T, x @ block.value.double().T
    if block.key_bias is not None:
        key, value = key + block.key_bias.double(), value + block.value_bias.double()
    key, value = key.view(shape), value.view(shape)
    key = key if block.key_norm is None else norm64(block.key_norm, key)
    if cos is not None:
        half = shape[-1] // 2
        turned = torch.cat([-key[..., half:], key[..., :half]], -1)
        key = key * cos.double()[:, None] + turned * sin.double()[:, None]
    return key, value


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_float64(implementation, device, dtype, unit, shape):
    hidden, blocks, keys, values, slots, cos, sin = make(shape, dtype, device)
    before = [[t.clone() for t in side] for side in (keys, values)]
    fill_kv(hidden, blocks, keys, values, slots, cos, sin)
    row = torch.arange(len(hidden), device=device)
    for i, block in enumerate(blocks):
        exact = wanted(hidden, block, cos, sin, (len(hidden), keys[i].shape[1], keys[i].shape[3]))
        for cache, old, new in zip((keys[i], values[i]), (before[0][i], before[1][i]), exact, strict=True):
            # normed state, product, key norm and both halves of the rotation are rounded, each to the unit
            error = (cache[row, :, slots].double() - new).abs()
            largest = new.abs().sum() if not new.numel() else new.abs().max() + 4 * hidden.double().abs().max()
            assert (error <= 12 * unit * largest + 1e-5).all()
            cache[row, :, slots] = old[row, :, slots]
            assert torch.equal(cache, old)  # nothing else was touched


def test_blocks_of_two_kinds_and_a_cache_that_is_a_view(implementation, device):
    hidden, blocks, keys, values, slots, cos, sin = make(SHAPES[2], torch.float32, device)
    blocks[1] = blocks[1]._replace(key_norm=Norm(torch.ones(4, device=device), 1e-6))
    other = [torch.zeros(2, 5, 2, 4, device=device).transpose(1, 2) for _ in keys]
    fill_kv(hidden, blocks, keys, values, slots, cos, sin)
    fill_kv(hidden, blocks, other, values, slots, cos, sin)
    row = torch.arange(2, device=device)
    for key, view in zip(keys, other, strict=True):
        torch.testing.assert_close(view[row, :, slots], key[row, :, slots])


@pytest.mark.parametrize("wrong", [-1, 5])
def test_slots_beyond_the_room(implementation, device, wrong):
    hidden, blocks, keys, values, slots, cos, sin = make(SHAPES[2], torch.float32, device)
    slots[1], before = wrong, [t[1].clone() for t in keys]
    if implementation == "torch":
        with pytest.raises(BadArgument, match="slots must be 0 to 4"):
            fill_kv(hidden, blocks, keys, values, slots, cos, sin)
    else:
        fill_kv(hidden, blocks, keys, values, slots, cos, sin)
    assert all(torch.equal(t[1], old) for t, old in zip(keys, before, strict=True))


@pytest.mark.parametrize(
    ("place", "given", "said"),
    [
        (0, torch.zeros(2, 15), "block 0: caches must be"),
        (2, [], "give as many"),
        (4, torch.zeros(3, dtype=torch.long), r"slots \[rows\]"),
        (5, None, "cos and sin, or neither"),
        (5, torch.zeros(2, 3), r"cos must be \[2, 4\]"),
    ],
)
def test_what_does_not_fit_is_said(place, given, said):
    arguments = list(make(SHAPES[2], torch.float32, "cpu"))
    arguments[place] = given
    with pytest.raises(BadArgument, match=said):
        fill_kv(*arguments)
