"""Choose exit and draft length anew each round from what every exit would have said."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from offramp._registry import register
from offramp.draft import Drafter, DraftRule, Look, Outcome, Plan, Setup, Shadow, most, share, whole

#: most that looks at all exits may cost, as a share of the rounds
SHARE = 0.03
#: what a new text keeps of the counts
LEFT = 0.5


@register("del")
@dataclass(frozen=True)
class Del(DraftRule):
    """Draft from the exit and with the length that promise most tokens per block; stop where the exit is unsure.

    length: longest draft considered; decay: of the counts, once per look at what all exits would have said; every:
    rounds between two such looks, 1 in the paper, None for as many as keep their price under 3 % of a round: heads are
    not free, three of them cost a fourth of a token of a small model. The stop threshold of an exit is the middle
    between its mean confidence where it was right and where it was wrong. Paper: DEL, arXiv 2504.05598.
    """

    length: int = 18
    decay: float = 0.95
    every: int | None = None

    exits = 2
    shadows = True

    def __post_init__(self) -> None:
        whole("length", self.length, 1, "del")
        if self.every is not None:
            whole("every", self.every, 1, "del")
        share("decay", self.decay, "del")

    def start(self, setup: Setup) -> Table:
        """Return a drafter with empty counts."""
        return Table(setup, self)


class Table(Drafter):
    """Decayed counts of right and wrong shadow tokens per exit, and how sure the exit was of them."""

    def __init__(self, setup: Setup, rule: Del) -> None:
        self.setup, self.rule, self.levels = setup, rule, setup.levels
        count = len(self.setup.depths)
        self.right, self.wrong = [0.0] * count, [0.0] * count
        self.sure_right, self.sure_wrong = [0.0] * count, [0.0] * count
        #: rounds to the next look at all exits, and such looks so far
        self.rounds = self.looked = 0

    def begin(self, rows: int) -> None:
        """Let a new text begin with half of what the others taught; learning anew costs a tenth of a short text."""
        for counts in (self.right, self.wrong, self.sure_right, self.sure_wrong):
            counts[:] = [LEFT * count for count in counts]

    def plan(self, room: int) -> Plan:
        """Plan the best exit and length, one draft from the shallowest exit while nothing is known."""
        shadow = self.rounds <= 0
        self.rounds = self.pause() if shadow else self.rounds - 1
        if not any(self.right[i] + self.wrong[i] for i in self.levels):
            return Plan(self.levels[:1], min(room, 1), True)
        level, length = self.choose()
        return Plan((level,) if length else (), min(room, length), shadow)

    def pause(self) -> int:
        """Return the rounds without a look at all exits after one with."""
        if self.rule.every is not None:
            return self.rule.every - 1
        self.looked += 1
        price = self.setup.head * len(self.setup.depths) / self.setup.depth
        return min(int(price / SHARE), self.looked)  # a new text is looked at often

    def choose(self) -> tuple[int, int]:
        """Return (exit, drafts) with the most expected tokens per block; the longest draft considered is length - 1.

        With acceptance rate p of an exit, d drafts give 1 + p + ... + p^d tokens for depth + d * (cost of one draft)
        and one more stop at the exit. Each draft adds less than the one before, so that no exit is worth more drafts
        than the first number that is worth less.
        """
        depth = self.setup.depth
        best, chosen = 1 / depth, (self.levels[0], 0)
        for level in self.levels:
            seen = self.right[level] + self.wrong[level]
            if not seen:
                continue
            rate, price, last = self.right[level] / seen, self.setup.draft(level), 0.0
            tokens, power, cost = 1.0, 1.0, depth + self.setup.cut
            for drafts in range(1, self.rule.length):
                power *= rate
                tokens += power
                cost += price
                value = tokens / cost
                if value < last:
                    break
                last = value
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
        """Compare the shadow tokens with the full model's, up to and including the first draft that was wrong; of
        rounds without them, the drafts.
        """
        decay = self.rule.decay
        shadows: Sequence[Shadow] = outcome.shadows
        if not shadows and outcome.looks:
            looks = sorted(outcome.looks, key=lambda look: look.place)
            tokens, sure = [k.tokens[outcome.row] for k in looks], [k.sure[outcome.row] for k in looks]
            shadows = [Shadow(looks[0].level, tokens, sure)]
        for shadow in shadows:
            level = shadow.level
            pairs = list(zip(shadow.tokens, outcome.tokens, shadow.sure, strict=False))
            hits = [(p, a == b) for a, b, p in pairs]
            self.right[level] = decay * self.right[level] + sum(ok for _, ok in hits)
            self.wrong[level] = decay * self.wrong[level] + sum(not ok for _, ok in hits)
            self.sure_right[level] = decay * self.sure_right[level] + sum(p for p, ok in hits if ok)
            self.sure_wrong[level] = decay * self.sure_wrong[level] + sum(p for p, ok in hits if not ok)
