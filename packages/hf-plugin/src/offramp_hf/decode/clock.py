"""What looks, low windows and wider calls really cost on this machine; measured while decoding."""

from __future__ import annotations

import math
from collections.abc import Sequence

from offramp.draft import Look, Setup

#: weight of a new measurement in the running means, and in that of the machine's speed
NEW, QUICK = 0.05, 0.2
#: measurements before the running means are believed; of calls of many tokens, which come in many sizes, fewer do
ENOUGH, FEW = 8, 2
#: rounds after which prices are worked out from the means only every so many rounds: they move by a twentieth at most,
#: and that takes 10 us of a round of 1.5 ms
SETTLED, PAUSE = 64, 8
#: what one more token of a row adds to a call, as a share of it, before it is measured: 1, 4, 17, 22 % for 2, 3, 4, 6
#: tokens of one row on a CPU, 33 % per token of eight rows
WIDER = 0.04
#: measurements that this guess counts for
PRIOR = 8
#: seconds that a block is taken to take longer once rows have different lengths, for masks, positions by row and
#: recordings of their own, until it is measured: 8 rows of a 5 M-parameter model 0.32 to 0.5 ms instead of 0.28
RAGGED = 1.4e-4
#: and how many times as long, until blocks are measured
FRAYED = 1.5


class Clock:
    """What batches of each kind cost on this machine; it corrects a `Setup` in place, round by round.

    Only on devices that run at once, as CPUs do: elsewhere seconds say when work was handed over, not how long it took.
    What is measured counts once its round ends: rounds that recordings were made in are dropped, for one of them, 15 to
    60 ms long, would tell a rule for good that drafting does not pay. All is counted in calls of one block on one token
    at that moment: other programs slow a machine by a third for a second, and what is seldom measured would be compared
    with what often is at another speed.
    """

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        #: by (rows, whether they have different lengths by now)
        self.kinds: dict[tuple[int, bool], Costs] = {}
        #: seconds of this round, of windows (first block, last block, tokens) and of looks (None)
        self.pending: list[tuple[float, tuple[int, int, int] | None]] = []
        self.first = setup.head, tuple(setup.low)
        self.kind, self.frays = (0, False), False
        self.begin(1, False, False)

    def begin(self, rows: int, ragged: bool, frays: bool) -> None:
        """A round of `rows` rows begins. ragged: they have different lengths; frays: they can come to have."""
        self.drop()
        if ((rows, ragged), frays) == (self.kind, self.frays):
            return
        self.kind, self.frays = (rows, ragged), frays
        if self.kind not in self.kinds:
            self.kinds[self.kind] = Costs(rows, *self.first)
        self.costs = self.kinds[self.kind]
        self.tell()

    def tell(self) -> None:
        """Say in the setup what things cost in blocks."""
        setup, costs = self.setup, self.costs
        setup.head, setup.low[:], setup.wider, setup.cut = costs.head, costs.low, costs.wider, costs.cut
        setup.given = costs.given
        setup.ragged = self.penalty() if self.frays and not self.kind[1] else 1.0

    def penalty(self) -> float:
        """Return what calls cost once rows have different lengths, in calls as they are now."""
        even, odd = self.costs.seconds(self.setup.depth), self.kinds.get((self.kind[0], True))
        if even is None:
            return FRAYED
        known = odd.seconds(self.setup.depth) if odd is not None else None
        return max(1.0, (known or even + RAGGED) / even)

    def window(self, seconds: float, start: int, stop: int, tokens: int) -> None:
        """Take in the time of blocks start < i <= stop on `tokens` tokens."""
        self.pending.append((seconds, (start, stop, tokens)))

    def look(self, seconds: float) -> None:
        """Take in the time of a look."""
        self.pending.append((seconds, None))

    def drop(self) -> None:
        """Forget what this round took: something ran in it that will not run again."""
        self.pending = []

    def round(self, seconds: float, looks: Sequence[Look] | None) -> None:
        """Take in the time of a whole round. looks: at exits in this round; None: its drafts came from elsewhere."""
        costs, pending = self.costs, self.pending
        self.drop()
        unit = costs.now(pending)
        if unit is None:
            return
        for took, window in pending:
            if window is None:
                costs.looks.add(took / unit)
            else:
                costs.window(took / unit, *window)
        costs.rests.add(max(0.0, seconds - sum(took for took, _ in pending)) / unit)
        if looks is None:
            costs.check(self.setup.depth, seconds / unit, sum(window[2] for _, window in pending if window is not None))
        elif not looks:
            costs.plain.add(seconds / unit)
        if costs.rests.count <= SETTLED or costs.rests.count % PAUSE == 0:
            costs.price(self.setup)
        costs.learn(self.setup, seconds / unit, looks or ())
        self.tell()


