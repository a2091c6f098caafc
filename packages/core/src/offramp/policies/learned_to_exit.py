"""Exit when a trained gate is certain enough that the exit is right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from offramp._registry import register
from offramp.policy import UNIT_GRID, Evidence, ExitPolicy, ThresholdPolicy, thresholds


@register("learned_to_exit")
@dataclass(frozen=True)
class LearnedToExit(ThresholdPolicy):
    """Stop a row when the gate's certainty that the exit is right is at least `threshold`; works for numbers too.

    threshold: above 0 and up to 1, one number or one per exit; higher is safer. Needs exits with
    `gate="learned_to_exit"`, trained by `offramp.fit(model, data, loss="learned_to_exit")`. Raises `BadArgument`.
    Paper: BERxiT (Xin et al., EACL 2021), whose default of 0.005 for being wrong is 0.995 here.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"learned_to_exit"})
    safer: ClassVar[str] = "up"
    threshold: float | tuple[float, ...] = 0.995

    def __post_init__(self) -> None:
        object.__setattr__(self, "threshold", thresholds(self.threshold, 0.0, 1.0, "learned_to_exit", open_low=True))

    def score(self, seen: Evidence) -> Tensor:
        """Return the certainty [rows]."""
        return seen["learned_to_exit"]

    def grid(self, classes: int) -> Sequence[float]:
        """Return thresholds from 1 down to 0.01."""
        return [t for t in UNIT_GRID if t > 0]

    @classmethod
    def example(cls, depths: Sequence[int], classes: int, **options: Any) -> ExitPolicy:
        """Return an instance at 0.5 unless another threshold is given: a gate trained by squared error is seldom sure.
        """
        return cls(**{"threshold": 0.5, **options})
