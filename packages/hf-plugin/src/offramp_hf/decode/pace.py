"""Decide from what was accepted so far whether one more draft pays; counts blocks, not seconds, so it is repeatable."""

from __future__ import annotations

import math

#: confidence bins per exit
BINS = 12
#: weight of the optimistic prior, in observations
PRIOR = 2.0
#: what one more token costs in a call of the deep blocks, as a share of the call: 25, 31, 42 % measured for 2, 3, 4
#: tokens on CPU (the mask of more than one token is most of it), about nothing where weights are what is read
WIDER = 0.08
#: rounds without looking at heads after a losing streak, doubled each time
NAP, LONGEST_NAP = 16, 64
#: what an exit that wakes may lose before it rests again, in blocks per look: about a dozen looks, 1 % of the time
TRIAL = 0.1


class Pace:
    """Learns how often drafts of each exit are accepted at each confidence, and stops where drafting loses.

    depths: of the exits; depth: of the model; head: cost of one head in blocks. Greedy output does not depend on it.
    """

    def __init__(self, depths: tuple[int, ...], depth: int, head: float) -> None:
        self.depths, self.depth, self.head = depths, depth, head
        self.hits = [[PRIOR * 0.75] * BINS for _ in depths]
        self.tries = [[PRIOR] * BINS for _ in depths]
        #: running mean of what looking at each exit earned, in blocks per look; starts hopeful
        self.worth = [1.0 for _ in depths]
        self.nap = [0 for _ in depths]
        self.next_nap = [NAP for _ in depths]

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
        # the drafted token's own way to the exit is spent again for the token after it, and the deep call gets wider
        return (self.depths[index] + self.head) / self.depth + WIDER * (1 - self.depths[index] / self.depth)

    def pays(self, index: int, joint: float) -> bool:
        """Whether a draft that is kept with probability `joint` earns more than it costs."""
        return joint > self.price(index)

    def awake(self, index: int) -> bool:
        """Whether the head of exit `index` is worth looking at in this round."""
        if self.nap[index] > 0:
            self.nap[index] -= 1
            return False
        return True

    def learn(self, index: int, confidence: float | None, kept: bool) -> None:
        """Take in whether the full model agreed with a prediction of exit `index`."""
        b = self.bin(confidence)
        self.hits[index][b] = 0.98 * self.hits[index][b] + kept
        self.tries[index][b] = 0.98 * self.tries[index][b] + 1.0

    def earned(self, index: int, blocks: float) -> None:
        """Take in what one look at exit `index` earned (negative: cost), and rest it when that is a loss on average."""
        self.worth[index] += 0.03 * (blocks - self.worth[index])
        if self.worth[index] < 0:
            self.nap[index], self.worth[index] = self.next_nap[index], TRIAL
            self.next_nap[index] = min(2 * self.next_nap[index], LONGEST_NAP)
        elif self.worth[index] > 0.75:
            self.next_nap[index] = NAP