class Costs:
    """Running means of what one kind of batch takes, in calls of one block on one token, and what follows from them in
    blocks.

    head, low, wider, cut, given: as in `Setup`; until they are measured, what is given, and a guess.
    """

    def __init__(self, rows: int, head: float, low: Sequence[float]) -> None:
        self.head, self.low = head, list(low)
        self.slope = self.wider = min(1.0, WIDER * rows)
        #: how often that was measured
        self.slopes = 0
        #: seconds of such a call
        self.unit = Mean(QUICK)
        #: what a block takes by first and last block and tokens
        self.windows: dict[tuple[int, int, int], Mean] = {}
        self.looks, self.rests, self.plain = Mean(), Mean(), Mean()
        self.cut = self.given = 0.0
        #: what a block takes, with its share of what a round takes outside; None until that is measured
        self.block: float | None = None

    def now(self, pending: Sequence[tuple[float, tuple[int, int, int] | None]]) -> float | None:
        """Return the seconds of a block on one token, as this round says; None while no round did."""
        for took, window in pending:
            if window is not None and window[2] == 1:
                self.unit.add(took / (window[1] - window[0]))
        return self.unit.value if self.unit.count else None

    def window(self, took: float, start: int, stop: int, tokens: int) -> None:
        """Learn what these blocks, and one more token in them, take."""
        mean = self.windows.setdefault((start, stop, tokens), Mean())
        mean.add(took / (stop - start))
        if mean.count < FEW:
            return
        known = [n for (a, b, n), m in self.windows.items() if (a, b) == (start, stop) and m.count >= FEW]
        fewer = min(known)
        short = self.windows[start, stop, fewer].value
        # seconds = one * (1 + wider * (tokens - 1)) of both calls
        rest = short * (tokens - 1) - mean.value * (fewer - 1)
        if tokens > fewer and rest > 0:
            self.slopes += 1
            # a token costs no more beside another than alone; a larger figure is another program's doing, and a rule
            # that believed it would not draft again, nor see that it was wrong. As far below, or that would not cancel
            slope = min(1.0, max(-1.0, (mean.value - short) / rest))
            self.slope += max(NEW, 1 / (PRIOR + self.slopes)) * (slope - self.slope)
            self.wider = max(0.0, self.slope)

    def price(self, setup: Setup) -> None:
        """Work out what a block, looks and low windows take."""
        one = self.one(setup.depth)
        if one is None or self.rests.count < ENOUGH:
            return
        block = self.plain.value if self.plain.count >= ENOUGH else one * setup.depth + self.rests.value
        self.block = block / setup.depth
        self.low = [self.way(depth, self.block) for depth in setup.depths]
        if self.looks.count >= ENOUGH:
            self.head = self.looks.value / self.block

    def learn(self, setup: Setup, took: float, looks: Sequence[Look]) -> None:
        """Learn from a round that took so long what its parts do not explain."""
        if looks and self.block is not None and self.looks.count >= ENOUGH:
            deep = [self.wider * (setup.depth - depth) for depth in setup.depths]
            costs = sum(self.head + (self.low[k.level] + deep[k.level] if k.drafted else 0.0) for k in looks)
            # calls cut in two, code and weights that the processor forgot; the last token always stops at one exit
            cuts = max(1, sum(not k.drafted for k in looks))
            cut = min(took / self.block - setup.depth - costs, setup.depth) / cuts
            self.cut = max(0.0, self.cut + NEW * (cut - self.cut))

    def check(self, depth: int, took: float, tokens: int) -> None:
        """Learn what checking drafts from elsewhere takes, `tokens` of them and the newest in one call of all blocks,
        beside what wider blocks explain."""
        if self.block is not None:
            more = took / self.block - depth * (1 + self.wider * (tokens - 1))
            self.given = max(0.0, self.given + NEW * (min(more, depth) - self.given))

    def way(self, depth: int, block: float) -> float:
        """Return what one token's way to an exit takes, in blocks."""
        mean = self.windows.get((0, depth, 1))
        return depth * mean.value / block if mean is not None and mean.count >= ENOUGH else float(depth)

    def seconds(self, depth: int) -> float | None:
        """Return the seconds per block of one token; depth: of the model."""
        one = self.one(depth)
        return None if one is None else one * self.unit.value

    def one(self, depth: int) -> float | None:
        """Return what a block takes for one token in all blocks, or in the longest window known."""
        known = [k for k, mean in self.windows.items() if k[2] == 1 and mean.count >= ENOUGH]
        if (0, depth, 1) in known:
            return self.windows[0, depth, 1].value
        return self.windows[max(known, key=lambda k: k[1] - k[0])].value if known else None


class Mean:
    """The least of the first measurements, which are slow for other reasons, then a running mean in which a moment
    when the machine did something else counts at most twice the mean."""

    def __init__(self, new: float = NEW) -> None:
        self.value, self.count, self.new = math.inf, 0, new

    def add(self, took: float) -> None:
        """Take in one measurement."""
        self.count += 1
        if self.count <= ENOUGH:
            self.value = min(self.value, took)
        else:
            self.value += self.new * (min(took, 2 * self.value) - self.value)
