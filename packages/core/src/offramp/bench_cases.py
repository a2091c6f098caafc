"""What kernels are measured on: every op on real shapes, against how it is written without them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from offramp import kernels
from offramp.kernels._select import not_built
from offramp.kernels.cpp.head_stats import head_stats as stats_in_cpp
from offramp.kernels.cpp.linear import linear as linear_in_cpp
from offramp.kernels.fill_kv import Projection
from offramp.kernels.head_stats import PARTS, Norm

Way = Callable[[], Any]
#: classes x width of two language models' unembeddings
SHAPES = ((32_000, 1024), (32_000, 2048), (152_000, 1024), (152_000, 2048))
QUICK = ((2_000, 64),)
#: ways that are ours: what OFFRAMP_KERNELS says, and C++ beside it where that says nothing
OURS = ("kernel", "kernel, cpp")


@dataclass(frozen=True)
class Case:
    """An op on one shape, ways to compute it by name (those in `OURS` are ours), and the bytes it must read."""

    op: str
    shape: str
    dtype: torch.dtype
    ways: dict[str, Way]
    moved: int


def eager_softmax(hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """Write head statistics as frameworks do: float32 logits of all classes, log-softmax, top-2, entropy."""
    log_p = functional.linear(hidden, weight).float().log_softmax(-1)
    top, label = log_p.topk(2, -1)
    return top, label, torch.special.entr(log_p.exp()).sum(-1)


def eager_logsumexp(hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """Write them with as few passes as eager torch allows."""
    logits = functional.linear(hidden, weight).float()
    total = logits.logsumexp(-1)
    top, label = logits.topk(2, -1)
    return top, label, total - (logits * (logits - total[:, None]).exp_()).sum(-1)


def head_stats(quick: bool, device: str, compiled: bool) -> Iterator[Case]:
    """Unembeddings of language models, one row and eight, in bfloat16 and float32."""
    for classes, width in QUICK if quick else SHAPES:
        for dtype in (torch.bfloat16, torch.float32):
            weight = (torch.randn(classes, width, device=device) * 0.02).to(dtype)
            for rows in (1, 8):
                hidden = torch.randn(rows, width, device=device).to(dtype)
                ways = _head_ways(hidden, weight, compiled)
                yield Case("head_stats", f"{rows} x {width} x {classes}", dtype, ways, weight.nbytes)


def _head_ways(hidden: Tensor, weight: Tensor, compiled: bool) -> dict[str, Way]:
    ways: dict[str, Way] = {
        "kernel": lambda: kernels.head_stats(hidden, weight),
        "softmax": lambda: eager_softmax(hidden, weight),
        "logsumexp": lambda: eager_logsumexp(hidden, weight),
    }
    if _cpp_beside("head_stats", hidden.device.type):
        ways["kernel, cpp"] = lambda: stats_in_cpp(hidden, weight, None, None, None, None, None, PARTS)
    if compiled:
        made = torch.compile(eager_softmax)
        ways["torch.compile"] = lambda: made(hidden, weight)
    return ways


def linear(quick: bool, device: str, compiled: bool) -> Iterator[Case]:
    """A layer of a language model, one state to eight: as many copies as no cache holds, as in a model."""
    for classes, width in ((64, 16),) if quick else ((512, 192), (2752, 1024)):
        for dtype in (torch.bfloat16, torch.float32):
            one = (torch.randn(classes, width, device=device) / width**0.5).to(dtype)
            layers = [one.clone() for _ in range(2 if quick else (64 << 20) // one.nbytes)]
            for rows in (1, 2, 4, 8):
                hidden = torch.randn(1, rows, width, device=device).to(dtype)
                ways = {
                    "kernel": _each(kernels.linear, layers, hidden),
                    "torch": _each(functional.linear, layers, hidden),
                }
                if _cpp_beside("linear", device):
                    ways["kernel, cpp"] = _each(lambda h, w: linear_in_cpp(h, w, None), layers, hidden)
                shape = f"{rows} x {width} x {classes}, {len(layers)} layers"
                yield Case("linear", shape, dtype, ways, sum(layer.nbytes for layer in layers))


def _each(function: Callable[[Tensor, Tensor], Any], layers: list[Tensor], hidden: Tensor) -> Way:
    return lambda: [function(hidden, layer) for layer in layers]


def _cpp_beside(op: str, device: str) -> bool:
    """Whether C++ is a way of its own: where nothing was asked for, and it compiles."""
    return device == "cpu" and kernels.mode() == "auto" and not_built(op) is None


def subset_logits(quick: bool, device: str, compiled: bool) -> Iterator[Case]:
    """Four candidates of a tree of 16 nodes, against the whole projection."""
    classes, width = (QUICK if quick else SHAPES)[0]
    weight = torch.randn(classes, width, device=device)
    for rows in (1, 16):
        hidden, ids = torch.randn(rows, width, device=device), torch.randint(classes, (rows, 4), device=device)
        ways: dict[str, Way] = {
            "kernel": lambda h=hidden, i=ids: kernels.subset_logits(h, weight, i),  # type: ignore[misc]
            "whole": lambda h=hidden, i=ids: functional.linear(h, weight).gather(-1, i),  # type: ignore[misc]
        }
        yield Case("subset_logits", f"{rows} x {width}, 4 of {classes}", weight.dtype, ways, ids.numel() * width * 4)


def compact(quick: bool, device: str, compiled: bool) -> Iterator[Case]:
    """A batch of images as ViT-B sees it, half of which goes on."""
    rows, tokens, width = (8, 5, 16) if quick else (64, 197, 768)
    hidden, mask = torch.randn(rows, tokens, width, device=device), torch.arange(rows, device=device) % 2 == 0
    ways: dict[str, Way] = {
        "kernel": lambda: kernels.compact(mask, hidden, count=rows // 2),
        "mask": lambda: (mask.nonzero(), hidden[mask]),
    }
    yield Case("compact", f"{rows} x {tokens} x {width}, half", hidden.dtype, ways, hidden.nbytes)


def row_attention(quick: bool, device: str, compiled: bool) -> Iterator[Case]:
    """Half of the rows of a cache, against a copy of these rows and one masked attention."""
    batch, heads, kv_heads, room, dim = (4, 4, 2, 16, 8) if quick else (16, 16, 8, 1024, 64)
    keys, values = torch.randn(2, batch, kv_heads, room, dim, device=device).unbind()
    rows = torch.arange(0, batch, 2, device=device)
    query, lengths = torch.randn(len(rows), heads, dim, device=device), torch.full((len(rows),), room, device=device)
    lengths[::2] //= 2

    def copied() -> Tensor:
        mask = torch.arange(room, device=device) < lengths[:, None]
        return functional.scaled_dot_product_attention(
            query[:, :, None], keys[rows], values[rows], attn_mask=mask[:, None, None], enable_gqa=True
        )

    ways: dict[str, Way] = {"kernel": lambda: kernels.row_attention(query, keys, values, rows, lengths), "copy": copied}
    shape = f"{len(rows)} of {batch} x {heads}/{kv_heads} x {room} x {dim}"
    yield Case("row_attention", shape, keys.dtype, ways, int(lengths.sum()) * kv_heads * dim * 8)


def span_margin(quick: bool, device: str, compiled: bool) -> Iterator[Case]:
    """A span of 32 positions of a diffusion language model, from hidden states, against its float32 logits."""
    positions, (classes, width) = 32, (QUICK if quick else SHAPES)[0]
    hidden = torch.randn(1, positions, width, device=device).bfloat16()
    weight = (torch.randn(classes, width, device=device) * 0.02).bfloat16()
    where = torch.ones(1, positions, dtype=torch.bool, device=device)

    def whole() -> Tensor:
        pair = functional.linear(hidden, weight).float().topk(2, -1).values
        return (pair[..., 0] - pair[..., 1]).mean(-1)

    ways: dict[str, Way] = {"kernel": lambda: kernels.span_margin(hidden, where, weight), "logits": whole}
    yield Case("span_margin", f"{positions} x {width} x {classes}", hidden.dtype, ways, weight.nbytes)


def scatter(quick: bool, device: str, compiled: bool) -> Iterator[Case]:
    """Half of a batch of images as ViT-B sees it, put back."""
    rows, tokens, width = (8, 5, 16) if quick else (64, 197, 768)
    out, index = torch.randn(rows, tokens, width, device=device), torch.arange(0, rows, 2, device=device)
    values = torch.randn(len(index), tokens, width, device=device)
    ways: dict[str, Way] = {
        "kernel": lambda: kernels.scatter(index, values, out),
        "index": lambda: out.__setitem__(index, values),
    }
    yield Case("scatter", f"{rows} x {tokens} x {width}, half", out.dtype, ways, 2 * values.nbytes)


def verify(quick: bool, device: str, compiled: bool) -> Iterator[Case]:
    """Chains of 5 drafts and trees of 16, for 8 texts, against torch operations."""
    rows = 2 if quick else 8
    for shape, count in (("chain", 5), ("tree", 16)):
        drafts = torch.randint(4, (rows, count), device=device)
        target = torch.randint(4, (rows, count + 1), device=device)
        tree = torch.stack([torch.randint(-1, d, (rows,)) for d in range(count)], 1).to(device)
        parents = None if shape == "chain" else tree
        ways: dict[str, Way] = {
            "kernel": lambda d=drafts, t=target, p=parents: kernels.verify(d, t, parents=p),  # type: ignore[misc]
            "torch": lambda d=drafts, t=target, p=parents: walk_with_torch(d, t, p),  # type: ignore[misc]
        }
        yield Case("verify", f"{rows} x {count}, {shape}", drafts.dtype, ways, drafts.nbytes + target.nbytes)


def walk_with_torch(drafts: Tensor, target: Tensor, parents: Tensor | None) -> tuple[Tensor, Tensor]:
    """Write `verify` without waiting for a device: products along a chain, a tree draft by draft for all rows."""
    rows, count = drafts.shape
    row, slots = torch.arange(rows, device=drafts.device), torch.arange(count + 1, device=drafts.device)
    if parents is None:
        accepted = (target[:, :count] == drafts).long().cumprod(-1).sum(-1)
        return target[row, accepted], slots.expand(rows, -1).masked_fill(slots > accepted[:, None], -1)
    slot, accepted = torch.zeros((2, rows), dtype=torch.long, device=drafts.device).unbind()
    keep = torch.full((rows, count + 1), -1, dtype=torch.long, device=drafts.device)
    keep[:, 0] = 0
    for draft in range(count):
        stands = (parents[:, draft] + 1 == slot) & (target[row, slot] == drafts[:, draft])
        accepted = accepted + stands
        slot = torch.where(stands, draft + 1, slot)
        keep[row, accepted] = slot
    return target[row, slot], keep


def fill_kv(quick: bool, device: str, compiled: bool) -> Iterator[Case]:
    """12 blocks that one token skipped, in a model of width 1,024 with 4 heads of keys, against its own modules."""
    blocks, width, heads, dim, room = (2, 16, 1, 4, 8) if quick else (12, 1024, 4, 64, 512)
    for dtype in (torch.bfloat16, torch.float32):

        def draw(*size: int, dtype: torch.dtype = dtype) -> Tensor:
            return (torch.randn(*size, device=device) / 32).to(dtype)

        made = [
            Projection(Norm(draw(width)), draw(heads * dim, width), draw(heads * dim, width))
            for _ in range(blocks)
        ]
        keys, values = ([draw(1, heads, room, dim) for _ in range(blocks)] for _ in range(2))
        given = draw(1, width), made, keys, values, torch.tensor([room // 2], device=device), draw(1, dim), draw(1, dim)
        ways: dict[str, Way] = {
            "kernel": lambda g=given: kernels.fill_kv(*g),  # type: ignore[misc]
            "modules": lambda g=given: fill_with_modules(*g),  # type: ignore[misc]
        }
        moved = sum(block.key.nbytes + block.value.nbytes for block in made)
        yield Case("fill_kv", f"{blocks} blocks x {width} x {2 * heads * dim}", dtype, ways, moved)


def fill_with_modules(
    hidden: Tensor, blocks: list[Any], keys: list[Tensor], values: list[Tensor], slots: Tensor, cos: Tensor, sin: Tensor
) -> None:
    """Write `fill_kv` as a model's attention does: its norm, two projections, rotation, a copy into each cache."""
    for block, key_cache, value_cache in zip(blocks, keys, values, strict=True):
        heads, _, dim = key_cache.shape[1:]
        x = functional.rms_norm(hidden, hidden.shape[-1:], block.norm.weight, block.norm.eps)
        key = functional.linear(x, block.key).view(-1, 1, heads, dim).transpose(1, 2)
        value = functional.linear(x, block.value).view(-1, 1, heads, dim).transpose(1, 2)
        low, high = key.chunk(2, -1)
        key = key * cos[:, None, None] + torch.cat([-high, low], -1) * sin[:, None, None]
        key_cache.index_copy_(2, slots, key)
        value_cache.index_copy_(2, slots, value)


#: op -> its cases
CASES = {
    f.__name__: f
    for f in (head_stats, linear, subset_logits, compact, scatter, verify, fill_kv, row_attention, span_margin)
}
