"""The statistics of a head without its logits: projection and reduction block by block over the classes."""

from __future__ import annotations

from collections.abc import Set
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, rms_norm

from offramp.errors import BadArgument
from offramp.kernels._select import select

#: logits per block on the CPU, all rows together: 512 kB in float32, a quarter of 2 MB of second-level cache
LOGITS = 131072
#: classes per block at least: with 4,096 the products of 8 rows take 10 % longer, as oneDNN starts anew for each
BLOCK = 8192
#: whether this processor multiplies bfloat16 in tiles (AMX), which decides which of torch's products is fast
TILES = bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)())
#: no exponent is less: exp would be no normal float32, and those take a CPU 17 times as long (8 rows of 32,000 logits
#: that are far apart: 7.1 and 0.4 ms); all such classes together add less than 1e-32. -inf - max is brought here too,
#: because 0 * -inf is NaN
LEAST = -87.0
#: statistics of `offramp.kernels.confidence` that `HeadStats.named` can give
NAMED = frozenset({"top1", "margin", "entropy", "energy", "label"})
PARTS = frozenset({"logsumexp", "entropy"})


class Norm(NamedTuple):
    """A norm before the projection: RMS norm, or with `center` layer norm. weight, bias: [width] or None."""

    weight: Tensor | None = None
    eps: float = 1e-6
    bias: Tensor | None = None
    center: bool = False

    def __call__(self, hidden: Tensor) -> Tensor:
        """Return the normed state [..., width], computed in float32, in the type that came in."""
        x, weight, bias = hidden, self.weight, self.bias
        # torch's own norms compute in float32 whatever comes in, as long as all is of one type
        if any(t is not None and t.dtype != x.dtype for t in (weight, bias)) or (bias is not None and not self.center):
            x, weight, bias = x.float(), *(None if t is None else t.float() for t in (weight, bias))
        if self.center:
            return layer_norm(x, x.shape[-1:], weight, bias, self.eps).to(hidden.dtype)
        x = rms_norm(x, x.shape[-1:], weight, self.eps)
        return (x if bias is None else x + bias).to(hidden.dtype)


class Lora(NamedTuple):
    """A low-rank delta: logits += scale * up @ (down @ hidden). down: [r, width]; up: [classes, r]."""

    down: Tensor
    up: Tensor
    scale: float = 1.0


class HeadStats(NamedTuple):
    """label: int64 [rows], the class of the largest logit, the lowest one of equals; first, second: the two largest
    logits; logsumexp; entropy: nats of the softmax. All but `label` float32 [rows]. A row with a NaN or infinite logit
    (or none above -inf) is NaN in all of them, with label 0. What was not asked for is None.
    """

    label: Tensor
    first: Tensor
    second: Tensor
    logsumexp: Tensor | None = None
    entropy: Tensor | None = None

    def named(self, needs: Set[str]) -> dict[str, Tensor]:
        """Return what `confidence` calls top1, margin, entropy, energy and label, as far as it is in `needs`."""
        found: dict[str, Tensor] = {}
        if self.logsumexp is not None:
            best = (self.first - self.logsumexp).exp()
            rest = (self.second - self.logsumexp).exp()
            found = {"energy": -self.logsumexp, "top1": best, "margin": best - rest}
        if self.entropy is not None:
            found["entropy"] = self.entropy
        return {name: value for name, value in {**found, "label": self.label}.items() if name in needs}


def parts(needs: Set[str]) -> frozenset[str]:
    """Return the sums that the statistics in `needs` take: what to ask `head_stats` for."""
    found = {"logsumexp"} if needs & {"top1", "margin", "energy"} else set()
    return frozenset(found | ({"entropy"} if "entropy" in needs else set()))


