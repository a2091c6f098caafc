"""Exit when the prediction has little entropy left."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from offramp._registry import register
from offramp.errors import BadArgument
from offramp.policy import UNIT_GRID, Evidence, ExitPolicy, ThresholdPolicy, thresholds

# 50 nats is the entropy of 5e21 equally likely classes: above it no threshold means anything
HIGHEST_NATS = 50.0


@register("entropy")
@dataclass(frozen=True)
class Entropy(ThresholdPolicy):
    """Stop a row when the entropy of the head's prediction is below `threshold`.

    threshold: in nats, above 0, or with `normalised` a fraction of ln(classes) in ]0, 1]; one number or one per exit;
    lower is safer, higher is faster. Raises `BadArgument` outside. Papers: BranchyNet (2016), DeeBERT (Xin et al.,
    2020); normalised: FastBERT's "speed" (Liu et al., 2020).
    """

    needs: ClassVar[frozenset[str]] = frozenset({"entropy"})
    safer: ClassVar[str] = "down"
    threshold: float | tuple[float, ...]
    normalised: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.normalised, bool):
            raise BadArgument(f"entropy: normalised must be True or False, not {self.normalised!r}")
        high = 1.0 if self.normalised else HIGHEST_NATS
        object.__setattr__(self, "threshold", thresholds(self.threshold, 0.0, high, "entropy", open_low=True))

    def score(self, seen: Evidence) -> Tensor:
        """Return the entropy [rows] in nats, or as a fraction of ln(classes)."""
        return seen["entropy"] / _most(seen.classes) if self.normalised else seen["entropy"]

    def grid(self, classes: int) -> Sequence[float]:
        """Return fractions of ln(classes) from 0.0001 to 1, in the unit of the threshold."""
        scale = 1.0 if self.normalised else _most(classes)
        return [round(1.0 - u, 6) * scale for u in UNIT_GRID if u < 1.0]

    @classmethod
    def example(cls, depths: Sequence[int], classes: int, **options: Any) -> ExitPolicy:
        """Return an instance at half of the largest entropy unless a threshold is given."""
        half = 0.5 if options.get("normalised") else 0.5 * _most(classes)
        return cls(**{"threshold": half, **options})


def _most(classes: int) -> float:
    if classes < 2:
        raise BadArgument(f"entropy: a prediction over {classes} classes has no entropy to compare; give classes >= 2")
    return math.log(classes)
