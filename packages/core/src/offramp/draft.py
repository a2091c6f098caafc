"""The contract of a draft rule: which exit drafts, how many tokens, and when drafting stops before verification."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from offramp.errors import BadArgument


@dataclass
class Setup:
    """What a drafter works with, and what a round costs in blocks (a block: that share of a round without drafts).

    depths: of the exits; depth: of the model; levels: indices of the exits that the policy could ever accept; head: one
    look at an exit; wider: what one more token adds to a call of blocks, as a share of the call; low: one token's way
    to each exit; cut: what stopping the newest token at an exit without a draft adds to the look; given: what checking
    drafts of `propose` adds to a round beside wider blocks; ragged: what all calls cost, in calls as they are, once
    rows have kept different numbers of drafts. The decoder measures these as it goes where it can.
    """

    depths: tuple[int, ...]
    depth: int
    levels: tuple[int, ...]
    head: float = 0.0
    wider: float = 0.0
    low: list[float] = field(default_factory=list)
    cut: float = 0.0
    given: float = 0.0
    ragged: float = 1.0

    def __post_init__(self) -> None:
        self.low = self.low or [float(depth) for depth in self.depths]

    def draft(self, level: int) -> float:
        """Return the cost of one draft from exit `level`: its low blocks, its look, and a wider deep call."""
        return self.low[level] + self.head + self.wider * (self.depth - self.depths[level])


@dataclass
class Look:
    """One look at an exit: which, at which place of the draft, and for every row of the batch how sure it was, which
    token it predicted and whether the policy accepts it. drafted: whether its tokens were drafted.
    """

    level: int
    place: int
    sure: list[float]
    tokens: list[int]
    accepted: list[bool]
    drafted: bool = False


@dataclass(frozen=True)
class Plan:
    """What a round may do. levels: exits asked in turn for every draft, none for no drafts; length: most drafts;
    shadow: whether verification shall say what every exit would have predicted; width: candidates per place, above 1
    for a tree of `length` levels.
    """

    levels: tuple[int, ...]
    length: int
    shadow: bool = False
    width: int = 1


@dataclass(frozen=True)
class Shadow:
    """What exit `level` would have said at the verified places of one row: tokens and how sure it was of each."""

    level: int
    tokens: list[int]
    sure: list[float]


@dataclass(frozen=True)
class Outcome:
    """What verification says about one row. tokens: the full model's choice at every known place, that is the accepted
    drafts and one more; drafted: how many drafts were checked; kept: how many of `tokens` were committed; given: the
    drafts came from `propose`.
    """

    row: int
    tokens: list[int]
    drafted: int
    kept: int
    looks: Sequence[Look] = ()
    shadows: Sequence[Shadow] = ()
    given: bool = False

    @property
    def accepted(self) -> int:
        """How many drafts were right."""
        return len(self.tokens) - 1


class Drafter(ABC):
    """A draft rule at work on one model: it remembers, as long as the policy is enabled, what was accepted."""

    #: indices of the exits that `plan` may ever name
    levels: tuple[int, ...] = ()

    def begin(self, rows: int) -> None:  # noqa: B027  (most rules have nothing to begin)
        """A generation of `rows` rows begins."""

    def propose(self, texts: Sequence[Sequence[int]], room: int) -> list[list[int]]:
        """Return up to `room` drafts per row that need no exit; texts: the tokens of each row so far (rows that have
        ended are empty). All empty: the exits draft.
        """
        return []

    @abstractmethod
    def plan(self, room: int) -> Plan:
        """Return what this round may do; room: most drafts that can still be used."""

    def wants(self, look: Look, rows: Sequence[int]) -> bool:
        """Whether this exit's tokens are drafted; else the next level of the plan is asked. rows: those still going."""
        return most(look.accepted, rows)

    def goes_on(self, look: Look, rows: Sequence[int]) -> bool:
        """Whether another token is drafted after one that was taken."""
        return True

    def deeper(self, best: Sequence[float], rows: Sequence[int]) -> bool:
        """Whether a tree gets another level; best: probability of the likeliest path of every row."""
        return True

    def learn(self, outcome: Outcome) -> None:  # noqa: B027  (some rules learn nothing)
        """Take in what verification said about one row."""


def most(flags: Sequence[bool], rows: Sequence[int]) -> bool:
    """Whether at least half of `rows` have their flag set."""
    return sum(flags[r] for r in rows) * 2 >= len(rows)


class DraftRule(ABC):
    """How tokens are drafted for verification; greedy output and the sampled distribution never depend on it.

    Subclass as a frozen dataclass in a file of the rule's own name and decorate with `@register("name")`.
    """

    #: statistics of the exit's prediction that the rule reads as `Look.sure`, beside what the policy needs
    needs: ClassVar[frozenset[str]] = frozenset({"top1"})
    #: fewest exits it can work with
    exits: ClassVar[int] = 1
    #: whether it asks what every exit would have said; heads that read earlier states cannot tell
    shadows: ClassVar[bool] = False
    #: whether `Drafter.propose` reads the text
    reads: ClassVar[bool] = False
    #: whether its drafts can be trees, which not every model can verify in one call
    branches: ClassVar[bool] = False

    @abstractmethod
    def start(self, setup: Setup) -> Drafter:
        """Return a drafter that has seen nothing."""

    def check(self, depths: Sequence[int], head: str, mixes: bool) -> None:
        """Raise `BadArgument` when the exits at `depths` with this head do not do; mixes: it reads earlier states."""
        name = getattr(type(self), "name", type(self).__name__)
        if self.shadows and mixes:
            raise BadArgument(
                f"draft rule {name!r} compares what all exits say, and heads {head!r} answer one text position after "
                f"the other; attach plain ones: offramp.attach(model, at={list(depths)}, head='translator')"
            )
        if len(depths) < self.exits:
            raise BadArgument(
                f"draft rule {name!r} chooses between exits and needs {self.exits} of them, the model has "
                f"{len(depths)} (at {list(depths)}); attach more: offramp.attach(model, at=[0.25, 0.5, 0.75])"
            )

    def config(self) -> dict[str, Any]:
        """Return the constructor's arguments as plain JSON values, with the registered name under "rule"."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}  # type: ignore[arg-type]
        plain = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
        return {"rule": getattr(type(self), "name", type(self).__name__), **plain}


def whole(name: str, value: Any, low: int, owner: str) -> None:
    """Raise `BadArgument` unless `value` is a whole number >= low."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise BadArgument(f"{owner}: {name}={value!r} must be a whole number >= {low}")


def share(name: str, value: Any, owner: str) -> None:
    """Raise `BadArgument` unless `value` is a number from 0 to 1."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise BadArgument(f"{owner}: {name}={value!r} must be a number from 0 to 1")
