"""Hold another policy back until enough blocks have run."""

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


@register("at_least")
@dataclass(frozen=True)
class AtLeast(Wrapping):
    """Do what `inner` says, but never before `depth` blocks have run.

    inner: a policy or its config; depth: in blocks, at least 1; higher is safer, lower is faster. `inner` sees the
    shallower exits too, so a counter in it goes on. Raises `BadArgument`, also when no exit is that deep.
    """

    depth: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "inner", wrapped(self.inner, "at_least"))
        if isinstance(self.depth, bool) or not isinstance(self.depth, int) or self.depth < 1:
            raise BadArgument(f"at_least: depth must be a whole number of blocks, at least 1, not {self.depth!r}")

    def step(self, state: State, seen: Evidence) -> tuple[Tensor, State]:
        """Step the wrapped policy and ignore its mask at shallower exits."""
        stop, state = self.inner.step(state, seen)
        return (stop if seen.depth >= self.depth else torch.zeros_like(stop)), state

    def opens(self, depth: int) -> bool:
        """Whether a row could stop there; a policy with a memory has to look at shallower exits too."""
        return self.inner.opens(depth) and not (depth < self.depth and forgetful(self.inner))

    def inside(self) -> ExitPolicy:
        """Return the wrapped policy."""
        return self.inner

    def check(self, depths: Sequence[int]) -> None:
        """Check the wrapped policy, and that an exit is deep enough."""
        super().check(depths)
        if depths and self.depth > max(depths):
            raise BadArgument(
                f"at_least: depth {self.depth} is deeper than every exit (exits at {list(depths)}), so it could never "
                f'fire; choose at most {max(depths)}, or write "never" for the full model'
            )

    @classmethod
    def example(cls, depths: Sequence[int], classes: int, **options: Any) -> ExitPolicy:
        """Return confidence 0.5 from the deepest exit on unless told otherwise."""
        return cls(**{"inner": create(ExitPolicy, "confidence", threshold=0.5), "depth": max(depths), **options})
