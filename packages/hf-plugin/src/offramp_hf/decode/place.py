"""Where new tokens go: their positions, what they see, and trees of drafts."""

from __future__ import annotations

import torch
from torch import Tensor

#: nodes that a tree has room for at first
NODES = 32


class Tree:
    """Drafts as a tree in the slots from `base` on: node 0 is the newest token, every other node has an earlier parent.

    depths: of each node below node 0; seen: bool [batch, nodes, nodes], a node's ancestors and itself; tokens, parents:
    int64 [batch, nodes]. Rows have trees of the same shape, but parents of their own.
    """

    def __init__(self, base: int, tokens: Tensor) -> None:
        self.base, self.tokens = base, tokens
        self.depths = [0]
        self.parents = torch.zeros_like(tokens)
        self.seen = self._room(NODES)[:, :1, :1]

    def _room(self, nodes: int) -> Tensor:
        """Make room for the matrix of so many nodes, which see themselves: adding one writes its row and nothing else.
        """
        self.room = torch.eye(nodes, dtype=torch.bool, device=self.tokens.device).repeat(len(self.tokens), 1, 1)
        return self.room

    def shifted(self, base: int) -> Tree:
        """Return the same tree in a cache that lacks the first `base` slots."""
        other = Tree(self.base - base, self.tokens)
        other.depths, other.parents, other.seen = self.depths, self.parents, self.seen
        return other

    def place(self, slot: int) -> int:
        """Return how many tokens of its text stand before the one in `slot`, counted in slots."""
        return slot if slot < self.base else self.base + self.depths[slot - self.base]

    def grow(self, parents: Tensor, tokens: Tensor) -> None:
        """Add nodes one level deeper than the deepest. parents, tokens: int64 [batch, new]."""
        batch, old, new = len(tokens), self.seen.shape[1], tokens.shape[1]
        total = old + new
        if total > self.room.shape[1]:
            self._room(2 * total)[:, :old, :old] = self.seen
        torch.gather(self.seen, 1, parents[:, :, None].expand(batch, new, old), out=self.room[:, old:total, :old])
        self.seen = self.room[:, :total, :total]
        self.depths += [self.depths[-1] + 1] * new
        self.parents = torch.cat([self.parents, parents], 1)
        self.tokens = torch.cat([self.tokens, tokens], 1)


class Place:
    """Where new tokens go. mask: [batch, slots] of 0/1 over all slots so far, or None without padding; longest: most
    tokens a row may come to hold (0: unknown); before: tokens of each row that stand in no slot; tree: set while the
    newest slots hold a tree of drafts.
    """

    def __init__(
        self, mask: Tensor | None, longest: int = 0, before: int | Tensor = 0, tree: Tree | None = None
    ) -> None:
        self.mask, self.longest, self.before, self.tree = mask, longest, before, tree

    def shifted(self, mask: Tensor | None, base: int) -> Place:
        """Return the same place for a cache that lacks the first `base` slots. mask: without them."""
        before = base if self.mask is None else self.mask[:, :base].sum(-1, keepdim=True)
        tree = None if self.tree is None else self.tree.shifted(base)
        return Place(mask, self.longest, before, tree)

    def positions(self, slots: int, new: int, device: torch.device) -> Tensor:
        """Return the positions [batch or 1, new] of `new` tokens behind `slots` stored ones: how many of the row's own
        tokens come before."""
        tree, total = self.tree, slots + new
        if self.mask is None:
            if tree is None:
                return torch.arange(slots, total, device=device)[None] + self.before
            return torch.tensor([[tree.place(s) for s in range(slots, total)]], device=device) + self.before
        mask = self.mask[:, :total]
        if mask.shape[1] < total:  # nobody has widened it yet: new tokens are no padding
            mask = torch.nn.functional.pad(mask, (0, total - mask.shape[1]), value=1)
        real = (mask.cumsum(-1) - 1).clamp(min=0)
        if tree is not None and total > tree.base:  # a node stands as far behind the stem as it has ancestors
            depths = torch.tensor(tree.depths[: total - tree.base], device=device)
            real = torch.cat([real[:, : tree.base], mask[:, : tree.base].sum(-1, keepdim=True) + depths], 1)
        # drafts of a row that is nearly full, and rows that ended, would run past a learned position table; nobody
        # reads them
        return (real[:, slots:] + self.before).clamp(max=max(self.longest, 1) - 1)

    def seen(self, slots: int, new: int, device: torch.device) -> Tensor | None:
        """Return `matrix` when that is no plain matter of order and padding, else None."""
        return None if self.tree is None else self.matrix(slots, new, device)

    def matrix(self, slots: int, new: int, device: torch.device) -> Tensor:
        """Return which slots the `new` tokens behind `slots` stored ones see, bool [batch or 1, new, slots + new]."""
        total, tree = slots + new, self.tree
        order = torch.ones(new, total, dtype=torch.bool, device=device).tril(slots)[None]
        if self.mask is not None:
            order = order & self.mask[:, None, :total].bool()
        if tree is not None and total > tree.base:
            first = max(0, tree.base - slots)  # the first new token that is a node of the tree
            order = order.expand(len(tree.seen), -1, -1).clone()
            start = slots + first - tree.base
            order[:, first:, tree.base :] = tree.seen[:, start : start + new - first, : total - tree.base]
        return order