def head_stats(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm: Norm | None = None,
    lora: Lora | None = None,
    softcap: float | None = None,
    scale: Tensor | None = None,
    needs: Set[str] = PARTS,
) -> HeadStats:
    """Return the statistics of softmax(cap(norm(hidden) @ weight.T + bias)) without keeping [rows, classes].

    hidden: [rows, width], any float type; weight: [classes, width], the same type, or int8 with `scale` [classes];
    bias: [classes]; softcap: c for c * tanh(logits / c); needs: which sums to make, of "logsumexp" and "entropy". On
    the CPU logits are rounded to the type of `hidden` as the model's own are; the rest is float32. Raises
    `BadArgument` for shapes that do not fit.
    """
    _check(hidden, weight, bias, norm, lora, softcap, scale, needs)
    if not hidden.shape[0]:
        empty = hidden.new_empty(0, dtype=torch.float32)
        return HeadStats(empty.long(), empty, empty, empty if "logsumexp" in needs else None,
                         empty if "entropy" in needs else None)  # fmt: skip
    parts_given = (bias, scale, *((lora.down, lora.up) if lora else ()), *((norm.weight, norm.bias) if norm else ()))
    given = [t for t in parts_given if t is not None]
    run = select("head_stats", reference, hidden, weight, *given)
    return run(hidden, weight, bias, norm, lora, softcap, scale, needs)


