"""Spend fewer blocks where the image is still noise, by the noise level alone."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from offramp._registry import register
from offramp.errors import BadArgument
from offramp.policy import FULL, Evidence, ExitPolicy, SchedulePolicy, State

#: blocks in the ten bins of the only schedule in ASE's released code, `demo`, of the 28 of DiT-XL/2: 28.6 % fewer
DEMO = tuple(round(blocks / 28, 4) for blocks in (28, 28, 24, 24, 20, 20, 16, 16, 12, 12))


@register("time_schedule")
@dataclass(frozen=True)
class TimeSchedule(SchedulePolicy):
    """Run depths[i] blocks where the noise level lies in bin i, from clean (0) to noise (1000).

    depths: one per bin, whole numbers of blocks, or fractions of the model's depth up to 1.0 that are rounded; the
    default is the published table of ASE, which wants a model tuned for it. edges: where bins meet, rising, one fewer
    than depths; None for bins of equal width. monotone=True refuses a table that is deeper for more noise. Lower depths
    are faster. Raises `BadArgument`. Papers: ASE (Moon et al., arXiv 2408.05927); with two bins DuoDiff
    (arXiv 2410.09633), see `two_stage`.
    """

    timed: ClassVar[bool] = True
    depths: tuple[float, ...] = DEMO
    edges: tuple[float, ...] | None = None
    monotone: bool = False

    def __post_init__(self) -> None:
        given = self.depths
        if not isinstance(given, (tuple, list)) or not given:
            raise BadArgument(f"time_schedule: depths must be a list, one per bin of noise levels, not {given!r}")
        for depth in given:
            if not _is_depth(depth):
                raise BadArgument(
                    f"time_schedule: depth {depth!r} is neither a whole number of blocks from 1 on nor a fraction of "
                    f"the depth above 0 and up to 1.0"
                )
        object.__setattr__(self, "depths", tuple(given))
        if self.edges is not None:
            object.__setattr__(self, "edges", self._checked(self.edges))
        if self.monotone and len({type(d) for d in given}) > 1:
            raise BadArgument("time_schedule: monotone compares depths; give blocks only, or fractions only")
        if self.monotone and any(a < b for a, b in zip(given[:-1], given[1:], strict=True)):
            raise BadArgument(
                f"time_schedule: depths {list(given)} grow with the noise; leave monotone out, or turn the list round: "
                f"bin 0 is the clean end"
            )

    def _checked(self, edges: Any) -> tuple[float, ...]:
        """Return the edges as a tuple; raises unless they cut 0 to 1000 into as many bins as there are depths."""
        if not isinstance(edges, (tuple, list)) or len(edges) != len(self.depths) - 1:
            raise BadArgument(
                f"time_schedule: {len(self.depths)} depths need {len(self.depths) - 1} edges between their bins, not "
                f"{edges!r}; the ends 0 and {FULL:g} are not written"
            )
        cuts = (0.0, *edges, FULL)
        if any(isinstance(e, bool) or not isinstance(e, (int, float)) for e in edges) or any(
            not a < b for a, b in zip(cuts[:-1], cuts[1:], strict=True)
        ):
            raise BadArgument(
                f"time_schedule: edges {list(edges)} do not cut the noise levels 0 to {FULL:g} into bins; give rising "
                f"numbers between them"
            )
        return tuple(float(e) for e in edges)

    @property
    def cuts(self) -> tuple[float, ...]:
        """The inner edges of the bins."""
        if self.edges is not None:
            return self.edges
        return tuple(FULL * i / len(self.depths) for i in range(1, len(self.depths)))

    def depth_at(self, level: float, depth: int) -> int:
        """Return how many of `depth` blocks run at a noise level; raises `BadArgument` where the model is too shallow.
        """
        return blocks(self.depths[bisect.bisect_right(self.cuts, level)], depth)

    def windows(self, position: float, depth: int) -> tuple[tuple[int, int], ...]:
        """Return the one window of blocks that run at noise level `position`."""
        for given in self.depths:
            blocks(given, depth)  # all of them: a bin that no step visits yet must not fail in the middle of a run
        return ((0, self.depth_at(position, depth)),)

    def step(self, state: State, seen: Evidence) -> tuple[Tensor, State]:
        """Stop the rows whose bin asks for no more blocks than have run; the table must be in blocks for that."""
        if seen.position is None:
            raise BadArgument("time_schedule needs the noise level of every row, and this call has none")
        if any(isinstance(d, float) for d in self.depths):
            raise BadArgument("time_schedule: fractions of an unknown depth; write the table in blocks: depths=[8, 4]")
        cuts = torch.tensor(self.cuts, device=seen.position.device)
        table = torch.tensor(self.depths, device=seen.position.device)
        return table[torch.bucketize(seen.position.float(), cuts, right=True)] <= seen.depth, state

    @classmethod
    def example(cls, depths: Sequence[int], classes: int, **options: Any) -> ExitPolicy:
        """Return the schedule that goes to the deepest exit for clean images and to the shallowest for noise."""
        return cls(**{"depths": tuple(sorted(depths, reverse=True)), **options})


def two_stage(shallow: float, deep: float = 1.0, switch: float = 300.0) -> TimeSchedule:
    """Return the schedule of DuoDiff: `shallow` above noise level `switch`, `deep` below it (arXiv 2410.09633)."""
    return TimeSchedule((deep, shallow), (switch,))


def blocks(given: float, depth: int) -> int:
    """Return a depth in blocks; raises `BadArgument` outside 1 to `depth`."""
    found = max(1, round(given * depth)) if isinstance(given, float) else given
    if not 1 <= found <= depth:
        raise BadArgument(
            f"time_schedule: {given} blocks are more than the {depth} of this model; give 1 to {depth}, or fractions"
        )
    return found


def _is_depth(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return value >= 1 if isinstance(value, int) else 0 < value <= 1
