"""Draft at one exit while it is confident; the token that ends the draft is kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from offramp._registry import register
from offramp.draft import Drafter, DraftRule, Look, Plan, Setup, most, share, whole


@register("confident")
@dataclass(frozen=True)
class Confident(DraftRule):
    """Stop drafting once the drafted token's probability is at most `eta`; that token is verified too.

    length: most drafts. Meant for the head "adapter" at a shallow exit: `attach(model, 2, "adapter")` and
    `enable(model, "fixed", depth=2, verify=True, draft="confident")`. Paper: Kangaroo, arXiv 2404.18911.
    """

    length: int = 6
    eta: float = 0.6

    def __post_init__(self) -> None:
        whole("length", self.length, 1, "confident")
        share("eta", self.eta, "confident")

    def start(self, setup: Setup) -> Drafter:
        """Return a drafter with nothing to learn."""
        return Kangaroo(setup, self.length, self.eta)


class Kangaroo(Drafter):
    """Drafts from the shallowest open exit until it is unsure."""

    def __init__(self, setup: Setup, length: int, eta: float) -> None:
        self.levels, self.length, self.eta = setup.levels[:1], length, eta

    def plan(self, room: int) -> Plan:
        """Ask the one exit."""
        return Plan(self.levels, min(room, self.length))

    def goes_on(self, look: Look, rows: Sequence[int]) -> bool:
        """Whether the token just drafted was sure enough for another."""
        return most([p > self.eta for p in look.sure], rows)
