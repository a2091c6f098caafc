"""Exit when the largest probability is high."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from offramp._registry import register
from offramp.policy import Evidence, ThresholdPolicy, thresholds


@register("confidence")
@dataclass(frozen=True)
class Confidence(ThresholdPolicy):
    """Stop a row when the largest probability of the head's prediction is at least `threshold`.

    threshold: probability in [0, 1], one number or one per exit; higher is safer, lower is faster. Raises `BadArgument`
    outside. Paper: BranchyNet (Teerapittayanon et al., 2016) and MSDNet (Huang et al., 2018) stop on this score.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"top1"})
    safer: ClassVar[str] = "up"
    threshold: float | tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "threshold", thresholds(self.threshold, 0.0, 1.0, "confidence"))

    def score(self, seen: Evidence) -> Tensor:
        """Return the largest probability [rows]."""
        return seen["top1"]
