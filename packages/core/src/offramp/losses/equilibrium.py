"""Train a model with all its exits at once, so that no layer is pulled harder for lying under more of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from offramp._registry import register
from offramp.loss import Loss, Moment, label_losses, weigh


@register("equilibrium")
@dataclass(frozen=True)
class Equilibrium(Loss):
    """Sum of the losses of all exits and of the last layer, their gradients in equilibrium; for fit(backbone=True).

    With n exits (the last layer among them) above exit i, the state there gets (g + n d) / (n + 1): g from its own
    head, d, of unit scale already, from above. So every layer gets a mean over the exits above it, not a sum. Losses
    are those of "labels". weighting: uniform (as in the papers), linear, inverse or sum. Raises `BadArgument`. Papers:
    improved techniques for training adaptive networks (Li et al., ICCV 2019), ElasticBERT, COST-EFF.
    """

    last: ClassVar[bool] = True
    equilibrium: ClassVar[bool] = True
    weighting: str = "uniform"

    def __post_init__(self) -> None:
        weigh([torch.zeros(())], self.weighting)  # an unknown weighting is refused here, not at the first step

    def each(self, predictions: Sequence[Tensor], final: Tensor, targets: Tensor | None) -> list[Tensor]:
        """Return one loss per exit, mean over labelled rows; `final` is not used."""
        return label_losses(predictions, targets, "equilibrium")

    def __call__(
        self,
        predictions: Sequence[Tensor],
        final: Tensor,
        targets: Tensor | None = None,
        active: Sequence[int] | None = None,
        exits: int | None = None,
        moment: Moment | None = None,
    ) -> Tensor:
        """Return the weighted sum over exits and the last layer, the exits at the scale of the moment."""
        scale = (moment or Moment()).scale
        *shallow, deep = self.each([*predictions, final], final, targets)
        return weigh([*(scale * part for part in shallow), deep], self.weighting) * (len(predictions) + 1)
