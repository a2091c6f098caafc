"""Exit when the best answer is well ahead of the second best."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from offramp._registry import register
from offramp.policy import Evidence, ThresholdPolicy, thresholds


@register("margin")
@dataclass(frozen=True)
class Margin(ThresholdPolicy):
    """Stop a row when the largest probability exceeds the second largest by at least `threshold`.

    threshold: difference of probabilities in [0, 1], one number or one per exit; higher is safer, lower is faster.
    Raises `BadArgument` outside. Paper: the softmax response of CALM (Schuster et al., arXiv 2207.07061).
    """

    needs: ClassVar[frozenset[str]] = frozenset({"margin"})
    safer: ClassVar[str] = "up"
    threshold: float | tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "threshold", thresholds(self.threshold, 0.0, 1.0, "margin"))

    def score(self, seen: Evidence) -> Tensor:
        """Return top-1 minus top-2 probability [rows]."""
        return seen["margin"]
