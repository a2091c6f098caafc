"""Exit where gates that were trained together with the heads say so."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from offramp._registry import register
from offramp.errors import BadArgument
from offramp.kernels.halting import joint_step
from offramp.policy import UNIT_GRID, Evidence, ExitPolicy, State, at_exit, thresholds

RECURSIONS = ("sum", "single")


@register("jei")
@dataclass(frozen=True)
class Jei(ExitPolicy):
    """Stop a row at the first exit whose activation is at least `threshold`.

    With gates g, P_l = max(0, min(g_l, 1 - sum of the g before)) is the probability to leave at l, and the activation
    a_l = P_l / prod(1 - a before), cut to [0, 1], the one to leave after not having left; recursion="single" takes g_l
    instead of P_l there. threshold: above 0 and up to 1, one number or one per exit; higher is safer. Needs exits with
    `gate="jei"`, trained by `offramp.fit(model, data, loss="joint_exit")`. Raises `BadArgument`. Paper: JEI-DNN (ICLR
    2024), with 0.5.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"jei"})
    safer: ClassVar[str] = "up"
    threshold: float | tuple[float, ...] = 0.5
    recursion: str = "sum"

    def __post_init__(self) -> None:
        object.__setattr__(self, "threshold", thresholds(self.threshold, 0.0, 1.0, "jei", open_low=True))
        if self.recursion not in RECURSIONS:
            raise BadArgument(f"jei: recursion {self.recursion!r} is not one of {', '.join(RECURSIONS)}")

    def start(self, batch: int, device: torch.device | str) -> State:
        """Return the sum of the gates so far, 0, and the product of 1 - a, 1."""
        return {"total": torch.zeros(batch, device=device), "survival": torch.ones(batch, device=device)}

    def step(self, state: State, seen: Evidence) -> tuple[Tensor, State]:
        """Take in this exit's gate; the state of a row with NaN stays NaN, so it never stops."""
        gate = seen["jei"]
        _, active = joint_step(gate, state["total"], state["survival"], self.recursion == "single")
        stop = active >= at_exit(self.threshold, seen.index)
        return stop, {"total": state["total"] + gate, "survival": state["survival"] * (1 - active)}

    def ladder(self, depths: Sequence[int], classes: int) -> list[ExitPolicy]:
        """Return this policy at thresholds from 1 down to 0.01, the same for all exits."""
        return [dataclasses.replace(self, threshold=t) for t in UNIT_GRID if t > 0]

    @classmethod
    def example(cls, depths: Sequence[int], classes: int, **options: Any) -> ExitPolicy:
        """Return the paper's threshold unless another is given."""
        return cls(**options)
