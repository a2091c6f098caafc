"""Train the gate of a model's exits to say where an exit agrees with the full model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from offramp._registry import register
from offramp.errors import BadArgument
from offramp.loss import Loss, weigh

if TYPE_CHECKING:
    from offramp.attach import Exits


@register("gate")
@dataclass(frozen=True)
class GateLoss(Loss):
    """Binary cross-entropy of the gate's log-odds with "this exit agrees", both answers weighing alike at each exit.

    predictions: K tensors [rows] of log-odds; targets: bool [rows, K], whether each exit's largest class is the
    full model's. Backbone and heads are frozen. weighting: of the exits. Raises `BadArgument`. Paper: CALM (Schuster
    et al., arXiv 2207.07061), whose weighting is uniform.
    """

    gate: ClassVar[bool] = True
    frozen: ClassVar[bool] = True
    shared: ClassVar[bool] = True
    weighting: str = "uniform"

    def __post_init__(self) -> None:
        weigh([torch.zeros(())], self.weighting)  # an unknown weighting is refused here, not at the first step

    def read(
        self, exits: Exits, hidden: Sequence[Tensor], final: Tensor, targets: Tensor | None, active: Sequence[int]
    ) -> tuple[list[Tensor], Tensor | None, Any]:
        """Return (the gate's log-odds [rows] per exit, whether each exit agrees with the full model [rows, exits])."""
        with torch.no_grad():
            best = final.argmax(-1)
            hits = torch.stack([exits[exits.at[i]](hidden[i]).argmax(-1) == best for i in active], 1)
        return [exits.odds(hidden)[:, i] for i in active], hits, None

    def each(self, predictions: Sequence[Tensor], final: Tensor, targets: Tensor | None) -> list[Tensor]:
        """Return one loss in nats per exit; `final` is not used."""
        if targets is None or targets.dim() != 2:
            raise BadArgument(
                'loss "gate" needs targets [rows, exits]; offramp.fit(model, data, loss="gate") makes them'
            )
        return [_balanced(p, agrees) for p, agrees in zip(predictions, targets.unbind(1), strict=True)]


def _balanced(odds: Tensor, agrees: Tensor) -> Tensor:
    """Return the mean over the two answers of their mean losses; where one does not occur, the other's mean."""
    yes = agrees.float()
    share = yes.mean()
    weight = torch.where(agrees.bool(), 1 - share, share)  # each answer's rows together weigh share * (1 - share)
    weight = torch.where(weight.sum() > 0, weight, torch.ones_like(weight))
    each = functional.binary_cross_entropy_with_logits(odds.float(), yes, reduction="none")
    return (each * weight).sum() / weight.sum()
