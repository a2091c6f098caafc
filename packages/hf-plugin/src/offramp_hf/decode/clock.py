"""What looks, low windows and wider calls really cost on this machine; measured while decoding."""

from __future__ import annotations

import math

from offramp.draft import Setup

#: weight of a new measurement in the running means
NEW = 0.05
#: measurements before the running means are believed; of calls of many tokens, which come in many sizes, fewer do
ENOUGH, FEW = 8, 2
#: measurements that the first guess of what one more token adds counts for
PRIOR = 8


class Clock:
    """Running means of seconds: per window and token count, per look, and of the rest of a round; they correct a
    `Setup` in place, round by round.

    Only on devices that run at once, as CPUs do: elsewhere seconds say when work was handed over, not how long it took.
    A moment in which the machine did something else counts at most twice the mean.
    """

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.windows: dict[tuple[int, int, int], Mean] = {}
        self.looks, self.rests = Mean(), Mean()
        #: how often the cost of one more token was measured
        self.slopes = 0
        #: seconds of this round that are accounted for
        self.spent = 0.0

    def window(self, seconds: float, start: int, stop: int, tokens: int) -> None:
        """Take in the time of blocks start < i <= stop on `tokens` tokens."""
        self.spent += seconds
        mean = self.windows.setdefault((start, stop, tokens), Mean())
        mean.add(seconds / (stop - start))
        if mean.count >= FEW:
            fewer, short = self.shortest(start, stop)
            # seconds = one * (1 + wider * (tokens - 1)) of both calls
            rest = short * (tokens - 1) - mean.value * (fewer - 1)
            if tokens > fewer and rest > 0:
                self.slopes += 1
                slope = max(0.0, (mean.value - short) / rest)
                self.setup.wider += max(NEW, 1 / (PRIOR + self.slopes)) * (slope - self.setup.wider)

    def look(self, seconds: float) -> None:
        """Take in the time of a look."""
        self.spent += seconds
        self.looks.add(seconds)

    def round(self, seconds: float) -> None:
        """Take in the time of a whole round, and say in the setup what things cost in blocks."""
        self.rests.add(max(0.0, seconds - self.spent))
        self.spent = 0.0
        one = self.one(0, self.setup.depth)
        if one is None or self.rests.count < ENOUGH:
            return
        block = one + self.rests.value / self.setup.depth
        if self.looks.count >= ENOUGH:
            self.setup.head = self.looks.value / block
        for level, depth in enumerate(self.setup.depths):
            mean = self.windows.get((0, depth, 1))
            if mean is not None and mean.count >= ENOUGH:
                self.setup.low[level] = depth * mean.value / block
        apart = [self.apart(depth) for depth in self.setup.depths]
        self.setup.split = next((max(0.0, seconds / block) for seconds in apart if seconds is not None), 0.0)

    def apart(self, depth: int) -> float | None:
        """Return what two calls, up to `depth` and from there on, take more than one of all blocks; None: not known."""
        whole = self.setup.depth
        found = [self.windows.get(key) for key in ((0, depth, 1), (depth, whole, 1), (0, whole, 1))]
        if any(mean is None or mean.count < ENOUGH for mean in found):
            return None
        low, deep, full = (mean.value for mean in found if mean is not None)
        return depth * low + (whole - depth) * deep - whole * full

    def shortest(self, start: int, stop: int) -> tuple[int, float]:
        """Return (tokens, seconds per block) of the shortest call known of these blocks."""
        known = [k for k, mean in self.windows.items() if k[:2] == (start, stop) and mean.count >= FEW]
        least = min(known, key=lambda k: k[2])
        return least[2], self.windows[least].value

    def one(self, start: int, stop: int) -> float | None:
        """Return the seconds per block of one token in this window, or in the longest one known."""
        known = [k for k, mean in self.windows.items() if k[2] == 1 and mean.count >= ENOUGH]
        if (start, stop, 1) in known:
            return self.windows[start, stop, 1].value
        return self.windows[max(known, key=lambda k: k[1] - k[0])].value if known else None


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
