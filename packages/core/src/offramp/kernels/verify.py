"""Which drafts the full model agrees with: lossless acceptance of chains and trees, for all rows at once."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from offramp.errors import BadArgument
from offramp.kernels._select import select


class Verified(NamedTuple):
    """accepted: int64 [rows], how many drafts stand; token: int64 [rows], the model's own next one; keep: int64
    [rows, drafts + 1], the slots that stay in the cache, the root's (0) first, then draft d's slot d + 1; -1 behind.
    """

    accepted: Tensor
    token: Tensor
    keep: Tensor


def verify(
    drafts: Tensor,
    target: Tensor,
    lengths: Tensor | None = None,
    parents: Tensor | None = None,
    proposal: Tensor | None = None,
    uniform: Tensor | None = None,
) -> Verified:
    """Return what of the drafts the full model keeps, and the token it goes on with.

    drafts: int64 [rows, n]; target: after the root and after every draft, the model's token, int64 [rows, n + 1]
    (greedy), or its probabilities, float [rows, n + 1, classes] (sampling); lengths: int64 [rows], drafts of each row
    that count, None for all; parents: int64 [rows, n], of a tree, the draft that each continues, -1 for the root; a
    parent comes before its children. Sampling takes uniform: [rows, n + 1] numbers in [0, 1); with proposal
    [rows, n, classes], the probabilities that chain drafts were drawn from, a draft stands with chance min(1, p / q)
    and the next token comes from max(0, p - q) (arXiv 2211.17192); without, drafts were certain, and stand where
    the model draws the same. Raises `BadArgument`.
    """
    _check(drafts, target, lengths, parents, proposal, uniform)
    rows, count = drafts.shape
    if lengths is None:
        lengths = torch.full((rows,), count, dtype=torch.long, device=drafts.device)
    if proposal is not None and uniform is not None:
        return _rejection(drafts, target, lengths, proposal, uniform)
    if uniform is not None:
        target = draw(target, uniform)
    given = (drafts, target, lengths) if parents is None else (drafts, target, lengths, parents)
    return select("verify", reference, *given)(drafts, target, lengths, parents)


def reference(drafts: Tensor, target: Tensor, lengths: Tensor, parents: Tensor | None) -> Verified:
    """Walk down on the host: a draft stands when its parent does and the model says it there; the first of equals wins.

    On a CPU 8 trees of 16 take 53 us this way and 272 us draft by draft in torch, 8 chains of 5 30 us either way. A GPU
    waits once per tensor.
    """
    rows, count = drafts.shape
    chain = [list(range(-1, count - 1))] * rows
    given = (drafts.tolist(), target.tolist(), lengths.tolist(), chain if parents is None else parents.tolist())
    accepted, token, keep = [], [], []
    for draft, said, length, parent in zip(*given, strict=True):
        path = [0]
        for d in range(min(length, count)):
            if parent[d] + 1 == path[-1] and draft[d] == said[path[-1]]:
                path.append(d + 1)
        accepted.append(len(path) - 1)
        token.append(said[path[-1]])
        keep.append(path + [-1] * (count + 1 - len(path)))
    made = [torch.tensor(one, dtype=torch.long, device=drafts.device) for one in (accepted, token, keep)]
    return Verified(made[0], made[1], made[2].view(rows, count + 1))


def draw(chances: Tensor, uniform: Tensor) -> Tensor:
    """Return the classes int64 [...] that numbers `uniform` [...] in [0, 1) draw from `chances` [..., classes]."""
    total = chances.double().cumsum(-1)  # double: in float32 the sum of 152,000 chances is off by more than the rarest
    found = torch.searchsorted(total, (uniform.double() * total[..., -1]).unsqueeze(-1), right=True).squeeze(-1)
    last = chances.shape[-1] - 1 - (chances > 0).flip(-1).to(torch.uint8).argmax(-1)
    return torch.minimum(found, last)  # rounding must not draw a class behind the last possible one


def _rejection(drafts: Tensor, target: Tensor, lengths: Tensor, proposal: Tensor, uniform: Tensor) -> Verified:
    rows, count = drafts.shape
    p = target[:, :count].gather(-1, drafts[..., None]).squeeze(-1)
    q = proposal.gather(-1, drafts[..., None]).squeeze(-1)
    place = torch.arange(count, device=drafts.device)
    stands = (uniform[:, :count] * q < p) & (place < lengths[:, None])
    accepted = stands.long().cumprod(-1).sum(-1)
    row = torch.arange(rows, device=drafts.device)
    rest = target[row, accepted]
    if count:
        rejected = accepted < lengths
        taken = proposal[row, accepted.clamp(max=count - 1)]
        left = (rest - taken).clamp(min=0)
        # p = q to rounding leaves nothing to draw from; a draft of such a place is rejected by rounding alone
        use = rejected & (left.sum(-1) > 0)
        rest = torch.where(use[:, None], left, rest)
    slots = torch.arange(count + 1, device=drafts.device).expand(rows, -1)
    return Verified(accepted, draw(rest, uniform[:, count]), slots.masked_fill(slots > accepted[:, None], -1))


def _check(
    drafts: Tensor, target: Tensor, lengths: Tensor | None, parents: Tensor | None, proposal: Tensor | None,
    uniform: Tensor | None,
) -> None:  # fmt: skip
    if drafts.dim() != 2 or drafts.is_floating_point():
        raise BadArgument(f"verify takes drafts int64 [rows, n], not {drafts.dtype} {list(drafts.shape)}")
    rows, count = drafts.shape
    if target.shape[:2] != (rows, count + 1) or target.dim() != 2 + target.is_floating_point():
        raise BadArgument(
            f"verify takes target int64 [{rows}, {count + 1}] (tokens) or float [{rows}, {count + 1}, classes] "
            f"(probabilities), one more than drafts, not {target.dtype} {list(target.shape)}"
        )
    if target.is_floating_point() != (uniform is not None):
        raise BadArgument("verify: probabilities come with uniform=[rows, n + 1] to draw with, tokens without")
    if proposal is not None and (parents is not None or uniform is None):
        raise BadArgument(
            "verify: proposal= belongs to sampled chains; give target as probabilities, and no parents (the drafts of "
            "a tree are certain: leave proposal out)"
        )
    shapes = (
        ("lengths", lengths, (rows,)),
        ("parents", parents, (rows, count)),
        ("uniform", uniform, (rows, count + 1)),
        ("proposal", proposal, (rows, count, *target.shape[2:])),
    )
    for name, given, wanted in shapes:
        if given is not None and given.shape != wanted:
            raise BadArgument(f"verify: {name} must be {list(wanted)}, not {list(given.shape)}")
