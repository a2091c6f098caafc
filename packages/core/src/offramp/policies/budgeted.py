"""What a budget solver found: a policy with one threshold per exit, some exits closed, and a depth nobody passes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from offramp._registry import create, register
from offramp.errors import BadArgument
from offramp.policies._wrapping import Wrapping, forgetful, wrapped
from offramp.policy import Evidence, ExitPolicy, State


@register("budgeted")
@dataclass(frozen=True)
class Budgeted(Wrapping):
    """Stop as `inner` does, but at no exit of `closed`; at `last` every row stops.

    inner: a policy or its config; closed: depths in blocks of exits whose share of the budget is nothing; last: depth
    of the exit at which all rows leave, which bounds the largest cost and lets the model be cut there, or None. Rows
    that are not finite run on even at `last`. Raises `BadArgument`. Papers: MSDNet (arXiv 1703.09844), whose solver
    closes exits; DeeR-VLA (arXiv 2411.02359), which bounds the depth.
    """

    closed: tuple[int, ...] = ()
    last: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "inner", wrapped(self.inner, "budgeted"))
        object.__setattr__(self, "closed", tuple(self.closed))
        for depth in (*self.closed, *(() if self.last is None else (self.last,))):
            if isinstance(depth, bool) or not isinstance(depth, int) or depth < 1:
                raise BadArgument(f"budgeted: {depth!r} is no depth of an exit, which is a whole number from 1 on")
        if self.last in self.closed:
            raise BadArgument(f"budgeted: all rows are to leave at depth {self.last}, and that exit is closed")

    def step(self, state: State, seen: Evidence) -> tuple[Tensor, State]:
        """Step the wrapped policy; at a closed exit no row stops, at `last` all do."""
        stop, state = self.inner.step(state, seen)
        if seen.depth == self.last:
            return torch.ones_like(stop), state
        return (torch.zeros_like(stop) if seen.depth in self.closed else stop), state

    def opens(self, depth: int) -> bool:
        """Whether a row could stop there; a policy with a memory has to look at closed exits too."""
        shut = depth in self.closed and forgetful(self.inner)
        return depth == self.last or (self.inner.opens(depth) and not shut)

    def inside(self) -> ExitPolicy:
        """Return the wrapped policy, where it is only kept from stopping and never made to."""
        return self.inner if self.last is None else self

    def check(self, depths: Sequence[int]) -> None:
        """Check the wrapped policy, that the depths are those of exits, and that one of them is open."""
        super().check(depths)
        for depth in (*self.closed, *(() if self.last is None else (self.last,))):
            if depth not in depths:
                raise BadArgument(f"budgeted: there is no exit at depth {depth}; there are exits at {list(depths)}")
        if set(depths) <= set(self.closed):
            raise BadArgument(
                f"budgeted: every exit (at {list(depths)}) is closed, so no row could leave; to never exit, write "
                f'offramp.enable(model, "never")'
            )

    def ladder(self, depths: Sequence[int], classes: int) -> list[ExitPolicy]:
        """Return the wrapped policy's ladder with the same exits closed; refuses where all rows leave at `last`."""
        if self.last is not None:
            raise BadArgument(
                f"budgeted: at depth {self.last} every row leaves, whatever the threshold, so no rung is safe; leave "
                f"last out to calibrate"
            )
        return super().ladder(depths, classes)

    @classmethod
    def example(cls, depths: Sequence[int], classes: int, **options: Any) -> ExitPolicy:
        """Return confidence 0.5 with the first of several exits closed unless told otherwise."""
        closed = tuple(depths[:1]) if len(depths) > 1 else ()
        return cls(**{"inner": create(ExitPolicy, "confidence", threshold=0.5), "closed": closed, **options})
