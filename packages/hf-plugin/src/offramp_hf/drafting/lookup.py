"""Draft what followed the same words earlier in the text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from offramp._registry import register
from offramp.draft import Drafter, DraftRule, Outcome, Plan, Setup, whole
from offramp.errors import BadArgument

#: weight of the prior of an order's acceptance rate, and how much each verification leaves of what was learned
PRIOR, KEPT = 2.0, 0.95
#: the prior of matches of n tokens is n / (n + DOUBT): sampled code gave 0.23, 0.38 and 0.67 for 1, 2 and 3
DOUBT = 3


@register("lookup")
@dataclass(frozen=True)
class Lookup(DraftRule):
    """Find the latest earlier place where the last `ngram` tokens (or fewer, down to `least`) stand, and draft on.

    length: most drafts; whether 1, 2, 4, ... or all of them are made follows from how often a match of this length was
    right: calls of few sizes are recorded sooner. A draft that reaches the end of the text goes on from its own
    beginning, as repeating text does. No exit is asked. Paper: prompt lookup (Saxena, 2023).
    """

    ngram: int = 3
    least: int = 1
    length: int = 12

    reads = True
    needs = frozenset()

    def __post_init__(self) -> None:
        for name in ("ngram", "least", "length"):
            whole(name, getattr(self, name), 1, "lookup")
        if self.least > self.ngram:
            raise BadArgument(f"lookup: least={self.least} is more than ngram={self.ngram}")

    def start(self, setup: Setup) -> Finder:
        """Return a drafter without a text."""
        return Finder(setup, self)


class Finder(Drafter):
    """Where each n-gram of each row stood last, and how often drafts after a match of n tokens were right."""

    def __init__(self, setup: Setup, rule: Lookup) -> None:
        self.rule, self.setup = rule, setup
        #: how many drafts can be made: 70 ms pass until a call of 5 M parameters is recorded, and 12 sizes took a tenth
        #: of 1,000 tokens
        self.lengths = {1 << n for n in range(rule.length.bit_length())} | {rule.length}
        self.prior = {n: PRIOR * n / (n + DOUBT) for n in range(rule.least, rule.ngram + 1)}
        self.hits, self.tries = dict(self.prior), dict.fromkeys(self.prior, PRIOR)
        self.begin(0)

    def begin(self, rows: int) -> None:
        """Forget the texts; what was learned about matches stays."""
        self.places: list[dict[tuple[int, ...], int]] = [{} for _ in range(rows)]
        self.read = [0] * rows
        #: length of each row's text when it was first seen
        self.first: dict[int, int] = {}
        #: order of the match behind the drafts of each row
        self.order: dict[int, int] = {}

    def plan(self, room: int) -> Plan:
        """Ask no exit."""
        return Plan((), 0)

    def propose(self, texts: Sequence[Sequence[int]], room: int) -> list[list[int]]:
        """Return the drafts of every row."""
        return self.offer(texts, room)[0]

    def offer(self, texts: Sequence[Sequence[int]], room: int) -> tuple[list[list[int]], float]:
        """Return (drafts of every row, expected tokens in the time of a call without drafts).

        All rows go through the same call, as wide as the longest draft makes it, so they are cut at one length; and
        they come back together, so what counts is the row that gains least of those that have the furthest to go.
        """
        self.order = {}
        found = [self.find(row, text, room) if text else ([], 0.0) for row, text in enumerate(texts)]
        made = {row: len(text) - self.first.setdefault(row, len(text)) for row, text in enumerate(texts) if text}
        least = min(made.values(), default=0)
        behind = [found[row] for row, count in made.items() if count == least]
        tokens, powers, best = [1.0] * len(behind), [1.0] * len(behind), (0, 1.0)
        fixed = 1 + self.setup.given / self.setup.depth
        for length in range(1, min((len(drafts) for drafts, _ in behind), default=0) + 1):
            for i, (_, rate) in enumerate(behind):
                powers[i] *= rate
                tokens[i] += powers[i]
            if length not in self.lengths:
                continue
            gain = min(tokens) / (fixed + self.wider * length) / self.setup.ragged
            if gain > best[1]:
                best = length, gain
        if not best[0]:  # on the way back to the prior, so that it is tried again some day
            for n in set(self.order.values()):
                self.count(n, 0, 0)
        return [drafts[: best[0]] for drafts, _ in found], best[1]

    @property
    def wider(self) -> float:
        """What one more token adds to a call, as a share of it."""
        return self.setup.wider

    def find(self, row: int, text: Sequence[int], room: int) -> tuple[list[int], float]:
        """Return (longest drafts, how often such a draft was right) of one row."""
        places, rule = self.places[row], self.rule
        for end in range(max(1, self.read[row]), len(text)):
            for n in self.hits:
                if n <= end:
                    places[tuple(text[end - n : end])] = end
        self.read[row] = len(text)
        for n in range(min(rule.ngram, len(text)), rule.least - 1, -1):
            start = places.get(tuple(text[len(text) - n :]))
            if start is None:
                continue
            self.order[row] = n
            drafts: list[int] = []
            for i in range(start, start + min(room, rule.length)):
                drafts.append(text[i] if i < len(text) else drafts[i - len(text)])
            return drafts, self.hits[n] / self.tries[n]
        return [], 0.0

    def learn(self, outcome: Outcome) -> None:
        """Count how many drafts after this kind of match were right."""
        n = self.order.get(outcome.row)
        if n is None or not outcome.given:
            return
        self.count(n, outcome.accepted, min(outcome.accepted + 1, outcome.drafted))

    def count(self, n: int, right: int, tried: int) -> None:
        """Add to the counts of matches of `n` tokens; what was before fades to the prior."""
        self.hits[n] = KEPT * self.hits[n] + (1 - KEPT) * self.prior[n] + right
        self.tries[n] = KEPT * self.tries[n] + (1 - KEPT) * PRIOR + tried
