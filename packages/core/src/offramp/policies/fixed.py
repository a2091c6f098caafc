"""Exit at a fixed depth, whatever the input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from offramp._registry import register
from offramp.errors import BadArgument
from offramp.policy import Evidence, ExitPolicy, State


@register("fixed")
@dataclass(frozen=True)
class Fixed(ExitPolicy):
    """Stop every row at the exit at `depth`, or at the first deeper one.

    depth: in blocks, at least 1; lower is faster, higher is safer. Raises `BadArgument` for a depth below every block
    or deeper than every exit.
    """

    depth: int

    def __post_init__(self) -> None:
        if isinstance(self.depth, bool) or not isinstance(self.depth, int) or self.depth < 1:
            raise BadArgument(f"fixed: depth must be a whole number of blocks, at least 1, not {self.depth!r}")

    def step(self, state: State, seen: Evidence) -> tuple[Tensor, State]:
        """Stop all rows once `depth` blocks have run."""
        return seen.every(seen.depth >= self.depth), state

    def opens(self, depth: int) -> bool:
        """Only exits from `depth` on."""
        return depth >= self.depth

    def check(self, depths: Sequence[int]) -> None:
        """Refuse a depth that no exit reaches: it would silently run the full model."""
        if depths and self.depth > max(depths):
            raise BadArgument(
                f"fixed: depth {self.depth} is deeper than every exit (exits at {list(depths)}), so it could "
                f'never fire; choose at most {max(depths)}, or write "never" for the full model'
            )

    def ladder(self, depths: Sequence[int], classes: int) -> list[ExitPolicy]:
        """Return one policy per exit, deepest first."""
        return [Fixed(d) for d in sorted(depths, reverse=True)]

    @classmethod
    def example(cls, depths: Sequence[int], classes: int, **options: Any) -> ExitPolicy:
        """Return the policy of the deepest exit unless a depth is given."""
        return cls(**{"depth": max(depths), **options})
