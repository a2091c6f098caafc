"""Stop where a trained module says that the prediction from here would be right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from offramp._registry import register
from offramp.policy import Evidence, ThresholdPolicy, thresholds


@register("uncertainty")
@dataclass(frozen=True)
class Uncertainty(ThresholdPolicy):
    """Stop a row at the first exit whose module estimates an error below the threshold.

    threshold: from above 0 to 1, one number or one per exit, in units of tanh of the mean absolute error of the
    predicted noise; lower is safer; the reproduction used 0.05 to 0.08. Needs heads "uncertainty", trained. Rows of one
    batch may leave at different blocks. Raises `BadArgument`. Paper: DeeDiff (arXiv 2309.17074).
    """

    needs: ClassVar[frozenset[str]] = frozenset({"uncertainty"})
    safer: ClassVar[str] = "down"
    threshold: float | tuple[float, ...]

    def __post_init__(self) -> None:
        checked = thresholds(self.threshold, 0.0, 1.0, "uncertainty", open_low=True)
        object.__setattr__(self, "threshold", checked)

    def score(self, seen: Evidence) -> Tensor:
        """Return the estimated error [rows]."""
        return seen["uncertainty"]

    def grid(self, classes: int) -> Sequence[float]:
        """Return thresholds from safest to boldest."""
        return tuple(round(0.005 * i, 3) for i in range(1, 201))
