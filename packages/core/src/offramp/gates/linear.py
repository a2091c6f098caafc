"""A gate that says from the state whether the exit will agree with the full model."""

from __future__ import annotations

from typing import ClassVar

from offramp._registry import register
from offramp.gates._direction import Direction


@register("linear")
class Linear(Direction):
    """One direction and one bias for all exits: width + 1 numbers; its probability is the statistic "agrees".

    Trained by `fit(loss="gate")`, read by the policy "gate". Paper: the classifier of CALM (arXiv 2207.07061).
    """

    statistic: ClassVar[str] = "agrees"
    loss: ClassVar[str] = "gate"

    @classmethod
    def build(cls, width: int, exits: int) -> Linear:
        """Start at 0.5 for every state."""
        return cls(width)
