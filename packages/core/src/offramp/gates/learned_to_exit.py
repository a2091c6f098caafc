"""A gate that says from the state how certain the exit's answer is to be right."""

from __future__ import annotations

from typing import ClassVar

from offramp._registry import register
from offramp.errors import BadArgument
from offramp.gates._direction import Direction


@register("learned_to_exit")
class LearnedToExit(Direction):
    """One direction and one bias, shared by all exits unless `per_exit`; says how certain it is that the exit is right.

    Trained by `fit(loss="learned_to_exit")`, for classes and for numbers; read by the policy of the same name. Raises
    `BadArgument`. Paper: BERxiT (Xin et al., EACL 2021), whose module says the opposite, how likely the exit is wrong.
    """

    statistic: ClassVar[str] = "learned_to_exit"
    loss: ClassVar[str] = "learned_to_exit"

    @classmethod
    def build(cls, width: int, exits: int, per_exit: bool = False) -> LearnedToExit:
        """Start at 0.5 for every state."""
        if not isinstance(per_exit, bool):
            raise BadArgument(f"gate 'learned_to_exit': per_exit must be True or False, not {per_exit!r}")
        return cls(width, exits if per_exit else 1)
