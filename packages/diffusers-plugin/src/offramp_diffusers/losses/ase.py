"""Train a denoiser at the depth that its noise level gets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from offramp._registry import register
from offramp.errors import BadArgument
from offramp.loss import Loss, weigh
from offramp.policy import FULL


@register("ase")
@dataclass(frozen=True)
class Ase(Loss):
    """Squared error of the prediction, weighted by the noise level: 1 + tilt * (1 - 2 * level / 1000).

    tilt: 0 weighs every level the same, as the released code does; up to 1 makes clean images count more, which the
    paper speaks of without giving the form; from -1 noise. For `offramp_diffusers.tune.tune`, which runs only the depth
    that is trained. Over exits: each one's distance from the full model. Raises `BadArgument`. Paper: ASE (Moon et al.,
    arXiv 2408.05927).
    """

    tilt: float = 0.0
    weighting: str = "uniform"

    def __post_init__(self) -> None:
        if isinstance(self.tilt, bool) or not isinstance(self.tilt, (int, float)) or not -1 <= self.tilt <= 1:
            raise BadArgument(f"ase: tilt must be a number from -1 to 1, not {self.tilt!r}")
        weigh([torch.zeros(())], self.weighting)  # an unknown weighting is refused here, not at the first step

    def at(self, said: Tensor, wanted: Tensor, level: Tensor) -> Tensor:
        """Return the loss of predictions [rows, ...] at noise levels [rows]."""
        each = (said.float() - wanted.float()).square().flatten(1).mean(1)
        return (each * (1 + self.tilt * (1 - 2 * level.to(each) / FULL))).mean()

    def each(self, predictions: Sequence[Tensor], final: Tensor, targets: Tensor | None) -> list[Tensor]:
        """Return one distance from the full model per exit; `targets` are not used."""
        return [functional.mse_loss(p.float(), final.detach().float()) for p in predictions]
