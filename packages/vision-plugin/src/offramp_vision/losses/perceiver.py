"""Dynamic Perceiver's objective: labels and the last answer teach the exits, labels the last answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from offramp._registry import create, register
from offramp.errors import BadArgument
from offramp.loss import Loss, Moment, label_losses, weigh


@register("perceiver")
@dataclass(frozen=True)
class PerceiverLoss(Loss):
    """Cross-entropy of the last answer, plus that of each exit mixed with its divergence from the last answer.

    share: of the divergence, from 0 to 1, the rest is labels; temperature: above 0, as in "distill". The sum over
    exits is `weighting`'s mean times their number. targets: LongTensor [rows], -100 is left out. Raises `BadArgument`.
    Paper: Dynamic Perceiver (Han et al., ICCV 2023, arXiv 2306.11248): share 0.5, temperature 1.
    """

    last: ClassVar[bool] = True
    share: float = 0.5
    temperature: float = 1.0
    weighting: str = "uniform"

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise BadArgument(f"perceiver: share must be a share from 0 to 1, not {self.share!r}")
        create(Loss, "distill", temperature=self.temperature)  # refused here, not at the first step
        weigh([torch.zeros(())], self.weighting)

    def each(self, predictions: Sequence[Tensor], final: Tensor, targets: Tensor | None) -> list[Tensor]:
        """Return one loss in nats per exit; no gradient reaches the last answer through it."""
        right = create(Loss, "labels").each(predictions, final, targets)
        alike = create(Loss, "distill", temperature=self.temperature).each(predictions, final, targets)
        return [(1 - self.share) * a + self.share * b for a, b in zip(right, alike, strict=True)]

    def __call__(
        self,
        predictions: Sequence[Tensor],
        final: Tensor,
        targets: Tensor | None = None,
        active: Sequence[int] | None = None,
        exits: int | None = None,
        moment: Moment | None = None,
    ) -> Tensor:
        """Return the sum over exits and last answer."""
        last = label_losses([final], targets, "perceiver")[0]
        early = weigh(self.each(predictions, final, targets), self.weighting) * len(predictions)
        return last + (moment or Moment()).scale * early
