"""What a look at an exit and a wider call really cost on this machine, in blocks; measured while decoding."""

from __future__ import annotations

from offramp.draft import Setup

#: weight of a new measurement in the running means
NEW = 0.05
#: measurements before the running means are believed
ENOUGH = 8


class Clock:
    """Running means of seconds: per block and token count, and per look; they correct a `Setup` in place.

    Only on devices that run at once, as CPUs do: elsewhere seconds say when work was handed over, not how long it took.
    A moment in which the machine did something else counts at most twice the mean.
    """

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.block: dict[int, float] = {}
        self.seconds = 0.0
        self.looks = 0

    def window(self, seconds: float, blocks: int, tokens: int) -> None:
        """Take in the time of a window."""
        each = seconds / blocks
        mean = self.block.get(tokens)
        self.block[tokens] = each if mean is None else mean + NEW * (min(each, 2 * mean) - mean)
        one = self.block.get(1)
        if one is not None and 1 < tokens and mean is not None:
            slope = max(0.0, (self.block[tokens] / one - 1) / (tokens - 1))
            self.setup.wider += NEW * (slope - self.setup.wider)

    def look(self, seconds: float) -> None:
        """Take in the time of a look."""
        self.looks += 1
        if not self.seconds:
            self.seconds = seconds
        self.seconds += NEW * (min(seconds, 2 * self.seconds) - self.seconds)
        if self.looks >= ENOUGH and 1 in self.block:
            self.setup.head = self.seconds / self.block[1]
