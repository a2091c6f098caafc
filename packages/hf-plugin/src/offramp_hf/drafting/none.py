"""Draft nothing: what the windowed decoder saves by itself, beside which drafts are to be judged."""

from __future__ import annotations

from dataclasses import dataclass

from offramp._registry import register
from offramp.draft import Drafter, DraftRule, Plan, Setup


@register("none")
@dataclass(frozen=True)
class Nothing(DraftRule):
    """No drafts: every token takes all blocks, in calls as the other rules make them. For comparison. Ours."""

    def start(self, setup: Setup) -> Drafter:
        """Return a drafter that asks no exit."""
        return Idle()


class Idle(Drafter):
    """Asks no exit."""

    def plan(self, room: int) -> Plan:
        """Draft nothing."""
        return Plan((), 0)
