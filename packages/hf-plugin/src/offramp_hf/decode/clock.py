"""What a look at an exit and a wider call really cost on this machine, in blocks; measured while decoding."""

from __future__ import annotations

import math

from offramp.draft import Setup

#: weight of a new measurement in the running means
NEW = 0.05
#: measurements before the running means are believed; of calls of many tokens, which come in many sizes, fewer do
ENOUGH, FEW = 8, 2


class Clock:
    """Running means of seconds: per block and token count, and per look; they correct a `Setup` in place.

    Only on devices that run at once, as CPUs do: elsewhere seconds say when work was handed over, not how long it took.
    A moment in which the machine did something else counts at most twice the mean.
    """

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.blocks: dict[int, Mean] = {}
        self.looks = Mean()

    def window(self, seconds: float, blocks: int, tokens: int) -> None:
        """Take in the time of a window."""
        mean = self.blocks.setdefault(tokens, Mean())
        mean.add(seconds / blocks)
        one = self.blocks.get(1)
        if one is not None and tokens > 1 and one.count >= ENOUGH and mean.count >= FEW:
            slope = max(0.0, (mean.value / one.value - 1) / (tokens - 1))
            self.setup.wider += NEW * (slope - self.setup.wider)

    def look(self, seconds: float) -> None:
        """Take in the time of a look."""
        self.looks.add(seconds)
        one = self.blocks.get(1)
        if self.looks.count >= ENOUGH and one is not None and one.count >= ENOUGH:
            self.setup.head = self.looks.value / one.value


class Mean:
    """The least of the first measurements, which are slow for other reasons, then a running mean."""

    def __init__(self) -> None:
        self.value, self.count = math.inf, 0

    def add(self, seconds: float) -> None:
        """Take in one measurement."""
        self.count += 1
        if self.count <= ENOUGH:
            self.value = min(self.value, seconds)
        else:
            self.value += NEW * (min(seconds, 2 * self.value) - self.value)
