"""Dynamic self-speculation: each draft comes from the first exit that is confident."""

from __future__ import annotations

from dataclasses import dataclass

from offramp._registry import register
from offramp.draft import Drafter, DraftRule, Plan, Setup, whole


@register("dssd")
@dataclass(frozen=True)
class Dssd(DraftRule):
    """Ask the exits from shallow to deep and draft from the first that the policy accepts; verify when none is.

    length: most drafts per round; the paper has 5 to 10. Its confidence is the policy `entropy` with one threshold per
    exit, e.g. `offramp.calibrate(trace, "entropy", method="per_exit", agreement=0.9)`. Paper: arXiv 2407.21082.
    """

    length: int = 8

    def __post_init__(self) -> None:
        whole("length", self.length, 1, "dssd")

    def start(self, setup: Setup) -> Drafter:
        """Return a drafter with nothing to learn."""
        return FirstConfident(setup, self.length)


class FirstConfident(Drafter):
    """Drafts from the first accepted exit, at most `length` tokens."""

    def __init__(self, setup: Setup, length: int) -> None:
        self.levels, self.length = setup.levels, length

    def plan(self, room: int) -> Plan:
        """Ask every open exit."""
        return Plan(self.levels, min(room, self.length))
