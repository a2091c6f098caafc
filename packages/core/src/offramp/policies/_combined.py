"""What `all_of` and `any_of` share: several policies that each see everything, and one mask out of theirs."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from offramp._registry import create
from offramp.errors import BadArgument
from offramp.policies._wrapping import join, part, wrapped_list
from offramp.policy import Evidence, ExitPolicy, Feedback, State


class Combined(ExitPolicy):
    """Several policies stepped side by side, each with a state of its own; subclasses say how masks combine."""

    policies: tuple[ExitPolicy, ...]

    def __post_init__(self) -> None:
        """Accept policies or their configs."""
        name = getattr(type(self), "name", type(self).__name__)
        object.__setattr__(self, "policies", wrapped_list(self.policies, name))

    @abstractmethod
    def combine(self, one: Tensor, other: Tensor) -> Tensor:
        """Return one mask [rows] out of two."""

    def statistics(self) -> frozenset[str]:
        """Return everything that any of the policies needs."""
        return frozenset().union(*(p.statistics() for p in self.policies))

    def start(self, batch: int, device: torch.device | str) -> State:
        """Return the states of all policies, side by side."""
        return join([p.start(batch, device) for p in self.policies])

    def step(self, state: State, seen: Evidence) -> tuple[Tensor, State]:
        """Step every policy, also those whose answer no longer matters: their counters must go on."""
        steps = [p.step(part(state, i), seen) for i, p in enumerate(self.policies)]
        stop = steps[0][0]
        for mask, _ in steps[1:]:
            stop = self.combine(stop, mask)
        return stop, join([new for _, new in steps])

    def learns(self) -> bool:
        """Whether any of the policies does."""
        return any(p.learns() for p in self.policies)

    def learn(self, state: State, feedback: Feedback) -> State:
        """Let every policy learn."""
        return join([p.learn(part(state, i), feedback) for i, p in enumerate(self.policies)])

    def check(self, depths: Sequence[int]) -> None:
        """Check every policy."""
        for p in self.policies:
            p.check(depths)

    def ladder(self, depths: Sequence[int], classes: int) -> list[ExitPolicy]:
        """Refuse: several thresholds have no one order from safest to boldest."""
        raise BadArgument(
            f"{getattr(type(self), 'name', type(self).__name__)} holds {len(self.policies)} policies, whose thresholds "
            f"have no single order from safe to bold; calibrate one of them by itself"
        )

    @classmethod
    def example(cls, depths: Sequence[int], classes: int, **options: Any) -> ExitPolicy:
        """Return confidence 0.5 and, where exits allow it, patience 1, unless policies are given."""
        second = create(ExitPolicy, "patience", patience=1) if len(depths) > 1 else create(ExitPolicy, "never")
        return cls(**{"policies": [create(ExitPolicy, "confidence", threshold=0.5), second], **options})
