"""Train heads and a halting gate together, towards a prior over how deep rows go."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from offramp._registry import register
from offramp.errors import BadArgument
from offramp.loss import Loss, Moment, label_losses, labelled, row_losses

PRIORS = ("geometric", "normal")
DIRECTIONS = ("from_prior", "to_prior")


@register("ponder")
@dataclass(frozen=True)
class Ponder(Loss):
    """Each row's loss at every exit and at the full model, weighed by how likely the row stops there, plus a prior.

    With lambda from the gate beside the exits, exit i weighs p_i = lambda_i prod(1 - lambda before) and the full model
    the rest; `beta` weighs the divergence of p and the prior in nats. prior: "geometric", chance `stop` at each exit
    and the rest for the full model, so a mean depth near 1 / stop where exits are many; or "normal", proportional to
    exp(-(i - 1 / stop)^2). divergence: "from_prior", KL(prior, p), which covers the prior (PALBERT's code), or
    "to_prior", KL(p, prior), which may keep to a part of it (PonderNet). Losses are those of "labels". Needs
    `attach(..., gate="lambda")`. Raises `BadArgument`. Papers: PALBERT (arXiv 2204.03276), beta 0.5; PonderNet (arXiv
    2107.05407), beta 0.01.
    """

    beside: ClassVar[str] = "lambda"
    last: ClassVar[bool] = True
    weighting: str = field(default="uniform", init=False)
    beta: float = 0.5
    stop: float = 0.1
    prior: str = "geometric"
    divergence: str = "from_prior"

    def __post_init__(self) -> None:
        for name, low, high in (("beta", -math.ulp(0.0), math.inf), ("stop", 0.0, 1.0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not low < value < high:
                wanted = "a weight from 0 on" if name == "beta" else "a chance between 0 and 1"
                raise BadArgument(f"ponder: {name} must be {wanted}, not {value!r}")
        if self.prior not in PRIORS:
            raise BadArgument(f"ponder: prior {self.prior!r} is not one of {', '.join(PRIORS)}")
        if self.divergence not in DIRECTIONS:
            raise BadArgument(f"ponder: divergence {self.divergence!r} is not one of {', '.join(DIRECTIONS)}")

    def log_prior(self, count: int) -> Tensor:
        """Return the log of the prior over `count` places, the last of which is the full model, float64 [count]."""
        place = torch.arange(1, count + 1, dtype=torch.float64)
        if self.prior == "normal":
            return (-((place - 1 / self.stop) ** 2)).log_softmax(0)
        log = (place - 1) * math.log1p(-self.stop)
        log[:-1] += math.log(self.stop)
        return log

    def each(self, predictions: Sequence[Tensor], final: Tensor, targets: Tensor | None) -> list[Tensor]:
        """Return one loss per exit, mean over labelled rows, not weighed yet; `final` is not used."""
        return label_losses(predictions, targets, "ponder")

    def __call__(
        self,
        predictions: Sequence[Tensor],
        final: Tensor,
        targets: Tensor | None = None,
        active: Sequence[int] | None = None,
        exits: int | None = None,
        moment: Moment | None = None,
    ) -> Tensor:
        """Return the mean over labelled rows; raises `BadArgument` where the moment has no log-odds."""
        moment = moment or Moment()
        if moment.odds is None:
            raise BadArgument(f'loss "ponder" needs the log-odds of gate "{self.beside}"; train through offramp.fit')
        keep = labelled(targets, "ponder")
        go, stay = logsigmoid(moment.odds), logsigmoid(-moment.odds).cumsum(1)
        log_p = torch.cat([go + stay - logsigmoid(-moment.odds), stay[:, -1:]], 1)
        each = torch.stack([row_losses(p, targets) for p in (*predictions, final)], 1)  # type: ignore[arg-type]
        log_prior = self.log_prior(log_p.shape[1]).to(log_p)
        if self.divergence == "from_prior":
            apart = (log_prior.exp() * (log_prior - log_p)).sum(1)
        else:
            apart = (log_p.exp() * (log_p - log_prior)).sum(1)
        value = moment.scale * ((log_p.exp() * each).sum(1) + self.beta * apart)
        return (value * keep).sum() / keep.sum().clamp(min=1)
