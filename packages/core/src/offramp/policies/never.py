"""Never exit: the full model, under a name of its own."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from offramp._registry import register
from offramp.policy import Evidence, ExitPolicy, State


@register("never")
@dataclass(frozen=True)
class Never(ExitPolicy):
    """Let every row run the full model; the safe answer when nothing could be certified."""

    def step(self, state: State, seen: Evidence) -> tuple[Tensor, State]:
        """Stop no row."""
        return seen.every(False), state
