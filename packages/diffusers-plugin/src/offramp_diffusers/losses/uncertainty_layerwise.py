"""Train the modules that estimate an exit's error, and the model's exits where they are to be trusted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from offramp._registry import register
from offramp.errors import BadArgument
from offramp.loss import Loss, weigh

FORMS = ("estimate", "target")


@register("uncertainty_layerwise")
@dataclass(frozen=True)
class UncertaintyLayerwise(Loss):
    """Squared distance of the estimate from tanh of the mean absolute error, plus the error where it is trusted.

    estimated: weight of the first part; trusted: of the second, sum over exits of (1 - u) times the exit's squared
    error, which only says something where the model is trained; form: whose u that is, the "estimate" as in the paper,
    or its "target" as in the reproduction, where the estimate cannot lower the loss by saying that all is wrong; plain:
    weight of the squared error itself, which the reproduction adds for that reason. For
    `offramp_diffusers.tune_heads.tune_uncertainty`; over exits: each one's distance from the full model. Raises
    `BadArgument`. Paper: DeeDiff (arXiv 2309.17074).
    """

    estimated: float = 1.0
    trusted: float = 1.0
    form: str = "estimate"
    plain: float = 0.0
    weighting: str = "uniform"

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise BadArgument(f"uncertainty_layerwise: form {self.form!r} is not one of {', '.join(FORMS)}")
        for name in ("estimated", "trusted", "plain"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1e6:
                raise BadArgument(f"uncertainty_layerwise: {name} must be a weight from 0 on, not {value!r}")
        weigh([torch.zeros(())], self.weighting)  # an unknown weighting is refused here, not at the first step

    def estimated_at(self, said: Tensor, wanted: Tensor, estimate: Tensor) -> Tensor:
        """Return the loss of one exit's predictions [rows, ...] whose errors were estimated as [rows]."""
        off = said.float() - wanted.float()
        target = off.detach().abs().flatten(1).mean(1).tanh()
        squared = off.square().flatten(1).mean(1)
        trust = 1 - (target if self.form == "target" else estimate)
        each = self.estimated * (estimate - target).square() + (self.trusted * trust + self.plain) * squared
        return each.mean()

    def each(self, predictions: Sequence[Tensor], final: Tensor, targets: Tensor | None) -> list[Tensor]:
        """Return one distance from the full model per exit; `targets` are not used."""
        return [functional.mse_loss(p.float(), final.detach().float()) for p in predictions]
