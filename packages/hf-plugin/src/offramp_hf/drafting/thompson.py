"""Draft length by Thompson sampling on whether drafts are accepted."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from offramp._registry import register
from offramp.draft import Drafter, DraftRule, Look, Outcome, Plan, Setup, share, whole
from offramp.errors import BadArgument


@register("thompson")
@dataclass(frozen=True)
class Thompson(DraftRule):
    """After each draft, draw an acceptance rate from its posterior and go on while a draft pays at that rate.

    a, b: of the prior Beta(a, b); length: most drafts; forgetting: share of what was learned that each verification
    keeps, 1 for a stationary text (ours; the paper has none); seed: of the draws; priced: go on while the rate drawn,
    to the power of the drafts so far, is above the price of a draft (ours); False: throw a coin with that rate, which
    knows no prices (the paper's). With r of n drafts accepted the posterior becomes Beta(a + r, b + n - r). Paper:
    EESD, arXiv 2406.03853.
    """

    length: int = 12
    a: float = 1.0
    b: float = 1.0
    forgetting: float = 1.0
    seed: int = 0
    priced: bool = True

    def __post_init__(self) -> None:
        whole("length", self.length, 1, "thompson")
        share("forgetting", self.forgetting, "thompson")
        for name in ("a", "b"):
            if not getattr(self, name) > 0:
                raise BadArgument(f"thompson: {name}={getattr(self, name)!r} must be above 0, as a Beta prior needs")

    def start(self, setup: Setup) -> Posterior:
        """Return a drafter at the prior."""
        return Posterior(setup, self)


class Posterior(Drafter):
    """Beta(a, b) over the probability that a draft from the shallowest open exit is accepted."""

    def __init__(self, setup: Setup, rule: Thompson) -> None:
        self.setup, self.levels, self.rule = setup, setup.levels[:1], rule
        self.a, self.b = rule.a, rule.b
        self.random = random.Random(rule.seed)

    def plan(self, room: int) -> Plan:
        """Draft at least once, as the paper does: a controller that never drafts learns nothing."""
        return Plan(self.levels, min(room, self.rule.length))

    def goes_on(self, look: Look, rows: Sequence[int]) -> bool:
        """Draw an acceptance rate, then decide."""
        rate = self.random.betavariate(self.a, self.b)
        if self.rule.priced:
            return rate ** (look.place + 2) > self.setup.draft(look.level) / self.setup.depth
        return self.random.random() < rate

    def learn(self, outcome: Outcome) -> None:
        """Add accepted and rejected drafts to the counts."""
        rule, drafted = self.rule, outcome.drafted
        if not drafted:
            return
        accepted = outcome.accepted
        self.a = rule.a + rule.forgetting * (self.a - rule.a) + accepted
        self.b = rule.b + rule.forgetting * (self.b - rule.b) + drafted - accepted
