"""Train exits that predict numbers to say what the full model says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from offramp._registry import register
from offramp.errors import BadArgument
from offramp.loss import Loss, weigh

DISTANCES = ("squared", "huber")


@register("regression")
@dataclass(frozen=True)
class Regression(Loss):
    """Mean over rows and outputs of each head's distance from the full model's prediction; no gradient to the model.

    distance: "squared", or "huber" with `delta`, from which on it grows linearly (robot actions). For true labels that
    are numbers use loss "labels". weighting: uniform, linear, inverse or sum. Raises `BadArgument`. Papers: PABEE
    (NeurIPS 2020) for scores, DeeR-VLA (arXiv 2411.02359) for actions.
    """

    distance: str = "squared"
    delta: float = 1.0
    weighting: str = "uniform"

    def __post_init__(self) -> None:
        if self.distance not in DISTANCES:
            raise BadArgument(f"regression: distance {self.distance!r} is not one of {', '.join(DISTANCES)}")
        if isinstance(self.delta, bool) or not isinstance(self.delta, (int, float)) or not 0 < self.delta < 1e6:
            raise BadArgument(f"regression: delta must be a number above 0, not {self.delta!r}")
        weigh([torch.zeros(())], self.weighting)  # an unknown weighting is refused here, not at the first step

    def each(self, predictions: Sequence[Tensor], final: Tensor, targets: Tensor | None) -> list[Tensor]:
        """Return one distance per exit; `targets` are not used."""
        wanted = final.detach().float()
        if self.distance == "huber":
            return [functional.huber_loss(p.float(), wanted, delta=self.delta) for p in predictions]
        return [functional.mse_loss(p.float(), wanted) for p in predictions]