def reference(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, norm: Norm | None, lora: Lora | None,
    softcap: float | None, scale: Tensor | None, needs: Set[str],
) -> HeadStats:  # fmt: skip
    """Compute `head_stats` with torch: one block of classes after the other, merged at the end."""
    hidden = hidden if norm is None else norm(hidden)
    low = None if lora is None else (hidden @ lora.down.t()) * lora.scale
    found = []
    size = max(BLOCK, LOGITS // len(hidden))
    for start in range(0, weight.shape[0], size):
        block = slice(start, start + size)
        logits = project(hidden, weight[block]) if scale is None else unpack(hidden, weight[block], scale[block])
        logits = logits if bias is None else logits + bias[block].float()
        if low is not None and lora is not None:
            logits = logits + project(low, lora.up[block])
        logits = logits if softcap is None else torch.tanh(logits / softcap) * softcap
        found.append(_block(logits, start, needs))
    return merge(found, needs)


def project(hidden: Tensor, weight: Tensor) -> Tensor:
    """Return hidden @ weight.T in float32, contiguous [rows, classes], by the fastest of torch's ways on the CPU.

    32,000 x 1,024 on one core of a Xeon with AMX, where reading bfloat16 weights once takes 2.7 ms: 1 row 3.3 ms as
    `mv`, 6.9 ms as `linear`; 8 rows 4.1 ms as weight @ hidden.T and a copy that turns and widens at once, 7.1 ms as
    `linear`; 8 rows in float32 17 and 29 ms; but 2 rows in float32 77 and 43 ms (152,000 classes). On an EPYC without
    AMX it is the other way round: bfloat16 12.5 and 7.5 ms (1 row), 12.3 and 8.7 ms (8), 2 rows in float32 7 and 23 ms.
    """
    rows, wide = hidden.shape[0], hidden.dtype == torch.float32
    turn = (not wide or rows >= 4) if TILES else wide
    if hidden.device.type != "cpu" or (rows == 1 and not (wide or TILES)) or (rows > 1 and not turn):
        return torch.nn.functional.linear(hidden, weight).float()
    if rows == 1:
        return torch.mv(weight, hidden[0]).float()[None]
    turned = (weight @ hidden.t()).t()
    return torch.empty(turned.shape, dtype=torch.float32).copy_(turned)


def unpack(hidden: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """Return hidden @ (weight * scale).T in float32 for an int8 weight [classes, width]; scale: [classes].

    torch's own product takes 5.6 ms for 32,000 x 1,024 and one row in bfloat16, widening the weight first 44 ms.
    """
    if hidden.device.type != "cpu" or hidden.requires_grad:
        return project(hidden, weight.to(hidden.dtype)) * scale.float()
    product: Tensor = torch.ops.aten._weight_int8pack_mm(
        hidden.contiguous(), weight.contiguous(), hidden.new_ones(len(scale))
    )
    return product.float() * scale.float()


def _block(logits: Tensor, start: int, needs: Set[str]) -> tuple[Tensor, ...]:
    """Return (label, first, second, sum of e = exp(x - first), sum of e * (x - first)) of one block [rows, classes].

    Overwrites the logits, but for the sake of a gradient.
    """
    first, place = logits.max(-1)  # the first of equals, as `max` promises and `topk` does not; NaN is the largest
    keep = logits.requires_grad
    rest = logits.scatter(1, place[:, None], -torch.inf) if keep else logits.scatter_(1, place[:, None], -torch.inf)
    second = rest.amax(-1)
    label = place + start
    if not needs:
        return label, first, second
    # the largest itself was taken out: its e is 1, and adds nothing to the second sum
    base = first.clamp(min=torch.finfo(torch.float32).min)[:, None]
    x = (rest - base if keep else rest.sub_(base)).clamp_(min=LEAST)
    if "entropy" not in needs:
        return label, first, second, x.exp_().sum(-1) + 1
    e = x.exp()
    return label, first, second, e.sum(-1) + 1, torch.linalg.vecdot(e, x)


def merge(found: list[tuple[Tensor, ...]], needs: Set[str]) -> HeadStats:
    """Return the statistics of all blocks from those of each, given in the order of their classes."""
    if len(found) == 1:
        label, first, second, *sums = found[0]
        return _finish(label, first, second, sums, needs)
    label, first, second, *sums = (torch.stack(part) for part in zip(*found, strict=True))
    return merge_stacked(label, first, second, sums, needs)


def merge_stacked(label: Tensor, first: Tensor, second: Tensor, sums: list[Tensor], needs: Set[str]) -> HeadStats:
    """Return the statistics of all blocks; each part is [blocks, rows]."""
    top, best = first.max(0)
    runner = first.scatter(0, best[None], second.gather(0, best[None])).amax(0)
    total = []
    if needs:
        shift = (first - top).clamp(min=LEAST)
        part = shift.exp()
        total = [(sums[0] * part).sum(0)]
        if "entropy" in needs:
            total.append(((sums[1] + sums[0] * shift) * part).sum(0))
    return _finish(label.gather(0, best[None])[0], top, runner, total, needs)


def _finish(label: Tensor, top: Tensor, second: Tensor, sums: list[Tensor], needs: Set[str]) -> HeadStats:
    """Return the statistics from sums over all classes. Few operations: of a small head they are the larger part."""
    broken = top - top  # 0, and NaN where the largest logit is no number
    total = entropy = None
    if needs:
        log = sums[0].log() + broken
        total = log + top if "logsumexp" in needs else None
        entropy = (log - sums[1] / sums[0]).clamp(min=0) if "entropy" in needs else None
    return HeadStats(label.masked_fill(broken.isnan(), 0), top + broken, second + broken, total, entropy)


def _check(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, norm: Norm | None, lora: Lora | None,
    softcap: float | None, scale: Tensor | None, needs: Set[str],
) -> None:  # fmt: skip
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1] or not weight.shape[0]:
        raise BadArgument(
            f"head_stats takes hidden [rows, width] and weight [classes, width] with at least one class, not "
            f"{list(hidden.shape)} and {list(weight.shape)}; flatten leading dimensions first"
        )
    if weight.dtype == torch.int8 and scale is None:
        raise BadArgument("head_stats: an int8 weight needs scale=, a float tensor [classes]")
    if weight.dtype not in (torch.int8, hidden.dtype) or not hidden.is_floating_point():
        raise BadArgument(
            f"head_stats takes hidden and weight of one float type, or an int8 weight with scale=, not {hidden.dtype} "
            f"and {weight.dtype}; write hidden.to(weight.dtype)"
        )
    classes = weight.shape[0]
    for name, given in (("bias", bias), ("scale", scale)):
        if given is not None and given.shape != (classes,):
            raise BadArgument(f"head_stats: {name} must be [{classes}], one per class, not {list(given.shape)}")
    if lora is not None and (lora.down.shape[1:] != weight.shape[1:] or lora.up.shape != (classes, len(lora.down))):
        raise BadArgument(
            f"head_stats: lora must be down [r, {weight.shape[1]}] and up [{classes}, r], not "
            f"{list(lora.down.shape)} and {list(lora.up.shape)}"
        )
    if softcap is not None and not softcap > 0:
        raise BadArgument(f"head_stats: softcap={softcap} must be above 0, or None")
    if norm is not None and not isinstance(norm, Norm):
        raise BadArgument(f"head_stats: norm must be an offramp.kernels.head_stats.Norm, not {type(norm).__name__}")
    if not needs <= PARTS:
        raise BadArgument(f"head_stats: needs {sorted(needs - PARTS)} are not known; choose of {sorted(PARTS)}")
