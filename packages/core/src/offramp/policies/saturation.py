"""Exit when the hidden state no longer turns."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from offramp._registry import register
from offramp.policy import Evidence, ThresholdPolicy, thresholds


@register("saturation")
@dataclass(frozen=True)
class Saturation(ThresholdPolicy):
    """Stop a row when the cosine of its hidden state with that of the previous exit is at least `threshold`.

    threshold: cosine in [-1, 1], one number or one per exit; higher is safer, lower is faster; never fires at the first
    exit, which has no previous one. Raises `BadArgument` outside. Papers: CALM's hidden-state saturation (arXiv
    2207.07061), MuE (Tang et al., arXiv 2211.11152).
    """

    needs: ClassVar[frozenset[str]] = frozenset({"cosine"})
    safer: ClassVar[str] = "up"
    threshold: float | tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "threshold", thresholds(self.threshold, -1.0, 1.0, "saturation"))

    def score(self, seen: Evidence) -> Tensor:
        """Return the cosine [rows]; NaN, which never stops a row, at the first exit."""
        return seen.every(False) + math.nan if seen.first else seen["cosine"]
