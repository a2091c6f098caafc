"""Draft from the text where it repeats itself, from the exits otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from offramp._registry import register
from offramp.draft import Drafter, DraftRule, Look, Outcome, Plan, Setup, whole
from offramp_hf.drafting.adaptive import Adaptive
from offramp_hf.drafting.lookup import Lookup


@register("hybrid")
@dataclass(frozen=True)
class Hybrid(DraftRule):
    """The rule "lookup" where its match promises more tokens per call than the exits have given, else "adaptive".

    ngram, least, length: as in "lookup"; length is also the most drafts of the exits. Ours.
    """

    ngram: int = 3
    least: int = 1
    length: int = 12

    reads = True

    def __post_init__(self) -> None:
        whole("length", self.length, 1, "hybrid")
        Lookup(self.ngram, self.least, self.length)  # refuses what it cannot work with

    def start(self, setup: Setup) -> Either:
        """Return a drafter that trusts neither source yet."""
        return Either(setup, self)


class Either(Drafter):
    """Both drafters, and the running mean of tokens per full model's worth of blocks that the exits gave."""

    def __init__(self, setup: Setup, rule: Hybrid) -> None:
        self.setup = setup
        self.text = Lookup(rule.ngram, rule.least, rule.length).start(setup)
        self.exits = Adaptive(rule.length).start(setup)
        self.levels = self.exits.levels
        self.gain = 1.1

    def begin(self, rows: int) -> None:
        """Begin with new texts."""
        self.text.begin(rows)
        self.exits.begin(rows)

    def propose(self, texts: Sequence[Sequence[int]], room: int) -> list[list[int]]:
        """Return drafts from the text when they promise more than the exits, averaged over rows still going."""
        drafts, gain = self.text.offer(texts, room)
        return drafts if gain > self.gain else []

    def plan(self, room: int) -> Plan:
        """Plan as the exits would."""
        return self.exits.plan(room)

    def wants(self, look: Look, rows: Sequence[int]) -> bool:
        """Ask the exits' rule."""
        return self.exits.wants(look, rows)

    def learn(self, outcome: Outcome) -> None:
        """Let the source that drafted learn."""
        if outcome.given:
            self.text.learn(outcome)
            return
        self.exits.learn(outcome)
        if outcome.looks:
            setup = self.setup
            look = setup.head + setup.cut
            spent = sum(setup.draft(one.level) if one.drafted else look for one in outcome.looks)
            self.gain += 0.05 * (outcome.kept / (1 + spent / setup.depth) - self.gain)
        else:
            self.gain += 0.05 * (1.0 - self.gain)
