"""Draft from the first exit that the policy accepts, and only while one more draft pays."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from offramp._registry import register
from offramp.draft import Drafter, DraftRule, Look, Outcome, Plan, Setup, whole

#: confidence bins per exit
BINS = 12
#: weight of the optimistic prior, in observations
PRIOR = 2.0
#: rounds without looking at heads after a losing streak, four times as many after the next
NAP, LONGEST_NAP = 32, 1024
#: what an exit that wakes may lose before it rests again, in blocks per look
TRIAL = 0.2
#: what an exit is hoped to earn at first, and how many looks that counts for
HOPE, SURE = 0.5, 10
#: least weight of a new look in the mean of what looks earned: single looks earn -5 to +8 blocks and texts differ, so
#: few say little. With these numbers 24 recorded texts of a model whose exits pay take 0.95 of the blocks' time (0.92
#: with the one exit that pays, if it were known), and of a model whose exits do not pay 1.004
NEW = 0.004


@register("adaptive")
@dataclass(frozen=True)
class Adaptive(DraftRule):
    """Learn how often drafts of each exit are right at each confidence; stop where one more costs more than it earns.

    length: most drafts per round (at 95 % acceptance more than 12 gain under 3 %). Earnings are counted in blocks, not
    seconds, so decisions are repeatable; exits whose looks lose rest for a while. Ours.
    """

    length: int = 12

    def __post_init__(self) -> None:
        whole("length", self.length, 1, "adaptive")

    def start(self, setup: Setup) -> Pace:
        """Return a drafter that expects three of four drafts to be right."""
        return Pace(setup, self.length)


class Pace(Drafter):
    """Acceptance rates by exit and confidence, and what looking earned; greedy output does not depend on it."""

    def __init__(self, setup: Setup, length: int) -> None:
        self.setup, self.length, self.levels = setup, length, setup.levels
        depths = setup.depths
        self.hits = [[PRIOR * 0.75] * BINS for _ in depths]
        self.tries = [[PRIOR] * BINS for _ in depths]
        #: running mean of what looking at each exit earned, in blocks per look
        self.worth = [HOPE for _ in depths]
        self.looked = [0 for _ in depths]
        self.nap = [0 for _ in depths]
        self.next_nap = [NAP for _ in depths]
        #: probability that the drafts so far are kept, per row
        self.chances: dict[int, float] = {}

    def plan(self, room: int) -> Plan:
        """Ask the exits that are awake."""
        self.chances = {}
        awake = tuple(i for i in self.levels if self.awake(i))
        return Plan(awake, min(room, self.length))

    def wants(self, look: Look, rows: Sequence[int]) -> bool:
        """Whether the policy accepts and the draft, kept with the chance of the whole chain, earns its price; of rows,
        which come back together, for the one that it helps least."""
        if not super().wants(look, rows):
            return False
        rate = {r: self.chances.get(r, 1.0) * self.chance(look.level, look.sure[r]) for r in rows}
        if min(rate.values()) <= self.price(look.level):
            return False
        self.chances = rate
        return True

    def learn(self, outcome: Outcome) -> None:
        """Take in whether the full model agreed with each look, and what each look earned in blocks."""
        setup = self.setup
        for one in outcome.looks:
            if one.place < len(outcome.tokens):
                self.note(one.level, one.sure[outcome.row], one.tokens[outcome.row] == outcome.tokens[one.place])
            won = one.place < outcome.kept - 1
            price = self.price(one.level)
            self.earned(one.level, setup.depth * (won - price) if one.drafted else -setup.head - setup.cut)

    def chance(self, index: int, confidence: float | None) -> float:
        """Return the acceptance rate seen at exit `index` for this confidence."""
        b = self.bin(confidence)
        return self.hits[index][b] / self.tries[index][b]

    @staticmethod
    def bin(confidence: float | None) -> int:
        """Return the bin of a confidence in [0, 1]; finer near 1, where acceptance changes fastest."""
        if confidence is None or not math.isfinite(confidence):
            return 0
        return min(BINS - 1, int(BINS * min(1.0, max(0.0, confidence)) ** 1.5))

    def price(self, index: int) -> float:
        """Return the cost of a draft from exit `index`, as a share of a full token."""
        # the drafted token's own way to the exit is spent again for the token after it
        return self.setup.draft(index) / self.setup.depth + self.setup.ragged - 1

    def awake(self, index: int) -> bool:
        """Whether the head of exit `index` is worth looking at in this round: not where no draft could earn its price.
        """
        if self.price(index) >= 1:
            return False
        if self.nap[index] > 0:
            self.nap[index] -= 1
            return False
        return True

    def note(self, index: int, confidence: float | None, kept: bool) -> None:
        """Take in whether the full model agreed with a prediction of exit `index`."""
        b = self.bin(confidence)
        self.hits[index][b] = 0.98 * self.hits[index][b] + kept
        self.tries[index][b] = 0.98 * self.tries[index][b] + 1.0

    def earned(self, index: int, blocks: float) -> None:
        """Take in what one look at exit `index` earned (negative: cost), and rest it when that is a loss on average."""
        self.looked[index] += 1
        self.worth[index] += max(NEW, 1 / (SURE + self.looked[index])) * (blocks - self.worth[index])
        if self.worth[index] < 0:
            self.nap[index], self.worth[index] = self.next_nap[index], TRIAL
            self.next_nap[index] = min(4 * self.next_nap[index], LONGEST_NAP)
        elif self.worth[index] > 0.75:
            self.next_nap[index] = NAP
