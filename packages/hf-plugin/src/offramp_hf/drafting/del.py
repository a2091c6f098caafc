"""Choose exit and draft length anew each round from what every exit would have said."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from offramp._registry import register
from offramp.draft import Drafter, DraftRule, Look, Outcome, Plan, Setup, most, share, whole


@register("del")
@dataclass(frozen=True)
class Del(DraftRule):
    """Draft from the exit and with the length that promise most tokens per block; stop where the exit is unsure.

    length: longest draft considered; decay: of the counts, once per verification; every: rounds between two looks at
    what all exits would have said (the paper looks after each; heads are not free); prompt: last prompt tokens that
    the counts start from. The stop threshold of an exit is the middle between its mean confidence where it was right
    and where it was wrong. Paper: DEL, arXiv 2504.05598.
    """

    length: int = 18
    decay: float = 0.95
    every: int = 1
    prompt: int = 32

    exits = 2
    shadows = True

    def __post_init__(self) -> None:
        for name, low in (("length", 1), ("every", 1), ("prompt", 0)):
            whole(name, getattr(self, name), low, "del")
        share("decay", self.decay, "del")

    def start(self, setup: Setup) -> Table:
        """Return a drafter with empty counts."""
        return Table(setup, self)


class Table(Drafter):
    """Decayed counts of right and wrong shadow tokens per exit, and how sure the exit was of them."""

    def __init__(self, setup: Setup, rule: Del) -> None:
        self.setup, self.rule, self.levels = setup, rule, setup.levels
        self.begin(0)

    def begin(self, rows: int) -> None:
        """Forget: the counts belong to one text."""
        count = len(self.setup.depths)
        self.right, self.wrong = [0.0] * count, [0.0] * count
        self.sure_right, self.sure_wrong = [0.0] * count, [0.0] * count
        self.rounds = 0

    def plan(self, room: int) -> Plan:
        """Plan the best exit and length, one draft from the shallowest exit while nothing is known."""
        shadow = self.rounds % self.rule.every == 0
        self.rounds += 1
        if not any(self.right[i] + self.wrong[i] for i in self.levels):
            return Plan(self.levels[:1], min(room, 1), True)
        level, length = self.choose()
        return Plan((level,) if length else (), min(room, length), shadow)

    def choose(self) -> tuple[int, int]:
        """Return (exit, drafts) with the most expected tokens per block; the longest draft considered is length - 1.

        With acceptance rate p of an exit, d drafts give 1 + p + ... + p^d tokens for depth + d * (cost of one draft).
        """
        best, chosen = 0.0, (self.levels[0], 0)
        for level in self.levels:
            seen = self.right[level] + self.wrong[level]
            if not seen:
                continue
            rate, tokens, power = self.right[level] / seen, 1.0, 1.0
            for drafts in range(self.rule.length):
                if drafts:
                    power *= rate
                    tokens += power
                value = tokens / (self.setup.depth + drafts * self.setup.draft(level))
                if value > best:
                    best, chosen = value, (level, drafts)
        return chosen

    def threshold(self, level: int) -> float:
        """Return the confidence below which a draft of this exit is the last; NaN while it was never wrong or right."""
        right, wrong = self.right[level], self.wrong[level]
        if not right or not wrong:
            return math.nan
        return (self.sure_right[level] / right + self.sure_wrong[level] / wrong) / 2

    def goes_on(self, look: Look, rows: Sequence[int]) -> bool:
        """Whether the token just drafted was sure enough for another; NaN stops nothing."""
        limit = self.threshold(look.level)
        return most([not p < limit for p in look.sure], rows)

    def learn(self, outcome: Outcome) -> None:
        """Compare the shadow tokens with the full model's, up to and including the first draft that was wrong."""
        decay = self.rule.decay
        for shadow in outcome.shadows:
            level = shadow.level
            pairs = list(zip(shadow.tokens, outcome.tokens, shadow.sure, strict=False))
            hits = [(p, a == b) for a, b, p in pairs]
            self.right[level] = decay * self.right[level] + sum(ok for _, ok in hits)
            self.wrong[level] = decay * self.wrong[level] + sum(not ok for _, ok in hits)
            self.sure_right[level] = decay * self.sure_right[level] + sum(p for p, ok in hits if ok)
            self.sure_wrong[level] = decay * self.sure_wrong[level] + sum(p for p, ok in hits if not ok)
