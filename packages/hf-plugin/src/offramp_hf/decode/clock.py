"""What looks, low windows and wider calls really cost on this machine; measured while decoding."""

from __future__ import annotations

import math
from collections.abc import Sequence

from offramp.draft import Look, Setup

#: weight of a new measurement in the running means
NEW = 0.05
#: measurements before the running means are believed; of calls of many tokens, which come in many sizes, fewer do
ENOUGH, FEW = 8, 2
#: measurements that the first guess of what one more token adds counts for
PRIOR = 8
#: most that drafting is taken to cost, in sums of its parts
MOST = 3.0
#: what calls are taken to cost once rows have different lengths, until it is measured: 1.3 to 1.8 times as much with 8
#: rows, for masks, positions by row and recordings of their own
RAGGED = 1.5


class Clock:
    """Running means of seconds: per window and token count, per look, and of the rest of a round; they correct a
    `Setup` in place, round by round.

    Only on devices that run at once, as CPUs do: elsewhere seconds say when work was handed over, not how long it took.
    A moment in which the machine did something else counts at most twice the mean.
    """

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        #: rows of the batch; whether they have different lengths by now, and whether they can come to have
        self.rows, self.ragged, self.frays = 1, False, False
        #: seconds per block by (rows, ragged), first and last block, tokens
        self.windows: dict[tuple[tuple[int, bool], int, int, int], Mean] = {}
        self.looks, self.rests, self.plain = Mean(), Mean(), Mean()
        #: running means of what the looks of a round cost in blocks: by their parts, and by the clock
        self.told = self.found = 0.0
        #: how often the cost of one more token was measured
        self.slopes = 0
        #: seconds of this round that are accounted for
        self.spent = 0.0

    def begin(self, rows: int, ragged: bool, frays: bool) -> None:
        """A round begins; see the attributes."""
        if (rows, ragged, frays) != (self.rows, self.ragged, self.frays):
            self.rows, self.ragged, self.frays = rows, ragged, frays
            self.setup.ragged = self.penalty()

    def window(self, seconds: float, start: int, stop: int, tokens: int) -> None:
        """Take in the time of blocks start < i <= stop on `tokens` tokens."""
        self.spent += seconds
        mean = self.windows.setdefault(((self.rows, self.ragged), start, stop, tokens), Mean())
        mean.add(seconds / (stop - start))
        if mean.count >= FEW:
            fewer, short = self.shortest(start, stop)
            # seconds = one * (1 + wider * (tokens - 1)) of both calls
            rest = short * (tokens - 1) - mean.value * (fewer - 1)
            if tokens > fewer and rest > 0:
                self.slopes += 1
                # a token costs no more beside another than alone; a larger figure is another program's doing, and a
                # rule that believed it would not draft again, nor see that it was wrong
                slope = min(1.0, max(0.0, (mean.value - short) / rest))
                self.setup.wider += max(NEW, 1 / (PRIOR + self.slopes)) * (slope - self.setup.wider)

    def look(self, seconds: float) -> None:
        """Take in the time of a look."""
        self.spent += seconds
        self.looks.add(seconds)

    def round(self, seconds: float, looks: Sequence[Look] | None) -> None:
        """Take in the time of a whole round, and say in the setup what things cost in blocks.

        looks: at exits in this round; None: its drafts came from elsewhere.
        """
        self.rests.add(max(0.0, seconds - self.spent))
        self.spent = 0.0
        if looks is not None and not looks:
            self.plain.add(seconds)
        one, setup = self.one(0, self.setup.depth), self.setup
        if one is None or self.rests.count < ENOUGH:
            return
        block = one + self.rests.value / setup.depth
        if self.plain.count >= ENOUGH:
            block = self.plain.value / setup.depth
        if looks and self.looks.count >= ENOUGH:
            costs = sum(self.draft(look.level, block) if look.drafted else self.looks.value / block for look in looks)
            self.told += NEW * (costs - self.told)
            self.found += NEW * (min(seconds / block, 2 * (setup.depth + costs)) - setup.depth - self.found)
        # drafting costs more than its parts: a call cut in two, code and weights that the processor forgot
        more = min(max(self.found / self.told, 1.0), MOST) if self.told > 0 else 1.0
        if self.looks.count >= ENOUGH:
            setup.head = more * self.looks.value / block
        for level, depth in enumerate(setup.depths):
            setup.low[level] = more * self.low(depth, block)

    def low(self, depth: int, block: float) -> float:
        """Return what one token's way to an exit takes, in blocks."""
        mean = self.windows.get(((self.rows, self.ragged), 0, depth, 1))
        return depth * mean.value / block if mean is not None and mean.count >= ENOUGH else float(depth)

    def draft(self, level: int, block: float) -> float:
        """Return the sum of the parts of a draft, in blocks."""
        depth = self.setup.depths[level]
        return self.low(depth, block) + self.looks.value / block + self.setup.wider * (self.setup.depth - depth)

    def penalty(self) -> float:
        """Return what calls cost once rows have different lengths, in calls as they are now."""
        if self.ragged or not self.frays:
            return 1.0
        even, odd = (self.one(0, self.setup.depth, ragged) for ragged in (False, True))
        return max(1.0, odd / even) if even and odd else RAGGED

    def shortest(self, start: int, stop: int) -> tuple[int, float]:
        """Return (tokens, seconds per block) of the shortest call known of these blocks."""
        kind = (self.rows, self.ragged), start, stop
        known = [k for k, mean in self.windows.items() if k[:3] == kind and mean.count >= FEW]
        least = min(known, key=lambda k: k[3])
        return least[3], self.windows[least].value

    def one(self, start: int, stop: int, ragged: bool | None = None) -> float | None:
        """Return the seconds per block of one token in this window, or in the longest one known.

        ragged: of rows of different length; None: as they are.
        """
        kind = self.rows, self.ragged if ragged is None else ragged
        known = [k for k, mean in self.windows.items() if k[0] == kind and k[3] == 1 and mean.count >= ENOUGH]
        if (kind, start, stop, 1) in known:
            return self.windows[kind, start, stop, 1].value
        return self.windows[max(known, key=lambda k: k[2] - k[1])].value if known else None


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
