"""A gate per exit that reads four statistics of the head's prediction."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from offramp._registry import register
from offramp.gate import NOTHING, ExitGate

#: in the order of the weights
STATISTICS = ("top1", "entropy", "margin", "sharpened")


@register("jei")
class Jei(ExitGate):
    """Five numbers per exit: weights of top1, entropy, margin and entropy of the sharpened distribution, and a bias.

    Its statistic "jei" is the raw gate g; the policy "jei" and the loss "joint_exit" turn the gates of all exits into
    exit probabilities. Untrained, all exits and the full model are equally likely. Paper: JEI-DNN (ICLR 2024).
    """

    statistic: ClassVar[str] = "jei"
    loss: ClassVar[str] = "joint_exit"
    needs: ClassVar[frozenset[str]] = frozenset(STATISTICS)

    def __init__(self, exits: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(exits, len(STATISTICS)))
        # g = 1 / (exits + 1) everywhere
        self.bias = nn.Parameter(torch.full((exits,), -math.log(exits)))

    @classmethod
    def build(cls, width: int, exits: int) -> Jei:
        """Start with every exit as likely as any other."""
        return cls(exits)

    def log_odds(
        self,
        hidden: Tensor,
        index: int = 0,
        previous: Tensor | None = None,
        stats: Mapping[str, Tensor] = NOTHING,
    ) -> Tensor:
        """Map the statistics of exit `index` to log-odds [...] in float32; no gradient reaches the prediction."""
        seen = torch.stack([stats[name].detach().float() for name in STATISTICS], -1)
        return seen @ self.weight[index].float() + self.bias[index].float()
