"""Exit when the gate says that the exit will agree with the full model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from offramp._registry import register
from offramp.policy import UNIT_GRID, Evidence, ThresholdPolicy, thresholds


@register("gate")
@dataclass(frozen=True)
class Gate(ThresholdPolicy):
    """Stop a row when the gate's probability is at least `threshold`; no head runs for rows that go on.

    threshold: above 0 and up to 1, one number or one per exit; higher is safer, lower is faster. Needs exits with a
    gate: `offramp.attach(model, at=[...], gate="linear")`, trained by `offramp.fit(model, data, loss="gate")` with
    both answers weighing alike, so that 0.5 is even odds only where half of the rows agree. Raises `BadArgument`.
    Paper: the classifier of CALM (Schuster et al., arXiv 2207.07061).
    """

    needs: ClassVar[frozenset[str]] = frozenset({"agrees"})
    safer: ClassVar[str] = "up"
    threshold: float | tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "threshold", thresholds(self.threshold, 0.0, 1.0, "gate", open_low=True))

    def score(self, seen: Evidence) -> Tensor:
        """Return the gate's probability [rows]."""
        return seen["agrees"]

    def grid(self, classes: int) -> Sequence[float]:
        """Return thresholds from 1 down to 0.01."""
        return [t for t in UNIT_GRID if t > 0]
