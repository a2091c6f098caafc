"""Exit when the free energy of the logits is low."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from offramp._registry import register
from offramp.policy import Evidence, ExitPolicy, ThresholdPolicy, thresholds

# logits of float16 end at 65504; no energy lies beyond
HIGHEST = 65504.0


@register("energy")
@dataclass(frozen=True)
class Energy(ThresholdPolicy):
    """Stop a row when the energy of its logits, minus the log of the sum of their exponentials, is below `threshold`.

    threshold: in nats, mostly negative, one number or one per exit; lower is safer, higher is faster. It follows the
    scale of the logits, unlike a probability, and stays low for inputs unlike the training data. Raises `BadArgument`.
    Papers: energy-based out-of-distribution detection (Liu et al., NeurIPS 2020); window cascades (ICCV 2023).
    """

    needs: ClassVar[frozenset[str]] = frozenset({"energy"})
    safer: ClassVar[str] = "down"
    threshold: float | tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "threshold", thresholds(self.threshold, -HIGHEST, HIGHEST, "energy"))

    def score(self, seen: Evidence) -> Tensor:
        """Return the energy [rows] in nats."""
        return seen["energy"]

    def grid(self, classes: int) -> Sequence[float]:
        """Return energies from -64 to 16 in steps of a quarter: logits of trained classifiers stay within."""
        return [-64 + step / 4 for step in range(4 * 80 + 1)]

    @classmethod
    def example(cls, depths: Sequence[int], classes: int, **options: Any) -> ExitPolicy:
        """Return an instance at -3 unless another threshold is given."""
        return cls(**{"threshold": -3.0, **options})
