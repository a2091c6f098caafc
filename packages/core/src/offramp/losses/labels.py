"""Train exits on the true labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from offramp._registry import register
from offramp.errors import BadArgument
from offramp.loss import IGNORE, Loss, weigh


@register("labels")
@dataclass(frozen=True)
class Labels(Loss):
    """Cross-entropy of each head with the true labels, in nats, mean over labelled rows (0 when there are none).

    targets: LongTensor [rows], -100 for rows to leave out. weighting: uniform, linear or inverse. Raises `BadArgument`
    without targets. Paper: deeply supervised nets (Lee et al., AISTATS 2015), BranchyNet (2016).
    """

    weighting: str = "uniform"

    def __post_init__(self) -> None:
        weigh([torch.zeros(())], self.weighting)  # an unknown weighting is refused here, not at the first step

    def each(self, predictions: Sequence[Tensor], final: Tensor, targets: Tensor | None) -> list[Tensor]:
        """Return one cross-entropy per exit; `final` is not used."""
        if targets is None:
            raise BadArgument(
                'loss "labels" needs labels, and the data has none; give batches with labels, or use loss="distill", '
                "which learns from the model's own output"
            )
        rows = (targets != IGNORE).sum().clamp(min=1)
        return [
            functional.cross_entropy(p.float(), targets, ignore_index=IGNORE, reduction="sum") / rows
            for p in predictions
        ]
