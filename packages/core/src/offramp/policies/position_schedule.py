"""Spend fewer blocks on later tokens, by their position alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from offramp._registry import register
from offramp.errors import BadArgument
from offramp.policy import Evidence, ExitPolicy, SchedulePolicy, State


@register("position_schedule")
@dataclass(frozen=True)
class PositionSchedule(SchedulePolicy):
    """Give generated token t a budget of round(max_depth - (max_depth - min_depth) t / (length - 1)) blocks.

    max_depth, min_depth: in blocks, min_depth <= max_depth; length: tokens, at least 2, over which the budget falls,
    usually the median length of an answer; from there on it is min_depth; warmup: blocks at the bottom that always run,
    the rest of the budget is the top of the model. Token 0 comes out of the prompt's own pass through the full model.
    Lower budgets are faster. Raises `BadArgument`, also for a budget that grows: keys and values of the blocks that
    come back would be missing. Paper: SkipDecode (Del Corro et al., arXiv 2307.02628).
    """

    max_depth: int
    min_depth: int
    length: int
    warmup: int = 1

    def __post_init__(self) -> None:
        for name, least in (("max_depth", 1), ("min_depth", 1), ("length", 2), ("warmup", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise BadArgument(f"position_schedule: {name} must be a whole number, at least {least}, not {value!r}")
        if self.min_depth > self.max_depth:
            raise BadArgument(
                f"position_schedule: the budget would grow from {self.max_depth} to {self.min_depth} blocks, and "
                f"blocks that come back would lack keys and values of the tokens between; give max_depth >= min_depth"
            )
        if self.warmup > self.min_depth:
            raise BadArgument(
                f"position_schedule: {self.warmup} warm-up blocks are more than the smallest budget of "
                f"{self.min_depth}; give warmup <= min_depth"
            )

    def budget(self, position: int) -> int:
        """Return how many blocks generated token `position` (from 0) runs."""
        drop = (self.max_depth - self.min_depth) * min(position, self.length - 1) / (self.length - 1)
        return round(self.max_depth - drop)

    def windows(self, position: int, depth: int) -> tuple[tuple[int, int], ...]:
        """Return the warm-up blocks at the bottom and the rest of the budget at the top; one window when they meet."""
        if self.max_depth > depth:
            raise BadArgument(
                f"position_schedule: max_depth={self.max_depth} is more than the {depth} blocks of this model; "
                f"give max_depth={depth} or less"
            )
        blocks = self.budget(position)
        if blocks == depth:
            return ((0, depth),)
        found = ((0, self.warmup), (depth - blocks + self.warmup, depth))
        return tuple((start, stop) for start, stop in found if start < stop)

    def step(self, state: State, seen: Evidence) -> tuple[Tensor, State]:
        """Stop the rows at the first exit with at least their budget of blocks, all from the bottom: the nearest that
        a trace, or a policy that wraps this one, has."""
        if seen.position is None:
            raise BadArgument(
                "position_schedule needs the position of every row (tokens already generated), and this call has none; "
                'use a policy that looks at the answer: "confidence"'
            )
        table = torch.tensor([self.budget(t) for t in range(self.length)], device=seen.position.device)
        return table[seen.position.clamp(max=self.length - 1)] <= seen.depth, state

    @classmethod
    def example(cls, depths: Sequence[int], classes: int, **options: Any) -> ExitPolicy:
        """Return the budget that falls from the deepest exit to the shallowest within 8 tokens, unless told otherwise.
        """
        return cls(**{"max_depth": max(depths), "min_depth": min(depths), "length": 8, **options})
