"""Train exits on the true labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from offramp._registry import register
from offramp.loss import Loss, label_losses, weigh


@register("labels")
@dataclass(frozen=True)
class Labels(Loss):
    """Cross-entropy of each head with the true labels, in nats, mean over labelled rows (0 when there are none).

    targets: LongTensor [rows], -100 for rows to leave out; of floats, [rows] or [rows, outputs], the squared error is
    taken instead, mean over rows and outputs. weighting: uniform, linear, inverse or sum. Raises `BadArgument`
    without targets. Paper: deeply supervised nets (Lee et al., AISTATS 2015), BranchyNet (2016).
    """

    weighting: str = "uniform"

    def __post_init__(self) -> None:
        weigh([torch.zeros(())], self.weighting)  # an unknown weighting is refused here, not at the first step

    def each(self, predictions: Sequence[Tensor], final: Tensor, targets: Tensor | None) -> list[Tensor]:
        """Return one cross-entropy per exit; `final` is not used."""
        return label_losses(predictions, targets, "labels")
