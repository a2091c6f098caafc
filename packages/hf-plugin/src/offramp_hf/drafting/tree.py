"""Draft several candidates per place as a tree, and verify all of them in one call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from offramp._registry import register
from offramp.draft import Drafter, DraftRule, Plan, Setup, share, whole


@register("tree")
@dataclass(frozen=True)
class Tree(DraftRule):
    """Keep the `width` likeliest nodes of every level of a tree of candidates from the shallowest open exit.

    width: nodes per level, and candidates looked at per node; length: levels; eta: the tree ends after a level whose
    likeliest path has at most this probability (0: never). The policy decides at the first level whether there is a
    tree. Sampling draws from the full model at each node and goes on while the draw is a node, which keeps the
    distribution. Papers: Kangaroo's tree, arXiv 2404.18911; EAGLE-2, arXiv 2406.16858.
    """

    width: int = 4
    length: int = 4
    eta: float = 0.0

    branches = True

    def __post_init__(self) -> None:
        for name in ("width", "length"):
            whole(name, getattr(self, name), 1, "tree")
        share("eta", self.eta, "tree")

    def start(self, setup: Setup) -> Drafter:
        """Return a drafter with nothing to learn."""
        return Branches(setup, self)


class Branches(Drafter):
    """Trees of one shape."""

    def __init__(self, setup: Setup, rule: Tree) -> None:
        self.levels, self.rule = setup.levels[:1], rule

    def plan(self, room: int) -> Plan:
        """Ask the one exit, for a tree that is not deeper than there is room."""
        return Plan(self.levels, min(room, self.rule.length), width=self.rule.width)

    def deeper(self, best: Sequence[float], rows: Sequence[int]) -> bool:
        """Whether another level is drafted; best: probability of the likeliest path of every row."""
        return self.rule.eta == 0 or any(best[r] > self.rule.eta for r in rows)
