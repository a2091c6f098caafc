"""Train the gates of `speculative` heads to tell when their exit says what the full model says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from offramp._registry import register
from offramp.errors import BadArgument
from offramp.head import ask_in_turn, gated
from offramp.loss import Loss, weigh

if TYPE_CHECKING:
    from offramp.attach import Exits


@register("speculative_gate")
@dataclass(frozen=True)
class SpeculativeGateLoss(Loss):
    """Binary cross-entropy of each gate with whether its exit agrees with the full model, in nats, mean over rows.

    Gates are asked exit after exit, as they are live; readout and backbone get no gradient. weighting: uniform, linear,
    inverse or sum. Raises `BadArgument` for heads without gates. Paper: SpecEE (arXiv 2504.08850).
    """

    gate: ClassVar[bool] = True
    frozen: ClassVar[bool] = True
    weighting: str = "uniform"

    def __post_init__(self) -> None:
        weigh([torch.zeros(())], self.weighting)  # an unknown weighting is refused here, not at the first step

    def read(
        self, exits: Exits, hidden: Sequence[Tensor], final: Tensor, targets: Tensor | None, active: Sequence[int]
    ) -> tuple[list[Tensor], Tensor | None, Any]:
        """Return (one gate logit [rows] per exit, whether each exit agrees with the full model [rows, exits])."""
        heads = gated(exits)
        with torch.no_grad():
            answers = [head(h) for head, h in zip(heads, hidden, strict=True)]
            best = final.argmax(-1)
            hits = torch.stack([a.argmax(-1) == best for a in answers], 1)
        return ask_in_turn(heads, [h.detach() for h in hidden], answers[0])[0], hits, None

    def each(self, predictions: Sequence[Tensor], final: Tensor, targets: Tensor | None) -> list[Tensor]:
        """Return one cross-entropy per exit. predictions: K logits [rows]; targets: [rows, K], whether right."""
        if targets is None:
            raise BadArgument("loss 'speculative_gate' needs to know which exits are right: targets [rows, exits]")
        wanted = targets.float().unbind(1)
        return [
            functional.binary_cross_entropy_with_logits(p.float(), t) for p, t in zip(predictions, wanted, strict=True)
        ]
