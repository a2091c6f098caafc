"""Draft a fixed number of tokens at one exit."""

from __future__ import annotations

from dataclasses import dataclass

from offramp._registry import register
from offramp.draft import Drafter, DraftRule, Plan, Setup, whole


@register("fixed")
@dataclass(frozen=True)
class Fixed(DraftRule):
    """Always `length` drafts from the shallowest exit that the policy leaves open (LayerSkip, arXiv 2404.16710).

    With the policy `fixed` its `depth` is the exit; another policy can end a draft earlier by refusing a token.
    """

    length: int = 4

    def __post_init__(self) -> None:
        whole("length", self.length, 1, "fixed")

    def start(self, setup: Setup) -> Drafter:
        """Return a drafter with nothing to learn."""
        return OneExit(setup, self.length)


class OneExit(Drafter):
    """Drafts from the shallowest open exit, at most `length` tokens."""

    def __init__(self, setup: Setup, length: int) -> None:
        self.levels, self.length = setup.levels[:1], length

    def plan(self, room: int) -> Plan:
        """Ask the one exit."""
        return Plan(self.levels, min(room, self.length))
